"""Results of evaluations that nobody ran, for tests of what reads them."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from plmtune.evaluation import results

Task = tuple[dict[str, Any], list[dict[str, Any]]]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def task(values: Sequence[Any], *, metric: str = "acc,none", asked: str = "q", value: float | None = None) -> Task:
    """A task of which document i gave values[i]; `asked` is what its prompts were, `value` a score that is no mean."""
    rows = [
        {"id": i, "doc_hash": digest(f"document {i}"), "prompt_hash": digest(f"{asked} {i}"), "metrics": {metric: v}}
        for i, v in enumerate(values)
    ]
    n, stderr = len(values), None
    if value is None:
        value = sum(values) / n
        stderr = math.sqrt(sum((v - value) ** 2 for v in values) / (n - 1) / n)
    entry = {
        "version": 1.0,
        "num_fewshot": 0,
        "samples": n,
        "documents": n,
        "prompt_hash": digest(asked),
        "metrics": {metric: {"value": value, "stderr": stderr, "higher_is_better": value < 1.5}},
    }
    return entry, rows


def result(name: str, tasks: dict[str, Task], **changes: Any) -> dict[str, Any]:
    return {
        "format": results.FORMAT,
        "version": results.VERSION,
        "status": "complete",
        "model": {"name": name, "path": name, "digest": "0", "parameters": None, "dtype": "float32", "step": None},
        "settings": {"limit": None},
        "environment": {"lm_eval": "0.4.13", "precision": "float32", "device_name": "A processor"},
        "git": None,
        "started": "2025-03-17T09:30:00Z",
        "seconds": 1.0,
        "tasks": {task: entry for task, (entry, _) in tasks.items()},
        "groups": {},
        "failed": {},
        "samples": {task: rows for task, (_, rows) in tasks.items()},
        **changes,
    }
