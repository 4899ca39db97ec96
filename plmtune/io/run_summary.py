"""What the files of runs say of them, for people: a table of runs, and why a run has no model to read. No torch."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from plmtune.errors import Unreadable, UserError
from plmtune.io import manifest, metrics
from plmtune.io.run_directory import CONFIG, LATEST, NEWEST, RECORD, read_record, state_of
from plmtune.io.untrusted import load_json, load_yaml

_log = logging.getLogger(__name__)
_TAIL = 1 << 20  # bytes at the end of metrics.jsonl in which the newest values are looked for
_MAX_CONFIG = 1 << 20
_ENDED = {"running": "is running", "stopped": "was stopped", "failed": "failed", "killed": "was killed"}
_REPORTING = ("quantize", "prune")  # recipes that train nothing: RECIPE.json has what came of them
_SHOWN = ("loss", "validation_loss", "bits_per_byte", "tokens")


@dataclass
class Summary:
    """One run; None stands for what is not known."""

    path: str
    recipe: str = ""
    model: str = ""  # its component; of a quantization the scheme
    layers: int | None = None
    width: int | None = None  # of the residual stream
    parameters: int | None = None
    status: str = "unknown"  # or running, finished, stopped, failed, killed
    reason: str | None = None  # why it failed
    started: str | None = None
    step: int | None = None  # the newest one
    steps: int | None = None  # the run's last
    tokens: int | None = None  # trained on so far
    saved_step: int | None = None  # of the newest checkpoint
    loss: float | None = None  # the newest validation loss, or where there is none the newest training loss
    bits_per_byte: float | None = None
    seconds: float | None = None  # from begin to end, summed over its attempts
    queue: str | None = None  # how the job that launched it stands in the queue

    @property
    def shape(self) -> str:
        """Layers x width, where they are known."""
        return f"{self.layers:,} x {self.width:,}" if self.layers and self.width else ""


def find_runs(directory: Path) -> list[Path]:
    """The runs at or below `directory`, oldest first. Links are not followed, so that each is found once."""
    if (directory / CONFIG).is_file():
        return [directory]
    found = []
    for folder, names, files in os.walk(directory):
        if CONFIG in files and RECORD in files:
            names.clear()
            found.append(Path(folder))
        # Where token shards and cached numbers are there is no run, and there may be many files.
        names[:] = [name for name in names if not name.startswith(".") and name not in ("checkpoints", "rounds")]
    return sorted(found, key=lambda path: (str(_json(path / RECORD).get("started")), path))


def summarize(path: Path) -> Summary:
    """What is known of the run at `path`; files that are missing, damaged or unreadable leave gaps."""
    record, config = _json(path / RECORD), _config(path)
    attempts = [one for one in record.get("attempts") or [] if isinstance(one, dict)]
    recipe = str(config.get("recipe") or "")
    model = config.get("quantization" if recipe == "quantize" else "model")
    model = str(model.get("component") or "") if isinstance(model, dict) else ""
    found = Summary(str(path), recipe=recipe, model=model)
    found.layers, found.width = _shape(path, config)
    try:
        found.status = state_of(path) or "unknown"
    except Unreadable:
        return found
    found.reason, found.started = record.get("reason"), record.get("started")
    found.parameters, found.steps = record.get("parameters"), record.get("num_steps")
    found.seconds = _seconds(attempts, path, running=found.status == "running")
    found.saved_step = next(reversed(manifest.steps(path / "checkpoints")), None)
    log = path / "metrics.jsonl"
    if found.recipe in _REPORTING:
        values = {"loss": _json(path / f"{found.recipe}.json").get("loss")}
    else:
        values = _newest_values(log)
        if found.saved_step and not log.exists():
            _log.warning("%s is missing: what the run logged is not known", log)
    found.step, found.bits_per_byte = values.get("step"), values.get("bits_per_byte")
    found.tokens = values.get("tokens")
    found.loss = values.get("validation_loss", values.get("loss"))
    return found


def differing_settings(paths: list[Path]) -> list[str]:
    """For each run those keys and values of its config in which the runs differ: optimizer.lr=0.001."""
    configs = [dict(_flat(_config(path))) for path in paths]
    keys = {key: None for config in configs for key in config if key not in ("run_dir", "resume")}
    differ = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
    return [" ".join(f"{key}={config[key]}" for key in differ if key in config) for config in configs]


def config_of(path: Path) -> dict[str, Any]:
    """Keys and values of a run's config, in one level: optimizer.lr."""
    return dict(_flat(_config(path)))


def _shape(path: Path, config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Layers and width of a run's model: of its config, or where that takes the model of a checkpoint, of its own."""
    model = config.get("model")
    held = model if isinstance(model, dict) else {}
    sizes = [held.get("num_layers"), held.get("embed_dim")]
    if None in sizes and (step := next(reversed(manifest.steps(path / "checkpoints")), None)) is not None:
        saved = _json(manifest.step_path(path / "checkpoints", step) / "config.json")
        pairs = (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd"))
        sizes = [next((saved[name] for name in names if name in saved), None) for names in pairs]
    layers, width = (size if type(size) is int else None for size in sizes)
    return layers, width


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def explain(path: Path) -> str:
    """Why there is no model in the run at `path`, and what to do, in a sentence; empty if it is no run."""
    if not (path / CONFIG).is_file():
        return ""
    one = summarize(path)
    if one.status == "running":
        return f"{path} is a run that {_how(one)} and has saved no model yet. Wait for it."
    if one.status == "finished":
        return f"{path} is a finished run, and its checkpoints are gone. Put them back, or name another run."
    why = f" ({one.reason:.300})" if one.reason else ""
    return f"{path} is a run that {_how(one)}{why}, before it saved a model. Resume it: plmtune resume {path}"


def interruption(path: Path, step: int) -> str:
    """What to say to somebody who reads the checkpoint of `step` of the run at `path`; empty if that run finished."""
    if not (path / CONFIG).is_file():
        return ""
    one = summarize(path)
    if one.status not in ("stopped", "failed", "killed"):
        return ""
    return f"{path} {_how(one)}: using its checkpoint of step {step:,}. Resume it: plmtune resume {path}"


def explain_missing(path: Path) -> str:
    """Why there is no `path`, where it is the link of a folder of runs to its finished one; else empty."""
    if path.name != LATEST:
        return ""
    if path.is_symlink():
        return f"{path} leads to {path.readlink()}, which was removed. Name another run: plmtune runs"
    newest = path.with_name(NEWEST)
    if not newest.exists():
        return ""
    one = summarize(newest)
    saved = "" if manifest.steps(newest / "checkpoints") else ", which has saved nothing yet"
    way = "" if one.status in ("running", "finished") else f", or resume it: plmtune resume {newest}"
    return (
        f"There is no {path}: no run in {path.parent} has finished. The newest {_how(one)}: name {newest}{saved}{way}."
    )


def _how(one: Summary) -> str:
    """How a run stands and how far it has come, as part of a sentence."""
    at = f" at step {one.step:,}" + (f" of {one.steps:,}" if one.steps else "") if one.step else ""
    return _ENDED.get(one.status, "ended") + at


def already_finished(path: Path) -> str:
    """What to say to somebody who resumes a finished run."""
    said = f"{path} is finished: there is nothing to resume."
    recipe = _config(path).get("recipe")
    if recipe in _REPORTING:
        return said
    words = [str(word) for word in _json(path / RECORD).get("command") or []]
    own = ("run_dir", "resume", "init_from")
    kept = [word for word in words[2:] if word.partition("=")[0] not in own] if words[1:2] == ["run"] else [str(recipe)]
    more = "epochs or rounds" if recipe == "preference" else "phases"
    return (
        f"{said} To train its model further, start a new run from its weights, with other {more} if it should train "
        f"longer: plmtune run {shlex.join(kept)} init_from={path}"
    )


def unfinished(directory: Path = Path("runs")) -> Iterator[Path]:
    """Runs that can be resumed, the newest first."""
    for path in reversed(find_runs(directory)):
        try:
            if state_of(path) in ("stopped", "failed", "killed"):
                yield path
        except Unreadable:
            continue


def finished_runs() -> Iterator[Path]:
    """The finished runs under runs/ that have a checkpoint; the one that finished last comes first, as `latest`."""
    found = []
    for path in Path("runs").glob(f"*/[0-9]*/{CONFIG}"):
        with contextlib.suppress(UserError):  # somebody else's
            record = read_record(path.parent)
            if record.get("status") == "finished" and manifest.steps(path.parent / "checkpoints"):
                found.append((str(record.get("ended")), path.parent.name, path.parent))
    return iter([path for *_, path in sorted(found, reverse=True)])


def _config(path: Path) -> dict[str, Any]:
    try:
        with (path / CONFIG).open(encoding="utf-8") as file:
            content = load_yaml(file.read(_MAX_CONFIG))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _newest_values(path: Path) -> dict[str, Any]:
    """The newest step, and the newest value of each metric that is shown."""
    return newest_metrics(path, ("step", *_SHOWN))


def newest_metrics(path: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The newest value of each of these metrics; None: of all at the end of the file."""
    try:
        with path.open("rb") as file:
            begin = max(0, path.stat().st_size - _TAIL)
            file.seek(begin)
            data = file.read()
    except OSError:
        return {}
    if begin:
        data = data[data.find(b"\n") + 1 :]  # the first is half a line
    found: dict[str, Any] = {}
    for entry in reversed(metrics.parse(data, path)):
        for name in names or entry:
            if entry.get(name) is not None:
                found.setdefault(name, entry[name])
        if names and all(name in found for name in names):
            break
    return found


def _seconds(attempts: list[dict[str, Any]], path: Path, *, running: bool) -> float | None:
    """From begin to end, summed over attempts; of one that was killed, to the last line that it wrote."""
    spans = []
    for attempt in attempts:
        began, ended = _time(attempt.get("began")), _time(attempt.get("ended"))
        if ended is None and attempt is attempts[-1]:
            with contextlib.suppress(OSError):
                ended = datetime.now(UTC).timestamp() if running else (path / "metrics.jsonl").stat().st_mtime
        if began is not None and ended is not None:
            spans.append(max(0.0, ended - began))
    return sum(spans) if spans else None


def _time(text: Any) -> float | None:
    if not isinstance(text, str) or not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", text):
        return None
    return datetime.fromisoformat(text).timestamp()
