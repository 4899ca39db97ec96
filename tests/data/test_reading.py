"""Nothing in a row is dropped: columns, keys of messages and nulls are honoured, refused or counted in every shape."""

import json
import random
import re
from datetime import datetime

import pyarrow
import pytest
from pyarrow import parquet

from plmtune.data.conversations import conversation_of, conversations, detect
from plmtune.data.messages import messages_of
from plmtune.data.preferences import pair_of, preferences
from plmtune.tokenizers.bpe import BYTE_PATTERN, CHATML_SPECIALS, SINGLE_BYTES, from_ranks
from plmtune.tokenizers.builtin_templates import CHATML_TEMPLATE
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Message, Unused
from plmtune.tokenizers.tokenizer import Tokenizer


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def shared(role, text):
    return {"from": role, "value": text}


ASKED, ANSWERED, WORSE = say("user", "Two?"), say("assistant", "It is 2."), say("assistant", "It is 3.")
CHAT = [ASKED, ANSWERED]
CONVERSATIONS = {
    "messages": {"messages": CHAT},
    "conversation": {"conversation": CHAT},
    "sharegpt": {"conversations": [shared("human", "Two?"), shared("gpt", "It is 2.")]},
    "alpaca": {"instruction": "Two?", "output": "It is 2."},
    "dolly": {"instruction": "Two?", "context": "", "response": "It is 2."},
    "question": {"question": "Two?", "answer": "It is 2."},
    "query": {"query": "Two?", "response": "It is 2."},
    "lists": {"prompt": [ASKED], "completion": [ANSWERED]},
    "half a list": {"prompt": [ASKED], "completion": "It is 2."},
}
PAIRS = {
    "strings": {"prompt": "Two?", "chosen": "It is 2.", "rejected": "It is 3."},
    "instruction": {"instruction": "Two?", "chosen": "It is 2.", "rejected": "It is 3."},
    "messages in front": {"prompt": [ASKED], "chosen": "It is 2.", "rejected": "It is 3."},
    "messages": {"prompt": "Two?", "chosen": [ANSWERED], "rejected": [WORSE]},
    "whole messages": {"chosen": CHAT, "rejected": [ASKED, WORSE]},
    "sharegpt": {
        "conversations": [shared("human", "Two?")],
        "chosen": shared("gpt", "It is 2."),
        "rejected": shared("gpt", "It is 3."),
    },
    "dialogue": {
        "chosen": "\n\nHuman: Two?\n\nAssistant: It is 2.",
        "rejected": "\n\nHuman: Two?\n\nAssistant: It is 3.",
    },
    "openai": {"input": {"messages": [ASKED]}, "preferred_output": [ANSWERED], "non_preferred_output": [WORSE]},
}
LABELLED = {
    "prompt": {"prompt": "Two?", "completion": "It is 2.", "label": True},
    "response": {"prompt": "Two?", "response": "It is 2.", "label": True},
    "lists": {"prompt": [ASKED], "completion": [ANSWERED], "label": True},
    "messages": {"messages": CHAT, "kto_tag": True},
    "sharegpt": {"conversations": [shared("human", "Two?"), shared("gpt", "It is 2.")], "label": True},
}
ALL = {
    **{("conversations", name): row for name, row in CONVERSATIONS.items()},
    **{("preferences", name): row for name, row in PAIRS.items()},
    **{("preferences", f"labelled {name}"): row for name, row in LABELLED.items()},
}
every_shape = pytest.mark.parametrize(
    ("kind", "row"), [(kind, row) for (kind, _), row in ALL.items()], ids=map(str, ALL)
)
CALL = {"name": "add", "arguments": {"a": 1, "b": 1}}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}


@pytest.fixture
def read(tmp_path):
    """Write one row and read it: (the messages before the answer, the answer, columns that are not used)."""

    def read(kind, row):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        data = (conversations if kind == "conversations" else preferences)((str(path),))
        if kind == "conversations":
            (held,) = data.conversations(skip_bad=True)
            *asked, answer = held.messages
            return [m.as_prompt() for m in asked], answer.content, data.unused.counts
        (pair,) = data.pairs(skip_bad=True)
        return list(pair.prompt), pair.chosen, data.unused.counts

    return read


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, and ChatML's."""
    ranks = {token: rank for rank, token in enumerate(SINGLE_BYTES)}
    return Tokenizer(from_ranks(ranks, BYTE_PATTERN, None, CHATML_SPECIALS, "a test"), chat_template=CHATML_TEMPLATE)


def lists_of(row):
    """The lists of messages in a row, at any depth."""
    for value in row.values():
        if isinstance(value, dict):
            yield from lists_of(value)
            if "value" in value:
                yield [value]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield value


class TestEveryShape:
    @every_shape
    def test_gives_one_question_and_its_answer(self, read, kind, row):
        assert read(kind, row) == ([Message("user", "Two?")], "It is 2.", {})

    @every_shape
    def test_counts_a_column_that_nothing_reads(self, read, kind, row):
        _, _, unused = read(kind, row | {"source": "a book", "difficulty": 3})
        assert unused == {"source": 1, "difficulty": 1}

    @every_shape
    def test_takes_a_null_for_nothing(self, read, kind, row):
        # As tables write one for each column that any row has.
        for key in (
            "system", "system_prompt", "tools", "functions", "history", "chosen", "rejected", "label", "kto_tag",
            "input", "context", "images", "messages", "prompt", "preferred_output",
        ):  # fmt: skip
            assert read(kind, {key: None} | row) == read(kind, row)
        for key in ("tools", "functions", "history", "images"):
            assert read(kind, row | {key: []}) == read(kind, row)
        for key in ("tools", "functions"):
            assert read(kind, row | {key: "[]"}) == read(kind, row)

    @every_shape
    def test_takes_a_null_in_a_message_for_nothing(self, read, kind, row):
        row = json.loads(json.dumps(row))
        for turns in lists_of(row):
            for turn in turns:
                turn |= dict.fromkeys(("weight", "train", "tool_calls", "reasoning_content", "name", "images"))
                other = ("role", "content") if "from" in turn else ("from", "value")
                turn |= dict.fromkeys(other)
        assert read(kind, row) == ([Message("user", "Two?")], "It is 2.", {})

    @every_shape
    def test_passes_on_or_counts_a_key_of_a_message(self, read, kind, row):
        row = json.loads(json.dumps(row))
        held = [turn for turns in lists_of(row) for turn in turns]
        for turn in held:
            turn["mood"] = "good"
        asked, _, unused = read(kind, row)
        is_asked = any(turn.get("role", turn.get("from")) in ("user", "human") for turn in held)
        assert asked == [Message("user", "Two?", {"mood": "good"} if is_asked else {})]
        assert unused == {}  # the template gets it, and counts it where it does not write it

    @every_shape
    def test_reads_what_stands_before_the_question(self, read, kind, row):
        system, tools = (
            Message("system", "Be brief."),
            Message("tools", json.dumps([{"type": "function", "function": TOOL}])),
        )
        earlier = [Message("user", "One?"), Message("assistant", "1.")]
        asked = [Message("user", "Two?")]
        for key in ("system", "system_prompt"):
            assert read(kind, row | {key: "Be brief."})[0] == [system, *asked]
        assert read(kind, row | {"system": "", "system_prompt": "Be brief."})[0] == [system, *asked]
        for value in ([TOOL], json.dumps([TOOL]), [{"type": "function", "function": TOOL}], TOOL):
            for key in ("tools", "functions"):
                assert read(kind, row | {key: value})[0] == [tools, *asked]
        assert read(kind, row | {"history": [["One?", "1."]]})[0] == [*earlier, *asked]
        whole = {"history": [["One?", "1."]], "system": "Be brief.", "tools": [TOOL]}
        assert read(kind, row | whole) == ([tools, system, *earlier, *asked], "It is 2.", {})

    @every_shape
    def test_reads_what_a_question_is_about_or_counts_it(self, read, kind, row):
        for key in {"input", "context"} - set(row):
            asked, _, unused = read(kind, row | {key: "Of apples."})
            about = [Message("user", "Two?\nOf apples.")], {}
            assert (asked, unused) in (about, ([Message("user", "Two?")], {key: 1}))
            if (
                isinstance(row.get("question", row.get("instruction", row.get("prompt"))), str)
                and "messages" not in row
            ):
                assert (asked, unused) == about or isinstance(row.get("chosen"), list)

    def test_says_once_what_a_prompt_holds_already(self, read):
        row = {"prompt": "Two?\nOf apples.", "input": "Of apples.", "completion": "It is 2."}
        assert read("conversations", row) == ([Message("user", "Two?\nOf apples.")], "It is 2.", {})

    @every_shape
    def test_refuses_images(self, kind, row):
        for key, value in (("images", ["a.png"]), ("image", "a.png"), ("photo", {"bytes": "...", "path": None})):
            with pytest.raises(BadRow, match="has images, audio or video"):
                self._read(kind, row | {key: value})
        row = json.loads(json.dumps(row))
        for turns in lists_of(row):
            for turn in turns:
                key = "content" if "content" in turn else "value"
                turn[key] = [{"type": "text", "text": turn[key]}, {"type": "image_url", "image_url": {"url": "a"}}]
            with pytest.raises(BadRow, match="image_url"):
                self._read(kind, row)

    @every_shape
    def test_is_the_same_from_parquet(self, kind, row, tmp_path):
        path = tmp_path / "rows.parquet"
        other = {"tools": [TOOL], "system": "Be brief.", "note": "x"}
        # Two rows in one table, so that each has columns and keys of nothing.
        parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(other) | row, row | other]), path)
        data = (conversations if kind == "conversations" else preferences)((str(path),))
        read_back = list(data.conversations() if kind == "conversations" else data.pairs())
        assert len(read_back) == 2 and data.unused.counts == {"note": 1}
        messages = [held.messages if kind == "conversations" else held.prompt for held in read_back]
        assert [m.role for m in messages[1]][:3] == ["tools", "system", "user"]
        assert messages[0] == messages[1][2:]

    @staticmethod
    def _read(kind, row):
        return conversation_of(row, "here", detect(row)) if kind == "conversations" else pair_of(row, "here")


class TestAnyRow:
    """Rows drawn at random, every value a word of its own: each word is read, or its column is counted, or refused."""

    COLUMNS = (
        "messages", "conversations", "prompt", "question", "instruction", "query", "input", "context", "completion",
        "response", "answer", "output", "chosen", "rejected", "system", "system_prompt", "tools", "functions",
        "history", "label", "kto_tag", "note", "images", "preferred_output", "non_preferred_output",
    )  # fmt: skip

    def value(self, draw, column):
        kind = draw.choice(["word", "word", "word", "null", "empty", "list", "turn", "turns", "number"])
        if column in ("label", "kto_tag"):
            return draw.choice([True, False, None, 1, self.word(draw)])
        if column in ("tools", "functions") and kind != "null":
            return draw.choice(
                [
                    [{"name": self.word(draw), "parameters": {"x": self.word(draw)}}],
                    "[]",
                    json.dumps([{"name": self.word(draw)}]),
                ]
            )
        if column == "history" and kind != "null":
            return draw.choice([[], [[self.word(draw), self.word(draw)]], [self.turn(draw), self.turn(draw)]])
        if column in ("messages", "conversations", "preferred_output", "non_preferred_output") and kind not in (
            "null",
            "number",
        ):
            return [self.turn(draw) for _ in range(draw.randint(0, 4))]
        values = {"null": None, "empty": "", "list": [self.word(draw)], "turn": self.turn(draw), "number": 7}
        return [self.turn(draw)] if kind == "turns" else values.get(kind, self.word(draw))

    def word(self, draw):
        self.words += 1
        return f"w{self.words}w"

    def turn(self, draw):
        names = draw.choice([("role", "content"), ("from", "value")])
        turn = dict(
            zip(
                names, (draw.choice(["user", "assistant", "assistant", "system", "tool"]), self.word(draw)), strict=True
            )
        )
        for key in draw.sample(
            ["weight", "reasoning_content", "tool_calls", "name", "mood", "images", "value"], draw.choice([0, 0, 1, 2])
        ):
            turn[key] = {"weight": draw.choice([0, 1, None]), "images": None}.get(key, self.word(draw))
            if key == "tool_calls":
                turn[key] = draw.choice([None, [], [{"name": self.word(draw), "arguments": {"x": self.word(draw)}}]])
        return turn

    @pytest.mark.parametrize("seed", range(8))
    def test_loses_no_word(self, seed):
        draw, self.words, read = random.Random(seed), 0, 0
        for _ in range(1500):
            row = {column: self.value(draw, column) for column in draw.sample(self.COLUMNS, draw.randint(2, 6))}
            for kind in ("conversations", "preferences"):
                try:
                    if kind == "conversations":
                        held = conversation_of(row, "here", detect(row))
                        said = list(held.messages)
                    else:
                        held = pair_of(row, "here")
                        said = [*held.prompt, held.answer("chosen"), held.answer("rejected")]
                except BadRow:
                    continue
                read += 1
                written = json.dumps([(m.content, m.more) for m in said if m is not None])
                for column, value in row.items():
                    lost = [word for word in re.findall(r"w\d+w", json.dumps(value)) if word not in written]
                    assert not lost or column in held.unused, (row, said)
        assert read > 100


class TestTables:
    def test_times_are_texts_and_numbers_that_are_none_are_nothing(self, tmp_path):
        path = tmp_path / "rows.parquet"
        turns = [
            ASKED | {"time": datetime(2026, 1, 2), "weight": float("nan")},
            ANSWERED | {"time": None, "weight": 1.0},
        ]
        rows = {"messages": turns, "score": float("nan"), "label": float("nan"), "day": datetime(2026, 1, 2)}
        parquet.write_table(pyarrow.Table.from_pylist([rows]), path)
        data = conversations((str(path),))
        (held,) = data.conversations()
        assert held.messages == (
            Message("user", "Two?", {"time": "2026-01-02 00:00:00"}),
            Message("assistant", "It is 2.", {}, True),
        )
        assert data.unused.counts == {"day": 1} and held.extra == {}

    def test_binary_data_in_a_message_is_refused(self):
        with pytest.raises(BadRow, match=r"holds bytes that is no JSON under voice in turn 1 \(user\)"):
            messages_of([ASKED | {"voice": b"..."}, ANSWERED])

    def test_a_named_column_may_be_null_in_some_rows(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        rows = [
            {"who": None, "ask": "Two?", "say": "2."},
            {"who": "Be brief.", "ask": "Two?", "say": "2."},
            {"ask": "Two?", "say": "2."},
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = conversations((str(path),), prompt_key="ask", completion_key="say", system_key="who")
        assert [held.messages[0].role for held in data.conversations(skip_bad=True)] == ["user", "system"]
        assert "line 3 has no key who" in data.refused.describe()


class TestLabels:
    @pytest.mark.parametrize("row", LABELLED.values(), ids=LABELLED)
    def test_a_labelled_answer_is_no_conversation(self, tmp_path, row):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        data = conversations((str(path),))
        assert list(data.conversations(skip_bad=True)) == []
        assert "label that says whether its answer is good" in data.refused.describe()
        # Unless a person says so.
        listed = next((key for key in ("messages", "conversations") if key in row), None)
        named = {"messages_key": listed} if listed else {"prompt_key": "prompt", "completion_key": list(row)[1]}
        (held,) = conversations((str(path),), **named).conversations()
        assert held.messages[-1].content == "It is 2."

    @pytest.mark.parametrize("name", ["label", "kto_tag", "desirable", "thumbs_up"])
    @pytest.mark.parametrize(
        ("value", "good"), [(True, True), (0, False), (1.0, True), ("true", True), ("False", False)]
    )
    def test_what_people_write_is_understood(self, read, name, value, good):
        _, chosen, unused = read("preferences", {"prompt": "Two?", "response": "It is 2.", name: value})
        assert (chosen, unused) == ("It is 2." if good else None, {})

    def test_a_label_of_another_kind_is_counted(self, read):
        row = {"question": "Two?", "answer": "It is 2.", "label": "sums"}
        assert read("conversations", row) == ([Message("user", "Two?")], "It is 2.", {"label": 1})


class TestTwice:
    """What stands in two places of a row is one thing or refused."""

    SYSTEM = say("system", "Be kind.")

    @pytest.mark.parametrize("row", [CONVERSATIONS["question"], PAIRS["strings"]])
    def test_a_system_message(self, row):
        read = conversation_of if "answer" in row else pair_of
        settings = ("prompt_completion",) if "answer" in row else ()
        row = row | {"system": "Be kind.", "history": [self.SYSTEM, *CHAT]}
        found = read(row, "here", *settings)
        messages = found.messages if "answer" in row else found.prompt
        assert [message.role for message in messages][:4] == ["system", "user", "assistant", "user"]
        with pytest.raises(BadRow, match="a column and a message of the system that differ"):
            read(row | {"system": "Be brief."}, "here", *settings)

    def test_tools_however_they_are_written(self):
        tools = json.dumps([{"name": "add", "parameters": {}}], indent=1)
        row = {"tools": [{"name": "add", "parameters": {}}], "messages": [say("tools", tools), *CHAT]}
        (first, *_) = conversation_of(row, "here", "messages").messages
        assert json.loads(first.content) == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
        with pytest.raises(BadRow, match=r"text that is no JSON in turn 1 \(tools\)"):
            conversation_of({"messages": [say("tools", "none"), *CHAT]}, "here", "messages")

    @pytest.mark.parametrize("more", [{"prompt": "Three?"}, {"tools": [{"name": "add"}]}])
    def test_columns_beside_an_input_that_has_them(self, more):
        row = PAIRS["openai"] | {"input": {"messages": [ASKED], "tools": [{"name": "sub"}]}}
        with pytest.raises(BadRow, match=f"has {next(iter(more))} twice, in input and beside it"):
            pair_of(row | more, "here")

    def test_a_label_of_another_kind_hides_none(self):
        row = {"prompt": "Two?", "completion": "It is 2.", "label": "sums", "kto_tag": True}
        found = pair_of(row, "here")
        assert (found.chosen, found.rejected, found.unused) == ("It is 2.", None, ("label",))


class TestFlags:
    """weight of OpenAI, train and its other names of axolotl."""

    def trained(self, tokenizer, *turns, **settings):
        template = ChatTemplate(CHATML_TEMPLATE, tokenizer, "a test")
        return [text for text, trained in template.segments(messages_of(list(turns)), **settings) if trained]

    @pytest.mark.parametrize(
        "flag", [{"weight": 0}, {"train": False}, {"training": 0}, {"trainable": False}, {"weight": 0.0}]
    )
    def test_an_answer_that_is_not_to_be_learned_is_not(self, tokenizer, flag):
        turns = [ASKED, WORSE | flag, ASKED, ANSWERED]
        assert self.trained(tokenizer, *turns) == ["It is 2.<|im_end|>"]
        assert self.trained(tokenizer, ASKED | flag, ANSWERED | {"weight": 1}) == ["It is 2.<|im_end|>"]

    def test_train_on_last_is_narrowed_and_nothing_to_learn_is_refused(self, tokenizer):
        turns = [ASKED, ANSWERED | {"weight": 1}, ASKED, WORSE | {"weight": 0}]
        assert self.trained(tokenizer, *turns) == ["It is 2.<|im_end|>"]
        with pytest.raises(BadRow, match="no answer that is to be learned"):
            self.trained(tokenizer, *turns, train_on="last")
        with pytest.raises(BadRow, match=r"weight 0, train false"):
            self.trained(tokenizer, ASKED, WORSE | {"weight": 0})

    def test_parts_of_an_answer_have_weights_of_their_own(self, tokenizer):
        parts = [
            {"type": "text", "text": " It is"},
            {"type": "text", "text": " er", "weight": 0},
            {"text": " 2. ", "weight": 1},
        ]
        assert self.trained(tokenizer, ASKED, say("assistant", parts)) == [" It is", " 2. <|im_end|>"]
        parts = [{"type": "text", "text": "It is 3.", "weight": 0}]
        assert self.trained(tokenizer, ASKED, say("assistant", parts), ASKED, ANSWERED) == ["It is 2.<|im_end|>"]

    @pytest.mark.parametrize(
        ("masked", "more"), [("Par", {}), ("e", {}), ("<|im", {}), ("Par", {"name": "Paris"}), ("is", {"name": "a"})]
    )
    def test_parts_are_found_where_they_are_said_or_refused(self, tokenizer, masked, more):
        source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.name }}<|im_end|>\n{% endfor %}"
        source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        template = ChatTemplate(source, tokenizer, "a test")
        answer = say("assistant", [{"type": "text", "text": masked, "train": False}, {"type": "text", "text": "is"}])
        turns = messages_of([ASKED, answer | more])
        if masked == "Par" and more:
            with pytest.raises(BadRow, match="not to be learned, which the chat template writes more than once"):
                template.segments(turns)
            return
        segments = template.segments(turns)
        assert [text for text, learned in segments if learned] == [f"is{more.get('name', '')}<|im_end|>"]
        assert "".join(text for text, _ in segments) == template.render(turns)

    def test_what_is_not_an_answer_cannot_be_learned(self):
        parts = [{"type": "text", "text": "Two?"}]
        for turn in (ASKED | {"train": True}, say("user", [parts[0] | {"train": True}])):
            with pytest.raises(BadRow, match=r"asks to learn what is said in turn 1 \(user\)"):
                messages_of([turn, ANSWERED])
        (message, _) = messages_of([say("user", [parts[0] | {"train": False}]), ANSWERED])
        assert message.as_prompt() == messages_of(CHAT)[0]

    def test_pairs_have_no_answers_that_are_not_to_be_learned(self):
        row = {"prompt": "Two?", "chosen": [ANSWERED | {"weight": 0}], "rejected": [WORSE]}
        with pytest.raises(BadRow, match=r"a chosen answer of which something is not to be learned"):
            pair_of(row, "here")


class TestCalls:
    @pytest.mark.parametrize(
        "turn",
        [
            say("assistant", None, tool_calls=[{"id": "1", "type": "function", "function": CALL}]),
            say(
                "assistant", "", tool_calls=[{"id": "1", "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}}]
            ),
            {"role": "assistant", "tool_calls": json.dumps([{"id": "1", **CALL}])},
            say("assistant", None, function_call={"name": "add", "arguments": '{"a": 1, "b": 1}'}),
            say("function_call", json.dumps(CALL)),
            shared("function_call", json.dumps([CALL])),
            say("tool_call", json.dumps({"name": "add", "parameters": {"a": 1, "b": 1}})),
            say(
                "assistant", None, tool_calls=[{"function": {"name": "add", "arguments": {"a": 1, "b": 1, "c": None}}}]
            ),
        ],
    )
    @pytest.mark.parametrize("result", [say("tool", "2"), say("function", "2", name="add"), shared("observation", "2")])
    def test_are_the_same_in_every_shape(self, turn, result):
        asked, called, given, answered = messages_of([ASKED, turn, result, ANSWERED])
        assert (asked.role, called.role, given.role, answered.role) == ("user", "assistant", "tool", "assistant")
        ((call,),) = called.more.values()
        assert (call["type"], call["function"], called.content) == ("function", CALL, "")
        assert (given.content, given.more) == ("2", {"name": "add"} if "name" in result else {})

    def test_an_answer_of_a_pair_may_be_a_call(self):
        chosen = say("assistant", None, tool_calls=[{"type": "function", "function": CALL}])
        pair = pair_of({"prompt": "Two?", "chosen": [chosen], "rejected": [WORSE | {"mood": "bad"}]}, "here")
        assert (pair.chosen, pair.rejected, pair.shows_all) == ("", "It is 3.", False)
        assert pair.more == {
            "chosen": {"tool_calls": [{"type": "function", "function": CALL}]},
            "rejected": {"mood": "bad"},
        }
        with pytest.raises(BadRow, match="chosen answer that equals"):
            pair_of({"prompt": "Two?", "chosen": [chosen], "rejected": [chosen]}, "here")

    def test_a_tool_may_give_back_nothing(self):
        assert messages_of([ASKED, say("function_call", json.dumps(CALL)), say("tool", ""), ANSWERED])[2].content == ""


class TestMessage:
    def test_is_read_back_from_what_a_file_of_prompts_holds(self):
        message = Message("assistant", "", {"tool_calls": [{"type": "function", "function": CALL}]})
        assert Message.from_row(json.loads(json.dumps(message.to_row()))) == message
        assert len({message, Message("assistant", "")}) == 2

    def test_is_written_short_where_it_is_plain(self):
        assert repr(Message("user", "Hi?")) == "Message(role='user', content='Hi?')"
        assert (
            repr(Message("user", "", {"id": 1}, False))
            == "Message(role='user', content='', more={'id': 1}, trained=False)"
        )

    def test_unused_is_one_line(self):
        unused = Unused()
        unused.add(["id", "lang"])
        unused.add(["id"])
        assert unused.describe() == "columns not used: id (2 rows), lang (1 row)"
        assert not Unused()
