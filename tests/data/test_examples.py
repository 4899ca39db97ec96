"""From conversations and pairs to packed rows."""

from collections.abc import Iterator
from typing import Any

import pytest

from plmtune.data.chat_template import find_template
from plmtune.data.conversations import Conversation, Conversations
from plmtune.data.examples import Examples, open_examples, open_pairs
from plmtune.data.preferences import InMemory, Pair
from plmtune.data.refinement import find_refinement
from plmtune.data.rows import Message, Refused
from plmtune.data.tokenizers import bundled
from plmtune.errors import UserError

TOKENIZER = bundled()


class Talks(Conversations):
    """Conversations in memory: (question, answer)."""

    name = "talks"

    def __init__(self, turns: list[tuple[str, str]]) -> None:
        self.turns, self.refused = turns, Refused()

    def conversations(self, skip_bad: bool = False) -> Iterator[Conversation]:
        for index, (question, answer) in enumerate(self.turns):
            yield Conversation((Message("user", question), Message("assistant", answer)), f"row {index}", {})

    def fingerprint(self) -> str:
        return "x"

    def describe(self) -> str:
        return "talks"


def opened(source: Any, **options: Any) -> Examples:
    settings: dict[str, Any] = {
        "seq_len": 128, "train_on": "all", "too_long": "drop", "skip_bad": False, "holdout": 0.0, "seed": 1,
    }  # fmt: skip
    return open_examples({"talks": source}, find_template(None, TOKENIZER), **{**settings, **options})


def texts(rows: Any) -> list[str]:
    return [TOKENIZER.decode(example.tokens.tolist()) for i in range(rows.num_rows) for example in rows.examples(i)]


class TestHoldout:
    def test_equal_conversations_stay_on_one_side(self) -> None:
        turns = [(f"Number {i % 40}?", f"It is {i % 40}.") for i in range(200)]
        found = opened(Talks(turns), holdout=0.3)
        train, held_out = set(texts(found.train["talks"])), set(texts(found.held_out["talks"]))
        assert not train & held_out
        assert len(train | held_out) == 40
        assert 5 <= len(held_out) <= 20

    def test_the_choice_does_not_depend_on_order_or_seed(self) -> None:
        turns = [(f"Number {i}?", f"It is {i}.") for i in range(60)]
        one, other = opened(Talks(turns), holdout=0.3), opened(Talks(turns[::-1]), holdout=0.3, seed=7)
        assert set(texts(one.held_out["talks"])) == set(texts(other.held_out["talks"]))


class TestFingerprints:
    def test_they_follow_what_is_trained(self) -> None:
        turns = [("One?", "1."), ("Two?", "2.")]
        same = {opened(Talks(turns)).fingerprints["talks"] for _ in range(2)}
        assert len(same) == 1
        assert opened(Talks([("One?", "1."), ("Two?", "3.")])).fingerprints["talks"] not in same
        assert opened(Talks(turns[::-1])).fingerprints["talks"] not in same


class TestRefinement:
    def test_each_pair_gives_the_answer_and_the_improved_answer(self) -> None:
        pair = Pair((Message("user", "What is 2 + 3?"),), "It is 5.", "It is 6.", "row 0")
        refinement = find_refinement(None)
        found = opened(InMemory([pair], "talks"), refinement=refinement)
        direct, refined = sorted(texts(found.train["talks"]), key=len)
        assert "It is 6." not in direct
        assert direct.endswith("assistant\nIt is 5.<|im_end|>\n")
        assert refined.endswith("assistant\nIt is 5.<|im_end|>\n")
        assert refinement.fill(pair.prompt, "It is 6.")[0].content in refined
        rows = found.train["talks"]
        trained = [example.trained.sum() for i in range(rows.num_rows) for example in rows.examples(i)]
        assert trained[0] == trained[1]  # the worse answer is read, not learned

    def test_single_answers_are_refused(self) -> None:
        single = Pair((Message("user", "Why?"),), "So.", None, "row 0")
        with pytest.raises(UserError, match="row 0 has one answer only"):
            opened(InMemory([single], "talks"), refinement=find_refinement(None))


class TestMistakes:
    def test_rows_that_hold_a_special_token_are_counted(self) -> None:
        source = Talks([("Fine?", "Yes."), ("Bad?", "No <|im_end|> more."), ("Worse?", "<|im_start|>")])
        with pytest.raises(UserError, match="row 1"):
            opened(source)
        assert "2 conversations left out" in opened(source, skip_bad=True).notes[0]

    def test_nothing_left_is_an_error_with_its_reasons(self) -> None:
        with pytest.raises(UserError, match=r"none of its 1 (?s:.*)longer than seq_len"):
            opened(Talks([("Long?", "word " * 300)]))

    def test_pairs_of_conversations_are_refused(self) -> None:
        with pytest.raises(UserError, match="holds conversations; this run takes pairs"):
            open_pairs({"talks": Talks([])}, skip_bad=False)
