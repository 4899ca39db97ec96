"""Arranging texts with common prefixes: nothing is lost, a prefix is common to its rows, the order is reproducible."""

import random
from itertools import groupby

import numpy as np
import pytest

from plmtune.evaluation.prefixes import Batch, Text, plan


def texts(seed: int) -> list[Text]:
    """Distinct texts in lexical order: some hundred questions behind one of three beginnings."""
    choose = random.Random(seed)
    begins = [[choose.randrange(9) for _ in range(length)] for length in (0, 40, 70)]
    found = sorted(
        {
            tuple(choose.choice(begins) + [choose.randrange(9) for _ in range(choose.randrange(1, 30))])
            for _ in range(200)
        }
    )
    return [
        Text(np.array(ids), (number,), max(0, len(ids) - choose.randrange(1, 6))) for number, ids in enumerate(found)
    ]


def arranged(seed: int, budget: int = 300) -> list[Batch]:
    return plan(texts(seed), token_budget=budget, token_cost=384, forward_cost=50)


def described(batches: list[Batch]) -> list[object]:
    return [(batch.prefix.tolist(), [[text.items for text in row] for row in batch.rows]) for batch in batches]


@pytest.mark.parametrize("seed", range(5))
class TestPlan:
    def test_each_text_lies_in_one_row(self, seed: int) -> None:
        placed = [text.items for batch in arranged(seed) for row in batch.rows for text in row]
        assert sorted(placed) == [text.items for text in texts(seed)]

    def test_a_stem_begins_all_texts_of_its_rows_and_predicts_for_none(self, seed: int) -> None:
        batches = arranged(seed)
        assert any(batch.prefix.size for batch in batches)
        for batch in batches:
            for text in (text for row in batch.rows for text in row):
                assert batch.prefix.tolist() == text.tokens[: batch.prefix.size].tolist()
                assert batch.prefix.size <= text.fixed

    def test_batches_of_one_stem_follow_each_other(self, seed: int) -> None:
        runs = [prefix for prefix, _ in groupby(arranged(seed, budget=60), key=lambda batch: batch.prefix.tobytes())]
        assert len(runs) == len(set(runs))

    def test_equal_texts_make_equal_batches(self, seed: int) -> None:
        assert described(arranged(seed)) == described(arranged(seed))

    def test_a_smaller_budget_makes_more_batches(self, seed: int) -> None:
        assert len(arranged(seed, budget=60)) > len(arranged(seed, budget=3000))


class TestNothing:
    def test_no_texts_make_no_batches(self) -> None:
        assert plan([], token_budget=10, token_cost=384, forward_cost=50) == []
