"""Rules for pairs. Each returns None, or why the pair is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import cast

from plmtune.preference.rounds.chains import Chain, Turn
from plmtune.preference.rounds.programs import program, tests_of
from plmtune.registry import load, register
from plmtune.sandbox import run_python, with_calls

Rule = Callable[[Chain, Turn, Turn], str | None]  # (chain, chosen, rejected)

_HASHES = re.compile(r"####\s*([^\n]*)")
_NUMBER = re.compile(r"(?:- ?)?(?:\d{1,3}(?: \d{3})+(?!\d)|\d[\d,]*)(?:\.\d+)?|(?:- ?)?\.\d+")  # 1 000, 1,000, .5
_UNITS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")  # words, marks, and signs of scripts without spaces

_GRAM = 8  # units
_MOST_REPEATED = 0.3  # largest share of repeated grams


def find_rules(names: Sequence[str]) -> list[Rule]:
    """Look rules up by name."""
    return [cast(Rule, load("rule", name)) for name in names]


@register("rule", "not_empty")
def not_empty(chain: Chain, chosen: Turn, rejected: Turn) -> str | None:
    """Neither answer is empty."""
    if not chosen.text.strip() or not rejected.text.strip():
        return "has an empty answer"
    return None


@register("rule", "not_truncated")
def not_truncated(chain: Chain, chosen: Turn, rejected: Turn) -> str | None:
    """The model ended the chosen answer; the rejected one may have been cut."""
    return None if chosen.ended else "has a chosen answer that was cut at generation.max_new_tokens"


@register("rule", "not_repeated")
def not_repeated(chain: Chain, chosen: Turn, rejected: Turn) -> str | None:
    """Most eight-word sequences of the chosen answer occur once; the rejected answer may repeat itself."""
    units = _UNITS.findall(chosen.text)
    grams = [tuple(units[start : start + _GRAM]) for start in range(len(units) - _GRAM + 1)]
    if len(grams) > _GRAM and len(set(grams)) < (1 - _MOST_REPEATED) * len(grams):
        return "has a chosen answer that repeats itself"
    return None


@register("rule", "last_turns_agree")
def last_turns_agree(chain: Chain, chosen: Turn, rejected: Turn) -> str | None:
    """The last two answers have the same result: the number after ``####``, else the last line."""
    if len(chain.answers) < 2 or _result(chain.answers[-1].text) != _result(chain.answers[-2].text):
        return "has last two answers with different results"
    return None


@register("rule", "final_number")
def final_number(chain: Chain, chosen: Turn, rejected: Turn) -> str | None:
    """The chosen answer has the known answer's number after ``####`` (GSM8K, arXiv 2110.14168)."""
    wanted = number_of(chain.gold or "")
    if wanted is None:
        return "has no known answer that ends in #### and a number"
    return None if number_of(chosen.text) == wanted else "has a chosen answer with another number than the known one"


@register("rule", "tests_pass")
def tests_pass(chain: Chain, chosen: Turn, rejected: Turn) -> str | None:
    """The chosen answer's code passes the tests of its row, in a sandbox."""
    tests = tests_of(chain)
    if tests is None:
        return "has no tests for code"
    if with_calls(tests.code).never is not None:
        return "has tests for code that are never run"
    code, after = program(chosen.text, tests)
    return None if run_python(code, tests=after).passed else "has a chosen answer whose code fails its tests"


def number_of(text: str) -> Decimal | None:
    """The number after the last ``####``; without thousands separators, currency, units and a final dot."""
    found = _HASHES.findall(text)
    number = _NUMBER.search(re.sub(r"\$ ?", "", found[-1])) if found else None
    try:
        return Decimal(re.sub("[, ]", "", number.group())) if number else None
    except InvalidOperation:
        return None


def _result(text: str) -> Decimal | str:
    number = number_of(text)
    lines = [line.strip(" .").lower() for line in text.split("\n") if line.strip()]
    return number if number is not None else lines[-1] if lines else ""
