import json

import pytest
from click.testing import CliRunner

from plmtune.cli.data import data
from plmtune.errors import UserError


@pytest.fixture
def inspect(tmp_path):
    """Write rows to a file and return what is shown of it."""

    def show(rows, *options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        arguments = ["inspect", str(path), *options]
        result = CliRunner().invoke(data, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return show


def chat(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


CHAIN = {
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "answers": [{"text": "5", "ended": True, "reward": 0.0}, {"text": "4", "ended": False, "reward": 1.0}],
    "gold": "#### 4",
    "place": "a.jsonl, line 1",
}


class TestConversations:
    def test_trained_tokens_are_marked_and_counted(self, inspect):
        out = inspect([chat("one?", "two!"), chat("SECRET?", "three!", "more", "four!")])
        assert "assistant\n⟦two!<|im_end|>⟧" in out
        assert "user\none?<|im_end|>" in out
        assert "turns: user, assistant" in out
        assert "2 rows of conversations: 2 can be used, 0 cannot" in out
        assert "SECRET" not in out

    def test_another_row_and_the_last_answer_alone_can_be_asked_for(self, inspect):
        out = inspect([chat("one?", "two!"), chat("a", "three!", "b", "four!")], "--row", "2", "--train-on", "last")
        assert "⟦four!<|im_end|>⟧" in out
        assert "⟦three!" not in out
        assert "rows.jsonl, line 2" in out

    def test_colours_take_the_place_of_marks(self, inspect, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        out = inspect([chat("one?", "two!")])
        assert "\x1b[1;32mtwo!<|im_end|>\x1b[0m" in out
        assert "⟦" not in out

    def test_bad_rows_are_counted_with_reason_and_first_place_and_not_shown(self, inspect):
        out = inspect([chat("q", "a"), chat("HIDDEN"), "broken", chat("HIDDEN")])
        assert "4 rows of conversations: 1 can be used, 3 cannot" in out
        assert "line 2 has no assistant turn; 1 more like it" in out
        assert "line 3 is not JSON" in out
        assert "HIDDEN" not in out

    def test_a_bad_row_that_is_asked_for_says_why(self, inspect):
        assert "cannot be used: it has no assistant turn" in inspect([chat("q", "a"), chat("q")], "--row", "2")

    def test_a_file_without_a_row_that_can_be_used_is_an_error_behind_its_summary(self, tmp_path):
        (tmp_path / "rows.jsonl").write_text("7\n")
        result = CliRunner().invoke(data, ["inspect", str(tmp_path / "rows.jsonl")])
        assert isinstance(result.exception, UserError)
        assert "no row can be used, for the reasons above" in str(result.exception)
        assert "1 row of conversations: 0 can be used, 1 cannot" in result.stdout

    def test_lengths_are_of_all_and_of_trained_tokens(self, inspect):
        out = inspect([chat("q", "a" * 3), chat("q", "a" * 10)], "--tokenizer", "byte", "--template", "plain")
        trained = next(line.split() for line in out.splitlines() if line.startswith("trained"))
        assert trained == ["trained", "2", "4", "4", "11", "11", "11", "15"]

    def test_text_cannot_steer_the_terminal(self, inspect):
        out = inspect([chat("q", "a\x1b]0;owned\x07b [bold]c")])
        assert "a\\x1b]0;owned\\x07b [bold]c" in out

    def test_what_is_not_used_is_counted(self, inspect):
        rows = [chat("one?", "two!") | {"id": 1, "lang": None}, chat("one?", "two!") | {"id": 2, "lang": "en"}]
        rows[0]["messages"][1]["mood"] = "good"
        assert "columns not used: id (2 rows), lang (1 row), mood of messages (1 row)" in inspect(rows)
        assert "not used" not in inspect([chat("one?", "two!")])


class TestPairs:
    def test_what_is_not_used_is_counted(self, inspect):
        row = {"prompt": "one?", "chosen": "two!", "rejected": "three!", "score": 0.5}
        assert "columns not used: score (1 row)" in inspect([row])

    def test_columns_of_nothing_make_no_pair(self, inspect):
        assert "1 row of conversations" in inspect(
            [chat("one?", "two!") | {"chosen": None, "rejected": None, "label": None}]
        )

    def test_prompt_and_both_answers_are_shown(self, inspect):
        rows = [{"prompt": "p?", "chosen": "good", "rejected": "bad"}, {"prompt": "p", "chosen": "x", "rejected": "x"}]
        out = inspect(rows)
        assert "chosen:\n⟦good<|im_end|>⟧" in out
        assert "rejected:\n⟦bad<|im_end|>⟧" in out
        assert "2 rows of pairs: 1 can be used, 1 cannot" in out
        assert "line 2 has a chosen answer that equals the rejected one" in out

    def test_one_sided_rows_show_their_one_answer(self, inspect):
        out = inspect([{"prompt": "p?", "completion": "good", "label": True}])
        assert "⟦good<|im_end|>⟧" in out
        assert "no rejected answer" in out


class TestRounds:
    def test_a_chain_shows_its_answers_with_rewards_and_all_turns_in_short(self, inspect):
        out = inspect([CHAIN, CHAIN])
        assert "answer 1 (reward 0, ended by the model):\n5" in out
        assert "answer 2 (reward 1, cut off at the longest length):\n4" in out
        assert "the data's answer:\n#### 4" in out
        turns = [line.split() for line in out.splitlines() if line.startswith(("first", "refinement"))]
        assert turns == [["first", "answer", "2", "100.0%", "0"], ["refinement", "1", "2", "0.0%", "1"]]

    def test_prompts_of_a_round_are_shown_without_a_template(self, inspect):
        row = {"messages": [{"role": "user", "content": "2 + 2?"}], "gold": "4", "place": "x", "extra": {}}
        out = inspect([row], "--tokenizer", "byte")
        assert "user:\n2 + 2?" in out
        assert "1 row of prompts: 1 can be used" in out

    def test_a_broken_chain_is_told(self, inspect):
        out = inspect([CHAIN, CHAIN | {"answers": [7]}, CHAIN | {"prompt": 7}])
        assert "3 rows of chains: 1 can be used, 2 cannot" in out


class TestMistakes:
    def test_a_row_that_is_not_there_says_how_many_there_are(self, inspect):
        with pytest.raises(UserError, match=r"--row 3: .* has 1 row"):
            inspect([chat("q", "a")], "--row", "3")

    def test_options_of_the_other_kind_are_refused(self, inspect, tmp_path):
        with pytest.raises(UserError, match="--window goes with a directory"):
            inspect([chat("q", "a")], "--window", "3")
        with pytest.raises(UserError, match="--row goes with a file"):
            CliRunner().invoke(data, ["inspect", str(tmp_path), "--row", "3"], catch_exceptions=False)

    def test_a_file_that_is_not_there_or_without_rows_is_told(self, inspect, tmp_path):
        with pytest.raises(UserError, match="There is no file"):
            CliRunner().invoke(data, ["inspect", str(tmp_path / "no.jsonl")], catch_exceptions=False)
        with pytest.raises(UserError, match="is empty"):
            inspect([])

    def test_a_tokenizer_without_a_template_says_what_to_pass(self, inspect):
        with pytest.raises(UserError, match="has no chat template"):
            inspect([chat("q", "a")], "--tokenizer", "byte")
