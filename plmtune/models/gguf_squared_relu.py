"""Squared ReLU stored as SwiGLU, for the architectures of llama.cpp that have no other FFN.

    silu(b h) h / b = h^2 sigmoid(b h), which is relu(h)^2 but for at most 0.48 / b^2.

With factors g, u, d and n of the gate, the up projection, the down projection and the norm before them, the file holds
gate = g W_up, up = u W_up, down = d W_down and norm = n w: b is g n, and g n u n d = 1. All are powers of two, so that
no number is rounded, as long as it and the scales of quantized blocks are in F16's range. F16 has few bits below 6e-5,
so the division by b is shared out among three tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from plmtune.errors import UserError
from plmtune.models.gguf_file import bits_of

KEY = "plmtune.squared_relu_factors"  # of a file's metadata: gate, up, down, norm
# b times the root mean square of h. The FFN's error is then 5e-6 of its output.
_SHARPNESS = 128.0
_LEAST, _MOST = 16.0, 65536.0
# A norm that is smaller costs bits of the scales that llama.cpp rounds activations with.
_LEAST_NORM = 2.0**-6
_LARGEST = 2.0**15  # number of a gate, where F16 ends at 65504


@dataclass(frozen=True)
class Factors:
    """What the tensors of an FFN are multiplied by: see above."""

    gate: float = 1.0
    up: float = 1.0
    down: float = 1.0
    norm: float = 1.0

    @classmethod
    def choose(cls, layers: Iterable[tuple[Tensor, Tensor]]) -> Factors:
        """Factors for the numbers of a model.

        Args:
            layers: of each the weights of up_proj [n, d] and ffn_norm [d].
        """
        sizes, largest = [], 0.0
        for up, weight in layers:
            # The root mean square of h for normed inputs that do not depend on one another.
            sizes.append(float((up.float() * weight.float()).norm()) / math.sqrt(len(up)))
            largest = max(largest, float(up.abs().max()))
        smallest = min((size for size in sizes if 0 < size < math.inf), default=1.0)
        sharpness = min(max(_power(_SHARPNESS / smallest), _LEAST), _MOST)
        norm = max(_LEAST_NORM, 1 / sharpness)
        if 0 < largest < math.inf:
            norm = max(norm, _power(sharpness * largest / _LARGEST))
        halvings = round(math.log2(sharpness * norm))
        return cls(sharpness / norm, 2.0 ** -(halvings // 2), 2.0 ** -(halvings - halvings // 2), norm)

    @classmethod
    def read(cls, metadata: Mapping[str, Any], path: Path) -> Factors | None:
        """Those of a file; None: it has no such FFN.

        Raises:
            UserError: if they are none.
        """
        held = metadata.get(KEY)
        if held is None:
            return None
        powers = isinstance(held, list) and all(isinstance(x, float) and math.frexp(x)[0] == 0.5 for x in held)
        if powers and len(held) == 4 and held[0] * held[1] * held[2] * held[3] ** 2 == 1:
            return cls(*held)
        raise UserError(
            f"{path}: {KEY} is {held!r:.80}; it must be four powers of two g, u, d and n with g n u n d = 1."
        )

    @property
    def values(self) -> list[float]:
        """As `KEY` has them."""
        return list(astuple(self))

    def of(self, theirs: str) -> float:
        """The factor of a tensor of the file."""
        return {"ffn_gate": self.gate, "ffn_up": self.up, "ffn_down": self.down, "ffn_norm": self.norm}.get(
            theirs.split(".")[-2], 1.0
        )


def is_copy(one: Tensor, other: Tensor, kinds: tuple[str, str]) -> bool:
    """Whether two tensors hold the same numbers, as their types round them."""
    return float((one - other).norm()) <= sum(map(_tolerance, kinds)) * float(other.norm())


def _tolerance(kind: str) -> float:
    """Of the difference from the number that was stored, as a share: twice the most that types cost random numbers."""
    if kind in ("F64", "F32", "F16", "BF16"):
        return {"F16": 1e-3, "BF16": 1e-2}.get(kind, 1e-6)
    return 3 * 2.0 ** -bits_of(kind)


def _power(value: float) -> float:
    """The least power of two that is not below a number."""
    return 2.0 ** math.ceil(math.log2(value))
