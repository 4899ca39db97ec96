"""metrics.jsonl: one JSON object a line, always valid, and after a resume as if never disturbed."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plmtune.io import manifest
from plmtune.io.untrusted import load_json

# What depends on the clock and the machine. All other keys are equal in two runs of one seed.
TIMING = ("time", "tokens_per_second", "mfu", "memory_bytes")

_NO_NUMBERS = ("phase", "not_finite")
_LARGEST = 1e300
_log = logging.getLogger(__name__)

# A line with this key comes between a checkpoint and the next step: a run resumed from there writes it again.
AFTER_ROUND = "after_round"


class MetricsFile(contextlib.AbstractContextManager["MetricsFile"]):
    """Appends lines to `path`; each is on its way to the disk before `append` returns, whole or not at all.

    Args:
        start_step: lines beyond it are cut off, as a resumed run writes them again; so is one torn by a kill, and one
            of this step that was measured after its checkpoint (`AFTER_ROUND`).
    """

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        self.path = path
        self.pending = ""  # lines that could not be written yet; the next `append` tries again
        if path.exists():
            _cut(path, start_step)
        elif start_step:
            _log.warning("%s is missing: what was logged up to step %d is lost", path, start_step)
        self._file = path.open("ab", buffering=0)

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the line of `step`, after those that are pending; after an OSError all are kept."""
        self.pending += line(step, values) + "\n"
        self.flush()

    def flush(self) -> None:
        """Write what is pending; after an OSError no part of it is left in the file."""
        left = self.pending.encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            while left:  # on a full disk what fits is written first, and the rest raises
                left = left[self._file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):  # a torn line that stays is cut by the next resume
                self._file.truncate(size)
            raise
        self.pending = ""

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def line(step: int, values: Mapping[str, Any]) -> str:
    """`values` as one line of JSON. JSON knows no NaN: it becomes null, and "not_finite" says what it was."""
    odd = {key: str(value) for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    entry = {"step": step, **values, **dict.fromkeys(odd), **({"not_finite": odd} if odd else {})}
    return json.dumps(entry, allow_nan=False)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that a kill tore; a warning counts others that are none."""
    return parse(path.read_bytes(), path)


def parse(data: bytes, path: Path) -> list[dict[str, Any]]:
    """Parse the bytes of a metrics file; returns what `read` does."""
    *lines, torn = data.split(b"\n")
    entries, wrong = [], []
    for number, text in enumerate(lines, 1):
        try:
            entries.append(_entry(text))
        except ValueError as error:
            wrong.append((number, error))
    with contextlib.suppress(ValueError):
        entries.append(_entry(torn))
    if wrong:
        _log.warning(
            "%s: %d of %d lines are no metrics and left out, the first of them line %d (%s)",
            path, len(wrong), len(lines), *wrong[0],
        )  # fmt: skip
    return entries


def _entry(text: bytes) -> dict[str, Any]:
    entry = load_json(text)
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        raise ValueError("it is no object with a step")
    for key, value in entry.items():
        number = type(value) in (int, float) and -_LARGEST <= value <= _LARGEST
        if key not in _NO_NUMBERS and value is not None and not number:
            raise ValueError(f"its {key:.40} is no number")
    return entry


def without_timing(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a line that depends on the run alone."""
    return {key: value for key, value in entry.items() if key not in TIMING}


def _cut(path: Path, start_step: int) -> None:
    lines = [entry for entry in read(path) if entry["step"] <= start_step]
    kept = [json.dumps(entry) for entry in lines if not (entry["step"] == start_step and AFTER_ROUND in entry)]
    manifest.write_text(path, "".join(text + "\n" for text in kept))
