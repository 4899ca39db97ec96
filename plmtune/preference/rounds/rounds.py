"""The rounds of a run, and their files: prompts, chains with rewards, pairs, and evaluations between rounds.

``rounds/01/prompts.jsonl, chains.jsonl, pairs.jsonl`` belong to the first round. ``rounds/00/evaluation`` holds the
first model's answers to held-out prompts, ``rounds/01/evaluation`` those after round 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plmtune.config.sections import ChatConfig, SelectionConfig
from plmtune.data.order import key_of, permute
from plmtune.data.preferences import Pair, Prompt, preferences, prompts_of
from plmtune.data.rows import REMEDY
from plmtune.errors import UserError
from plmtune.io import manifest
from plmtune.io.metrics import AFTER_ROUND
from plmtune.io.untrusted import load_json
from plmtune.preference.rounds import selection
from plmtune.preference.rounds.chains import CHAINS, Chain, save_chains, save_prompts
from plmtune.preference.rounds.rewards import Reward
from plmtune.preference.rounds.rollout import Rollout
from plmtune.preference.rounds.rules import Rule, find_rules
from plmtune.training.distributed import broadcast_from_rank0
from plmtune.training.monitor import RunMonitor

EVALUATION = "evaluation"

# Held-out prompts that are answered after each round: enough to see a trend, few beside a round's own prompts.
MAX_EVALUATED = 64


def round_directory(run: Path, number: int) -> Path:
    return run / "rounds" / f"{number:02}"


class Rounds:
    """The rounds of one run.

    Args:
        holdout: share of the prompts that is held out. At most `MAX_EVALUATED`, and no more than a round's prompts, are
            answered.
        per_round: prompts of a round, from where the last round ended; 0: all.
        reward: None: pairs are chosen by rules alone, and nothing is evaluated.
        rules, margin: see `selection.select`.
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
        self.held_out = [prompts[index] for index in order[: min(num_held, MAX_EVALUATED, self.per_round)]]
        self.reward, self.rules, self.margin = reward, rules, margin

    def prompts_of(self, number: int) -> list[Prompt]:
        """The prompts of a round, counted from 1."""
        first = (number - 1) * self.per_round
        return [self.prompts[(first + index) % len(self.prompts)] for index in range(self.per_round)]

    def begin(
        self, run: Path, number: int, rollout: Rollout, monitor: RunMonitor, *, step: int, make_pairs: bool
    ) -> bool:
        """Evaluate the policy, then make the pairs of a round; False if the run is to stop. Every rank calls it."""
        with monitor.paused():
            rewards = self.evaluate(run, number - 1, rollout, monitor.message)
        if rewards:
            monitor.log(step, {AFTER_ROUND: number - 1, **rewards})
        with monitor.paused():
            made = not make_pairs or (rewards is not None and self.make_pairs(run, number, rollout, monitor.message))
        done = rewards is not None and made
        if not done:
            monitor.stopped(step)
        return done

    def make_pairs(self, run: Path, number: int, rollout: Rollout, log: Callable[[str], None]) -> bool:
        """Generate, score and select, unless the pairs exist; False if the run is to stop. Every rank calls it."""
        place = round_directory(run, number)
        if broadcast_from_rank0((place / selection.PAIRS).is_file):
            return True
        prompts = self.prompts_of(number)
        broadcast_from_rank0(lambda: save_prompts(place, prompts))
        chains = rollout(place, prompts, number)
        if chains is None:
            return False

        scored, by_reward = self._score(place, chains), self.reward is not None
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
        log(
            f"round {number}: {len(pairs):,} pairs of {len(chains):,} prompts"
            + (f"; the others:\n{refused.describe()}" if refused else "")
        )
        return True

    def pairs(self, run: Path, number: int) -> list[Pair]:
        """The pairs of a round that `make_pairs` made."""
        return list(preferences((str(round_directory(run, number) / selection.PAIRS),), shape="strings").pairs())

    def evaluate(self, run: Path, number: int, rollout: Rollout, log: Callable[[str], None]) -> dict[str, float] | None:
        """Direct and refined rewards on held-out prompts after a round (0: before any); None if the run is to stop.

        Empty without a reward, held-out prompts, or complete answers. Every rank calls it.
        """
        if self.reward is None or not self.held_out:
            return {}
        place = round_directory(run, number) / EVALUATION
        found = place / "evaluation.json"
        if not broadcast_from_rank0(found.is_file):
            when = f"after round {number}" if number else "before round 1"
            log(f"evaluation {when}: {len(self.held_out):,} held-out prompts")
            # Number 0: the samples' seeds are equal after each round.
            chains = rollout(place, self.held_out, 0)
            if chains is None:
                return None
            text = json.dumps(selection.evaluate(self._score(place, chains)), indent=1) + "\n"
            broadcast_from_rank0(lambda: manifest.write_text(found, text))
        measured: dict[str, float] = broadcast_from_rank0(lambda: load_json(found.read_text(encoding="utf-8")))
        if "direct" not in measured:
            log(f"evaluation: none of {measured['num']:,} held-out prompts could be answered")
            return {}
        log(
            f"after round {number}: reward of direct answers {measured['direct']:.4f}, "
            f"of refined {measured['refined']:.4f}"
        )
        return measured

    def _score(self, place: Path, chains: Sequence[Chain]) -> Sequence[Chain]:
        """The chains with their rewards, which are saved with the answers. Every rank calls it."""
        if self.reward is None:
            return chains
        scored = selection.score(chains, self.reward)
        broadcast_from_rank0(lambda: save_chains(place / CHAINS, scored))
        return scored


def check_rounds(rounds: int, reward: Any, settings: SelectionConfig, strategy: str) -> None:
    """Check the strategy, rules and reward of a run; without rounds, rules are checked and not used."""
    if rounds and strategy not in ("none", "ddp"):
        raise UserError(f"key rounds: each process generates with a whole model, not under {strategy}: use ddp.")
    try:
        find_rules(settings.rules)
    except UserError as error:
        raise UserError(f"key selection.rules: {error}") from error
    if rounds and hasattr(reward, "check"):
        reward.check()


def open_rounds(
    sources: Mapping[str, Any],
    chat: ChatConfig,
    settings: SelectionConfig,
    reward: Reward | None,
    *,
    per_round: int,
    seed: int,
) -> tuple[Rounds, list[str]]:
    """The rounds on the prompts of `sources`, each prompt once; and notes on columns that are not read."""
    prompts = prompts_of(sources.values())  # a prompt of two sources must not be both held out and used
    for source in sources.values():
        if not chat.skip_bad:
            source.refused.raise_if_any(REMEDY)
    rounds = Rounds(
        prompts,
        holdout=chat.holdout,
        per_round=per_round,
        reward=reward,
        rules=find_rules(settings.rules),
        margin=settings.margin,
        seed=seed,
    )
    unused = {name: source.unused.describe() for name, source in sources.items() if source.unused}
    return rounds, [f"{name}: {text}; rules and the reward see them" for name, text in unused.items()]
