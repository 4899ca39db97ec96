"""What a pruning has measured, kept in its run's directory until it ends, so that a stopped one resumes there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from plmtune.io import checksummed_json, safetensors_writer
from plmtune.io.atomic import atomic_write
from plmtune.io.terminal import echo
from plmtune.pruning.depth import Run

_LEAST_SECONDS = 60.0  # between two saves of what is not complete
_SHARE = 20  # of these seconds that a save may take, as 1 in so many
FOLDER = "measured"


class Kept:
    """Tensors by name, in files with checksums.

    Args:
        run: the run's directory; the files are in its folder `measured`.
        key: says what the numbers follow from, see `key_of`; those of another key are not read.
    """

    def __init__(self, run: Path, key: str) -> None:
        self._folder, self._key = run / FOLDER, key
        self._last, self._cost = time.monotonic(), 0.0

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        begun = time.monotonic()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{name}.safetensors"
        with atomic_write(path) as temporary:
            file = safetensors_writer.write(temporary, tensors)
        checksummed_json.save(path.with_suffix(".json"), {"key": self._key, "file": file})
        self._last = time.monotonic()
        self._cost = self._last - begun

    @contextmanager
    def saving(self, name: str, state: Callable[[], Mapping[str, Tensor]]) -> Iterator[Callable[[], None]]:
        """Save a state at the end of the block, also where a signal stops it; call the given function often, which
        saves it from time to time."""

        def due() -> None:
            if time.monotonic() - self._last > max(_LEAST_SECONDS, _SHARE * self._cost):
                self.save(name, state())

        try:
            yield due
        except SystemExit:
            self.save(name, state())
            raise
        self.save(name, state())

    def read(self, name: str) -> dict[str, Tensor]:
        """What was saved; nothing, with a line that says why, where it cannot be used."""
        note = self._folder / f"{name}.json"
        if not note.exists():
            return {}
        try:
            content = checksummed_json.load(note)
            if content["key"] != self._key:
                raise ValueError("it is of another model or text")
            data = note.with_suffix(".safetensors").read_bytes()
            if xxhash.xxh3_128_hexdigest(data) != content["file"]["xxh3_128"]:
                raise ValueError("the numbers do not match their checksum")
            return load(data)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            echo(f"{note}: what was measured before cannot be used ({error}); it is measured again.")
            return {}

    def remove(self) -> None:
        """Remove the files, which a finished run does not need."""
        shutil.rmtree(self._folder, ignore_errors=True)


def key_of(tensors: Iterable[Tensor]) -> str:
    """A digest of the numbers of tensors."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        numbers: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(numbers)
    return digest.hexdigest()


def tensors_of(rises: Mapping[Run, float]) -> dict[str, Tensor]:
    """What `rises_without` has measured, to be kept."""
    return {"rises": torch.tensor([[*run, nats] for run, nats in rises.items()], dtype=torch.float64).view(-1, 3)}


def rises_of(tensors: Mapping[str, Tensor]) -> dict[Run, float]:
    """What `tensors_of` gave; nothing of nothing."""
    rows = tensors["rises"].tolist() if tensors else ()
    return {(int(first), int(n)): nats for first, n, nats in rows}
