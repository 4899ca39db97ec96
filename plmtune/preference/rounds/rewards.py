"""Rewards: scores of answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from plmtune.errors import UserError
from plmtune.models import reward
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.preference.rounds.chains import Chain
from plmtune.preference.rounds.programs import program, tests_of
from plmtune.preference.rounds.rules import number_of
from plmtune.ranges import AT_LEAST_1, Range, check
from plmtune.registry import register
from plmtune.sandbox import run_all, with_calls
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.message import BadRow
from plmtune.tokenizers.tokenizer_files import load_tokenizer

Item = tuple[Chain, str]  # a prompt, and an answer to it

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")


class Reward(Protocol):
    """Scores answers; higher is better. Raises UserError, which names the first prompt that it cannot score."""

    def score(self, items: Sequence[Item]) -> list[float]: ...


@register("reward", "final_number")
class FinalNumber:
    """1 where the number after ``####`` is the known answer's, else 0 (GSM8K, arXiv 2110.14168)."""

    def score(self, items: Sequence[Item]) -> list[float]:
        for chain, _ in items:
            if number_of(chain.gold or "") is None:
                lacks = "has no known answer that ends in #### and a number"
                raise UserError(f"reward=final_number: {chain.place} {lacks}.")
        return [float(number_of(text) == number_of(chain.gold or "")) for chain, text in items]


@register("reward", "overlap")
class Overlap:
    """F1 of the words of an answer and the known one, as in SQuAD (arXiv 1606.05250)."""

    def score(self, items: Sequence[Item]) -> list[float]:
        for chain, _ in items:
            if not chain.gold:
                raise UserError(f"reward=overlap: {chain.place} has no known answer to compare with.")
        return [overlap(text, chain.gold or "") for chain, text in items]


def overlap(text: str, gold: str) -> float:
    """F1 of the words of two texts: 2 * common / (words of one + words of the other)."""
    ours, theirs = (Counter(_WORD.findall(each.lower())) for each in (text, gold))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0


@register("reward", "tests_pass")
class TestsPass:
    """1 where the answer's code passes the tests of its row, in a sandbox, else 0."""

    def __init__(self, *, seconds: float = 5.0) -> None:
        """Set the wall-clock limit of one answer's tests."""
        check(Range(above=0, most=86_400), seconds=seconds)
        self.seconds = seconds

    def score(self, items: Sequence[Item]) -> list[float]:
        work = []
        for chain, text in items:
            tests = tests_of(chain)
            if tests is None:
                raise UserError(f"reward=tests_pass: {chain.place} has no tests (keys test and entry_point, or tests).")
            if (never := with_calls(tests.code).never) is not None:
                raise UserError(f"reward=tests_pass: {chain.place} has tests that never run: {never}. Call them.")
            work.append(program(text, tests))
        return [float(result.passed) for result in run_all(work, seconds=self.seconds)]


@register("reward", "reward_model")
class RewardModel:
    """The score of a model that `loss=bradley_terry` trained. It is loaded for each scoring and freed afterwards."""

    def __init__(self, path: str = "", *, batch_size: int = 16, template: str | None = None) -> None:
        """Name the model.

        Args:
            path: a run, a checkpoint or a model directory, with its tokenizer.
            batch_size: texts a forward.
            template: chat template; None: the tokenizer's own.
        """
        if not path:
            raise ValueError("path is empty: name a model that loss=bradley_terry trained, reward.path=runs/...")
        check(AT_LEAST_1, batch_size=batch_size)
        self.path, self.batch_size, self.template = path, batch_size, template

    def check(self) -> None:
        """Check that the model exists, before answers are generated."""
        checkpoint_directory(self.path, weights=False)

    def score(self, items: Sequence[Item]) -> list[float]:
        """Score answers; one that the chat template refuses, for a special token in its text, counts as empty."""
        directory = checkpoint_directory(self.path)
        template = find_template(self.template, load_tokenizer(directory))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = reward.load_reward_model(directory, device)
        sequences = []
        for chain, text in items:
            try:
                answer = template.encode_answer(text)
            except BadRow:
                answer = template.encode_answer("")
            ids = np.concatenate([template.encode_prompt(chain.prompt), answer])
            if len(ids) > model.max_seq_len:
                raise UserError(
                    f"reward=reward_model: {chain.place} with an answer has {len(ids):,} tokens, "
                    f"and {self.path} reads {model.max_seq_len:,}. Generate shorter answers, or take another model."
                )
            sequences.append(ids)
        return reward.score(model, sequences, batch_size=self.batch_size)
