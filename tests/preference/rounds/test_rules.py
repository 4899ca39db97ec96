"""What a pair must be to be trained on."""

from decimal import Decimal
from typing import Any

import pytest

from plmtune.errors import UserError
from plmtune.preference.rounds.chains import Chain, Turn
from plmtune.preference.rounds.rules import find_rules, number_of
from plmtune.tokenizers.message import Message


def check(name: str, *texts: str, ended: bool = True, gold: str | None = None, **extra: Any) -> str | None:
    """What the rule says of a chain, from first answer to last."""
    turns = tuple(Turn(text, ended) for text in texts)
    chain = Chain((Message("user", "?"),), turns, "x, row 1", extra, gold)
    (rule,) = find_rules([name])
    return rule(chain, turns[-1], turns[0])


class TestNames:
    def test_an_unknown_rule_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(UserError, match=r"rule has no component not_emty. Did you mean not_empty\?"):
            find_rules(["not_emty"])


class TestText:
    def test_empty_answers(self) -> None:
        assert check("not_empty", "a", "b") is None
        assert check("not_empty", " \n", "b") == check("not_empty", "a", "") == "has an empty answer"

    def test_a_chosen_answer_that_was_cut(self) -> None:
        assert check("not_truncated", "a", "b") is None
        cut = "has a chosen answer that was cut at generation.max_new_tokens"
        assert check("not_truncated", "a", "b", ended=False) == cut

    @pytest.mark.parametrize(
        "text",
        [
            "I am sure of it. " * 9,
            "no\n" * 40,
            "ha " * 60,
            "我不知道。" * 12,
            "abc def. " + "The end is near, my friend. " * 8,
        ],
    )
    def test_going_in_circles(self, text: str) -> None:
        assert check("not_repeated", "a", text) == "has a chosen answer that repeats itself"
        assert check("not_repeated", text, "a") is None  # rejected for it

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "yes yes yes",
            "def f(n):\n    if n == 0:\n        return 1\n    if n == 1:\n        return 1\n    return f(n - 1)\n",
            "She bought 3 apples for $2 each and 4 pears for $1 each. 3*2=6, 4*1=4, 6+4=10. So she paid 10 dollars.",
            "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
            ", ".join(map(str, range(60))),
        ],
    )
    def test_what_does_not_go_in_circles(self, text: str) -> None:
        assert check("not_repeated", "a", text) is None


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("so\n#### 72", "72"),
            ("#### 1,234.50", "1234.5"),
            ("####$5.", "5"),
            ("#### -3 apples", "-3"),
            ("#### $ 1,000", "1000"),
            ("#### 0.50%", "0.5"),
            ("#### 12 34", "12"),
            ("#### -1 234 567.5", "-1234567.5"),
            ("#### 2024 100", "2024"),
            ("#### - 3", "-3"),
            ("#### 1\n#### 2", "2"),
            ("The answer is 72", None),
            ("####", None),
            ("#### none", None),
        ],
    )
    def test_the_number_after_the_hashes(self, text: str, number: str | None) -> None:
        assert number_of(text) == (Decimal(number) if number else None)

    def test_the_known_number_decides(self) -> None:
        assert check("final_number", "#### 1", "6*3=18\n#### 18.00", gold="Well.\n#### 18") is None
        wrong = "has a chosen answer with another number than the known one"
        assert check("final_number", "#### 18", "#### 17", gold="#### 18") == wrong
        assert check("final_number", "#### 18", "18", gold="#### 18") == wrong
        assert check("final_number", "a", "#### 1") == "has no known answer that ends in #### and a number"

    def test_last_turns_that_agree(self) -> None:
        assert check("last_turns_agree", "#### 1", "so\n#### 1,000", "thus\n#### 1000") is None
        assert check("last_turns_agree", "it is\nParis.", "I say\nparis") is None
        disagree = "has last two answers with different results"
        assert check("last_turns_agree", "#### 1", "#### 1", "#### 2") == disagree
        assert check("last_turns_agree", "#### 1") == disagree


class TestCode:
    @pytest.mark.usefixtures("sandbox")
    def test_tests_decide_in_whichever_form(self) -> None:
        good, bad = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", "def add(a, b):\n    return a - b"
        human_eval: dict[str, Any] = {
            "test": "def check(f):\n    assert f(2, 3) == 5\n",
            "entry_point": "add",
            "prompt": "def add(a, b):\n",
        }
        mbpp: dict[str, Any] = {"test_list": ["assert add(2, 3) == 5"], "test_setup_code": "import math"}
        for row in (human_eval, mbpp, {"tests": "assert add(2, 3) == 5"}):
            assert check("tests_pass", bad, good, **row) is None
        assert check("tests_pass", good, bad, **mbpp) == "has a chosen answer whose code fails its tests"
        assert check("tests_pass", good, "    return a + b", **human_eval) is None  # goes on from the prompt

    def test_a_row_without_tests(self) -> None:
        assert check("tests_pass", "a", "b") == "has no tests for code"

    def test_a_row_whose_tests_never_run(self) -> None:
        row = {"tests": "def check(f):\n    assert f(2) == 4\n"}
        assert check("tests_pass", "a", "b", **row) == "has tests for code that are never run"
