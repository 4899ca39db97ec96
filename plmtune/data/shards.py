"""Token shards: memory-mapped arrays of ids, opened only if they match the manifest, and windows of them as rows.

A shard is a plain array of little-endian ids, uint16 if the vocabulary allows it and else uint32, so any tool can read
it. Everything else is in ``manifest.json``, which is written last.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from plmtune.data.batches import IGNORE, Row
from plmtune.data.shard_manifest import SPLITS, Manifest, ShardFile, SplitCounts, again
from plmtune.errors import UserError
from plmtune.io import checksummed_json
from plmtune.io.lock import exclusive

_CHUNK = 1 << 18  # bytes read at a time, so few that they are hashed and compared in the cache
# Up to this size every opening reads every byte. A larger corpus is read once and then recognized by size and time of
# change, which verified.json records: hashing hundreds of gigabytes at each start takes an hour.
_READ_ALWAYS = 4 << 30
_RECORD = "verified.json"
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class ShardWriter:
    """Append token arrays to one split's shards; count and hash them."""

    directory: Path
    split: str
    dtype: np.dtype[Any]
    shard_tokens: int
    counts: SplitCounts = field(default_factory=SplitCounts)
    _file: Any = None
    _digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    _filled: int = 0

    def append(self, ids: NDArray[Any]) -> None:
        """Write ids, over several shards if necessary."""
        ids = ids.astype(self.dtype)
        while ids.size:
            if self._file is None:
                self._file = self._path.open("wb")
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
        self._sync()
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
        left = self._filled * self.dtype.itemsize
        self._file = self._path.open("r+b")
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
        self._sync()
        size = self._filled * self.dtype.itemsize
        self.counts.shards.append(ShardFile(self._path.name, self._filled, size, self._digest.hexdigest()))
        self.abandon()
        self._filled = 0
        self._digest.reset()

    def _sync(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def _path(self) -> Path:
        return self.directory / f"{self.split}-{len(self.counts.shards):05d}.bin"


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

    def locate(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """Return where tokens start to stop (exclusive) lie: (file, first token, last token) for each file."""
        return [(self._files[shard], first, end - 1) for shard, first, end in self._parts(start, stop)]


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
        cls, directory: Path, *, tokenizer_fingerprint: str = "", vocab_size: int | None = None, verify: bool = True
    ) -> Shards:
        """Open a prepared directory and check it against its manifest.

        Sizes are always compared. With `verify` every byte is hashed and every id compared with the vocabulary; beyond
        4 GiB once, and again only for shards that changed. If several processes open such a corpus, one reads and the
        others wait for it.

        Args:
            tokenizer_fingerprint: of the tokenizer that the tokens must come from; empty: any.
            vocab_size: rows of the model's embedding, above every id; None: the manifest's.
            verify: each process of a job does, since it may have its own copy of the files.
        """
        directory = Path(directory)
        manifest = Manifest.read(directory)
        if tokenizer_fingerprint not in ("", manifest.tokenizer):
            raise UserError(
                f"{directory} was made by another tokenizer ({manifest.tokenizer}) than this run's "
                f"({tokenizer_fingerprint}). Prepare the text again with this run's tokenizer"
            )
        limit = manifest.vocab_size if vocab_size is None else min(vocab_size, manifest.vocab_size)
        for shard in manifest.shards:
            size = _status(directory, shard).st_size
            if size != shard.size:
                kind = "truncated" if size < shard.size else "too long"
                said = f"is {kind}: {size:,} bytes, expected {shard.size:,}. {again(directory)}"
                raise UserError(f"Shard {directory / shard.file} {said}")
        if verify:
            _verify(directory, manifest, limit)
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest's hashes: equal exactly when the tokens are."""
        shards = [shard.xxh3 for shard in self.manifest.shards]
        return xxhash.xxh3_128_hexdigest(" ".join([self.manifest.tokenizer, *shards]).encode())


def _unreadable(directory: Path, shard: ShardFile, error: OSError) -> UserError:
    return UserError(f"Shard {directory / shard.file} cannot be read ({error.strerror}). {again(directory)}")


def _status(directory: Path, shard: ShardFile) -> os.stat_result:
    try:
        return (directory / shard.file).stat()
    except OSError as error:
        raise _unreadable(directory, shard, error) from error


def _verify(directory: Path, manifest: Manifest, limit: int) -> None:
    """Hash what changed, and compare the highest id of each shard with `limit`."""
    records = sum(shard.size for shard in manifest.shards) > _READ_ALWAYS
    writable = records and os.access(directory, os.W_OK)
    with exclusive(directory / ".verified.lock", f"verifies {directory}") if writable else nullcontext():
        known: dict[str, list[Any]] = {}  # of each shard its state, its highest id and the position of that
        if records:
            with suppress(OSError, ValueError):  # without it everything is read again
                known = checksummed_json.load(directory / _RECORD)
        new = {shard.file: _state(directory, shard) for shard in manifest.shards}
        todo = sum(shard.size for shard in manifest.shards if known.get(shard.file, [])[:3] != new[shard.file])
        if records and todo:
            often = "once" if writable else "at each start, since the result cannot be written there"
            _log.warning("verifying %s: %.1f GB are read, %s", directory, todo / 1e9, often)
        try:
            for shard in manifest.shards:
                if known.get(shard.file, [])[:3] != new[shard.file]:
                    known[shard.file] = [*new[shard.file], *_read_shard(directory, shard, manifest)]
                highest, where = known[shard.file][3:]
                if highest >= limit:
                    raise UserError(
                        f"Shard {directory / shard.file} holds id {highest} at token {where}, beyond the vocabulary of "
                        f"{limit}. Was it made for another model or tokenizer? Prepare the text again with this run's "
                        "tokenizer"
                    )
        finally:
            if todo and writable:  # also after an interruption, to keep what was verified
                try:
                    checksummed_json.save(directory / _RECORD, known)
                except OSError as error:
                    why = f"cannot be written ({error.strerror}), so the next start reads everything again"
                    _log.warning("%s: %s %s", directory, _RECORD, why)


def _state(directory: Path, shard: ShardFile) -> list[Any]:
    # Not the time of modification, which copying tools can set.
    status = (directory / shard.file).stat()
    return [status.st_size, status.st_ctime_ns, shard.xxh3]


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
        raise _unreadable(directory, shard, error) from error
    found = digest.hexdigest()
    if found != shard.xxh3:
        other = next((s.file for s in manifest.shards if s.xxh3 == found), None)
        hint = f" That is {other}: were the files swapped?" if other else ""
        raise UserError(f"Shard {path} is damaged: xxh3 {found}, expected {shard.xxh3}.{hint} {again(directory)}")
    return highest, where


class Windows:
    """The windows of one split; a window at the end of the text is padded with `eos_id`, which is not counted.

    Args:
        split: of `shards`.
        document_mask: keep attention and counted targets inside documents.
        whole: leave the last window out if it is not full.
    """

    def __init__(self, shards: Shards, split: Split, seq_len: int, *, document_mask: bool, whole: bool) -> None:
        self.seq_len = seq_len
        self.num_tokens = split.num_tokens
        targets = max(0, split.num_tokens - 1)
        self.num_rows = targets // seq_len if whole else -(-targets // seq_len)
        self._directory = shards.directory
        self._split = split
        self._eos_id = shards.eos_id
        self._document_mask = document_mask

    def row(self, index: int) -> Row:
        """Return window `index`, with the first token of the next as its last target.

        With a document mask an end-of-document token belongs to the document that it ends. Positions restart after
        it, and its target, the first token of another document, is not counted. The target after a document whose
        rest is in the other split is never counted.
        """
        first = index * self.seq_len
        ids = self._split.read(first, first + self.seq_len + 1)
        tokens, targets = ids[:-1], ids[1:]
        if missing := self.seq_len - len(tokens):
            tokens = np.append(tokens, np.full(missing, self._eos_id))
            targets = np.append(targets, np.full(missing, IGNORE))
        breaks = self._split.breaks_in(first, first + self.seq_len) - first - 1
        if breaks.size:
            targets = targets.copy()  # tokens are a view of the same ids
            targets[breaks] = IGNORE
        if not self._document_mask:
            return Row(tokens, targets)
        ends = tokens == self._eos_id
        ends[breaks] = True
        bounds = np.unique(np.concatenate(([0], np.flatnonzero(ends) + 1, [self.seq_len])))
        return Row(tokens, np.where(ends, IGNORE, targets), tuple(np.diff(bounds).tolist()))

    def locate(self, index: int) -> str:
        """Return the files of window `index` and its tokens in each, counted from 0; the last is only a target."""
        places = self._split.locate(index * self.seq_len, (index + 1) * self.seq_len + 1)
        return ", and ".join(f"{self._directory / file}, tokens {begin:,} to {end:,}" for file, begin, end in places)

    def describe(self) -> str:
        return f"{self.num_tokens:,} tokens"


def open_windows(
    shards: Mapping[str, Shards], seq_len: int, *, document_mask: bool = False
) -> tuple[dict[str, Windows], dict[str, Windows]]:
    """Return the training and the held-out windows of each source.

    In the training text the tokens after the last whole window are no targets. In the held-out text every token but
    the first of each source is a target once.
    """
    train, held_out = {}, {}
    for name, source in shards.items():
        train[name] = Windows(source, source.train, seq_len, document_mask=document_mask, whole=True)
        held_out[name] = Windows(source, source.validation, seq_len, document_mask=document_mask, whole=False)
        if train[name].num_rows < 1:
            raise UserError(
                f"Source {name} ({source.directory}) has {source.train.num_tokens:,} training tokens, "
                f"too few for seq_len={seq_len} and its last target. Give more text or a shorter seq_len"
            )
    return train, held_out
