"""What a bar came to: how many were tried, how many passed, and what went wrong, in words."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts the trials of one bar, and shows how far they are.

    Attributes:
        name: what is tried.
        looked_at: what each trial compares.
        failures: a sentence for each trial that did not pass.
        where: how often something was seen.
        figures: what was measured.
    """

    name: str
    looked_at: str
    tried: int = 0
    passed: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    where: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began = time.perf_counter()

    def add(self, trial: str, complaints: Sequence[str]) -> None:
        """Count a trial; it passed if there is no complaint."""
        self.tried += 1
        self.passed += not complaints
        if complaints:
            self.failures.append(f"{trial}: {'; '.join(complaints)}")
        self.seconds = time.perf_counter() - self._began
        print(f"{self.name}: {self.passed} of {self.tried}", file=sys.stderr, flush=True)

    def saw(self, what: str, times: int = 1) -> None:
        """Count something that is no trial's result."""
        self.where[what] = self.where.get(what, 0) + times

    def at_most(self, what: str, figure: float) -> None:
        """Keep the largest figure."""
        self.figures[f"{what}, at most"] = max(self.figures.get(f"{what}, at most", figure), figure)

    @property
    def all_passed(self) -> bool:
        return self.passed == self.tried > 0


def table(tallies: Iterable[Tally]) -> str:
    """A Markdown table of the bars, and below it what else was seen."""
    lines = ["| bar | tried | passed | seconds | what was looked at |", "|---|---|---|---|---|"]
    notes = []
    for tally in tallies:
        lines.append(f"| {tally.name} | {tally.tried} | {tally.passed} | {tally.seconds:.0f} | {tally.looked_at} |")
        seen = [f"{place} {count}" for place, count in sorted(tally.where.items(), key=lambda item: -item[1])]
        seen += [f"{what} {figure:.3g}" for what, figure in tally.figures.items()]
        if seen:
            notes.append(f"* {tally.name}: {'; '.join(seen)}.")
        notes += [f"* **{tally.name} failed.** {failure}" for failure in tally.failures]
    return "\n".join([*lines, "", *notes])
