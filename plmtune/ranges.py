"""Ranges of settings, used in a schema's annotations and checked by components with the same messages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Range:
    """The values that a number may have; all of them are finite.

    Used in an annotation, ``Annotated[int, Range(1)]``, or by `check`.
    """

    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None

    def allows(self, value: Any) -> bool:
        """Whether a number lies in the range; NaN and infinity do not."""
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        bounds = (("at least", self.least), ("above", self.above), ("below", self.below), ("at most", self.most))
        words = [f"{word} {bound:,}" for word, bound in bounds if bound is not None]
        return f"must be {' and '.join(words) or 'finite'}"


class NotEmpty:
    """A text that is not blank."""

    def allows(self, value: Any) -> bool:
        return bool(str(value).strip())

    def __str__(self) -> str:
        return "must not be empty"


class PathPart:
    """A text that names one file or directory, without a path to it."""

    def allows(self, value: Any) -> bool:
        return value.strip() not in ("", "..") and Path(value).name == value

    def __str__(self) -> str:
        return "must be one part of a path, as in runs/NAME"


Rule = Range | NotEmpty | PathPart

NOT_NEGATIVE = Range(least=0)
AT_LEAST_1 = Range(least=1)
SHARE = Range(least=0, below=1)
# Far above any use; larger values are typing errors and end in infinity.
RATE = Range(least=0, most=10)  # of learning, and weight decay
TINY = Range(least=0, most=1)  # what keeps a division from zero
WEIGHT = Range(least=0, most=1000)  # of a term in a loss
STRENGTH = Range(above=0, most=1000)  # by which a loss scales its margin
WIDTH = Range(least=1, most=2**24)  # of a matrix: far above any real one; products of two fit into 64 bits


def check(rule: Rule, **settings: Any) -> None:
    """Refuse settings that break a rule. None means that a setting is not given."""
    for name, value in settings.items():
        if value is not None and not rule.allows(value):
            raise ValueError(f"{name} ({value}) {rule}")
