"""A teacher's most likely tokens on disk, so that training needs its weights once, and later runs not at all.

A directory holds parts: PART.bin, records one after the other, and PART.json, checksummed, written last, with the
former's length and checksum, the directory's name, which is the teacher's key, and for each row of training data its
digest and its number of records. A record is a token that counts: k log-probabilities and that of all other tokens
together, in fp16, the lower 16 bits of k ids, and their higher bits, packed.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from plmtune.data.batches import IGNORE, Row
from plmtune.errors import UserError
from plmtune.io import checksummed_json
from plmtune.io.atomic import atomic_write
from plmtune.losses.distillation import TeacherTopK

_PART_BYTES, _PART_ROWS = 64 * 2**20, 20_000


def row_digest(row: Row) -> str:
    """The xxh3-128 of a row's tokens, of the places that count, and of its texts' lengths, as hex."""
    digest = xxhash.xxh3_128(np.ascontiguousarray(row.tokens, "<i8").tobytes())
    digest.update(np.packbits(row.targets != IGNORE).tobytes())
    digest.update(repr(row.lengths).encode())
    return digest.hexdigest()


def record_bytes(k: int, vocab_size: int) -> int:
    """Bytes of a token's record."""
    return 4 * k + 2 + high_bits(vocab_size) * -(-k // 8)


def high_bits(vocab_size: int) -> int:
    """How many bits of an id do not fit into 16."""
    return max(0, (vocab_size - 1).bit_length() - 16)


def encode(top: TeacherTopK, vocab_size: int) -> NDArray[np.uint8]:
    """Encode n tokens as records, [n, record_bytes]."""
    log_probs = torch.cat([top.log_probs, top.log_rest[:, None]], dim=1).to(torch.float16).cpu().numpy()
    ids = top.ids.cpu().numpy()
    planes = [np.packbits((ids >> 16 + bit) & 1, axis=1) for bit in range(high_bits(vocab_size))]
    low = (ids & 0xFFFF).astype("<u2")
    return np.concatenate([log_probs.astype("<f2").view(np.uint8), low.view(np.uint8), *planes], axis=1)


def decode(records: NDArray[np.uint8], k: int, vocab_size: int) -> TeacherTopK:
    """Decode what `encode` made."""
    log_probs, low, high = np.split(records, [2 * k + 2, 4 * k + 2], axis=1)
    numbers = torch.from_numpy(log_probs.copy().view("<f2").astype(np.float32))
    ids = low.copy().view("<u2").astype(np.int64)
    for bit, plane in enumerate(np.split(high, high_bits(vocab_size), axis=1) if high.size else ()):
        ids |= np.unpackbits(plane, axis=1, count=k).astype(np.int64) << 16 + bit
    return TeacherTopK(torch.from_numpy(ids), numbers[:, :k], numbers[:, k])


@dataclass
class TeacherCache:
    """The records of one teacher in a directory of their own; several processes may write into it.

    Attributes:
        directory: made when the first part is written.
        k: tokens of a record.
    """

    directory: Path
    k: int
    vocab_size: int
    _places: dict[str, tuple[Path, int, int]] = field(default_factory=dict)  # digest: part, first record, records
    _opened: dict[Path, NDArray[np.uint8]] = field(default_factory=dict)
    _damaged: set[Path] = field(default_factory=set)
    _pending: list[tuple[str, NDArray[np.uint8]]] = field(default_factory=list)

    @property
    def record_bytes(self) -> int:
        return record_bytes(self.k, self.vocab_size)

    def refresh(self) -> list[str]:
        """Find the parts that are there; return a line for each that cannot be used, once."""
        damaged = []
        for note in sorted(self.directory.glob("*.json")):
            part = note.with_suffix(".bin")
            if part in self._opened or part in self._damaged:
                continue
            try:
                self._open(part, checksummed_json.load(note))
            except (OSError, ValueError, KeyError) as error:
                self._damaged.add(part)
                damaged.append(f"{note}: this part of the teacher's log-probabilities cannot be used ({error}).")
        return damaged

    def _open(self, part: Path, document: dict[str, Any]) -> None:
        rows, file, size = document["rows"], document["file"], part.stat().st_size
        if (key := document.get("teacher", self.directory.name)) != self.directory.name:  # earlier files lack it
            raise ValueError(f"it is of another teacher or other settings ({key!s:.40}), and lies in the wrong folder")
        counts = [int(count) for _, count in rows]
        if size != sum(counts) * self.record_bytes or size != file["bytes"]:
            raise ValueError(f"{part.name} has {size:,} bytes instead of {file['bytes']}")
        data = np.memmap(part, np.uint8, "r").reshape(-1, self.record_bytes) if size else np.empty((0, 0), np.uint8)
        if xxhash.xxh3_128_hexdigest(data.reshape(-1).data) != file["xxh3_128"]:
            raise ValueError(f"{part.name} does not match its checksum")
        self._opened[part] = data
        first = 0
        for (digest, _), count in zip(rows, counts, strict=True):
            self._places[digest] = (part, first, count)
            first += count

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def read(self, rows: Iterable[Row]) -> dict[str, Tensor]:
        """Read the tokens that count of some rows, which must be there, as the fields of a batch."""
        found = []
        for row in rows:
            if (row.targets != IGNORE).any():
                part, first, count = self._places[row_digest(row)]
                found.append(self._opened[part][first : first + count])
        records = np.concatenate(found) if found else np.empty((0, self.record_bytes), np.uint8)
        top = decode(records, self.k, self.vocab_size)
        return {"top_ids": top.ids, "top_log_probs": top.log_probs, "top_log_rest": top.log_rest}

    def add(self, digest: str, top: TeacherTopK) -> None:
        """Add a row; it can be read after the next `flush` and `refresh`."""
        self._pending.append((digest, encode(top, self.vocab_size)))
        if len(self._pending) >= _PART_ROWS or sum(records.size for _, records in self._pending) >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows that were added as a part."""
        if not self._pending:
            return
        part = self.directory / f"{uuid.uuid4().hex}.bin"
        data = np.concatenate([records for _, records in self._pending])
        rows = [[digest, len(records)] for digest, records in self._pending]
        file = {"bytes": data.nbytes, "xxh3_128": xxhash.xxh3_128_hexdigest(data.reshape(-1).data)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with atomic_write(part) as temporary:
                data.tofile(temporary)
            checksummed_json.save(
                part.with_suffix(".json"), {"teacher": self.directory.name, "file": file, "rows": rows}
            )
        except OSError as error:
            raise UserError(
                f"The teacher's log-probabilities cannot be kept: {error}. See distillation.cache."
            ) from error
        self._pending.clear()


def most_likely(logits: Tensor, k: int) -> TeacherTopK:
    """The k most likely tokens of [n, v] logits; k is at most v."""
    every = torch.log_softmax(logits.float(), dim=1)
    log_probs, ids = every.topk(k)
    return TeacherTopK(ids, log_probs, every.scatter_(1, ids, -torch.inf).logsumexp(dim=1))
