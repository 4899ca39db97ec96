"""The output of lm-eval's `evaluate` in the form of our result files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

_PROMPTS_KEPT = 3  # of each task, for a person to read


def collect(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return (tasks, groups, samples) of lm-eval's output for a result file.

    Args:
        raw: with its samples (log_samples=True).
    """
    samples = {task: _samples(rows) for task, rows in (raw.get("samples") or {}).items()}
    tasks = {}
    for name in raw["configs"]:
        counts = raw["n-samples"][name]
        tasks[name] = {
            "version": _plain(raw["versions"].get(name)),
            "num_fewshot": raw["n-shot"].get(name),
            "samples": counts["effective"],
            "documents": counts["original"],
            "prompt_hash": _prompts_hash(samples.get(name, [])),
            "metrics": _metrics(raw["results"][name], raw["higher_is_better"].get(name) or {}),
        }
    groups = {}
    for name, found in (raw.get("groups") or {}).items():
        groups[name] = {
            "version": _plain(raw["versions"].get(name)),
            "num_fewshot": raw["n-shot"].get(name),
            "samples": found.get("sample_len"),
            "tasks": list(raw["group_subtasks"][name]),
            "metrics": _metrics(found, raw["higher_is_better"].get(name) or {}),
        }
    return tasks, groups, samples


def _samples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join lm-eval's rows, one a document and filter, to one row a document."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        entry = found.get(row["doc_id"])
        if entry is None:
            entry = found[row["doc_id"]] = {
                "id": row["doc_id"],
                "doc_hash": row["doc_hash"],
                "prompt_hash": row["prompt_hash"],
                "target": _plain(row["target"]),
                # A request has one answer, unless the task repeats it.
                "responses": [_plain(one[0] if len(one) == 1 else one) for one in row["resps"]],
                "metrics": {},
            }
            if len(found) <= _PROMPTS_KEPT:
                entry["prompt"] = str(row["arguments"][0][0])
        filtered = [_plain(one) for one in row["filtered_resps"]]
        if filtered != entry["responses"]:
            entry.setdefault("filtered", {})[row["filter"]] = filtered
        for metric in row["metrics"]:
            entry["metrics"][f"{metric},{row['filter']}"] = _number(row[metric])
    return [found[index] for index in sorted(found)]


def _prompts_hash(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return one hash of all prompts of a task, for comparing evaluations."""
    if not rows:
        return None
    text = "".join(f"{row['doc_hash']} {row['prompt_hash']}\n" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def _metrics(found: Mapping[str, Any], better: Mapping[str, bool | None]) -> dict[str, Any]:
    metrics = {}
    for key, value in found.items():
        metric, comma, chosen_by = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue  # name, alias, sample_len; errors are read below
        stderr = _plain(found.get(f"{metric}_stderr,{chosen_by}"))
        metrics[key] = {
            "value": _number(value),
            "stderr": stderr if isinstance(stderr, float) else None,  # "N/A" where there is none
            "higher_is_better": better.get(metric),
        }
    return metrics


def _number(value: Any) -> Any:
    plain = _plain(value)
    return float(plain) if isinstance(plain, bool | int) else plain


def _plain(value: Any) -> Any:
    """Convert `value` for JSON; NaN becomes null."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # numpy's and torch's scalars
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(one) for one in value]
    return str(value)
