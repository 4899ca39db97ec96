"""Tensors on disk with a note that holds their file's length and checksum, written last.

NAME.safetensors holds the tensors, and NAME.json the note, itself checksummed: a file whose note is there and agrees is
whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import load as load_tensors
from torch import Tensor

from plmtune.io import checksummed_json, safetensors_writer
from plmtune.io.atomic import atomic_write


def save(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> str:
    """Write tensors of the host to `path` (.safetensors) and their note beside it; return their checksum.

    Args:
        note: what else the note holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        file = safetensors_writer.write(temporary, tensors)
    checksummed_json.save(path.with_suffix(".json"), {**(note or {}), "file": file})
    return str(file["xxh3_128"])


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of `path` and its note.

    Raises:
        OSError, ValueError, KeyError, SafetensorError: if one of the two is not there, or damaged.
    """
    note = checksummed_json.load(path.with_suffix(".json"))
    file, size = note["file"], path.stat().st_size
    if size != file["bytes"]:
        raise ValueError(f"{path.name} has {size:,} bytes instead of {file['bytes']:,}")
    data = path.read_bytes()
    if xxhash.xxh3_128_hexdigest(data) != file["xxh3_128"]:
        raise ValueError(f"{path.name} does not match its checksum")
    return load_tensors(data), note
