"""Selection of pairs: the preferred and the rejected answer of each chain, or why it gives no pair."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plmtune.data.messages import OPENING
from plmtune.data.preferences import Pair
from plmtune.data.rows import Refused
from plmtune.errors import UserError
from plmtune.io.provenance import num_cores
from plmtune.preference.rounds.chains import Chain, Turn, save_rows
from plmtune.preference.rounds.rewards import Reward
from plmtune.preference.rounds.rollout import POLL_SECONDS
from plmtune.preference.rounds.rules import Rule, tests_pass
from plmtune.training import distributed

PAIRS = "pairs.jsonl"


def score(chains: Sequence[Chain], reward: Reward) -> list[Chain]:
    """Give each answer its reward. Every process calls it with the same chains, and scores its share."""

    def score_share(share: Sequence[Chain]) -> list[list[float]]:
        rewards = iter(reward.score([(chain, turn.text) for chain in share for turn in chain.answers]))
        return [[float(next(rewards)) for _ in chain.answers] for chain in share]

    return [
        replace(chain, answers=tuple(replace(turn, reward=r) for turn, r in zip(chain.answers, rewards, strict=True)))
        for chain, rewards in zip(chains, _share_out(chains, score_share), strict=True)
    ]


def select(
    chains: Sequence[Chain], rules: Sequence[Rule], *, margin: float = 0.0, by_reward: bool
) -> tuple[list[Pair], Refused]:
    """Choose one pair a chain, or none.

    ARIES (arXiv 2502.05605) has both ways: a reward model's best answer against its worst, or, without a reward, the
    last refinement against the first answer. Every process calls it with the same chains, and applies the rules, which
    may run code, to its share.

    Args:
        rules: each can refuse a pair.
        margin: a pair's rewards must differ by more.
        by_reward: whether the answers' rewards decide.

    Returns:
        The pairs, and the prompts without a pair, by reason.
    """
    pairs, refused = [], Refused()

    def choose(share: Sequence[Chain]) -> list[tuple[int, int] | str]:
        one = partial(_choose, rules=rules, margin=margin, by_reward=by_reward)
        with ThreadPoolExecutor(num_cores() if tests_pass in rules else 1) as pool:  # programs run in parallel
            return list(pool.map(one, share))

    for chain, found in zip(chains, _share_out(chains, choose), strict=True):
        if isinstance(found, str):
            refused.add(chain.place, found)
        else:
            chosen, rejected = (chain.answers[index].text for index in found)
            pairs.append(Pair(chain.prompt, chosen, rejected, chain.place, chain.extra))
    return pairs, refused


def _share_out(chains: Sequence[Chain], work: Callable[[Sequence[Chain]], list[Any]]) -> list[Any]:
    """The result of `work` for each chain, as JSON; each process works on its share, and all raise one's UserError."""
    num = distributed.world_size()
    if num == 1:
        return work(chains)
    share = chains[distributed.rank() :: num]
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def do() -> tuple[list[Any], str]:
        if device is not None:
            torch.cuda.set_device(device)  # a new thread starts on device 0
        try:
            return work(share), ""
        except UserError as error:
            return [], str(error)

    # This thread keeps exchanging: a single exchange that waits for the slowest process would time out.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(do)
        while distributed.any_rank(not future.done()):
            wait([future], POLL_SECONDS)
    parts = [json.loads(text) for text in distributed.gather_texts(json.dumps(future.result()))]
    if failures := [failure for _, failure in parts if failure]:
        raise UserError(failures[0])
    return [parts[index % num][0][index // num] for index in range(len(chains))]


def _choose(chain: Chain, rules: Sequence[Rule], margin: float, by_reward: bool) -> tuple[int, int] | str:
    """The indices of the chosen and the rejected answer, or why there is no pair."""
    if len(chain.answers) < 2:
        return chain.short or "has fewer than two answers"
    best, worst = len(chain.answers) - 1, 0
    if by_reward:
        # Of equally good answers the later one, of equally bad ones the earlier: refinement should improve answers.
        best = max(reversed(range(len(chain.answers))), key=lambda index: _reward(chain.answers[index]))
        worst = min(range(len(chain.answers)), key=lambda index: _reward(chain.answers[index]))
    chosen, rejected = chain.answers[best], chain.answers[worst]
    if chosen.text.strip() == rejected.text.strip():
        return "has a chosen answer that equals the rejected one"
    if by_reward and _reward(chosen) - _reward(rejected) <= margin:
        return f"has answers whose rewards differ by no more than {margin:g}"
    if not chosen.text.strip() or not rejected.text.strip():
        return "has an empty answer"  # refused under any rules
    return next(filter(None, (rule(chain, chosen, rejected) for rule in rules)), (best, worst))


def _reward(turn: Turn) -> float:
    assert turn.reward is not None
    return turn.reward


def evaluate(chains: Iterable[Chain]) -> dict[str, float]:
    """Mean rewards: "direct" of first answers and "refined" of last, "turn/1", "turn/2", ...

    Only chains with the most answers count, so that all means are over the same prompts: "answered" of "num".
    """
    scored = [[_reward(turn) for turn in chain.answers] for chain in chains]
    longest = max(map(len, scored), default=0)
    whole = [rewards for rewards in scored if len(rewards) == longest]
    if not longest:
        return {"num": len(scored), "answered": 0}
    means = [sum(column) / len(whole) for column in zip(*whole, strict=True)]
    turns = {f"turn/{number}": mean for number, mean in enumerate(means, start=1)}
    return {"direct": means[0], "refined": means[-1], **turns, "num": len(scored), "answered": len(whole)}


def save_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as readable JSONL, which the data `preferences` reads."""
    rows = (
        {key: value for key, value in pair.extra.items() if key not in OPENING}
        | {"prompt": [message.to_row() for message in pair.prompt], "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in pairs
    )
    save_rows(path, rows)
