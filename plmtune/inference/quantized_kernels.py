"""Products with quantized matrices: the kernels there are, each equal to `quantized.reference` up to rounding.

torch and `plmtune.native` have kernels that read integers directly: the fastest for few rows, such as one token. For
many rows, such as a prompt, the matrix is dequantized block by block and multiplied as any other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plmtune import native
from plmtune.modules.quantized import (
    ROWS,
    Format,
    Multiply,
    Quantized,
    QuantizedLinear,
    reference,
    round_inputs,
    round_rows,
)

_INT4_GROUPS = (32, 64, 128, 256)  # group sizes that torch's packed 4-bit kernel supports
_TILE = 64  # rows; half of them without AVX-512
_CHUNK = 2**20  # numbers converted at a time, so that caches hold them
_BYTES = 2**23  # of a matrix that are dequantized at a time: a product by fewer rows is slower
_EPS = np.float32(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Kernel:
    """A function that multiplies by a quantized matrix, on a CPU.

    Args:
        multiply: (module, x [n, in]) -> [n, out].
        supports: whether it can multiply in this format, in this dtype, by rows of so many numbers.
        tiled: it needs the integers in tiles (`to_tiles`); False: in the files' order. None: it reads both.
    """

    multiply: Multiply
    supports: Callable[[Format, torch.dtype, int], bool]
    tiled: bool | None = False


def _int8(module: Quantized, x: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, module.weight, module.scales.view(-1))


def _round_row(x: Tensor) -> tuple[Tensor, float, int]:
    """`round_rows` of one row, [1, in], with scale and zero as numbers of Python; NaN as scale where x is not finite.

    A third of the calls, which dominate a small layer's time.
    """
    least, most = x.aminmax()
    low, high = min(least.item(), 0.0), max(most.item(), 0.0)
    if not math.isfinite(high - low):
        return x, math.nan, 0
    # In numpy's fp32: in Python's double a tie would fall elsewhere than in `round_rows`.
    step = np.maximum(np.float32(high - low) / np.float32(255), _EPS)
    zero = max(-128 - round(float(np.float32(low) / step)), -128)
    inverse = float(np.float32(1) / step)
    return (x.float() * inverse).round_().add_(zero).clamp_(-128, 127), float(step), zero


def _int4(module: Quantized, x: Tensor) -> Tensor:
    if module.format.dynamic and len(x) == 1:
        q, step, zero = _round_row(x)
        x = q.sub(zero).mul_(step).to(x.dtype)
    elif module.format.dynamic:
        x = _rounded(x)
    group = module.format.group_size
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, module.weight, group, module.scales)[:, : module.num_rows]


def _integer(module: Quantized, x: Tensor) -> Tensor:
    """Inputs as 8-bit integers, the product exact: scale (q - zero) W^T = scale (q W^T - zero W 1)."""
    scales, sums = module.scales.view(-1), module.get_buffer("sums")
    if len(x) == 1:
        whole_row, step, at = _round_row(x)
        if not math.isfinite(step):
            return x.new_full((1, module.num_rows), math.nan)
        q = whole_row.to(torch.int8)
        return torch._int_mm(q, module.weight.t()).sub_(sums, alpha=at).mul(scales.float() * step).to(x.dtype)
    parts = [round_rows(part) for part in x.split(max(1, _CHUNK // module.width))]
    q = torch.cat([part.to(torch.int8) for part, _, _ in parts])
    scale, zero = (torch.cat(found) for found in zip(*((scale, zero) for _, scale, zero in parts), strict=True))
    out, step = x.new_empty(len(x), module.num_rows), max(64, _CHUNK // max(len(x), 1) // 64 * 64)
    for start in range(0, module.num_rows, step):
        rows = slice(start, start + step)
        product = torch._int_mm(q, module.weight[rows].t()) - zero.to(torch.int32) * sums[rows]
        out[:, rows] = (product * scales[rows].float()).mul_(scale)
    return out


def _rounded(x: Tensor) -> Tensor:
    """`round_inputs` of x (Tensor), [n, in]."""
    if native.supports(Format(8), x.dtype, x.shape[1]):
        return native.round_inputs(x)
    return torch.cat([round_inputs(part) for part in x.split(max(1, _CHUNK // x.shape[1]))])


def _parts(module: Quantized, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The reference in x's dtype, some rows of W at a time, so that caches hold what is dequantized."""
    if module.format.dynamic:
        x = _rounded(x)
    dtype = dtype or x.dtype
    wide, step = x.to(dtype), max(64, _BYTES // dtype.itemsize // module.width // 64 * 64)
    is_native = not module.tile and native.supports(module.format, module.scales.dtype, module.width)

    def product(rows: slice) -> Tensor:
        weight = native.dequantize(module, rows, dtype) if is_native else module.dequantize(rows).to(dtype)
        return F.linear(wide, weight)

    if module.num_rows <= step:
        return product(slice(None)).to(x.dtype)
    out = x.new_empty(len(x), module.num_rows)
    for start in range(0, module.num_rows, step):
        rows = slice(start, start + step)
        out[:, rows] = product(rows)
    return out


# Where nothing is measured, the first that supports a layer multiplies few rows by it, and `parts` many.
KERNELS: dict[str, Kernel] = {
    "int4_tiles": Kernel(
        _int4,
        lambda format, dtype, width: format.bits == 4 and format.group_size in _INT4_GROUPS and dtype == torch.bfloat16,
        tiled=True,
    ),
    # Of rows that are no multiple of 16, torch's kernel reads what lies behind their end.
    "int8": Kernel(
        _int8, lambda format, dtype, width: format.name == "int8" and dtype == torch.bfloat16 and width % 32 == 0
    ),
    # 255 x 128 x width must stay below 2^31.
    "int8_integer": Kernel(
        _integer, lambda format, dtype, width: format.name == "int8_dynamic_int8" and width <= 2**15
    ),
    "native": Kernel(native.multiply, native.supports),
    "parts": Kernel(_parts, lambda format, dtype, width: True, tiled=None),
    # In fp32, for processors without bf16 units.
    "wide": Kernel(
        functools.partial(_parts, dtype=torch.float32), lambda format, dtype, width: dtype != torch.float32, tiled=None
    ),
    "reference": Kernel(reference, lambda format, dtype, width: True, tiled=None),
}


def to_tiles(module: Quantized) -> bool:
    """Put a module's 4-bit integers into the packed kernel's order, in place; return whether that was possible.

    The order depends on the processor: tiles of 64 or 32 rows, column by column, half of the rows low and half high. An
    order that is neither is detected by reading back, and the module is left as it was.
    """
    held, (scales, zeros) = module.weight, module.scales_and_zeros()
    weight = F.pad(held, (0, 0, 0, -module.num_rows % _TILE))
    module.weight = torch.empty_like(weight)
    step = max(_CHUNK // module.width // _TILE, 1) * _TILE  # as the packing takes 4 bytes a number
    for packed, part in zip(module.weight.split(step), weight.split(step), strict=True):
        raw = torch.stack((part & 15, part >> 4), dim=-1).flatten(-2)
        packed.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(raw.to(torch.int32), 1))
    sample = torch.arange(0, module.num_rows, max(module.num_rows // 97, 1), device=held.device)
    expected = torch.stack((held[sample] & 15, held[sample] >> 4), dim=-1).flatten(-2).view(torch.int8)
    for tile in (_TILE, _TILE // 2):
        module.tile = tile
        if torch.equal(module._untiled(sample), expected):
            break
    else:
        module.weight, module.tile = held, 0
        return False
    middle = torch.zeros_like(scales) if zeros is None else (8 - zeros) * scales
    pair = F.pad(torch.stack((scales, middle), dim=-1), (0, 0, 0, 0, 0, -module.num_rows % _TILE))
    module.scales = pair.transpose(0, 1).contiguous()  # [groups, out, 2]
    if zeros is not None:
        del module.zeros
    return True


def example(format: Format, dtype: torch.dtype, shape: tuple[int, int]) -> QuantizedLinear:
    """A layer [out, in] of random integers, for measurements and comparisons."""
    module = QuantizedLinear(shape[1], shape[0], format)
    generator = torch.Generator().manual_seed(0)
    low, high = (-128, 128) if format.bits == 8 else (0, 256)
    module.weight.random_(low, high, generator=generator)
    module.scales = torch.rand(module.scales.shape, generator=generator).add_(0.5).to(torch.bfloat16).to(dtype)
    if not format.symmetric:
        module.zeros.random_(0, 16, generator=generator)
    return module


@functools.cache
@torch.no_grad()
def matches_reference(name: str, format: Format, dtype: torch.dtype) -> bool:
    """Whether a kernel equals the reference on this processor, also for the largest integers.

    Some processors add products of 8 bits up in 16, which overflow.
    """
    module = example(format, dtype, (64, 512))
    module.weight[:32] = 127 if format.bits == 8 else 255
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0] = 1.0
    expected = reference(module, x).float()
    try:
        found = torch.cat([use_kernel(module, name).multiply(rows) for rows in (x[:1], x[1:])]).float()
    except RuntimeError:  # not built for this processor
        return False
    bound = expected.abs().max() * (2e-2 if dtype != torch.float32 else 1e-4)
    return bool((found - expected).abs().max() <= bound)


def use_kernel(module: Quantized, name: str) -> Quantized:
    """Let a module always multiply by this kernel, in place."""
    if KERNELS[name].tiled and not module.tile and not to_tiles(module):
        raise RuntimeError("this processor's order of packed integers is unknown")
    if name == "int8_integer":
        module.register_buffer("sums", module.weight.sum(1, dtype=torch.int32), persistent=False)
    module.kernels = (KERNELS[name].multiply,) * (len(ROWS) + 1)
    return module
