import json
from pathlib import Path

import pytest

from plmtune.data.conversations import conversations, detect, docstrings, public_functions
from plmtune.errors import UserError

SFT = Path(__file__).parents[3] / "shared" / "data" / "sft"
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.fixture
def written(tmp_path):
    """Write rows and read them as conversations."""

    def write(*rows, **settings):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return conversations((str(path),), **settings)

    return write


def turns(data, **settings):
    return [[(m.role, m.content) for m in held.messages] for held in data.conversations(**settings)]


def reasons(data):
    assert list(data.conversations(skip_bad=True)) == []
    return list(data.refused.counts)


class TestShapes:
    @pytest.mark.parametrize(
        ("row", "shape"),
        [
            ({"messages": [USER, ASSISTANT]}, "messages"),
            ({"conversation": [USER, ASSISTANT]}, "messages"),
            ([USER, ASSISTANT], "messages"),
            ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "sharegpt"),
            ({"instruction": "hi", "input": "", "output": "hello"}, "alpaca"),
            ({"instruction": "hi", "context": "", "response": "hello", "category": "x"}, "alpaca"),
            ({"question": "hi", "answer": "hello"}, "prompt_completion"),
            ({"prompt": "hi", "completion": "hello"}, "prompt_completion"),
            ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion"),
            ({"instruction": "hi", "response": "hello"}, "prompt_completion"),
            ({"input": "hi", "output": "hello"}, "prompt_completion"),
        ],
    )
    def test_each_usual_shape_is_found_out_and_gives_the_same_conversation(self, written, row, shape):
        assert detect(row if isinstance(row, dict) else {"messages": row}) == shape
        assert turns(written(row)) == turns(written(row, shape=shape)) == [[("user", "hi"), ("assistant", "hello")]]

    def test_alpaca_puts_history_in_front_and_input_behind_the_instruction(self, written):
        row = {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"]], "system": "be terse"}
        assert turns(written(row)) == [
            [("system", "be terse"), ("user", "a"), ("assistant", "b"), ("user", "add\n1 2"), ("assistant", "3")]
        ]

    def test_a_system_text_beside_the_messages_comes_first_and_an_empty_one_not_at_all(self, written):
        row = {"system": "be kind", "messages": [USER, ASSISTANT]}
        assert turns(written(row))[0][0] == ("system", "be kind")
        assert len(turns(written(row | {"system": ""}))[0]) == 2

    def test_other_names_are_found_when_named(self, written):
        row = {"ask": "hi", "say": "hello", "who": "be kind"}
        assert reasons(written(row))[0].startswith("fits no known shape of a conversation (it holds ask, say, who)")
        named = written(row, prompt_key="ask", completion_key="say", system_key="who")
        assert turns(named) == [[("system", "be kind"), ("user", "hi"), ("assistant", "hello")]]
        assert turns(written({"dialog": [USER, ASSISTANT]}, messages_key="dialog"))[0][0] == ("user", "hi")

    def test_messages_in_text_parts_are_joined(self, written):
        parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
        assert turns(written([USER, ASSISTANT | {"content": parts}]))[0][1] == ("assistant", "hello")

    def test_what_else_a_row_holds_is_kept(self, written):
        (held,) = written({"question": "hi", "answer": "hello", "tests": ["assert True"]}).conversations()
        assert held.extra == {"tests": ["assert True"]}
        assert held.place.endswith("a.jsonl, line 1")

    def test_keys_without_a_use_are_refused(self, written):
        with pytest.raises(ValueError, match="prompt_key"):
            written({}, shape="alpaca", prompt_key="x")
        with pytest.raises(ValueError, match="messages_key"):
            written({}, shape="alpaca", messages_key="x")


class TestRefusals:
    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            ([USER], "has no assistant turn"),
            ([], "has no assistant turn"),
            ([USER, ASSISTANT | {"content": " \n"}], "is empty in turn 2 (assistant)"),
            ([USER, ASSISTANT | {"content": None}], "holds nothing in turn 2"),
            ([USER, ASSISTANT | {"content": {"x": 1}}], "holds an object, not text, in turn 2"),
            ([USER, ASSISTANT | {"content": [{"type": "image"}]}], "a part of the type 'image' in turn 2"),
            (
                [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT],
                "'image_url' in turn 1",
            ),
            ([USER | {"images": ["a.png"]}, ASSISTANT], "has images, audio or video (under images) in turn 1"),
            ([USER, ASSISTANT | {"weight": 0.5}], "0.5 under weight in turn 2 (assistant): 0 and 1 are known"),
            ([USER, ASSISTANT | {"train": "no"}], "'no' under train in turn 2 (assistant): true and false are known"),
            (
                [USER, ASSISTANT | {"train": True, "weight": 0}],
                "weight and train in turn 2 (assistant), which say diff",
            ),
            (
                [USER | {"weight": 1}, ASSISTANT],
                "asks to learn what is said in turn 1 (user), and only answers are learned",
            ),
            ([USER, ASSISTANT | {"content": "\ud800"}], "half a surrogate pair at character 0 in turn 2"),
            ([USER, {"role": "assistant"}], "has no content in turn 2"),
            ([USER, {"content": "x"}], "has no role in turn 2"),
            ([USER, {"role": "martian", "content": "x"}], "unknown role 'martian' in turn 2"),
            ([USER, ASSISTANT | {"tool_calls": [{"id": "1"}]}], "a call of a tool without a name in turn 2"),
            ([USER, ASSISTANT | {"tool_calls": [{"name": "f", "arguments": "{"}]}], "arguments are no JSON in turn 2"),
            ([USER | {"tool_calls": [{"name": "f"}]}, ASSISTANT], "has tool_calls in turn 1 (user)"),
            (
                [USER, {"role": "function_call", "content": "f(1)"}, ASSISTANT],
                "text that is no JSON as a call of a tool",
            ),
            ([USER, "hello"], "holds a text as turn 2"),
        ],
    )
    def test_each_says_what_is_wrong_and_in_which_turn(self, written, messages, reason):
        (said,) = reasons(written({"messages": messages}))
        assert reason in said

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "x", "chosen": "a", "rejected": "b"}, "is a preference pair"),
            ({"messages": [USER], "chosen": ASSISTANT, "rejected": ASSISTANT}, "is a preference pair"),
            ({"messages": [USER, ASSISTANT], "tools": "x"}, "holds text that is no JSON under tools"),
            ({"messages": [USER, ASSISTANT], "tools": [3]}, "holds a number under tools, not the definition of a tool"),
            ({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}], "functions": [{"name": "f"}]}, "two names"),
            ({"messages": [{"role": "system", "content": "x"}, USER, ASSISTANT], "system": "y"}, "system that differ"),
            ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "has images, audio or video under images"),
            ({"question": "x", "answer": "y", "photo": {"bytes": "...", "path": None}}, "images, audio or video under"),
            ({"instruction": "x", "output": ""}, "is empty under output"),
            ({"instruction": "x", "output": "y", "history": "z"}, "history that is no list"),
            ({}, "it holds nothing"),
            (7, "is a number, not an object"),
            (True, "is true, not an object"),
            (None, "is nothing, not an object"),
            ({"messages": "hi"}, "holds a text under messages, not a list of messages"),
            ({"conversations": {"role": "user"}}, "holds an object under conversations, not a list of messages"),
            ({"Prompt": "a", "completion ": "b"}, "('prompt', 'completion' would be read)"),
        ],
    )
    def test_rows_of_other_kinds_are_recognized(self, written, row, reason):
        (said,) = reasons(written(row))
        assert reason in said

    def test_the_first_row_decides_and_others_are_refused(self, written):
        data = written({"question": "a", "answer": "b"}, {"messages": [USER, ASSISTANT]})
        assert len(turns(data, skip_bad=True)) == 1
        assert data.refused.describe().endswith(
            "line 2 has no prompt or question or instruction or query or input (see prompt_key)"
        )

    def test_all_rows_are_looked_at_before_the_error(self, written):
        data = written([USER, ASSISTANT], [USER], [USER, ASSISTANT], [USER])
        with pytest.raises(
            UserError, match=r"2 rows cannot be used:\n.*line 2 has no assistant turn; 1 more like it\n.*skip_bad"
        ):
            list(data.conversations())

    def test_each_reading_counts_anew(self, written):
        data = written([USER, ASSISTANT], [USER])
        for _ in range(2):
            list(data.conversations(skip_bad=True))
            assert len(data.refused) == 1

    def test_the_fingerprint_changes_with_how_rows_are_read(self, written):
        row = {"question": "a", "answer": "b"}
        assert written(row).fingerprint() == written(row).fingerprint()
        assert written(row).fingerprint() != written(row, completion_key="answer").fingerprint()


@pytest.mark.skipif(not SFT.is_dir(), reason="the shared data sets are not here")
class TestRealData:
    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("gsm8k_train.jsonl", 7473),
            ("dolly_hhrlhf_1k.jsonl", 1000),
            ("lf_alpaca_en_demo.json", 999),
            ("lf_alpaca_zh_demo.json", 1000),
        ],
    )
    def test_every_row_of_published_sets_is_read_by_detection(self, name, count):
        assert len(list(conversations((str(SFT / name),)).conversations())) == count


class TestDocstrings:
    def test_functions_that_every_python_has_are_asked_about(self):
        known = {f"{f.module}.{f.name}": f for f in public_functions()}
        assert len(known) > 2000
        assert (
            known["bisect.insort_left"].question == "What does bisect.insort_left(a, x, lo=0, hi=None, *, key=None) do?"
        )
        assert known["textwrap.dedent"].doc == "Remove any common leading whitespace from every line in `text`."
        assert known["shlex.shlex.get_token"].signature == "()"

    def test_only_public_names_and_no_tests_are_taken(self):
        for function in public_functions():
            assert not any(part.startswith("_") for part in f"{function.module}.{function.name}".split("."))
            assert "test" not in function.module.split(".")

    def test_answers_are_short_lines_of_words(self):
        for function in public_functions():
            assert 12 <= len(function.doc) <= 300
            assert "\n" not in function.doc

    def test_they_are_conversations_in_a_fixed_order(self):
        held = list(docstrings().conversations())
        assert [c.place for c in held] == [f"docstring of {f.module}.{f.name}" for f in public_functions()]
        assert [m.role for m in held[0].messages] == ["user", "assistant"]
        assert docstrings().fingerprint() == docstrings().fingerprint()
