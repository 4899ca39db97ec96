"""From chains of answers to pairs: which answer is preferred to which, and why other prompts gave no pair."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from plmtune.atomic import replacing
from plmtune.data.preferences import Pair
from plmtune.data.rows import Refused
from plmtune.rounds.chains import Chain, Turn
from plmtune.rounds.rewards import Reward
from plmtune.rounds.rules import Rule

PAIRS = "pairs.jsonl"


def score(chains: Sequence[Chain], reward: Reward) -> list[Chain]:
    """Give each answer its reward."""
    rewards = iter(reward.score([(chain, turn.text) for chain in chains for turn in chain.answers]))
    return [
        replace(chain, answers=tuple(replace(turn, reward=float(next(rewards))) for turn in chain.answers))
        for chain in chains
    ]


def select(
    chains: Iterable[Chain], rules: Sequence[Rule], *, margin: float = 0.0, by_reward: bool
) -> tuple[list[Pair], Refused]:
    """Choose one pair a chain, or none.

    ARIES (arXiv 2502.05605) knows both ways: a reward model's best answer against its worst, or, without one, the
    last refinement against the first answer.

    Args:
        rules: each can refuse a pair.
        margin: pairs whose rewards differ by no more are left out.
        by_reward: whether the answers' rewards decide.

    Returns:
        The pairs, and which prompts gave none, by reason.
    """
    pairs, refused = [], Refused()
    for chain in chains:
        found = _choose(chain, rules, margin, by_reward)
        if isinstance(found, str):
            refused.add(chain.place, found)
        else:
            pairs.append(found)
    return pairs, refused


def _choose(chain: Chain, rules: Sequence[Rule], margin: float, by_reward: bool) -> Pair | str:
    if len(chain.answers) < 2:
        return chain.short or "has fewer than two answers"
    chosen, rejected = chain.answers[-1], chain.answers[0]
    if by_reward:
        # Of equally good answers the later, of equally bad the earlier: what refinement should lead to.
        chosen = max(reversed(chain.answers), key=_reward)
        rejected = min(chain.answers, key=_reward)
    if chosen.text.strip() == rejected.text.strip():
        return "has a chosen answer that equals the rejected one"
    if by_reward and _reward(chosen) - _reward(rejected) <= margin:
        return f"has answers whose rewards differ by no more than {margin:g}"
    for rule in rules:
        reason = rule(chain, chosen, rejected)
        if reason:
            return reason
    return Pair(chain.prompt, chosen.text, rejected.text, chain.place, chain.extra)


def _reward(turn: Turn) -> float:
    assert turn.reward is not None
    return turn.reward


def evaluate(chains: Iterable[Chain]) -> dict[str, float]:
    """Mean rewards: "direct" of first answers and "refined" of last, "turn/1", "turn/2", ..., and "num" of chains.

    Only chains with the most answers count, so that all means are of the same prompts.
    """
    scored = [[_reward(turn) for turn in chain.answers] for chain in chains]
    longest = max(map(len, scored), default=0)
    whole = [rewards for rewards in scored if len(rewards) == longest]
    if not longest:
        return {"num": 0}
    means = [sum(column) / len(whole) for column in zip(*whole, strict=True)]
    turns = {f"turn/{number}": mean for number, mean in enumerate(means, start=1)}
    return {"direct": means[0], "refined": means[-1], **turns, "num": len(whole)}


def save_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as JSONL that a person can read, and the data `preferences` too, in one step."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for pair in pairs:
            prompt = [asdict(message) for message in pair.prompt]
            row = {**pair.extra, "prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
