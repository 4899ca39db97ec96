"""Linear layers and embeddings that hold integers and scales in place of their weights.

How a matrix is stored is a `Format`; `plmtune.quantization` makes the numbers, `models.hf` reads and writes them, and
`inference.quantized_kernels` multiplies. A stored number q stands for (q - zero) * scale; a scale is always a bf16
number, so that casting a model to another dtype and back changes nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows up to which another kernel may be the fastest: one; few, where a product reads weights more than it computes;
# more, where writing a matrix out costs as much as multiplying by it. Beyond, it costs next to nothing.
ROWS = (1, 16, 128)

_NAME = re.compile(r"(int8_dynamic_)?int([48])(?:_g([1-9]\d*))?")


@dataclass(frozen=True)
class Format:
    """How the rows of a matrix [out, in] are stored.

    Args:
        bits: of a number. 4 bits lie two to a byte, the even column low, as 0 to 15; 8 bits are -128 to 127.
        group_size: neighbours in a row that share a scale; None: the whole row.
        dynamic: in a product the inputs are rounded to 8 bits too, token by token (asymmetric: a scale and a zero
            each). Such weights are symmetric, as their kernels need.

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
                f"{name!r:.80} is no format. Formats are int8, int4_gN, int8_dynamic_int8 and int8_dynamic_int4_gN"
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
        kernels: what multiplies up to as many rows as each of ROWS, and more; None: the reference below.
        tile: rows that are interleaved in `weight`, as a kernel wants them; 0: none (`inference.quantized_kernels`).
        dense: the whole matrix written out, in place of the integers.

    Raises:
        ValueError: if rows cannot be divided into the format's groups or bytes.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    kernels: tuple[Multiply, ...] | None = None
    tile = 0
    dense: Tensor | None = None

    def __init__(self, num_rows: int, width: int, format: Format) -> None:
        super().__init__()
        group = format.group_size or width
        if width % group or width % 2:
            raise ValueError(f"rows of {width} numbers cannot be divided into groups of {group}")
        self.num_rows, self.width, self.format = num_rows, width, format
        shape = (num_rows, width) if format.bits == 8 else (num_rows, width // 2)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8 if format.bits == 8 else torch.uint8))
        self.register_buffer("scales", torch.zeros(num_rows, width // group))
        if not format.symmetric:
            self.register_buffer("zeros", torch.zeros(num_rows, width // group, dtype=torch.int8))

    @property
    def prepacked(self) -> bool:
        """Its integers are in the order of this machine's kernel, no longer in the files'."""
        return self.kernels is not None or self.dense is not None

    def integers(self, rows: Tensor | slice | None = None) -> Tensor:
        """The stored numbers of all rows or some, int8, [rows, in]; of symmetric 4 bits -8 to 7, else 0 to 15.

        A slice begins and ends at multiples of 64, or at the end.
        """
        if self.format.bits == 8:
            return self.weight if rows is None else self.weight[rows]
        if self.tile:
            pairs = self._untiled(rows)
        else:
            held = self.weight if rows is None else self.weight[rows]
            pairs = torch.stack((held & 15, held >> 4), dim=-1).flatten(-2).view(torch.int8)
        return pairs - 8 if self.format.symmetric else pairs

    def _untiled(self, rows: Tensor | slice | None) -> Tensor:
        """Numbers from 0 to 15 of rows that lie in tiles: [in, tile / 2] bytes each, its second half of rows high."""
        half = self.tile // 2
        if isinstance(rows, Tensor):
            tiles = self.weight.view(-1, self.width, half)
            lane = rows % self.tile
            held = tiles[rows // self.tile, :, lane % half]  # [..., in]
            return torch.where((lane < half)[..., None], held & 15, held >> 4).view(torch.int8)
        tiles = (self.weight if rows is None else self.weight[rows]).reshape(-1, self.width, half)
        found = torch.cat((tiles & 15, tiles >> 4), dim=-1).transpose(1, 2).reshape(-1, self.width).view(torch.int8)
        # The last tile is filled up with rows that are none.
        return found[: self.num_rows - (rows.start if rows is not None else 0)]

    def scales_and_zeros(self, rows: Tensor | slice | None = None) -> tuple[Tensor, Tensor | None]:
        """[rows, groups] of each; no zeros of a symmetric format."""
        if self.tile:
            # The kernel's are [groups, out, 2]: scales, and what 8 stands for, (8 - zero) scale.
            held = self.scales[:, : self.num_rows]
            pair = (held if rows is None else held[:, rows]).movedim(0, -2)
            scales = pair[..., 0]
            if self.format.symmetric:
                return scales, None
            return scales, (8 - (pair[..., 1] / scales).nan_to_num(8.0).round()).to(torch.int8)
        scales = self.scales if rows is None else self.scales[rows]
        if self.format.symmetric:
            return scales, None
        return scales, self.zeros if rows is None else self.zeros[rows]

    def dequantize(self, rows: Tensor | slice | None = None) -> Tensor:
        """The dequantized rows, [rows, in], in the dtype of the scales."""
        if self.dense is not None:
            return self.dense if rows is None else self.dense[rows]
        q, (scales, zeros) = self.integers(rows), self.scales_and_zeros(rows)
        q = q.unflatten(-1, (scales.shape[-1], -1))
        if zeros is not None:
            q = q - zeros[..., None]
        return (q * scales[..., None]).flatten(-2)

    def keep_dense(self) -> None:
        """Dequantize the matrix for good, where each token needs it, and drop the integers."""
        self.dense = self.dequantize()
        self.weight = self.weight.new_empty(0)

    def multiply(self, x: Tensor) -> Tensor:
        """x (Tensor): [..., in] -> x W^T, [..., out]."""
        if self.kernels is None:
            return reference(self, x)
        flat = x.reshape(-1, self.width).contiguous()  # what packed kernels take
        return self.kernels[bisect_left(ROWS, len(flat))](self, flat).reshape(*x.shape[:-1], self.num_rows)


Multiply = Callable[[Quantized, Tensor], Tensor]


def reference(module: Quantized, x: Tensor) -> Tensor:
    """x (Tensor): [..., in] -> [..., out], by the matrix written out; each kernel computes this, up to rounding."""
    if module.format.dynamic:
        x = round_inputs(x)
    return F.linear(x, module.dequantize().to(x.dtype))


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
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(Quantized):
    """Rows looked up, [...] ids -> [..., d], and of a tied one the vocabulary's projection."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.dequantize(ids)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden (Tensor): [..., d] -> [..., v]."""
        return self.multiply(hidden)


def round_inputs(x: Tensor) -> Tensor:
    """Round each token of x (Tensor), [..., in], to 256 steps between its least and greatest number, 0 among them.

    Asymmetric, with a scale and a zero a token, as torchao's int8_asym_per_token and XNNPACK's qd8 have it.
    """
    q, scale, zero = round_rows(x)
    return ((q - zero) * scale).to(x.dtype)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (Tensor), [..., in], as whole numbers from -128 to 127 in fp32, with scale and zero, [..., 1]."""
    wide = x.float()
    low, high = wide.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    q = ((wide * (1 / scale)).round() + zero).clamp(-128, 127)  # a product as in torchao, so that ties round equally
    return q, scale, zero


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
        model.set_submodule(name, new.train(held.training))


def is_quantized(model: nn.Module) -> bool:
    """Whether a module stores integers."""
    return any(isinstance(module, Quantized) for module in model.modules())
