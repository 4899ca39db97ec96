"""A run's rounds on disk: for each its prompts, chains with rewards, and pairs; and what was measured between them.

``rounds/01/prompts.jsonl, chains.jsonl, pairs.jsonl`` belong to the first round; ``rounds/00/evaluation`` holds what
the first model says to held-out prompts, ``rounds/01/evaluation`` what it says after round 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plmtune.config.compose import build
from plmtune.config.schema import SelectionConfig
from plmtune.data.order import key_of, permute
from plmtune.data.preferences import Pair, Prompt, preferences, prompts_of
from plmtune.data.rows import REMEDY, Refused
from plmtune.errors import UserError
from plmtune.io import manifest
from plmtune.io.untrusted import load_json
from plmtune.preference.rounds import selection
from plmtune.preference.rounds.chains import CHAINS, Chain, save_chains, save_prompts
from plmtune.preference.rounds.rewards import Reward
from plmtune.preference.rounds.rollout import Rollout
from plmtune.preference.rounds.rules import Rule, find_rules
from plmtune.registry import Component
from plmtune.tokenizers.message import Message
from plmtune.training.distributed import broadcast_from_rank0

EVALUATION = "evaluation"

# Held-out prompts that are answered after each round: enough to see which way rewards go, few beside a round's own.
MOST_EVALUATED = 64


def of(run: Path, number: int) -> Path:
    """The directory of a round."""
    return run / "rounds" / f"{number:02}"


class Rounds:
    """The rounds of one run.

    Args:
        prompts: all prompts; some are held out for evaluation.
        holdout: share of them; of many, `MOST_EVALUATED` or as many as a round takes are answered.
        per_round: prompts a round takes, going on where the last one stopped; 0: all.
        reward: judges answers; None: pairs are chosen by rules alone, and nothing is evaluated.
        rules: that a pair must pass.
        margin: least difference of rewards.
        seed: of the order of prompts.

    Raises:
        UserError: if there are no prompts.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        holdout: float,
        per_round: int,
        reward: Reward | None,
        rules: Sequence[Rule],
        margin: float,
        seed: int,
    ) -> None:
        order = permute(np.arange(len(prompts)), len(prompts), key_of(seed, "prompts")).tolist() if prompts else []
        num_held = min(round(holdout * len(prompts)) or int(holdout > 0), len(prompts) - 1)
        if len(prompts) <= max(num_held, 0):
            raise UserError("There is no prompt to answer. Give other data.")
        self.prompts = [prompts[index] for index in order[num_held:]]
        self.per_round = min(per_round, len(self.prompts)) or len(self.prompts)
        self.held_out = [prompts[index] for index in order[: min(num_held, MOST_EVALUATED, self.per_round)]]
        self.reward, self.rules, self.margin = reward, rules, margin

    def prompts_of(self, number: int) -> list[Prompt]:
        """The prompts of a round, counted from 1."""
        first = (number - 1) * self.per_round
        return [self.prompts[(first + index) % len(self.prompts)] for index in range(self.per_round)]

    def make_pairs(self, run: Path, number: int, rollout: Rollout, tell: Callable[[str], None]) -> bool:
        """Write, judge and choose, unless it is done; False if the run is to stop. Every rank calls it.

        Raises:
            UserError: if no pair was chosen, with the reasons.
        """
        place = of(run, number)
        if broadcast_from_rank0((place / selection.PAIRS).is_file):
            return True
        prompts = self.prompts_of(number)
        broadcast_from_rank0(lambda: save_prompts(place, prompts))
        chains = rollout(place, prompts, number)
        if chains is None:
            return False

        scored, by_reward = self._judged(place, chains), self.reward is not None
        pairs, refused = selection.select(scored, self.rules, margin=self.margin, by_reward=by_reward)
        if not pairs:
            cut = any("generation.max_new_tokens" in reason for reason in refused.counts)
            raise UserError(
                f"round {number}: no pair was chosen from {len(chains):,} chains of answers.\n{refused.describe()}\n"
                + ("A larger generation.max_new_tokens, other" if cut else "Other")
                + " selection.rules, a smaller selection.margin, more generation.turns or a higher "
                f"generation.temperature may give some. The chains are in {place / CHAINS}"
            )
        broadcast_from_rank0(lambda: selection.save_pairs(place / selection.PAIRS, pairs))
        tell(f"round {number}: {len(pairs):,} pairs of {len(chains):,} prompts" + _because(refused))
        return True

    def pairs(self, run: Path, number: int) -> list[Pair]:
        """The pairs of a round that `make_pairs` made."""
        return list(preferences((str(of(run, number) / selection.PAIRS),), shape="strings").pairs())

    def evaluate(
        self, run: Path, number: int, rollout: Rollout, tell: Callable[[str], None]
    ) -> dict[str, float] | None:
        """Direct and refined rewards on held-out prompts after a round (0: before any); None if the run is to stop.

        Empty without a reward, held-out prompts, or answers to them. Every rank calls it.
        """
        if self.reward is None or not self.held_out:
            return {}
        place = of(run, number) / EVALUATION
        found = place / "evaluation.json"
        if not broadcast_from_rank0(found.is_file):
            when = f"after round {number}" if number else "before round 1"
            tell(f"evaluation {when}: {len(self.held_out):,} held-out prompts")
            # Their draws are the same after each round: what differs is the model.
            chains = rollout(place, self.held_out, 0)
            if chains is None:
                return None
            text = json.dumps(selection.evaluate(self._judged(place, chains)), indent=1) + "\n"
            broadcast_from_rank0(lambda: manifest.write_text(found, text))
        measured: dict[str, float] = broadcast_from_rank0(lambda: load_json(found.read_text(encoding="utf-8")))
        if "direct" not in measured:
            tell(f"evaluation: none of {measured['num']:,} held-out prompts could be answered")
            return {}
        return measured

    def _judged(self, place: Path, chains: Sequence[Chain]) -> Sequence[Chain]:
        """The chains with their rewards, kept beside the answers. Every rank calls it."""
        if self.reward is None:
            return chains
        scored = selection.score(chains, self.reward)
        broadcast_from_rank0(lambda: save_chains(place / CHAINS, scored))
        return scored


def _because(refused: Refused) -> str:
    return f"; the others:\n{refused.describe()}" if refused else ""


def check_rounds(rounds: int, reward: Component | None, settings: SelectionConfig, strategy: str) -> None:
    """Refuse a reward or rules that are not there or cannot work here, before the first answer is written.

    Args:
        rounds: how many; without any the reward and the rules are not used, but they must be right.

    Raises:
        UserError: naming the key.
    """
    if rounds and strategy in ("fsdp", "hsdp"):
        raise UserError(f"key rounds: each process writes answers with a whole model, not under {strategy}: use ddp.")
    try:
        find_rules(settings.rules)
    except UserError as error:
        raise UserError(f"key selection.rules: {error}") from error
    judge: Any = build("reward", reward) if reward else None
    if rounds and hasattr(judge, "check"):
        judge.check()


def open_rounds(cfg: Any, sources: Mapping[str, Any]) -> Rounds:
    """The rounds that a config asks for, with the prompts of `sources`, each once.

    Raises:
        UserError: for data without prompts.
    """
    prompts: dict[tuple[Message, ...], Prompt] = {}  # what two sources share is not held out in one and used in another
    for source in sources.values():
        for prompt in prompts_of(source, skip_bad=True):
            held = prompts.setdefault(prompt.messages, prompt)
            if held.gold is None:
                prompts[prompt.messages] = prompt
        if not cfg.chat.skip_bad:
            source.refused.raise_if_any(REMEDY)
    return Rounds(
        list(prompts.values()),
        holdout=cfg.chat.holdout,
        per_round=cfg.prompts_per_round,
        reward=build("reward", cfg.reward) if cfg.reward else None,
        rules=find_rules(cfg.selection.rules),
        margin=cfg.selection.margin,
        seed=cfg.seed,
    )
