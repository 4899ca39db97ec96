"""Token shards: memory-mapped arrays of ids, opened only if they match the manifest.

A shard is a plain array of little-endian ids, uint16 if the vocabulary allows it and else uint32, so any tool can read
it. Everything else is in ``manifest.json``, which is written last.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from plmtune.data.shard_manifest import SPLITS, Manifest, ShardFile, SplitCounts, again
from plmtune.errors import UserError
from plmtune.io import checksummed_json
from plmtune.io.lock import exclusive

_CHUNK = 1 << 18  # bytes read at a time, so few that they are hashed and compared in the cache
# Up to this size every opening reads every byte. A larger corpus is read once and then recognized by size and time of
# change, which verified.json records: hashing hundreds of gigabytes at each start takes an hour.
_READ_ALWAYS = 4 << 30
_log = logging.getLogger(__name__)


class ShardWriter:
    """Append token arrays to one split's shards; count and hash them."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.directory = directory
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.counts = SplitCounts()
        self._file: Any = None
        self._digest = xxhash.xxh3_128()
        self._filled = 0

    def append(self, ids: NDArray[Any]) -> None:
        """Write ids, over several shards if necessary."""
        ids = ids.astype(self.dtype)
        while ids.size:
            if self._file is None:
                self._file = (self.directory / f"{self.split}-{len(self.counts.shards):05d}.bin").open("wb")
            part, ids = np.split(ids, [self.shard_tokens - self._filled])
            data = part.tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._filled += part.size
            self.counts.tokens += part.size
            if self._filled == self.shard_tokens:
                self.close()

    def state(self) -> dict[str, Any]:
        """Flush what was appended; return a state for `resume`."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"counts": asdict(self.counts), "filled": self._filled, "digest": self._digest.hexdigest()}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; ValueError if the files do not match it."""
        counts = dict(state["counts"])
        shards = [ShardFile(**shard) for shard in counts.pop("shards")]
        if any((self.directory / shard.file).stat().st_size != shard.size for shard in shards):
            raise ValueError("a finished shard has another size")
        self.counts, self._filled = SplitCounts(**counts, shards=shards), state["filled"]
        if not self._filled:
            return
        path, left = self.directory / f"{self.split}-{len(shards):05d}.bin", self._filled * self.dtype.itemsize
        self._file = path.open("r+b")
        while left and (data := self._file.read(min(left, _CHUNK))):
            self._digest.update(data)
            left -= len(data)
        if left or self._digest.hexdigest() != state["digest"]:
            raise ValueError("the last shard holds something else")
        self._file.truncate()

    def abandon(self) -> None:
        """Close the current shard's file without finishing the shard."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Finish the current shard, if any."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        name = Path(self._file.name).name
        size = self._filled * self.dtype.itemsize
        self.counts.shards.append(ShardFile(name, self._filled, size, self._digest.hexdigest()))
        self._file, self._filled = None, 0
        self._digest.reset()


class Split:
    """The tokens of one split over all its shards, memory-mapped."""

    def __init__(self, directory: Path, counts: SplitCounts, dtype: np.dtype[Any]) -> None:
        self.num_tokens = counts.tokens
        self.num_documents = counts.documents
        self.breaks = np.array(counts.breaks, dtype=np.int64)
        self._files = [shard.file for shard in counts.shards]
        # Plain views of the maps: slicing a numpy.memmap takes several times as long.
        self._arrays = [np.asarray(np.memmap(directory / file, dtype=dtype, mode="r")) for file in self._files]
        self._starts = [0]
        for shard in counts.shards:
            self._starts.append(self._starts[-1] + shard.tokens)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first, stop), counted inside the shard, for tokens start to stop (exclusive)."""
        shard = bisect_right(self._starts, start) - 1
        while start < stop:
            base, end = self._starts[shard], min(stop, self._starts[shard + 1])
            yield shard, start - base, end - base
            start, shard = end, shard + 1

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens start to stop (exclusive), fewer at the end."""
        stop = min(stop, self.num_tokens)
        out = np.empty(max(0, stop - start), dtype=np.int64)
        filled = 0
        for shard, first, end in self._parts(start, stop):
            out[filled : filled + end - first] = self._arrays[shard][first:end]
            filled += end - first
        return out

    def document(self, index: int, eos_id: int) -> NDArray[np.int64]:
        """Return document `index`, searched from the first, with its end token if it ends in this split."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        start = seen = 0
        for base, array in zip(self._starts, self._arrays, strict=False):
            for offset in range(0, len(array), _CHUNK):
                at = int(base) + offset
                ends = np.flatnonzero(array[offset : offset + _CHUNK] == eos_id) + at + 1
                ends = np.sort(np.append(ends, self.breaks_in(at, min(at + _CHUNK, int(base) + len(array)))))
                if seen + ends.size > index:
                    first = int(ends[index - seen - 1]) if index > seen else start
                    return self.read(first, int(ends[index - seen]))
                start = int(ends[-1]) if ends.size else start
                seen += ends.size
        raise AssertionError("the manifest counts more documents than end tokens")

    def breaks_in(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the breaks (see `SplitCounts`) behind tokens start to stop (exclusive)."""
        return self.breaks[slice(*np.searchsorted(self.breaks, [start, stop], side="right"))]

    def num_windows(self, seq_len: int) -> int:
        """Return the number of whole windows; the tokens after the last one are no targets."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def window(self, index: int, seq_len: int) -> NDArray[np.int64]:
        """Return window `index`: seq_len + 1 tokens, the last of which is the first of the next window."""
        return self.read(*self._bounds(index, seq_len))

    def locate(self, index: int, seq_len: int) -> list[tuple[str, int, int]]:
        """Return where window `index` lies: (file, first token, last token) for each file that it spans."""
        parts = self._parts(*self._bounds(index, seq_len))
        return [(self._files[shard], first, stop - 1) for shard, first, stop in parts]

    def _bounds(self, index: int, seq_len: int) -> tuple[int, int]:
        if not 0 <= index < self.num_windows(seq_len):
            raise IndexError(f"window {index} of {self.num_windows(seq_len)}")
        return index * seq_len, (index + 1) * seq_len + 1


class Shards:
    """A prepared directory: `train`, `validation` and the manifest."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.eos_id = manifest.eos_id
        dtype = np.dtype(manifest.dtype)
        self.train, self.validation = (Split(directory, manifest.splits[name], dtype) for name in SPLITS)

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        tokenizer_fingerprint: str | None = None,
        vocab_size: int | None = None,
        verify: bool = True,
    ) -> Shards:
        """Open a prepared directory and check it against its manifest.

        Sizes are always compared. With `verify` every byte is hashed and every id compared with the vocabulary; beyond
        4 GiB once, and again only for shards that changed. If several processes open such a corpus, one reads and the
        others wait for it.

        Args:
            tokenizer_fingerprint: of the tokenizer that the tokens must come from; None: any.
            vocab_size: rows of the model's embedding, above every id; None: the manifest's.
            verify: read everything. Each process of a job does, since it may have its own copy of the files.
        """
        directory = Path(directory)
        manifest = Manifest.read(directory)
        if tokenizer_fingerprint is not None and manifest.tokenizer != tokenizer_fingerprint:
            raise UserError(
                f"{directory} was made by another tokenizer ({manifest.tokenizer}) than this run's "
                f"({tokenizer_fingerprint}). Prepare the text again with this run's tokenizer"
            )
        limit = manifest.vocab_size if vocab_size is None else min(vocab_size, manifest.vocab_size)
        for shard in manifest.shards:
            _check_size(directory, shard)
        if verify:
            _verify(directory, manifest, limit)
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest's hashes: equal exactly when the tokens are."""
        shards = [shard.xxh3 for shard in self.manifest.shards]
        return xxhash.xxh3_128_hexdigest(" ".join([self.manifest.tokenizer, *shards]).encode())


def _check_size(directory: Path, shard: ShardFile) -> None:
    path = directory / shard.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"Shard {path} cannot be read ({error.strerror}). {again(directory)}") from error
    if size != shard.size:
        kind = "truncated" if size < shard.size else "too long"
        raise UserError(f"Shard {path} is {kind}: {size:,} bytes, expected {shard.size:,}. {again(directory)}")


def _verify(directory: Path, manifest: Manifest, limit: int) -> None:
    size = sum(shard.size for shard in manifest.shards)
    if size <= _READ_ALWAYS:
        for shard in manifest.shards:
            _check_ids(directory, shard, limit, *_read_shard(directory, shard, manifest))
        return
    writable = os.access(directory, os.W_OK)
    lock = exclusive(directory / ".verified.lock", f"verifies {directory}") if writable else nullcontext()
    with lock:
        known = _read_record(directory)
        new = {shard.file: _state(directory, shard) for shard in manifest.shards}
        todo = sum(shard.size for shard in manifest.shards if known.get(shard.file, [])[:3] != new[shard.file])
        if todo:
            often = "once" if writable else "at each start, since the result cannot be written there"
            _log.warning("verifying %s: %.1f GB are read, %s", directory, todo / 1e9, often)
        try:
            for shard in manifest.shards:
                if known.get(shard.file, [])[:3] != new[shard.file]:
                    known[shard.file] = [*new[shard.file], *_read_shard(directory, shard, manifest)]
                _check_ids(directory, shard, limit, *known[shard.file][3:])
        finally:
            if todo and writable:  # also after an interruption, to keep what was verified
                _write_record(directory, known)


def _state(directory: Path, shard: ShardFile) -> list[Any]:
    # Not the time of modification, which copying tools can set.
    status = (directory / shard.file).stat()
    return [status.st_size, status.st_ctime_ns, shard.xxh3]


def _read_record(directory: Path) -> dict[str, list[Any]]:
    """Return the record of each shard in verified.json: its state, its highest id and the position of that."""
    try:
        return checksummed_json.load(directory / "verified.json")
    except (OSError, ValueError):
        return {}  # without it everything is read again


def _write_record(directory: Path, known: dict[str, list[Any]]) -> None:
    try:
        checksummed_json.save(directory / "verified.json", known)
    except OSError as error:
        _log.warning("%s: verified.json cannot be written (%s), so the next start reads everything again", directory,
                     error.strerror)  # fmt: skip


def _read_shard(directory: Path, shard: ShardFile, manifest: Manifest) -> tuple[int, int]:
    """Hash a shard; return its highest id and the position of its first occurrence."""
    path = directory / shard.file
    dtype = np.dtype(manifest.dtype)
    digest = xxhash.xxh3_128()
    highest, where, done = -1, 0, 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                ids = np.frombuffer(chunk[: len(chunk) // dtype.itemsize * dtype.itemsize], dtype=dtype)
                if ids.size and (top := int(ids.max())) > highest:
                    highest, where = top, done + int(ids.argmax())
                done += ids.size
    except OSError as error:
        raise UserError(f"Shard {path} cannot be read ({error.strerror}). {again(directory)}") from error
    found = digest.hexdigest()
    if found != shard.xxh3:
        other = next((s.file for s in manifest.shards if s.xxh3 == found), None)
        hint = f" That is {other}: were the files swapped?" if other else ""
        raise UserError(f"Shard {path} is damaged: xxh3 {found}, expected {shard.xxh3}.{hint} {again(directory)}")
    return highest, where


def _check_ids(directory: Path, shard: ShardFile, limit: int, highest: int, where: int) -> None:
    if highest >= limit:
        raise UserError(
            f"Shard {directory / shard.file} holds id {highest} at token {where}, beyond the vocabulary of {limit}. "
            "Was it made for another model or tokenizer? Prepare the text again with this run's tokenizer"
        )
