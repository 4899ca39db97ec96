"""Result files of evaluations: one JSON file each, made of lm-eval's output.

docs/results.md has the file's schema.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from plmtune.errors import UserError, refuse_pipe
from plmtune.io.atomic import atomic_write
from plmtune.io.provenance import device_name, versions
from plmtune.io.untrusted import load_json

if TYPE_CHECKING:
    import torch

FORMAT = "plmtune evaluation"
VERSION = 1

_PACKAGES = ("plmtune", "torch", "lm_eval", "tokenizers", "numpy")
HOW_TO_MAKE = "Make results in evaluations/: plmtune eval CHECKPOINT --suite quick"
_CHECKSUM = "xxh3_128"
_END = re.compile(rb',\n "[^"]{8}": "[^"]{32}"\n\}\n$')
_PROMPTS_KEPT = 3  # of each task, for a person to read
# Keys of a result file that must hold objects.
_OBJECTS = ("model", "settings", "environment", "tasks", "groups", "failed", "samples")


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return versions, device, threads and the precision of the weights for a result."""
    import torch

    where = {"device": str(device), "device_name": device_name(device), "threads": torch.get_num_threads()}
    return {**versions(_PACKAGES), **where, "precision": str(dtype).removeprefix("torch.")}


def collect(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return (tasks, groups, samples) of lm-eval's output, with log_samples=True, for a result file."""

    def entry(name: str, found: Mapping[str, Any], **counts: Any) -> dict[str, Any]:
        return {
            "version": _plain(raw["versions"].get(name)),
            "num_fewshot": raw["n-shot"].get(name),
            **counts,
            "metrics": _metrics(found, raw["higher_is_better"].get(name) or {}),
        }

    samples = {task: _samples(rows) for task, rows in (raw.get("samples") or {}).items()}
    tasks, groups = {}, {}
    for name in raw["configs"]:
        number, rows = raw["n-samples"][name], samples.get(name)
        text = "".join(f"{row['doc_hash']} {row['prompt_hash']}\n" for row in rows or ())
        prompts = hashlib.sha256(text.encode()).hexdigest() if rows else None  # for comparing evaluations
        counts = {"samples": number["effective"], "documents": number["original"], "prompt_hash": prompts}
        tasks[name] = entry(name, raw["results"][name], **counts)
    for name, found in (raw.get("groups") or {}).items():
        members = list(raw["group_subtasks"][name])
        groups[name] = entry(name, found, samples=found.get("sample_len"), tasks=members)
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


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write a result atomically: a readable head, one sample a line, and the hash of it all at the end."""
    head = {key: value for key, value in result.items() if key != "samples"}
    digest = xxhash.xxh3_128()
    with atomic_write(path, user_error=True) as temporary, temporary.open("wb") as file:

        def write(text: str) -> None:
            digest.update(text.encode())
            file.write(text.encode())

        write(json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}"))
        write(',\n "samples": {')
        for index, (task, rows) in enumerate((result.get("samples") or {}).items()):
            lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
            write(("," if index else "") + f"\n  {json.dumps(task)}: [\n   " + ",\n   ".join(lines) + "\n  ]")
        write("\n }")
        file.write(f',\n "{_CHECKSUM}": "{digest.hexdigest()}"\n}}\n'.encode())


def step_file(run: Path, step: int) -> Path:
    """Return the file of a run's own result after a step."""
    return run / "evaluations" / f"step-{step:08d}.json"


def load(path: str | Path) -> dict[str, Any]:
    """Read a result that `save` wrote; UserError if it is missing, damaged, of another kind or of a newer version."""
    path = Path(path)
    refuse_pipe(path)
    try:
        data = path.read_bytes()
        result = load_json(data)
    except FileNotFoundError:
        raise UserError(f"There is no result {path} (seen from {Path.cwd()}). {HOW_TO_MAKE}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged or no result: it is not valid JSON ({error}).") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise UserError(f"{path} is no result of plmtune eval: its key format is not {FORMAT!r}.")
    if result.get("version") != VERSION:
        raise UserError(
            f"{path}: version {result.get('version')!r:.40} of the format, and this plmtune reads version {VERSION}. "
            "Read it with the plmtune that wrote it, or evaluate again."
        )
    try:
        end, said = _END.search(data), result.pop(_CHECKSUM, None)
        if (end or said) and (end is None or said != xxhash.xxh3_128_hexdigest(data[: end.start()])):
            raise ValueError("it does not match its own checksum")  # files of earlier versions have none
        _check(result)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Evaluate again with plmtune eval.") from error
    return result


def load_all(paths: Sequence[str | Path], log: Callable[[str], None]) -> dict[Path, dict[str, Any]]:
    """Read results; for a folder its .json files by name, and of repeated evaluations only the newest.

    `log` gets a message for each file that is left out.
    """
    given: set[Path] = set()
    for path in map(Path, paths):
        if path.resolve() in given:
            raise UserError(f"{path} is given twice: a result is compared with others, not with itself.")
        given.add(path.resolve())
    found: dict[Path, dict[str, Any]] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            found[path] = load(path)
            continue
        inside = sorted(path.glob("*.json"))
        if not inside:
            raise UserError(f"{path} holds no result: it has no .json file. {HOW_TO_MAKE}")
        # A file that is also given by name has its place there.
        found |= _without_repeats({file: load(file) for file in inside if file.resolve() not in given}, log)
    return found


def _without_repeats(found: Mapping[Path, dict[str, Any]], log: Callable[[str], None]) -> dict[Path, dict[str, Any]]:
    """Leave out older results of the same weights and settings; a complete result precedes a partial one."""
    newest: dict[str, tuple[tuple[bool, str], Path]] = {}
    for file, result in found.items():
        digest = result["model"].get("digest")
        what = json.dumps([digest, result["settings"]], sort_keys=True) if digest else str(file)
        age = (result["status"] == "complete", str(result.get("started")))
        before, best = newest.setdefault(what, (age, file))
        if best == file:
            continue
        (_, older), newest[what] = sorted(((before, best), (age, file)), key=itemgetter(0))
        log(f"{older} is left out: {newest[what][1].name} measured the same model with the same settings again")
    kept = {file for _, file in newest.values()}
    return {file: result for file, result in found.items() if file in kept}


def _check(result: dict[str, Any]) -> None:
    """Check the structure of a result for all later readers; ValueError names the wrong key."""

    def need(right: bool, otherwise: str) -> None:
        if not right:
            raise ValueError(otherwise)

    for key in _OBJECTS:
        need(isinstance(result.get(key), dict), f"its key {key} holds no object")
    need(result.get("status") in ("complete", "partial"), "its key status is neither complete nor partial")
    entries = {f"{part}.{name}": entry for part in ("tasks", "groups") for name, entry in result[part].items()}
    for place, entry in entries.items():
        need(isinstance(entry, dict) and isinstance(entry.get("metrics"), dict), f"{place} has no metrics")
        need(place.startswith("tasks") or _are(entry.get("tasks"), str), f"{place}.tasks is no list of names")
        need(isinstance(entry.get("samples"), int | None), f"{place}.samples is no count")
        for metric, found in entry["metrics"].items():
            where = f"{place}.metrics.{metric}"
            need(isinstance(found, dict) and "value" in found, f"{where} has no value")
            numbers = [found[key] for key in ("value", "stderr") if found.get(key) is not None]
            # JSON's integers have no bounds, floats do.
            finite = all(isinstance(one, int | float) and abs(one) <= sys.float_info.max for one in numbers)
            need(finite, f"{where} holds what is no finite number")
            better = found.get("higher_is_better")
            need(better in (True, False, None), f"{where}.higher_is_better is neither true, false nor null")
    for task, rows in result["samples"].items():
        whole = _are(rows, dict) and all(isinstance(row.get("metrics"), dict) for row in rows)
        need(whole, f"samples.{task} is no list of samples with metrics")
        named = all(isinstance(row.get(key), str) for row in rows for key in ("doc_hash", "prompt_hash"))
        need(named, f"samples.{task} has a sample without doc_hash or prompt_hash")


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
