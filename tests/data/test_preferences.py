import json
from pathlib import Path

import pytest

from plmtune.data import preferences as module
from plmtune.data.conversations import conversations
from plmtune.data.functions import Function, question
from plmtune.data.pairs import Pair
from plmtune.data.preferences import InMemory, docstring_pairs, preferences, prompts_of
from plmtune.tokenizers.message import Message

REAL = Path(__file__).parents[3] / "shared" / "data" / "preference"

USER, HELLO = Message("user", "Hi?"), Message("assistant", "Hello.")
SYSTEM, AGAIN = Message("system", "Be kind."), Message("user", "And now?")
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
CHAT += [{"role": "user", "content": "And now?"}]


def whole(answer):
    return [*CHAT, {"role": "assistant", "content": answer}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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
        return {question(function): function for function in found}

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
        first, second = prompts_of(conversations((path,)))
        assert (first.messages, first.gold, first.extra) == ((USER, HELLO, AGAIN), "yes", {"tests": 1})
        assert (second.messages, second.gold, second.place) == ((USER,), "Hello.", f"{path}, line 2")

    def test_a_prompt_of_several_pairs_is_given_once_with_the_first_chosen_answer(self):
        other = (Message("user", "Why?"),)
        pairs = [Pair((USER,), None, "no", "1"), Pair((USER,), "yes", None, "2"), Pair((USER,), "yea", "no", "3")]
        found = list(prompts_of(InMemory([*pairs, Pair(other, None, "no", "4")], "pairs")))
        assert [(prompt.messages, prompt.gold) for prompt in found] == [((USER,), "yes"), (other, None)]
