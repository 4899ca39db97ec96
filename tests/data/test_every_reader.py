"""Every reader and shape of rows: what is not known, or null, is honoured, refused by its name, or counted."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmtune.data.conversations import Keys, conversation_of, conversations, detect
from plmtune.data.messages import COMPLETIONS, LABELS, MESSAGES, OPENING, PROMPTS
from plmtune.data.preferences import pair_of, preferences
from plmtune.data.sources import is_something
from plmtune.data.text_files import files
from plmtune.tokenizers.chat_template import ChatTemplate, find_template
from plmtune.tokenizers.message import BadRow, Unused
from plmtune.tokenizers.tokenizer_files import bundled

ASK, SAY = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
NO = {"role": "assistant", "content": "You."}
LONG = [{"role": "system", "content": "Be kind."}, ASK, SAY, {"role": "user", "content": "Sure?"}, NO]
GPT = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
HH = "\n\nHuman: Who?\n\nAssistant: "
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "OpenAI's messages": {"messages": LONG},
    "conversation": {"conversation": [ASK, SAY]},
    "ShareGPT": {"conversations": GPT, "system": "Be kind."},
    "ShareGPT with tools": {"conversations": [{"from": "system", "value": "Be kind."}, *GPT]},
    "Alpaca": {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Ho"]], "system": "Be kind."},
    "Dolly": {"instruction": "Add.", "context": "1 2", "response": "3"},
    "prompt and completion": {"prompt": "Who?", "completion": "Me."},
    "prompt and response": {"prompt": "Who?", "response": "Me.", "system_prompt": "Be kind."},
    "question and answer": {"question": "Who?", "answer": "Me.", "context": "Here."},
    "instruction and output": {"instruction": "Who?", "output": "Me."},
    "input and output": {"input": "Who?", "output": "Me."},
    "query and answer": {"query": "Who?", "answer": "Me."},
    "lists of messages": {"prompt": LONG[:2], "completion": [SAY]},
    "parts of a content": {"messages": [ASK | {"content": [{"type": "text", "text": "Who?"}]}, SAY]},
}
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
    "texts with all before": {
        "instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4", "history": [["Hi", "Ho"]],
        "system": "Be kind.",
    },
    "question": {"question": "Who?", "chosen": "Me.", "rejected": "You."},
    "whole conversations": {"chosen": [ASK, SAY], "rejected": [ASK, NO]},
    "conversations behind a prompt": {"prompt": [ASK], "chosen": [SAY], "rejected": [NO]},
    "messages behind a text": {"prompt": "Who?", "chosen": [SAY], "rejected": [NO]},
    "LLaMA-Factory": {
        "conversations": GPT[:1], "chosen": GPT[1], "rejected": {"from": "gpt", "value": "You."},
    },
    "OpenAI": {"input": {"messages": [ASK]}, "preferred_output": [SAY], "non_preferred_output": [NO]},
    "Anthropic's HH": {"chosen": HH + "Me.", "rejected": HH + "You."},
    "HH behind a prompt": {"prompt": HH, "chosen": " Me.", "rejected": " You."},
    "KTO": {"prompt": "Who?", "completion": "Me.", "label": True},
    "KTO's other names": {"question": "Who?", "answer": "Me.", "kto_tag": False},
    "KTO's messages": {"messages": LONG[:3], "label": True},
}  # fmt: skip
SHAPES = [*(("conversations", name) for name in CONVERSATIONS), *(("preferences", name) for name in PAIRS)]
TEMPLATE: ChatTemplate = find_template(None, bundled())
KNOWN = (*MESSAGES, *PROMPTS, *COMPLETIONS, *LABELS, *OPENING, "context", "chosen", "rejected")
KNOWN += ("preferred_output", "non_preferred_output", "images", "audio", "text")
SPOKEN = ("role", "content", "from", "value", "name", "weight", "train", "trainable", "tool_calls", "function_call")
SPOKEN += ("tool_call_id", "reasoning_content", "thinking", "images", "refusal")
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=2),
    max_leaves=3,
)


def row_of(reader: str, name: str) -> dict[str, Any]:
    return (CONVERSATIONS if reader == "conversations" else PAIRS)[name]


def read(reader: str, row: dict[str, Any]) -> tuple[list[Any], dict[str, int]]:
    """What a row gives to a model, mask and label included, and what is counted of it."""
    unused = Unused()
    if reader == "conversations":
        held = conversation_of(row, "here", detect(row), Keys())
        given = [part.tolist() for part in TEMPLATE.encode(held.messages, "all", unused)]
        unused.add(held.unused)
    else:
        pair = pair_of(row, "here")
        given = [TEMPLATE.encode_prompt(pair.prompt, unused).tolist()]
        given += [None if said is None else TEMPLATE.encode_answer(said, unused).tolist() for said in sides(pair)]
        unused.add(pair.unused)
    return given, unused.counts


def sides(pair: Any) -> Iterator[Any]:
    yield from (pair.answer(side) for side in ("chosen", "rejected"))


def messages_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all messages of a row."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in inner:
        yield from messages_in(inside, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: dict[str, Any]) -> Any:
    """A copy in which the object at `path` has other keys, too."""
    if not path:
        return value | change
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], change)
    return copy


@pytest.mark.parametrize(("reader", "name"), SHAPES)
class TestRows:
    def test_a_shape_is_read_and_all_of_it_is_used(self, reader: str, name: str) -> None:
        assert read(reader, row_of(reader, name))[1] == {}

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(value=VALUES)
    def test_an_unknown_column_is_counted(self, reader: str, name: str, value: Any) -> None:
        row = row_of(reader, name)
        given, unused = read(reader, {"mood": value, **row})
        assert (given, unused) == (read(reader, row)[0], {"mood": 1} if is_something(value) else {})

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(value=VALUES)
    def test_an_unknown_key_of_a_message_is_counted(self, reader: str, name: str, value: Any) -> None:
        row = row_of(reader, name)
        for path in messages_in(row):
            try:
                given, unused = read(reader, changed(row, path, {"mood": value}))
            except BadRow as error:
                assert "mood" in str(error) or "differ" in str(error)
                continue
            assert given == read(reader, row)[0]
            assert list(unused) == (["mood of messages"] if is_something(value) else [])

    @pytest.mark.parametrize("null", [None, float("nan")])
    def test_columns_and_keys_of_null_are_absent(self, reader: str, name: str, null: Any) -> None:
        row = row_of(reader, name)
        expected = read(reader, row)
        assert read(reader, dict.fromkeys(KNOWN, null) | row) == expected
        assert read(reader, row | {"mood": null}) == expected
        for path in messages_in(row):
            held = row
            for key in path:
                held = held[key]
            nulls = {key: null for key in (*SPOKEN, "mood") if key not in held}
            assert read(reader, changed(row, path, nulls)) == expected

    def test_a_null_in_a_needed_place_is_as_if_it_were_not_there(self, reader: str, name: str) -> None:
        row = row_of(reader, name)
        for key in row:
            without = {other: value for other, value in row.items() if other != key}
            outcomes = []
            for changed_row in (without, row | {key: None}):
                try:
                    outcomes.append(read(reader, changed_row))
                except BadRow as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1]
            assert outcomes[0] != read(reader, row)
        for path in messages_in(row):
            for key in ("content", "value", "role", "from"):
                held = row
                for step in path:
                    held = held[step]
                if key in held:
                    with pytest.raises(BadRow, match=r"role|content|nothing|no text"):
                        read(reader, changed(row, path, {key: None}))


FLAT = [(r, n) for r, n in SHAPES if all(isinstance(value, str | bool) for value in row_of(r, n).values())]
FORMATS = ("json", "jsonl", "csv", "tsv", "parquet")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]")
    return str(path)


class TestFiles:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize(("reader", "name"), FLAT)
    def test_rows_of_every_format_are_equal(self, tmp_path: Path, reader: str, name: str, form: str) -> None:
        plain = row_of(reader, name)
        rows = [plain | {"mood": "glad", "image": None}, plain | {"mood": None, "image": None}]
        path = write(tmp_path / f"a.{form}", rows)
        if reader == "conversations":
            source = conversations((path,))
            found = [held.messages for held in source.conversations()]
            assert found == [conversation_of(plain, "here", detect(plain), Keys()).messages] * 2
        else:
            source = preferences((path,))
            found = [(pair.prompt, pair.chosen, pair.rejected) for pair in source.pairs()]
            pair = pair_of(plain, "here")
            assert found == [(pair.prompt, pair.chosen, pair.rejected)] * 2
        assert source.unused.counts == {"mood": 1}

    @pytest.mark.parametrize("form", FORMATS[1:])
    def test_texts_have_their_other_columns_counted(self, tmp_path: Path, form: str) -> None:
        rows = [{"mood": "glad", "text": "One.", "none": None}, {"mood": None, "text": "Two.", "none": None}]
        source = files((write(tmp_path / f"a.{form}", rows),))
        assert list(source.documents()) == ["One.", "Two."]
        assert source.unused.counts == {"mood": 1}
        assert list(source.documents()) and source.unused.counts == {"mood": 1}

    @pytest.mark.parametrize("form", FORMATS[1:])
    def test_a_text_of_null_is_refused_with_its_place(self, tmp_path: Path, form: str) -> None:
        rows = [{"text": "One.", "mood": "glad"}, {"text": None, "mood": "sad"}]
        source = files((write(tmp_path / f"a.{form}", rows),))
        with pytest.raises(Exception, match=r"a\.\w+, (line|row) \d .*text"):
            list(source.documents())
        assert list(source.documents(skip_bad=True)) == ["One."]
        assert source.skipped == 1
