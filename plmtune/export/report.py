"""What a verification found: checks with their limits, figures without, and causes, each once."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field

from plmtune.io.tables import Column, Table


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        value: what was found; smaller is better.
        threshold: what it may be at most; None: a figure, without a verdict.
        remark: what is to be known of it.
        cause: why it failed.
    """

    name: str
    value: float
    threshold: float | None
    passed: bool
    remark: str | None = None
    cause: str | None = None


@dataclass
class Report:
    """All comparisons of an export.

    Attributes:
        runtime: the program that ran it.
        kind: the type that the export says it is of, or how most of its numbers are written.
        positions: of how many tokens the log-probabilities were compared.
        warnings: what the type costs, where that is much.
    """

    export: str
    against: str
    runtime: str
    kind: str
    positions: int
    checks: list[Check] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        """Whether the export is the model, as its type can hold it."""
        return not self.failed

    @property
    def cause(self) -> str:
        """Why it failed, each cause once."""
        causes = dict.fromkeys(check.cause.rstrip(".") for check in self.failed if check.cause)
        return " ".join(f"{cause}." for cause in causes)

    @property
    def verdict(self) -> str:
        """Which checks failed, and why: the end of a sentence."""
        return f"{', '.join(check.name for check in self.failed)}. {self.cause}"

    def table(self) -> Table:
        title = f"{self.export} in {self.runtime}, {self.kind}, {self.positions} positions"
        numbers = (Column("value", right=True), Column("at most", right=True))
        table = Table([Column("check", folds=True), *numbers, "result", Column("remark", folds=True)], title=title)
        for check in self.checks:
            limit = "-" if check.threshold is None else f"{check.threshold:.3g}"
            result = "FAILED" if not check.passed else "-" if check.threshold is None else "ok"
            table.add(check.name, f"{check.value:.3g}", limit, result, check.remark or "")
        return table

    def as_json(self) -> str:
        data = asdict(self) | {"passed": self.passed}
        for check in data["checks"]:
            check["value"] = check["value"] if math.isfinite(check["value"]) else None
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    def add(
        self, name: str, value: float, threshold: float | None, remark: str | None = None, cause: str | None = None
    ) -> Check:
        """Append a check; a value that is not a number fails. The cause is kept of one that failed."""
        passed = threshold is None or value <= threshold
        self.checks.append(Check(name, value, threshold, passed, remark, None if passed else cause))
        return self.checks[-1]
