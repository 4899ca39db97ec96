"""Which part of an answer is code, and what it is run with."""

from typing import Any

import pytest

from plmtune.preference.rounds import programs
from plmtune.preference.rounds.chains import Chain
from plmtune.preference.rounds.programs import code_of, program
from plmtune.sandbox import run_python
from plmtune.tokenizers.message import Message

HUMAN_EVAL = '''from typing import List


def twice(x: int) -> int:
    return 2 * x


def total(numbers: List[int]) -> int:
    """ Twice the sum, said with a bad \\d escape.
    >>> total([1, 2])
    6
    """
'''
TEST = "def check(candidate):\n    assert candidate([1, 2]) == 6\n"


def chain(text: str, **extra: Any) -> Chain:
    return Chain((Message("user", text),), (), "x, row 1", extra)


class TestCode:
    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("```python3\nprint(1)\n```\nThat is it.", "print(1)\n"),
            ("```bash\npip install x\n```\nThen\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
            ("```Py title=x\nprint(1)\n```\n```\n1\n```", "print(1)\n"),
            ("```\r\nprint(1)\n```", "print(1)\n"),
            ("```py\na = 1\n```\nand\n```py\nb = 2", "a = 1\n\nb = 2"),
            ("Use ```x``` here:\n```python\nx = 1\n```", "x = 1\n"),
            ("x = 1", "x = 1"),
            ("```python3 print(1) ``` That is it.", "```python3 print(1) ``` That is it."),
        ],
    )
    def test_stands_between_fences_of_python(self, text: str, code: str) -> None:
        assert code_of(text) == code


class TestHumanEval:
    @pytest.mark.parametrize(
        "prompt",
        [
            HUMAN_EVAL,
            HUMAN_EVAL.strip(),
            f"Complete this function.\n\n{HUMAN_EVAL}",
            f"Go on:\n```python\n{HUMAN_EVAL}```",
        ],
    )
    @pytest.mark.parametrize(
        ("answer", "passed"),
        [
            ("    return twice(sum(numbers))", True),
            ("```python\n    return twice(sum(numbers))\n```", True),
            ("def total(numbers: List[int]) -> int:\n    return twice(sum(numbers))", True),
            ("from __future__ import annotations\ndef total(n: List[int]):\n    return 2 * sum(n)", True),
            ("    return sum(numbers)", False),
        ],
    )
    @pytest.mark.usefixtures("sandbox")
    def test_an_answer_may_go_on_from_what_was_asked(self, prompt: str, answer: str, passed: bool) -> None:
        tests = programs.tests_of(chain(prompt, test=TEST, entry_point="total"))
        assert tests is not None
        code, after = program(answer, tests)
        assert run_python(code, tests=after).passed == passed

    def test_a_question_without_code_begins_nothing(self) -> None:
        tests = programs.tests_of(chain("Write a def total(numbers) for me.", test=TEST, entry_point="total"))
        assert tests is not None
        assert (tests.begun, tests.before) == ("", "")


class TestMbpp:
    @pytest.mark.usefixtures("sandbox")
    def test_imports_of_sanitized_rows_are_there_for_the_tests(self) -> None:
        row = {"test_imports": ["import math"], "test_list": ["assert math.isclose(f(), 1.0)"]}
        tests = programs.tests_of(chain("Write f.", **row))
        assert tests is not None
        code, after = program("def f(): return 1.0", tests)
        assert run_python(code, tests=after).passed
