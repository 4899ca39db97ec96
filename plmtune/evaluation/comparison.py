"""Comparison of results: differences with standard errors, paired if the questions are the same.

Two results are paired document by document if both had the same prompt (`doc_hash` and `prompt_hash` agree), which
removes the difficulty of the questions from the error. Scores of 0 and 1 are tested by McNemar's exact test, others by
flipping the signs of the differences. If the prompts differ, only the scores are compared. All p-values of one
comparison are corrected together by Holm's method (Scandinavian Journal of Statistics 6, 1979).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from plmtune.evaluation.result_table import Line, Score, direction, labels, lines, metric_label, score, show_number
from plmtune.io.tables import Cell, Column, Table

Result = Mapping[str, Any]
Test = Literal["McNemar", "sign flips", "z"]

Z_95 = 1.959963984540054  # standard deviations that contain 95% of a normal distribution
_FLIPS = 10_000
_EXACT_FLIPS = 12  # up to so many documents all 2^n flips are tried
_CHUNK = 1 << 22  # signs sampled at a time
# Largest difference between a score that is computed from the samples and the reported one.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Difference:
    """A result's score minus the first result's.

    Attributes:
        mean: over the shared documents if paired, else of the two scores.
        stderr: None if lm-eval gives no errors of the scores and the documents cannot be paired.
        p: two-sided p-value of no difference; None if `stderr` is.
        corrected: `p` corrected for all tests of the comparison.
        shared: documents with the same prompt in both.
        paired: whether only these were compared.
        note: why they are not paired, or that only some are.
    """

    mean: float
    stderr: float | None
    p: float | None
    shared: int
    paired: bool
    test: Test | None
    note: str = ""
    corrected: float | None = None


@dataclass(frozen=True)
class Row:
    """A metric of a task: scores of each result, and differences to the first (whose own is None)."""

    line: Line
    higher_is_better: bool | None
    scores: tuple[Score | None, ...]
    differences: tuple[Difference | None, ...]


def compare(results: Sequence[Result], *, all_tasks: bool = False) -> list[Row]:
    """Compare results with the first of them.

    Args:
        all_tasks: also the tasks that a group sums up.
    """
    rows = []
    for line in lines(results, all_tasks=all_tasks):
        scores = tuple(score(result, line) for result in results)
        differences = (None, *(_difference(results[0], other, line) for other in results[1:]))
        rows.append(Row(line, direction(scores), scores, differences))
    found = iter(holm([one.p for row in rows for one in row.differences if one and one.p is not None]))

    def correct(one: Difference | None) -> Difference | None:
        return replace(one, corrected=next(found)) if one and one.p is not None else one

    return [replace(row, differences=tuple(map(correct, row.differences))) for row in rows]


def table(rows: Sequence[Row], results: Sequence[Result]) -> list[Table | str]:
    """Return the differences to the first result, one a line."""
    names = labels(results)
    columns = [Column("task", key=True), Column("metric", folds=True), Column(""), Column("difference")]
    columns += [Column("p", right=True), Column("test", folds=True, drop=1)]
    grid = Table(columns, title=f"differences to {names[0]}")
    for row in rows:
        task, metric = row.line.task, metric_label(row.line, row.higher_is_better)
        for name, one in zip(names, row.differences, strict=True):
            if one is None:
                continue
            error = f" ± {show_number(one.stderr)}" if one.stderr is not None else ""
            test = f"{one.test}, {one.shared} pairs" if one.paired else one.test or "none"
            style = ""
            if one.corrected is not None and one.corrected < 0.05 and row.higher_is_better is not None:
                style = "green" if (one.mean > 0) == row.higher_is_better else "red"
            difference = Cell(f"{'+' * (one.mean >= 0)}{show_number(one.mean)}{error}", style)
            note = test + (f" ({one.note})" if one.note else "")
            p = "-" if one.corrected is None else "<0.0001" if one.corrected < 1e-4 else f"{one.corrected:.4f}"
            grid.add(task, metric, name, difference, p, note)
            task = metric = ""
    tests = sum(one is not None and one.p is not None for row in rows for one in row.differences)
    corrected = f"p is corrected for these {tests} tests together (Holm); --json also has it uncorrected."
    return [grid, *([corrected] if tests > 1 else [])]


def as_json(rows: Sequence[Row], files: Sequence[Path]) -> dict[str, Any]:
    """Return the comparison as JSON values; `files` are those of the results."""
    return {
        "results": [str(file) for file in files],
        "rows": [
            {"task": row.line.task, "metric": row.line.metric}
            | {key: value for key, value in asdict(row).items() if key != "line"}
            for row in rows
        ],
    }


def _difference(first: Result, other: Result, line: Line) -> Difference | None:
    a, b = score(first, line), score(other, line)
    if a is None or b is None or a.value is None or b.value is None:
        return None
    seen_a, seen_b = _samples(first, line), _samples(other, line)
    shared = sorted(seen_a.keys() & seen_b.keys(), key=repr)
    reason = _unpaired_because(seen_a, seen_b, shared)
    if not reason:
        measure = _measure(seen_a, a.value)
        if measure is None or _measure(seen_b, b.value) is not measure:
            reason = "unpaired: the score is no mean of the samples"
        elif found := _paired([seen_a[key] for key in shared], [seen_b[key] for key in shared], measure):
            all_of_both = len(shared) == len(seen_a) == len(seen_b)
            return replace(found, note="" if all_of_both else f"of {len(seen_a)} and {len(seen_b)}")
        else:
            reason = "unpaired: the same documents have other lengths"
    stderr = p = None
    if a.stderr is not None and b.stderr is not None:
        stderr, mean = math.hypot(a.stderr, b.stderr), b.value - a.value
        p = math.erfc(abs(mean) / stderr / math.sqrt(2)) if stderr else float(mean == 0)
    return Difference(b.value - a.value, stderr, p, len(shared), False, "z" if p is not None else None, reason)


def _samples(result: Result, line: Line) -> dict[Hashable, Any]:
    """Return each document's value of a metric, for all tasks of a group, by task and prompt."""
    found: dict[Hashable, Any] = {}
    seen: Counter[Hashable] = Counter()
    for task in _leaves(result, line.task):
        for row in result["samples"].get(task, ()):
            if line.metric in row["metrics"]:
                key = (task, row.get("doc_hash"), row.get("prompt_hash"))
                found[(*key, seen[key])] = row["metrics"][line.metric]  # data sets contain some documents twice
                seen[key] += 1
    return found


def _leaves(result: Result, name: str, depth: int = 0) -> list[str]:
    group = result["groups"].get(name)
    if group is None or depth == 8:
        return [name]
    return list(dict.fromkeys(leaf for child in group["tasks"] for leaf in _leaves(result, child, depth + 1)))


def _unpaired_because(a: Mapping[Hashable, Any], b: Mapping[Hashable, Any], shared: Sequence[Hashable]) -> str:
    if not a or not b:
        return "unpaired: a result has no samples"
    # A few prompts that are equal by chance are no sample of the rest.
    if len(shared) >= 2 and 2 * len(shared) >= min(len(a), len(b)):
        return ""
    if len(shared) >= 2:
        return f"unpaired: only {len(shared)} documents have the same prompt"
    same_documents = {key[:2] for key in a} & {key[:2] for key in b}  # type: ignore[index]
    return "unpaired: the prompts differ" if same_documents else "unpaired: the documents differ"


class _Measure(NamedTuple):
    """How a score follows from the rate: the sum of the samples over that of their words or bytes, or their number."""

    score: Callable[[float], float]
    slope: Callable[[float], float]


_MEAN = _Measure(lambda rate: rate, lambda rate: 1.0)
_PERPLEXITY = _Measure(lambda rate: math.exp(-rate), lambda rate: -math.exp(-rate))
_BITS = _Measure(lambda rate: -rate / math.log(2), lambda rate: -1 / math.log(2))


def _rate(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the rate of samples [n] or, with words or bytes, [n, 2], and the influence of each on it, [n]."""
    values, weights = (x, np.ones(len(x))) if x.ndim == 1 else x.T
    rate = float(values.sum() / weights.sum())
    return rate, (values - rate * weights) / weights.sum()


def _measure(samples: Mapping[Hashable, Any], reported: float) -> _Measure | None:
    """Find lm-eval's aggregation that gives the reported score, by computing each."""
    try:
        x = np.array(list(samples.values()), dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    weighted = x.ndim == 2 and x.shape[1] == 2 and bool((x[:, 1] > 0).all())
    if not np.isfinite(x).all() or not (x.ndim == 1 or weighted):
        return None
    rate, _ = _rate(x)
    for measure in (_PERPLEXITY, _BITS) if weighted else (_MEAN, _PERPLEXITY):
        with contextlib.suppress(OverflowError):
            if abs(measure.score(rate) - reported) <= _TOLERANCE * max(1.0, abs(reported)):
                return measure
    return None


def _paired(first: Sequence[Any], other: Sequence[Any], measure: _Measure) -> Difference | None:
    """Return the difference over the same documents; None if their words or bytes differ."""
    a, b = np.array(first, dtype=np.float64), np.array(other, dtype=np.float64)
    n = len(a)
    if a.ndim == 2 and not np.array_equal(a[:, 1], b[:, 1]):
        return None
    differences = (b - a).reshape(n, -1)[:, 0]
    (rate_a, influence_a), (rate_b, influence_b) = _rate(a), _rate(b)
    influence = measure.slope(rate_b) * influence_b - measure.slope(rate_a) * influence_a
    stderr = math.sqrt(n / (n - 1) * float((influence**2).sum()))
    if measure is _MEAN and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        test: Test = "McNemar"
        p = mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        # The scores are monotone in the sums of their samples, so the sums are tested instead.
        test, p = "sign flips", sign_flips(differences)
    return Difference(measure.score(rate_b) - measure.score(rate_a), stderr, p, n, True, test)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test (Psychometrika 12, 1947).

    Args:
        gained, lost: documents that only the second, and only the first, got right.
    """
    from scipy.stats import binomtest  # its import takes a second

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flips(differences: np.ndarray) -> float:
    """The two-sided p-value of a paired permutation test of differences [n]: the share of flips with as large a sum.

    For few documents all flips are tried, else `_FLIPS` with a fixed seed, and the given signs.
    """
    d = differences[differences != 0]
    n = len(d)
    if n == 0:
        return 1.0
    # Sums that differ only by the order of additions count as equal.
    least = abs(d.sum()) - 1e-9 * np.abs(d).sum()
    if n <= _EXACT_FLIPS:
        signs = 1 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)  # [2^n, n]
        return float((np.abs(signs @ d) >= least).mean())
    generator = np.random.default_rng(0)
    extreme, left = 0, _FLIPS
    while left:
        take = min(left, max(1, _CHUNK // n))
        bits = np.unpackbits(generator.integers(0, 256, size=(take, -(-n // 8)), dtype=np.uint8), axis=1, count=n)
        extreme += int((np.abs(d.sum() - 2 * (bits @ d)) >= least).sum())
        left -= take
    return (extreme + 1) / (_FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
