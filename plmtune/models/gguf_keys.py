"""The keys of one architecture in a GGUF file: each is read, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from plmtune.errors import UserError

_MAX_POSITIONS = 2**24
# Keys that change nothing, given the tensors and the others.
_HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_NEUTRAL = (0, "none", False)


class Metadata:
    """The keys and tensors of a file, and which of the architecture's keys were read.

    Args:
        path: for messages.
        architecture: general.architecture.
        metadata: all keys of the file.
        shapes: of its tensors.
        read: gives a tensor.
    """

    def __init__(
        self,
        path: Path | str,
        architecture: str,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
    ) -> None:
        self.path, self.architecture = path, architecture
        self.shapes, self.tensor = shapes, read
        self._metadata, self._read = metadata, set(_HARMLESS)

    def has(self, key: str) -> bool:
        """Whether the file has a key of its architecture."""
        return f"{self.architecture}.{key}" in self._metadata

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key."""
        self._read.add(key)
        return self._metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number above 0.

        Raises:
            UserError: if it is not, or missing without a default.
        """
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one for each layer
        if type(value) is not int or not 0 < value <= _MAX_POSITIONS:
            what = "is missing" if value is None else f"is {value!r:.80}, not a whole number above 0"
            raise UserError(f"{self.path}: {self.architecture}.{key} {what}.")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A finite number.

        Raises:
            UserError: if it is not, or missing without a default.
        """
        value = self.get(key, default)
        if not isinstance(value, float) or not math.isfinite(value):
            what = "is missing" if value is None else f"is {value!r:.80}, not a number"
            raise UserError(f"{self.path}: {self.architecture}.{key} {what}.")
        return float(str(np.float32(value)))  # 1e-5 as it was meant, not as fp32 has it

    def refuse(self, key: str) -> UserError:
        """An error about a key whose value this version does not compute."""
        value = self.get(key)
        return UserError(
            f"{self.path}: {self.architecture}.{key} is {value!r:.80}; what it changes in a {self.architecture} model "
            "is not supported."
        )

    def refuse_rest(self) -> None:
        """Refuse each key that was not read.

        Raises:
            UserError: naming the key.
        """
        for name, value in self._metadata.items():
            key = name.removeprefix(f"{self.architecture}.")
            if key != name and key not in self._read and value not in _NEUTRAL:
                raise self.refuse(key)
