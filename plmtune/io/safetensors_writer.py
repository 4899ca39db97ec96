"""Writes safetensors files: tensors are split over files of bounded size and hashed as they are written.

The format is that of the safetensors library: 8 bytes of length, a JSON header, the numbers. The library's own writer
is not used for two reasons. A file that it wrote must be read again to be hashed, so that a disk's fault stays unseen.
Only the owner may read its files, whatever the umask.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from plmtune import dtypes

FILE_BYTES = 1 << 30


def not_finite(named: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors with NaN or infinity; of a sharded tensor this part is checked.

    One pass over the numbers, no memory beside them, and one wait for a device.
    """
    names, finite = [], []
    for name, tensor in named.items():
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
        if type(part) is Tensor and part.is_floating_point() and part.element_size() > 1 and part.numel():
            names.append(name)
            finite.append(torch.stack(torch.aminmax(part)).isfinite().all())  # NaN is the least and the most
    return [name for name, good in zip(names, torch.stack(finite).tolist(), strict=True) if not good] if names else []


def listed(names: Sequence[str]) -> str:
    """Return the first names of tensors, for a message."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2:,} more tensors" if len(names) > 2 else "")


def deal(sizes: Mapping[str, int], stem: str, max_bytes: float = FILE_BYTES) -> dict[str, list[str]]:
    """Split tensors of some bytes, in order, over files of at most `max_bytes` (or a single tensor).

    The names of files are "stem.safetensors", or "stem-00001-of-00003.safetensors" and so on.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def index(files: Mapping[str, Iterable[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Content of "stem.safetensors.index.json", Hugging Face's index of tensors in several files."""
    return {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of the file that `write` makes of tensors, which may be on the meta device."""
    return len(_header(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    # Wide types first, so that each tensor stands at a multiple of its own width.
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in _ordered(tensors):
        start, end = end, end + tensor.nbytes
        code = dtypes.code_of(tensor.dtype)
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write and sync tensors of the host; return the file's "bytes" and "xxh3_128", taken from memory."""
    flat = (tensor.detach().contiguous().reshape(-1) for _, tensor in _ordered(tensors))
    parts: list[Any] = [_header(tensors), *(tensor.view(torch.uint8).numpy() for tensor in flat)]
    with ThreadPoolExecutor(1) as pool, path.open("wb") as file:
        # Beside the writing, which waits for the disk: neither holds Python's lock.
        digest = pool.submit(_digest, parts)
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "xxh3_128": digest.result()}


def _digest(parts: Iterable[Any]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
