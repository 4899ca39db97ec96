"""A reward that a user brings along with --import: even a random model gets some of it."""

from collections.abc import Sequence
from typing import Any

from plmtune.registry import register


@register("reward", "vowels")
class Vowels:
    """How many vowels an answer has."""

    def score(self, items: Sequence[Any]) -> list[float]:
        """Score answers."""
        return [float(sum(letter in "aeiou" for letter in text)) for _, text in items]
