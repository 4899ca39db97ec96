"""What an evaluation found: one JSON file, and the table that shows one or several of them.

docs/results.md has the file's schema.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from plmtune.errors import UserError, refuse_pipe
from plmtune.io.atomic import atomic_write
from plmtune.io.provenance import device_name, versions
from plmtune.io.tables import Column, Table
from plmtune.io.untrusted import load_json

if TYPE_CHECKING:
    import torch

FORMAT = "plmtune evaluation"
VERSION = 1

_PACKAGES = ("plmtune", "torch", "lm_eval", "tokenizers", "numpy")
_PROMPTS_KEPT = 3  # of each task: to see with one's own eyes what the model was asked
_REASON_LENGTH = 100
HOW_TO_MAKE = "Make results in evaluations/: plmtune eval CHECKPOINT --suite quick"
_BESIDE = 2  # more results than these are shown below each other
_CHECKSUM = "xxh3_128"
_END = re.compile(rb',\n "[^"]{8}": "[^"]{32}"\n\}\n$')
# Names of a result file that must hold objects, for whoever reads it.
_OBJECTS = ("model", "settings", "environment", "tasks", "groups", "failed", "samples")


@dataclass(frozen=True)
class Score:
    """A metric of a task or group. `value` is None where it was not finite, `stderr` where lm-eval gives none."""

    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    samples: int


@dataclass(frozen=True)
class Line:
    """A row of a table: a metric of a task, or of a group of tasks; `depth` is how deep in groups it lies."""

    task: str
    metric: str
    depth: int = 0


def collect(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return (tasks, groups, samples) of what lm-eval's `evaluate` returned, as the file has them.

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


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a result was measured with: versions, device, threads and the precision of the weights."""
    import torch

    return {
        **versions(_PACKAGES),
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
    }


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write a result in one step: its head for people, its samples a line each, the hash of all that last.

    Raises:
        UserError: if it cannot be written.
    """
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
    """Where a run keeps what it measured of itself while it trained."""
    return run / "evaluations" / f"step-{step:08d}.json"


def load(path: str | Path) -> dict[str, Any]:
    """Read a result that `save` wrote.

    Raises:
        UserError: if it is missing, damaged, of another kind or of a newer version.
    """
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
        _check_whole(data, result)
        _check(result)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Evaluate again with plmtune eval.") from error
    return result


def load_all(paths: Sequence[str | Path], tell: Callable[[str], None]) -> dict[Path, dict[str, Any]]:
    """Read results; of a folder the .json files that lie in it, by name, and of repeats among them the newest.

    Args:
        tell: is told which file of a folder is left out.

    Raises:
        UserError: if one is no result or given twice, or a folder has none.
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
        # One that is also given by its own name has its place there.
        found |= _without_repeats({file: load(file) for file in inside if file.resolve() not in given}, tell)
    return found


def _without_repeats(found: Mapping[Path, dict[str, Any]], tell: Callable[[str], None]) -> dict[Path, dict[str, Any]]:
    """Leave out what was measured again: the same weights with the same settings. An interrupted one stands back."""
    newest: dict[str, Path] = {}
    for file, result in found.items():
        digest = result["model"].get("digest")
        what = json.dumps([digest, result["settings"]], sort_keys=True) if digest else str(file)
        best = newest.setdefault(what, file)
        if best == file:
            continue
        older, newest[what] = sorted((best, file), key=lambda one: _age(found[one]))
        tell(f"{older} is left out: {newest[what].name} measured the same model with the same settings again")
    return {file: result for file, result in found.items() if file in newest.values()}


def _age(result: Mapping[str, Any]) -> tuple[bool, str]:
    return result["status"] == "complete", str(result.get("started"))


def labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands for each result in tables: the name of a lone one's model, else A, B, C (see `legend`)."""
    if len(results) == 1:
        return [_name(results[0])]
    return [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(results))]


def legend(results: Sequence[Mapping[str, Any]], files: Sequence[Path] | None = None) -> list[str]:
    """What each result is: its file (or its model where there is none), its limit, and when it was measured."""
    out = []
    for i, result in enumerate(results):
        limit = result["settings"].get("limit")
        parts = [
            str(files[i]) if files else _name(result),
            f"limit {limit}" if limit is not None else "",
            str(result.get("started") or "")[:16].replace("T", " "),
        ]
        out.append(" · ".join(part for part in parts if part))
    return out


def _name(result: Mapping[str, Any]) -> str:
    """The name of its model, with the step where the name does not say it."""
    name, step = str(result["model"].get("name") or "model"), result["model"].get("step")
    return name if step is None or re.search(rf"step[- ]?0*{step}(?!\d)", name) else f"{name}, step {step}"


def score(result: Mapping[str, Any], line: Line) -> Score | None:
    """What a result has for a line, if anything."""
    entry = entry_of(result, line.task)
    found = entry.get("metrics", {}).get(line.metric)
    if not found:
        return None
    return Score(found["value"], found.get("stderr"), found.get("higher_is_better"), entry.get("samples") or 0)


def lines(results: Sequence[Mapping[str, Any]], *, all_tasks: bool = False) -> list[Line]:
    """The rows of a table of `results`: tasks and groups as they come in the files, a task's metrics in its own order.

    Args:
        all_tasks: also those that a group sums up, after it. MMLU has 57.
    """
    found: dict[Line, None] = {}

    def visit(result: Mapping[str, Any], name: str, depth: int) -> None:
        entry = result["groups"].get(name) or result["tasks"].get(name)
        if entry is None:
            return
        for metric in entry["metrics"]:
            found.setdefault(Line(name, metric, depth))
        if all_tasks:
            for child in entry.get("tasks", ()):
                if depth < 8:  # no real group is as deep, and a damaged file may hold itself
                    visit(result, child, depth + 1)

    for result in results:
        children = {child for group in result["groups"].values() for child in group["tasks"]}
        for name in (*result["groups"], *result["tasks"]):
            if name not in children:
                visit(result, name, 0)
    return list(found)


def metric_label(line: Line, higher_is_better: bool | None) -> str:
    """`exact_match,strict-match` -> `exact_match (strict-match) ↑`: what is better is where the arrow points."""
    metric, _, chosen_by = line.metric.partition(",")
    arrow = {True: " ↑", False: " ↓", None: ""}[higher_is_better]
    return metric + (f" ({chosen_by})" if chosen_by not in ("", "none") else "") + arrow


def direction(found: Sequence[Score | None]) -> bool | None:
    """Whether higher is better, as the first that has the metric says."""
    return next((one.higher_is_better for one in found if one), None)


def show_score(one: Score | None) -> str:
    if one is None:
        return "-"
    if one.value is None:
        return "not finite"
    return show_number(one.value) + (f" ± {show_number(one.stderr)}" if one.stderr is not None else "")


def show_number(value: float) -> str:
    """Four decimals, or the first digits of what is as large as the perplexity of an untrained model."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def table(
    results: Sequence[Mapping[str, Any]], files: Sequence[Path] | None = None, *, all_tasks: bool = False
) -> list[Table | str]:
    """One or several results: value ± standard error of each metric, and below what failed and why.

    Up to two results stand side by side, more of them below each other, as terminals have 80 columns. Above stands
    what each of several is.

    Args:
        files: where they were read from, if from files.
    """
    names = [
        label + (" (partial)" if result["status"] == "partial" else "")
        for label, result in zip(labels(results), results, strict=True)
    ]
    beside = len(results) <= _BESIDE
    what = [Column("task", key=True), Column("shots", right=True, drop=1), Column("metric", folds=True)]
    grid = Table([*what, Column("n", right=True, drop=2), *(names if beside else ("result", "score"))])
    before = ""
    for line in lines(results, all_tasks=all_tasks):
        found = [score(result, line) for result in results]
        shots = [entry_of(result, line.task).get("num_fewshot") for result in results]
        name, before = ("" if line.task == before else "  " * line.depth + line.task), line.task
        metric = metric_label(line, direction(found))
        if beside:
            there = [shot for shot, one in zip(shots, found, strict=True) if one]
            counts = _distinct([one.samples for one in found if one])
            grid.add(name, _distinct(there) if name else "", metric, counts, *map(show_score, found))
            continue
        for label, shot, one in zip(names, shots, found, strict=True):
            if one:
                shown = _distinct([shot]) if metric else ""
                grid.add(name, shown, metric, str(one.samples), label, show_score(one))
                name = metric = ""
    failures = [
        f"{task} failed" + (f" ({label})" if len(results) > 1 else "") + f": {_in_short(str(reason))}"
        for label, result in zip(labels(results), results, strict=True)
        for task, reason in result["failed"].items()
    ]
    if beside:
        for task in dict.fromkeys(task for result in results for task in result["failed"]):
            grid.add(task, "", "", "", *("failed" if task in result["failed"] else "-" for result in results))
    if len(results) == 1:
        return [grid, *failures]
    above = Table(["", Column("", folds=True)], headings=False)
    for label, text in zip(labels(results), legend(results, files), strict=True):
        above.add(label, text)
    return [above, "", grid, *failures]


def _in_short(reason: str) -> str:
    """Its first sentence: whoever measured has read all of it, and the file has it."""
    first = re.split(r"\n|(?<=\.)\s+(?=[A-Z])", reason.strip(), maxsplit=1)[0]
    return first if len(first) <= _REASON_LENGTH else first[: _REASON_LENGTH - 1] + "…"


def entry_of(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a result has of a task or group; empty if nothing."""
    entry: dict[str, Any] = result["tasks"].get(name) or result["groups"].get(name) or {}
    return entry


def _distinct(values: Sequence[Any]) -> str:
    """One value where all have it, else those of all results in their order."""
    shown = ["?" if value is None else str(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else "/".join(shown)


def _samples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a document of lm-eval's one a document and filter."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        entry = found.get(row["doc_id"])
        if entry is None:
            entry = found[row["doc_id"]] = {
                "id": row["doc_id"],
                "doc_hash": row["doc_hash"],
                "prompt_hash": row["prompt_hash"],
                "target": _plain(row["target"]),
                # A request is answered once, but where a task repeats it.
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
    """One hash of all prompts of a task in order: equal where two evaluations asked the same."""
    if not rows:
        return None
    text = "".join(f"{row['doc_hash']} {row['prompt_hash']}\n" for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def _metrics(found: Mapping[str, Any], better: Mapping[str, bool | None]) -> dict[str, Any]:
    metrics = {}
    for key, value in found.items():
        metric, comma, chosen_by = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue  # name, alias, sample_len; errors are looked up
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
    """`value` as JSON has it. JSON knows no NaN: it becomes null."""
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


def _check_whole(data: bytes, result: dict[str, Any]) -> None:
    """Refuse (ValueError) what has another hash than it says; files of earlier versions say none."""
    found = _END.search(data)
    said = result.pop(_CHECKSUM, None)
    if found is None and said is None:
        return
    if found is None or said != xxhash.xxh3_128_hexdigest(data[: found.start()]):
        raise ValueError("it does not match its own checksum")


def _check(result: dict[str, Any]) -> None:
    """Refuse what no result has, so that those who read it need not ask again.

    Raises:
        ValueError: naming the key.
    """
    for key in _OBJECTS:
        if not isinstance(result.get(key), dict):
            raise ValueError(f"its key {key} holds no object")
    if result.get("status") not in ("complete", "partial"):
        raise ValueError("its key status is neither complete nor partial")
    for part in ("tasks", "groups"):
        for name, entry in result[part].items():
            where = f"{part}.{name}"
            if not isinstance(entry, dict) or not isinstance(entry.get("metrics"), dict):
                raise ValueError(f"{where} has no metrics")
            if part == "groups" and not _are(entry.get("tasks"), str):
                raise ValueError(f"{where}.tasks is no list of names")
            for metric, found in entry["metrics"].items():
                if not isinstance(found, dict) or "value" not in found:
                    raise ValueError(f"{where}.metrics.{metric} has no value")
                if not all(_is_number(found.get(key)) for key in ("value", "stderr")):
                    raise ValueError(f"{where}.metrics.{metric} holds what is no finite number")
                if found.get("higher_is_better") not in (True, False, None):
                    raise ValueError(f"{where}.metrics.{metric}.higher_is_better is neither true, false nor null")
            if not isinstance(entry.get("samples"), int | None):
                raise ValueError(f"{where}.samples is no count")
    for task, rows in result["samples"].items():
        if not _are(rows, dict) or not all(isinstance(row.get("metrics"), dict) for row in rows):
            raise ValueError(f"samples.{task} is no list of samples with metrics")
        if not all(isinstance(row.get(key), str) for row in rows for key in ("doc_hash", "prompt_hash")):
            raise ValueError(f"samples.{task} has a sample without doc_hash or prompt_hash")


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _is_number(value: Any) -> bool:
    # JSON's integers know no bounds, and floats do.
    return value is None or (isinstance(value, int | float) and abs(value) <= sys.float_info.max)
