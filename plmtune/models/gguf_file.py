"""GGUF files, read without trusting them: every length is compared with the file before it is used.

Types, block sizes and dequantization are the `gguf` library's. Its reader is not used: it accepts tensors that share
bytes, does not end on an array that claims 2^60 values, and takes seconds for a vocabulary.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from plmtune.errors import UserError, refuse_pointer

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
# Far above any real file's, far below what would hurt.
_MAX_ENTRIES = 1 << 16
_MAX_ITEMS = 1 << 21
_MAX_STRING_BYTES = 1 << 20


def bits_of(kind: str) -> float:
    """Bits of a number of a type, with its share of the block's scales."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8 * size / block


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: where it lies and in which form.

    Attributes:
        shape: as torch has it, rows first.
        kind: how its numbers are written.
        start, num_bytes: its place in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    num_bytes: int


class GGUFFile:
    """An opened GGUF file.

    Attributes:
        path: where it is.
        metadata: its keys and values; arrays are lists.
        tensors: by their names.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self._data = data
        self._holders: dict[str, GGUFFile] = {}
        header = _Header(data, path)
        if header.take(4) != b"GGUF":
            refuse_pointer(path)
            raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF.")
        version = header.number("I")
        if version not in (2, 3):
            old = " Files of the other byte order are not read." if version & 0xFFFF == 0 else ""
            raise UserError(f"{path} is of GGUF version {version}; 2 and 3 can be read.{old}")
        num_tensors, num_keys = header.number("Q"), header.number("Q")
        header.allow(num_tensors, _MAX_ENTRIES, "tensors")
        header.allow(num_keys, _MAX_ENTRIES, "keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = header.text()
            if key in self.metadata:
                raise UserError(f"{path} holds the key {key!r:.80} twice.")
            self.metadata[key] = header.value(header.number("I"), key)
        found = [header.tensor() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise UserError(f"{path}: general.alignment is {alignment!r:.80}, not a power of two.")
        origin = -(-header.position // alignment) * alignment
        self.tensors: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in found:
            if name in self.tensors:
                raise UserError(f"{path} holds the tensor {name!r:.80} twice.")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise UserError(f"{path}: {name} has rows of {shape[-1]}, but {kind.name} needs multiples of {block}.")
            num_bytes = math.prod(shape) // block * block_bytes
            if origin + offset + num_bytes > len(data):
                raise UserError(
                    f"{path} has {len(data):,} bytes, but {name} would end at {origin + offset + num_bytes:,}. "
                    "Is the copy complete?"
                )
            self.tensors[name] = StoredTensor(name, shape, kind, origin + offset, num_bytes)
        # Tensors that share bytes would let a small file describe a model of any size.
        placed = sorted(self.tensors.values(), key=lambda tensor: tensor.start)
        for before, after in pairwise(placed):
            if after.start < before.start + before.num_bytes:
                raise UserError(f"{path}: {after.name} begins within {before.name}. Is the file damaged?")

    @property
    def part(self) -> tuple[int, int]:
        """(which part of a model this file is, from 0; how many there are), (0, 1) of a whole model."""
        number, count = (self.metadata.get(f"split.{name}", default) for name, default in (("no", 0), ("count", 1)))
        if type(number) is not int or type(count) is not int or not 0 <= number < max(count, 1):
            raise UserError(
                f"{self.path}: split.no is {number!r:.80} and split.count {count!r:.80}: no part of a model."
            )
        return number, max(count, 1)

    def add(self, other: GGUFFile) -> None:
        """Read the tensors of another part as this file's.

        Raises:
            UserError: if both hold one.
        """
        for name, tensor in other.tensors.items():
            if name in self.tensors:
                raise UserError(f"{other.path} holds the tensor {name!r:.80}, and so does {self.path}.")
            self.tensors[name] = tensor
            self._holders[name] = other

    def kinds(self) -> dict[str, int]:
        """How many numbers are of each type, the most first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.kind.name] += math.prod(tensor.shape)
        return dict(counts.most_common())

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor's numbers as fp32.

        Raises:
            UserError: if they are written in a form that cannot be read, or are not finite.
        """
        if name in self._holders:
            return self._holders[name].read(name)
        held = self.tensors[name]
        block, block_bytes = GGML_QUANT_SIZES[held.kind]
        stored = np.frombuffer(self._data, np.uint8, held.num_bytes, held.start)
        stored = stored.reshape(*held.shape[:-1], held.shape[-1] // block * block_bytes)
        try:
            with np.errstate(all="ignore"):  # looked at below
                numbers: npt.NDArray[np.float32] = np.array(dequantize(stored, held.kind), np.float32)
        except NotImplementedError:
            raise UserError(f"{self.path}: {name} is of type {held.kind.name}, which cannot be read.") from None
        if not np.isfinite(numbers).all():
            raise UserError(f"{self.path}: {name} holds numbers that are not finite. Is the file damaged?")
        return numbers.reshape(held.shape)


@contextmanager
def opened_gguf(path: Path) -> Iterator[GGUFFile]:
    """Map a GGUF file and read its header; of the first part of a split model, those of the others, too.

    Raises:
        UserError: if it is none, damaged, or another part than the first.
    """
    with _opened(path) as file, ExitStack() as stack:
        number, count = file.part
        if count > 1:
            paths = _parts(path, number, count)
            for index, other in enumerate(paths[1:], 1):
                part = stack.enter_context(_opened(other))
                if part.part != (index, count):
                    raise UserError(f"{other} says that it is part {part.part[0] + 1} of {part.part[1]}.")
                file.add(part)
            named = file.metadata.get("split.tensors.count", len(file.tensors))
            if named != len(file.tensors):
                raise UserError(f"{path} names {named!r:.80} tensors, and its {count} parts hold {len(file.tensors)}.")
        yield file


def _parts(path: Path, number: int, count: int) -> list[Path]:
    """The files of a model that llama-gguf-split cut, of which one is given."""
    stem = path.name.removesuffix(f"-{number + 1:05}-of-{count:05}.gguf")
    paths = [path.with_name(f"{stem}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]
    said = f"{path} is part {number + 1} of {count} of a model."
    if stem == path.name:
        raise UserError(
            f"{said} Name it as llama.cpp does, NAME-{number + 1:05}-of-{count:05}.gguf, or join the parts: "
            "llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf"
        )
    if number:
        raise UserError(f"{said} Give the first, {paths[0]}.")
    if missing := [other for other in paths if not other.is_file()]:
        raise UserError(f"{said} {missing[0].name} is not beside it.")
    return paths


@contextmanager
def _opened(path: Path) -> Iterator[GGUFFile]:
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file.")
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise UserError(f"{path} is empty.") from None
        # Not closed here: numpy arrays may still view it; the last of them frees the map.
        yield GGUFFile(path, data)


class _Header:
    """A position in the file that moves on with what is taken."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise UserError(f"{self.path} ends within its header, at {len(self.data):,} bytes. Is the copy complete?")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def allow(self, count: int, most: int, what: str) -> None:
        if count > most:
            raise UserError(f"{self.path} claims to hold {count:,} {what}; at most {most:,} are possible.")

    def text(self) -> str:
        size = self.number("Q")
        self.allow(size, _MAX_STRING_BYTES, "bytes in one string")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: a string before byte {self.position:,} is not UTF-8.") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise UserError(f"{self.path}: {key!r:.80} is of the unknown type {kind}.")
        item, count = self.number("I"), self.number("Q")
        self.allow(count, _MAX_ITEMS, f"values of {key!r:.80}")
        if item == _STRING:
            return [self.text() for _ in range(count)]
        if item not in _SCALARS:
            raise UserError(f"{self.path}: {key!r:.80} is a list of the unknown type {item}.")
        form = f"<{count}{_SCALARS[item]}"
        return list(struct.unpack(form, self.take(struct.calcsize(form))))

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, num_dims = self.text(), self.number("I")
        if not 1 <= num_dims <= 4:
            raise UserError(f"{self.path}: {name!r:.80} has {num_dims} dimensions, not 1 to 4.")
        shape = tuple(self.number("Q") for _ in range(num_dims))[::-1]
        number, offset = self.number("I"), self.number("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise UserError(
                f"{self.path}: {name!r:.80} is of type {number}, which this version of the gguf library does not know."
            ) from None
        if min(shape) < 1:
            raise UserError(f"{self.path}: {name!r:.80} has the impossible shape {list(shape)}.")
        return name, shape, kind, offset
