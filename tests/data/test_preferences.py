"""Preference pairs from rows of every shape."""

import json
from pathlib import Path

import pytest

from plmtune.data import preferences as module
from plmtune.data.conversations import Function, conversations
from plmtune.data.preferences import InMemory, Pair, docstring_pairs, pair_of, preferences, prompts_of
from plmtune.errors import UserError
from plmtune.tokenizers.message import BadRow, Message

REAL = Path(__file__).parents[3] / "shared" / "data" / "preference"

USER, HELLO = Message("user", "Hi?"), Message("assistant", "Hello.")
SYSTEM, AGAIN = Message("system", "Be kind."), Message("user", "And now?")
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
CHAT += [{"role": "user", "content": "And now?"}]


def say(role, content):
    return {"role": role, "content": content}


def whole(answer):
    return [*CHAT, say("assistant", answer)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class TestShapes:
    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            ({"prompt": "Hi?"}, [USER]),
            ({"question": "Hi?", "system": "Be kind."}, [SYSTEM, USER]),
            ({"question": "Hi?", "system": ""}, [USER]),
            ({"instruction": "Hi?", "input": "And now?"}, [Message("user", "Hi?\nAnd now?")]),
            ({"instruction": "Hi?", "input": ""}, [USER]),
            ({"prompt": CHAT}, [USER, HELLO, AGAIN]),
        ],
    )
    def test_texts(self, row, prompt):
        found = pair_of({**row, "chosen": "yes", "rejected": "no"}, "here")
        assert found == Pair(tuple(prompt), "yes", "no", "here")

    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            ({"chosen": whole("yes"), "rejected": whole("no")}, [USER, HELLO, AGAIN]),
            ({"prompt": "Hi?", "chosen": whole("yes"), "rejected": whole("no")}, [USER, HELLO, AGAIN]),
            (
                {"prompt": CHAT, "chosen": [say("assistant", "yes")], "rejected": [say("assistant", "no")]},
                [USER, HELLO, AGAIN],
            ),
            ({"prompt": "Hi?", "chosen": [say("assistant", "yes")], "rejected": [say("assistant", "no")]}, [USER]),
            (
                {"prompt": "Hi?", "chosen": whole("yes")[1:], "rejected": whole("no")[1:]},
                [USER, HELLO, AGAIN],
            ),
            (
                {
                    "prompt": [say("system", "Be kind."), say("user", "Hi?")],
                    "chosen": [say("assistant", "yes")],
                    "rejected": [say("assistant", "no")],
                },
                [SYSTEM, USER],
            ),
            ({"prompt": CHAT[:2], "chosen": whole("yes")[2:], "rejected": whole("no")[2:]}, [USER, HELLO, AGAIN]),
            ({"prompt": CHAT[:1], "chosen": whole("yes"), "rejected": whole("no")}, [USER, HELLO, AGAIN]),
            (
                {"prompt": [say("system", "Be kind."), *CHAT], "chosen": whole("yes"), "rejected": whole("no")},
                [SYSTEM, USER, HELLO, AGAIN],
            ),
            (
                {
                    "prompt": CHAT[:1],
                    "chosen": [say("system", "Be kind."), CHAT[0], say("assistant", "yes")],
                    "rejected": [say("system", "Be kind."), CHAT[0], say("assistant", "no")],
                },
                [SYSTEM, USER],
            ),
        ],
    )
    def test_messages(self, row, prompt):
        assert pair_of(row, "here") == Pair(tuple(prompt), "yes", "no", "here")

    def test_sharegpt(self):
        row = {
            "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        }
        assert pair_of(row, "here") == Pair((SYSTEM, USER), "yes", "no", "here")

    def test_dialogue(self):
        begin = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: And now?\n\nAssistant: "
        expected = Pair((USER, HELLO, AGAIN), "yes", "no", "here")
        assert pair_of({"chosen": begin + "yes", "rejected": begin + "no"}, "here") == expected
        assert pair_of({"prompt": begin, "chosen": " yes", "rejected": " no"}, "here") == expected
        whole = {"chosen": begin + "yes", "rejected": begin + "no"}
        for prompt in ("Hi?", begin):  # it is in the dialogues
            assert pair_of({"prompt": prompt, **whole}, "here") == expected
        assert pair_of({"prompt": "Else?", **whole}, "here").unused == ("prompt",)

    def test_an_answer_that_begins_like_a_dialogue_is_an_answer(self):
        row = {"prompt": "Hi?", "chosen": "Human: a person.", "rejected": "no"}
        assert pair_of(row, "here") == Pair((USER,), "Human: a person.", "no", "here")

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "Hi?", "completion": "yes"},
            {"prompt": [say("user", "Hi?")], "completion": [say("assistant", "yes")]},
            {"messages": [say("user", "Hi?"), say("assistant", "yes")]},
        ],
    )
    @pytest.mark.parametrize(
        ("label", "answers"), [(True, ("yes", None)), (False, (None, "yes")), (1, ("yes", None)), (0, (None, "yes"))]
    )
    def test_a_label_decides_which_answer_an_unpaired_row_has(self, row, label, answers):
        assert pair_of({**row, "label": label}, "here") == Pair((USER,), *answers, "here")

    def test_what_else_a_row_holds_is_kept_where_it_is_json(self):
        row = {"prompt": "Hi?", "chosen": "yes", "rejected": "no", "tests": ["a"], "score": 2, "digest": b"..."}
        assert pair_of(row, "here").extra == {"tests": ["a"], "score": 2}


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "a", "chosen": "x ", "rejected": "x"}, "equals the rejected"),
            ({"prompt": "a", "chosen": " ", "rejected": "x"}, "empty chosen"),
            ({"prompt": "a", "chosen": "x", "rejected": ""}, "empty rejected"),
            ({"prompt": " ", "chosen": "x", "rejected": "y"}, "empty under prompt"),
            ({"prompt": "a", "chosen": "x", "rejected": 3}, "holds a number under rejected"),
            ({"prompt": "a", "chosen": "x"}, "has the keys prompt, chosen, which fit no shape"),
            ({"chosen": "x", "rejected": "y"}, "fit no shape"),
            ({"chosen": 1, "rejected": 2}, "fit no shape"),
            ({}, "has the keys none"),
            ({"prompt": whole("b"), "chosen": "x", "rejected": "y"}, "does not end in a user's message"),
            ({"prompt": [], "chosen": "x", "rejected": "y"}, "no messages under prompt"),
            ({"prompt": [say("martian", "1")], "chosen": "x", "rejected": "y"}, "unknown role"),
            ({"chosen": whole("x"), "rejected": [say("user", "b"), say("assistant", "y")]}, "differ before their last"),
            ({"chosen": CHAT, "rejected": CHAT}, "ends in a message of the user"),
            ({"chosen": [say("assistant", "x")], "rejected": [say("assistant", "y")]}, "no key prompt"),
            (
                {"chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"}},
                "no key prompt",
            ),
            ({"prompt": "a", "chosen": {"from": "human", "value": "x"}, "rejected": {}}, "user under chosen"),
            ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}, "differ before"),
            ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "y"}, "does not begin with Human:"),
            ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "ends in a turn of Human:"),
            ({"prompt": "a", "completion": "x", "label": "maybe"}, "'maybe' under label"),
            ({"prompt": "a", "completion": "x", "label": None}, "no label .label, kto_tag. that is true or false"),
            ({"prompt": "a", "completion": "x", "label": 2}, "2 under label"),
            ({"prompt": "a", "completion": "x", "label": [1]}, "under label"),
            ({"prompt": "a", "completion": "", "label": True}, "empty chosen"),
            ({"messages": CHAT, "label": True}, "end in one of the user"),
            ({"prompt": "a \ud83d", "chosen": "x", "rejected": "y"}, "surrogate"),
        ],
    )
    def test_each_reason_is_named(self, row, reason):
        with pytest.raises(BadRow, match=reason):
            pair_of(row, "here")

    def test_a_named_shape_holds_for_every_row(self):
        row = {"prompt": "Hi?", "chosen": "yes", "rejected": "no"}
        assert pair_of(row, "here", "strings").chosen == "yes"
        with pytest.raises(BadRow, match="no key label"):
            pair_of(row, "here", "unpaired")
        with pytest.raises(BadRow, match="no messages under chosen, but a text"):
            pair_of(row, "here", "messages")

    def test_bad_rows_are_counted_with_file_and_line_and_raised_at_the_end(self, tmp_path):
        good = {"prompt": "Hi?", "chosen": "yes", "rejected": "no"}
        path = write(tmp_path / "pairs.jsonl", [good, good | {"rejected": "yes"}, good, good | {"chosen": "no"}])
        data = preferences((path,))
        assert [pair.place for pair in data.pairs(skip_bad=True)] == [f"{path}, line 1", f"{path}, line 3"]
        assert data.refused.counts == {"has a chosen answer that equals the rejected one": 2}
        read = []
        with pytest.raises(UserError) as caught:
            read.extend(data.pairs())
        assert len(read) == 2
        assert f"{path}, line 2" in str(caught.value) and "skip_bad" in str(caught.value)


class TestPreferences:
    def test_the_fingerprint_follows_the_text_and_the_shape(self, tmp_path):
        row = {"prompt": "Hi?", "chosen": "yes", "rejected": "no"}
        path = write(tmp_path / "pairs.jsonl", [row])
        first = preferences((path,)).fingerprint()
        assert preferences((path,)).fingerprint() == first
        assert preferences((path,), shape="strings").fingerprint() != first
        write(tmp_path / "pairs.jsonl", [row | {"rejected": "yes?"}])
        assert preferences((path,)).fingerprint() != first

    def test_rows_can_be_limited(self, tmp_path):
        path = write(
            tmp_path / "pairs.jsonl", [{"prompt": "Hi?", "chosen": str(i), "rejected": "no"} for i in range(9)]
        )
        assert [pair.chosen for pair in preferences((path,), max_rows=3).pairs()] == ["0", "1", "2"]

    def test_pairs_in_memory(self):
        pairs = [Pair((USER,), "yes", "no", "here"), Pair((USER,), None, "no", "there")]
        data = InMemory(pairs, "round 1")
        assert list(data.pairs()) == pairs
        assert data.name == "round 1" and "2 pairs" in data.describe()
        assert data.fingerprint() == InMemory(pairs, "another").fingerprint()
        assert data.fingerprint() != InMemory(pairs[:1], "round 1").fingerprint()

    @pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data/preference")
    def test_the_real_files_are_read(self):
        llama_factory = preferences((str(REAL / "lf_dpo_en_demo.json"),))
        assert len(list(llama_factory.pairs())) == 300
        helpful = preferences((str(REAL / "hh_harmless_base_test.jsonl"),))
        read = list(helpful.pairs(skip_bad=True))
        assert len(read) == 2303  # 4 with two turns of a role in a row, which a template may take
        assert len(helpful.refused) == 9
        assert all(pair.chosen == pair.chosen.strip() and pair.prompt[-1].role == "user" for pair in read)


class TestDocstringPairs:
    @pytest.fixture(autouse=True)
    def functions(self, monkeypatch):
        found = tuple(Function("m", f"f{i}", "(x)", f"{i % 50} " + "does it. " * (i % 40)) for i in range(200))
        monkeypatch.setattr(module, "public_functions", lambda: found)
        return {function.question: function for function in found}

    def test_a_functions_own_docstring_is_preferred_to_another_of_about_its_length(self, functions):
        pairs = list(docstring_pairs().pairs())
        assert len(pairs) == 200
        for pair in pairs:
            (message,) = pair.prompt
            function = functions[message.content]
            assert pair.chosen == function.doc
            assert pair.place == f"docstring of m.{function.name}"
            assert pair.rejected != pair.chosen
            assert pair.rejected in {other.doc for other in functions.values()}
            assert abs(len(pair.rejected) - len(pair.chosen)) <= 20

    def test_are_the_same_each_time(self):
        assert docstring_pairs().fingerprint() == docstring_pairs().fingerprint()


class TestPromptsOf:
    def test_a_conversations_last_answer_is_gold(self, tmp_path):
        path = write(tmp_path / "chats.jsonl", [{"messages": whole("yes"), "tests": 1}, {"messages": CHAT[:2]}])
        first, second = prompts_of([conversations((path,))])
        assert (first.messages, first.gold, first.extra) == ((USER, HELLO, AGAIN), "yes", {"tests": 1})
        assert (second.messages, second.gold, second.place) == ((USER,), "Hello.", f"{path}, line 2")

    def test_a_prompt_of_several_pairs_is_given_once_with_the_first_chosen_answer(self):
        other = (Message("user", "Why?"),)
        pairs = [Pair((USER,), None, "no", "1"), Pair((USER,), "yes", None, "2"), Pair((USER,), "yea", "no", "3")]
        found = prompts_of([InMemory([*pairs, Pair(other, None, "no", "4")], "pairs")])
        assert [(prompt.messages, prompt.gold) for prompt in found] == [((USER,), "yes"), (other, None)]
