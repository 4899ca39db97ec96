"""Token shards: memory-mapped arrays of ids and the manifest that vouches for them.

A shard is nothing but little-endian ids, uint16 where the vocabulary allows it and uint32 where not, so any
tool can read it. Everything else stands in ``manifest.json``, which is written last.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from plmtune.atomic import replacing
from plmtune.errors import UserError

FORMAT = 1
SPLITS = ("train", "validation")
_CHUNK = 4 << 20
# Up to this size every opening reads every byte. A larger corpus is read once and then known by size
# and time of change, remembered in verified.json: hashing hundreds of gigabytes at each start costs an hour.
_READ_ALWAYS = 4 << 30


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class ShardFile:
    """One shard as the manifest knows it."""

    file: str
    tokens: int
    size: int  # bytes
    xxh3: str  # xxh3-128, hex


@dataclass
class SplitCounts:
    """What a split holds; bytes are those of the text in UTF-8, without end-of-document tokens."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    shards: list[ShardFile] = field(default_factory=list)


@dataclass
class Manifest:
    """The content of manifest.json."""

    format: int
    name: str
    tokenizer: str
    vocab_size: int
    eos_id: int
    dtype: str
    source: str
    source_description: str
    settings: dict[str, Any]
    skipped: int
    splits: dict[str, SplitCounts]

    def save(self, directory: Path) -> None:
        """Write it beside its shards."""
        with (directory / "manifest.json").open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check it.

        Raises:
            UserError: if it is missing, broken, of another format, or names a file outside its directory.
        """
        path = directory / "manifest.json"
        again = f"Delete {directory} and prepare the data again"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{directory} is no directory of prepared tokens: it has no manifest.json") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}. {again}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise UserError(f"{path} has format {found!r}; this version reads {FORMAT}. {again}")
        try:
            splits = {
                name: SplitCounts(
                    int(part["tokens"]),
                    int(part["documents"]),
                    int(part["bytes"]),
                    [ShardFile(**shard) for shard in part["shards"]],
                )
                for name, part in raw["splits"].items()
            }
            manifest = cls(**{**raw, "splits": splits})
            whole = (
                set(splits) == set(SPLITS)
                and manifest.dtype == dtype_for(manifest.vocab_size).str
                and 0 <= manifest.eos_id < manifest.vocab_size
                and all(sum(shard.tokens for shard in s.shards) == s.tokens for s in splits.values())
                and all(
                    Path(shard.file).name == shard.file
                    and shard.tokens > 0
                    and shard.size == shard.tokens * np.dtype(manifest.dtype).itemsize
                    for s in splits.values()
                    for shard in s.shards
                )
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). {again}") from error
        if not whole:
            raise UserError(f"{path} is damaged: its entries contradict each other. {again}")
        return manifest


class ShardWriter:
    """Append token arrays to one split's shards, counting and hashing on the way."""

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
        """Write ids; they may span shards."""
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

    def close(self) -> None:
        """Finish the current shard; harmless when there is none."""
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
    """The tokens of one split, one after another over all its shards, mapped and never loaded whole."""

    def __init__(self, directory: Path, counts: SplitCounts, dtype: np.dtype[Any]) -> None:
        self.num_tokens = counts.tokens
        self.num_documents = counts.documents
        self._arrays = [np.memmap(directory / shard.file, dtype=dtype, mode="r") for shard in counts.shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in counts.shards)])

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens start to stop (exclusive), fewer at the end."""
        stop = min(stop, self.num_tokens)
        out = np.empty(max(0, stop - start), dtype=np.int64)
        filled = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < out.size:
            offset = start + filled - int(self._starts[shard])
            part = self._arrays[shard][offset : offset + out.size - filled]
            out[filled : filled + part.size] = part
            filled += part.size
            shard += 1
        return out

    def document(self, index: int, eos_id: int) -> NDArray[np.int64]:
        """Return document `index` with its end token, found by reading from the first.

        Raises:
            IndexError: if there is no such document.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        start = seen = 0
        for base, array in zip(self._starts, self._arrays, strict=False):
            for offset in range(0, len(array), _CHUNK):
                ends = np.flatnonzero(array[offset : offset + _CHUNK] == eos_id) + int(base) + offset + 1
                if seen + ends.size > index:
                    first = int(ends[index - seen - 1]) if index > seen else start
                    return self.read(first, int(ends[index - seen]))
                start = int(ends[-1]) if ends.size else start
                seen += ends.size
        raise AssertionError("the manifest counts more documents than end tokens")

    def num_windows(self, seq_len: int) -> int:
        """Return how many whole windows there are; the tokens after the last one are no target of any."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def window(self, index: int, seq_len: int) -> NDArray[np.int64]:
        """Return window `index`: seq_len + 1 tokens, the last of which begins the next window.

        So every token but the first is a target exactly once.

        Raises:
            IndexError: if there is no such window.
        """
        if not 0 <= index < self.num_windows(seq_len):
            raise IndexError(f"window {index} of {self.num_windows(seq_len)}")
        return self.read(index * seq_len, (index + 1) * seq_len + 1)


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
        """Open a prepared directory and see that it is what it says.

        Sizes are always compared. With `verify` every byte is hashed and every id compared with the
        vocabulary; beyond 4 GiB once, and again only for shards that changed.

        Args:
            tokenizer_fingerprint: the tokenizer that the tokens must come from; None: any.
            vocab_size: rows of the model's embedding, which every id must be below; None: the manifest's.
            verify: read everything (on one process of a job is enough).

        Raises:
            UserError: naming the file, for a shard that is missing, truncated or garbled, holds ids beyond
                the vocabulary, or was made by another tokenizer.
        """
        directory = Path(directory)
        manifest = Manifest.read(directory)
        if tokenizer_fingerprint is not None and manifest.tokenizer != tokenizer_fingerprint:
            raise UserError(
                f"{directory} was made by another tokenizer ({manifest.tokenizer}) than this run's "
                f"({tokenizer_fingerprint}). Prepare the text again with this run's tokenizer"
            )
        limit = manifest.vocab_size if vocab_size is None else min(vocab_size, manifest.vocab_size)
        for shard in _shards_of(manifest):
            _check_size(directory, shard)
        if verify:
            _verify(directory, manifest, limit)
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of the manifest's hashes: equal exactly when the tokens are."""
        shards = [shard.xxh3 for split in SPLITS for shard in self.manifest.splits[split].shards]
        return xxhash.xxh3_128_hexdigest(" ".join([self.manifest.tokenizer, *shards]).encode())


def _shards_of(manifest: Manifest) -> list[ShardFile]:
    return [shard for name in SPLITS for shard in manifest.splits[name].shards]


def _check_size(directory: Path, shard: ShardFile) -> None:
    path = directory / shard.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"Shard {path} cannot be read ({error.strerror}). {_again(directory)}") from error
    if size != shard.size:
        kind = "truncated" if size < shard.size else "too long"
        raise UserError(f"Shard {path} is {kind}: {size:,} bytes, expected {shard.size:,}. {_again(directory)}")


def _again(directory: Path) -> str:
    return f"Delete {directory} and run the same command (or plmtune data prepare) again"


def _verify(directory: Path, manifest: Manifest, limit: int) -> None:
    shards = _shards_of(manifest)
    remember = sum(shard.size for shard in shards) > _READ_ALWAYS
    record = directory / "verified.json"
    seen: dict[str, Any] = {}
    if remember and record.is_file():
        try:
            loaded = json.loads(record.read_text(encoding="utf-8"))
            seen = loaded if isinstance(loaded, dict) else {}
        except (OSError, ValueError):
            seen = {}  # only a note: without it everything is read again
    for shard in shards:
        status = (directory / shard.file).stat()
        state = [status.st_size, status.st_mtime_ns, shard.xxh3, limit]
        if seen.get(shard.file) == state:
            continue
        _verify_shard(directory, shard, np.dtype(manifest.dtype), limit)
        seen[shard.file] = state
    if remember:
        try:
            with replacing(record) as temporary:
                temporary.write_text(json.dumps(seen), encoding="utf-8")
        except OSError:
            return  # a read-only corpus is verified at each start


def _verify_shard(directory: Path, shard: ShardFile, dtype: np.dtype[Any], limit: int) -> None:
    path = directory / shard.file
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
        raise UserError(f"Shard {path} cannot be read ({error.strerror}). {_again(directory)}") from error
    if digest.hexdigest() != shard.xxh3:
        raise UserError(
            f"Shard {path} is damaged: xxh3 {digest.hexdigest()}, expected {shard.xxh3}. {_again(directory)}"
        )
    if highest >= limit:
        raise UserError(
            f"Shard {path} holds id {highest} at token {where}, beyond the vocabulary of {limit}. "
            "Was it made for another model or tokenizer? Prepare the text again with this run's tokenizer"
        )
