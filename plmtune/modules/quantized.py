"""Linear layers and embeddings that hold integers and scales in place of their weights.

How a matrix is stored is a `Format`; `plmtune.quantization` makes the numbers, `models.hf` reads and writes them, and
`modules.quantized_kernels` multiplies. A stored number stands for (q - zero) * scale; a scale is always a bf16 number,
so that casting a model to another dtype and back changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAME = re.compile(r"(int8_dynamic_)?int([48])(?:_g([1-9]\d*))?")


@dataclass(frozen=True)
class Format:
    """How the rows of a matrix [out, in] are stored.

    Args:
        bits: of a number. 4 bits lie two to a byte, the even column low, as 0 to 15; 8 bits are -128 to 127.
        group_size: neighbours in a row that share a scale; None: the whole row.
        dynamic: in a product the inputs are rounded to 8 bits too, token by token (asymmetric: a scale and a zero
            each). Such weights are symmetric, as the kernels for it want them.

    Raises:
        ValueError: for another number of bits, or a group that is not a multiple of 16.
    """

    bits: Literal[4, 8]
    group_size: int | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, not {self.bits}")
        if self.group_size is not None and (self.group_size < 16 or self.group_size % 16):
            raise ValueError(f"group_size must be a multiple of 16, not {self.group_size}")

    @property
    def symmetric(self) -> bool:
        """Zero is the middle of the range, so that no zeros are stored; weights of 4 bits alone are worth theirs."""
        return self.bits == 8 or self.dynamic

    @property
    def name(self) -> str:
        """Such as int8, int4_g32, int8_dynamic_int8, int8_dynamic_int4_g32."""
        group = f"_g{self.group_size}" if self.group_size else ""
        return f"{'int8_dynamic_' if self.dynamic else ''}int{self.bits}{group}"

    @classmethod
    def parse(cls, name: str) -> Format:
        """The inverse of `name`.

        Raises:
            ValueError: if it is no such name.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"{name!r:.80} is no format: int8, int4_g32, int8_dynamic_int8, int8_dynamic_int4_g32, ... are"
            )
        dynamic, bits, group = found.groups()
        return cls(4 if bits == "4" else 8, int(group) if group else None, bool(dynamic))

    def num_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that a matrix [out, in] of this shape takes, scales in bf16 and zeros included."""
        rows, width = shape
        groups = width // self.group_size if self.group_size else 1
        return rows * (width * self.bits // 8 + groups * (2 if self.symmetric else 3))


class Quantized(nn.Module):
    """A matrix [out, in] as integers; the common part of layers that multiply by it or look its rows up.

    Attributes:
        weight (Tensor): int8 [out, in], or uint8 [out, in / 2] for 4 bits.
        scales (Tensor): [out, groups], in the dtype that is computed in.
        zeros (Tensor): int8 [out, groups], what stands for 0; only where the format is not symmetric (4 bits: 0 to 15).
        prepared: a kernel has the integers in an order of its own, and the three are gone (`quantized_kernels`).

    Raises:
        ValueError: if rows cannot be divided into the format's groups or bytes.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, num_rows: int, width: int, format: Format) -> None:
        super().__init__()
        group = format.group_size or width
        if width % group or width % 2:
            raise ValueError(f"rows of {width} numbers cannot be divided into groups of {group}")
        self.num_rows, self.width, self.format = num_rows, width, format
        self.prepared = False
        shape = (num_rows, width) if format.bits == 8 else (num_rows, width // 2)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8 if format.bits == 8 else torch.uint8))
        self.register_buffer("scales", torch.zeros(num_rows, width // group))
        if not format.symmetric:
            self.register_buffer("zeros", torch.zeros(num_rows, width // group, dtype=torch.int8))

    def integers(self, rows: Tensor | None = None) -> Tensor:
        """The stored numbers of all rows or some, int8, [rows, in]; of symmetric 4 bits -8 to 7, else 0 to 15."""
        held = self.weight if rows is None else self.weight[rows]
        if self.format.bits == 8:
            return held
        pairs = torch.stack((held & 15, held >> 4), dim=-1).flatten(-2).to(torch.int8)
        return pairs - 8 if self.format.symmetric else pairs

    def dequantize(self, rows: Tensor | None = None) -> Tensor:
        """The numbers that rows stand for, [rows, in], in the dtype of the scales."""
        q, scales = self.integers(rows), self.scales if rows is None else self.scales[rows]
        q = q.unflatten(-1, (scales.shape[-1], -1))
        if not self.format.symmetric:
            q = q - (self.zeros if rows is None else self.zeros[rows])[..., None]
        return (q.to(scales.dtype) * scales[..., None]).flatten(-2)


class QuantizedLinear(Quantized):
    """x W^T (+ bias) with W stored as integers.

    Args:
        in_features: width of the inputs.
        out_features: rows.
        format: how W is stored.
        bias: has one, of floating-point numbers.
    """

    def __init__(self, in_features: int, out_features: int, format: Format, *, bias: bool = False) -> None:
        super().__init__(out_features, in_features, format)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (Tensor): [..., in] -> [..., out]."""
        if self.format.dynamic:
            x = round_inputs(x)
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


class QuantizedEmbedding(Quantized):
    """Rows looked up, [...] ids -> [..., d], and of a tied one the vocabulary's projection."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.dequantize(ids)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden (Tensor): [..., d] -> [..., v]."""
        if self.format.dynamic:
            hidden = round_inputs(hidden)
        return F.linear(hidden, self.dequantize().to(hidden.dtype))


def round_inputs(x: Tensor) -> Tensor:
    """Round each token of x (Tensor), [..., in], to 256 steps between its least and greatest number, 0 among them.

    Asymmetric, with a scale and a zero a token, as torchao's int8_asym_per_token and XNNPACK's qd8 have it.
    """
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    q = ((wide / scale).round() + zero).clamp(-128, 127)
    return ((q - zero) * scale).to(x.dtype)


def install(model: nn.Module, formats: Mapping[str, Format]) -> None:
    """Put quantized modules, still empty, in the place of the linear layers and embeddings of these names.

    Args:
        model: changed in place; on the meta device nothing is allocated.
        formats: module name (`layers.0.attention.q_proj`, `tok_embeddings`) -> format.

    Raises:
        ValueError: naming the module, if there is none, it is of another kind, or the format does not fit it.
    """
    for name, format in formats.items():
        try:
            held = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the model has no module {name!r:.200}") from None
        try:
            new: Quantized
            if not isinstance(held, nn.Linear | nn.Embedding):
                raise ValueError(f"a {type(held).__name__} cannot be quantized")
            with torch.device(held.weight.device):
                if isinstance(held, nn.Linear):
                    new = QuantizedLinear(held.in_features, held.out_features, format, bias=held.bias is not None)
                else:
                    new = QuantizedEmbedding(held.num_embeddings, held.embedding_dim, format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(held.training))
