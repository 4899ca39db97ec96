"""From chains of answers to pairs: which answer is preferred to which, and why other prompts gave no pair."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plmtune.data.pairs import Pair
from plmtune.data.parts import OPENING
from plmtune.data.rows import Refused
from plmtune.errors import UserError
from plmtune.io.atomic import atomic_write
from plmtune.io.provenance import num_cores
from plmtune.preference.rounds.chains import Chain, Turn
from plmtune.preference.rounds.rewards import Reward
from plmtune.preference.rounds.rollout import POLL_SECONDS
from plmtune.preference.rounds.rules import Rule, tests_pass
from plmtune.training import distributed

PAIRS = "pairs.jsonl"


def score(chains: Sequence[Chain], reward: Reward) -> list[Chain]:
    """Give each answer its reward. Every process calls it with the same chains, and judges its share of them."""

    def judge(share: Sequence[Chain]) -> list[list[float]]:
        rewards = iter(reward.score([(chain, turn.text) for chain in share for turn in chain.answers]))
        return [[float(next(rewards)) for _ in chain.answers] for chain in share]

    return [
        replace(chain, answers=tuple(replace(turn, reward=r) for turn, r in zip(chain.answers, rewards, strict=True)))
        for chain, rewards in zip(chains, _shared(chains, judge), strict=True)
    ]


def select(
    chains: Sequence[Chain], rules: Sequence[Rule], *, margin: float = 0.0, by_reward: bool
) -> tuple[list[Pair], Refused]:
    """Choose one pair a chain, or none.

    ARIES (arXiv 2502.05605) knows both ways: a reward model's best answer against its worst, or, without one, the
    last refinement against the first answer. Every process calls it with the same chains, and tries the rules, which
    may run code, on its share of them.

    Args:
        rules: each can refuse a pair.
        margin: pairs whose rewards differ by no more are left out.
        by_reward: whether the answers' rewards decide.

    Returns:
        The pairs, and which prompts gave none, by reason.
    """
    pairs, refused = [], Refused()

    def choose(share: Sequence[Chain]) -> list[tuple[int, int] | str]:
        one = partial(_choose, rules=rules, margin=margin, by_reward=by_reward)
        if tests_pass not in rules:
            return list(map(one, share))
        with ThreadPoolExecutor(num_cores()) as pool:  # programs run side by side
            return list(pool.map(one, share))

    choices = _shared(chains, choose)
    for chain, found in zip(chains, choices, strict=True):
        if isinstance(found, str):
            refused.add(chain.place, found)
        else:
            chosen, rejected = (chain.answers[index].text for index in found)
            pairs.append(Pair(chain.prompt, chosen, rejected, chain.place, chain.extra))
    return pairs, refused


def _shared(chains: Sequence[Chain], work: Callable[[Sequence[Chain]], list[Any]]) -> list[Any]:
    """What `work` gives for each chain, something of JSON; each process does its share.

    Raises:
        UserError: on every process, if `work` raises it on one.
    """
    num = distributed.world_size()
    if num == 1:
        return work(chains)
    share = chains[distributed.rank() :: num]
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def do() -> tuple[list[Any], str]:
        if device is not None:
            torch.cuda.set_device(device)  # a thread begins on the first
        try:
            return work(share), ""
        except UserError as error:
            return [], str(error)

    # Meanwhile this thread keeps in touch: an exchange that waited for the slowest process would run out of time.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(do)
        while distributed.any_rank(not future.done()):
            wait([future], POLL_SECONDS)
    parts = [json.loads(text) for text in distributed.gather_texts(json.dumps(future.result()))]
    for _, failure in parts:
        if failure:
            raise UserError(failure)
    return [parts[index % num][0][index // num] for index in range(len(chains))]


def _choose(chain: Chain, rules: Sequence[Rule], margin: float, by_reward: bool) -> tuple[int, int] | str:
    """Which answers are chosen and rejected, or why none are."""
    if len(chain.answers) < 2:
        return chain.short or "has fewer than two answers"
    best, worst = len(chain.answers) - 1, 0
    if by_reward:
        # Of equally good answers the later, of equally bad the earlier: what refinement should lead to.
        best = max(reversed(range(len(chain.answers))), key=lambda index: _reward(chain.answers[index]))
        worst = min(range(len(chain.answers)), key=lambda index: _reward(chain.answers[index]))
    chosen, rejected = chain.answers[best], chain.answers[worst]
    if chosen.text.strip() == rejected.text.strip():
        return "has a chosen answer that equals the rejected one"
    if by_reward and _reward(chosen) - _reward(rejected) <= margin:
        return f"has answers whose rewards differ by no more than {margin:g}"
    if not chosen.text.strip() or not rejected.text.strip():
        return "has an empty answer"  # which no pair may have, whatever the rules
    for rule in rules:
        reason = rule(chain, chosen, rejected)
        if reason:
            return reason
    return best, worst


def _reward(turn: Turn) -> float:
    assert turn.reward is not None
    return turn.reward


def evaluate(chains: Iterable[Chain]) -> dict[str, float]:
    """Mean rewards: "direct" of first answers and "refined" of last, "turn/1", "turn/2", ...

    Only chains with the most answers count, so that all means are of the same prompts: "answered" of "num".
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
    """Write pairs as JSONL that a person can read, and the data `preferences` too, in one step."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for pair in pairs:
            prompt = [message.to_row() for message in pair.prompt]
            extra = {key: value for key, value in pair.extra.items() if key not in OPENING}
            row = {**extra, "prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
