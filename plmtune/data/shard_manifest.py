"""The manifest of a directory of prepared tokens: sizes and hashes of the files, with its own checksum."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plmtune.errors import UserError
from plmtune.io import checksummed_json
from plmtune.io.manifest import write_text
from plmtune.tokenizers.message import Unused
from plmtune.units import show_number_of

FORMAT = 2  # 2: the manifest has a checksum of its own
SPLITS = ("train", "validation")


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class ShardFile:
    file: str
    tokens: int
    size: int  # bytes
    xxh3: str  # xxh3-128, hex


@dataclass
class SplitCounts:
    """Counts of a split."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0  # of the text in UTF-8, without end-of-document tokens
    shards: list[ShardFile] = field(default_factory=list)
    # Positions where a document stops without an end token, because its rest is in the other split.
    breaks: list[int] = field(default_factory=list)


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
    unused: dict[str, int] = field(default_factory=dict)  # number of rows by unused column

    def left_out(self) -> str:
        """Return what was left out, as the end of a sentence; empty if nothing was."""
        rows = [f"{show_number_of(self.skipped, 'bad row')} left out"] if self.skipped else []
        return "; ".join(["", *rows, *([Unused(self.unused).describe()] if self.unused else [])])

    @property
    def documents(self) -> int:
        """Documents of both splits; a document with a held-out tail counts once."""
        return sum(counts.documents - len(counts.breaks) for counts in self.splits.values())

    @property
    def shards(self) -> list[ShardFile]:
        """The shards of both splits."""
        return [shard for name in SPLITS for shard in self.splits[name].shards]

    def save(self, directory: Path) -> None:
        write_text(directory / "manifest.json", checksummed_json.dumps(asdict(self)).decode())

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check the manifest."""
        path = directory / "manifest.json"
        remedy = again(directory)
        try:
            data = checksummed_json.read_bytes(path)
            # The format without a checksum is the first.
            first = data.startswith(b'{\n "format": 1,')
            raw: dict[str, Any] = {"format": 1} if first else checksummed_json.loads(data)
        except FileNotFoundError as error:
            raise UserError(f"{directory} is no directory of prepared tokens: it has no manifest.json") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}. {remedy}") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}. {remedy}") from error
        if raw.get("format") != FORMAT:
            raise UserError(f"{path} has format {raw.get('format')!r}; this version reads {FORMAT}. {remedy}")
        try:
            splits = {
                name: SplitCounts(**{**part, "shards": [ShardFile(**shard) for shard in part["shards"]]})
                for name, part in raw["splits"].items()
            }
            manifest = cls(**{**raw, "splits": splits})
            width = dtype_for(manifest.vocab_size).itemsize
            whole = (
                set(splits) == set(SPLITS)
                and manifest.dtype == dtype_for(manifest.vocab_size).str
                and 0 <= manifest.eos_id < manifest.vocab_size
                and all(sum(shard.tokens for shard in s.shards) == s.tokens for s in splits.values())
                and all(sorted(s.breaks) == s.breaks for s in splits.values())
                and all(Path(s.file).name == s.file and s.size == s.tokens * width > 0 for s in manifest.shards)
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). {remedy}") from error
        if not whole:
            raise UserError(f"{path} is damaged: its entries contradict each other. {remedy}")
        return manifest


def again(directory: Path) -> str:
    """Return the remedy for a damaged directory."""
    return f"Delete {directory} and run the same command (or plmtune data prepare) again"
