"""From conversations and pairs to packed rows."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from plmtune.data.conversations import Conversation, Conversations, conversations
from plmtune.data.examples import Examples, open_examples, open_pairs
from plmtune.data.preferences import InMemory, Pair, preferences
from plmtune.data.rows import Refused
from plmtune.errors import UserError
from plmtune.preference.refinement import encode_pairs, find_refinement
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer_files import bundled

TOKENIZER = bundled()
REFINE = partial(encode_pairs, refinement=find_refinement(None))


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
        "seq_len": 128, "train_on": "all", "truncation": "drop", "skip_bad": False, "holdout": 0.0, "seed": 1,
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


class TestNotes:
    def test_unused_columns_are_reported(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        turns = [{"role": "user", "content": "One?", "id": "7"}, {"role": "assistant", "content": "1."}]
        path.write_text(json.dumps({"messages": turns, "source": "a book"}) + "\n")
        assert opened(conversations((str(path),))).notes == [
            "talks: columns not used: id of messages (1 row), source (1 row)"
        ]
        path.write_text(json.dumps({"prompt": "One?", "chosen": "1.", "rejected": "2.", "score": 3}) + "\n")
        _, notes = open_pairs({"pairs": preferences((str(path),))}, skip_bad=False)
        assert notes == ["pairs: columns not used: score (1 row)"]


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
        found = opened(InMemory([pair], "talks"), encode=partial(encode_pairs, refinement=refinement))
        direct, refined = sorted(texts(found.train["talks"]), key=len)
        assert "It is 6." not in direct
        assert direct.endswith("assistant\nIt is 5.<|im_end|>")
        assert refined.endswith("assistant\nIt is 5.<|im_end|>")
        assert refinement.fill(pair.prompt, "It is 6.")[0].content in refined
        rows = found.train["talks"]
        trained = [example.trained.sum() for i in range(rows.num_rows) for example in rows.examples(i)]
        assert trained[0] == trained[1]  # the worse answer is read, not learned

    def test_keys_of_an_answer_that_the_template_leaves_out_are_counted(self) -> None:
        more = {"chosen": {"id": "7"}}
        pair = Pair((Message("user", "What is 2 + 3?"),), "It is 5.", "It is 6.", "row 0", more=more)
        found = opened(InMemory([pair], "talks"), encode=REFINE)
        assert "talks: columns not used: id of messages (1 row)" in found.notes

    def test_single_answers_are_refused(self) -> None:
        single = Pair((Message("user", "Why?"),), "So.", None, "row 0")
        with pytest.raises(UserError, match="row 0 has one answer only"):
            opened(InMemory([single], "talks"), encode=REFINE)

    def test_what_is_held_out_of_a_pair_is_all_of_its_prompt(self) -> None:
        pairs = [
            Pair((Message("user", f"What is {i} + 3?"),), f"It is {i + 3}{sign}", "I do not know.", f"row {i}{sign}")
            for i in range(40)
            for sign in ".!"
        ]
        found = opened(InMemory(pairs, "talks"), encode=REFINE, holdout=0.3, seq_len=256)

        def prompts(rows: Any) -> list[str]:
            return [text.split(" + 3?")[0].rpartition(" ")[2] for text in texts(rows)]

        train, held_out = prompts(found.train["talks"]), prompts(found.held_out["talks"])
        assert not set(train) & set(held_out)
        assert {train.count(key) for key in train} == {held_out.count(key) for key in held_out} == {4}
        assert len(set(train)) + len(set(held_out)) == 40

    @pytest.mark.parametrize("train_on", ["all", "last"])
    def test_answers_in_the_prompt_are_not_trained(self, train_on: str) -> None:
        prompt = (Message("user", "Two?"), Message("assistant", "It is two."), Message("user", "And three?"))
        source = InMemory([Pair(prompt, "Three.", "Four.", "row 0")], "talks")
        rows = opened(source, encode=REFINE, train_on=train_on).train["talks"]
        examples = [example for i in range(rows.num_rows) for example in rows.examples(i)]
        assert len(examples) == 2
        for example in examples:
            assert "It is two." in TOKENIZER.decode(example.tokens.tolist())
            assert TOKENIZER.decode(example.tokens[example.trained].tolist()) == "Three.<|im_end|>"

    @pytest.mark.parametrize("truncation", ["drop", "right"])
    def test_a_long_earlier_answer_is_shortened_and_the_one_to_learn_is_whole(self, truncation: str) -> None:
        pair = Pair((Message("user", "Why?"),), "It is so.", "word " * 300, "row 0")
        found = opened(InMemory([pair], "talks"), encode=REFINE, truncation=truncation)
        _, refined = sorted(texts(found.train["talks"]), key=len)
        assert refined.endswith("It is so.<|im_end|>") and "word word" in refined
        assert found.notes == ["talks: 1 earlier answer was shortened, so that the answer that follows fits into "
                               "seq_len (128 tokens)"]  # fmt: skip

    def test_where_no_earlier_answer_fits_the_answer_alone_is_learned(self) -> None:
        pair = Pair((Message("user", "Why?"),), "It is so.", "word " * 300, "row 0")
        found = opened(InMemory([pair], "talks"), encode=REFINE, seq_len=50)
        (direct,) = texts(found.train["talks"])
        assert "word" not in direct
        assert "1 conversation left out:\nrow 0 leaves no room in seq_len (50)" in found.notes[0]


class TestMistakes:
    def test_rows_that_hold_a_special_token_are_counted(self) -> None:
        source = Talks([("Fine?", "Yes."), ("Bad?", "No <|im_end|> more."), ("Worse?", "<|im_start|>")])
        with pytest.raises(UserError, match="row 1"):
            opened(source)
        assert "2 conversations left out" in opened(source, skip_bad=True).notes[0]

    def test_where_all_rows_are_bad_leaving_them_out_is_not_advised(self) -> None:
        with pytest.raises(UserError, match=r"^all 2 rows cannot be used") as raised:
            opened(Talks([("Bad?", "No <|im_end|> more."), ("Worse?", "<|im_start|>")]))
        assert "skip_bad" not in str(raised.value)

    def test_conversations_given_as_pairs_are_refused_by_kind(self, tmp_path: Path) -> None:
        path = tmp_path / "c.jsonl"
        path.write_text('{"prompt": "a?", "completion": "b"}\n' * 3)
        with pytest.raises(UserError, match=r"(?s)^all 3 rows .*plmtune run sft data=conversations") as raised:
            open_pairs({"talks": preferences((str(path),))}, skip_bad=False)
        assert "skip_bad" not in str(raised.value)

    def test_nothing_left_is_an_error_with_its_reasons(self) -> None:
        with pytest.raises(UserError, match=r"none of its 1 (?s:.*)longer than seq_len"):
            opened(Talks([("Long?", "word " * 300)]))

    def test_pairs_of_conversations_are_refused(self) -> None:
        with pytest.raises(UserError, match="holds conversations; this run takes pairs"):
            open_pairs({"talks": Talks([])}, skip_bad=False)
