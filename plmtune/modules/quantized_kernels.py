"""Products with integers: the ways there are, which of them is fastest here, and layers that are ready for it.

torch and `plmtune.native` have kernels that read integers as they are: the fastest for few rows, such as one token.
For many rows, such as a prompt, the matrix is written out part by part and multiplied as any other. The fastest kernel
depends on processor, threads, shape and rows, so it is measured, once a machine, and kept in a file of the user's cache
(`PLMTUNE_KERNELS=reference` uses none of them, so that numbers do not depend on the machine). Each computes what
`quantized.reference` does, up to rounding.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.io.atomic import atomic_write
from plmtune.io.untrusted import load_json
from plmtune.modules.attention import MultiHeadLatentAttention
from plmtune.modules.quantized import (
    ROWS,
    Format,
    Multiply,
    Quantized,
    QuantizedEmbedding,
    QuantizedLinear,
    reference,
    round_inputs,
    round_rows,
)

_INT4_GROUPS = (32, 64, 128, 256)  # that the packed kernel of 4 bits takes
_MEASURED_ROWS = (1, 8, 64, 256)  # which stand for up to each of ROWS, and more
_FEW = 8  # of them: rows that need no matrix that is written out
_TILE = 64  # rows; half of them without AVX-512
_SMALL = 2**16  # numbers of a matrix below which it does not matter, and nothing is measured
_MAX_MEASURED = 2**21  # numbers of a matrix that is measured
_RUNS, _COPIES, _SECONDS = 10, 4, 0.05
_CHUNK = 2**20  # numbers that are changed at a time, so that caches hold them
_BYTES = 2**23  # of a matrix that are written out at a time: a product by fewer rows is slower
_VERSION = 2  # of the file
_EPS = np.float32(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Kernel:
    """A way to multiply.

    Args:
        multiply: (module, x [n, in]) -> [n, out].
        takes: whether it can multiply in this format, dtype, device type and shape [out, in].
        tiled: it wants the integers in tiles (`to_tiles`); else as they are in files. None: it takes both.
    """

    multiply: Multiply
    takes: Callable[[Format, torch.dtype, str, tuple[int, int]], bool]
    tiled: bool | None = False


def _int8(module: Quantized, x: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, module.weight, module.scales.view(-1))


def _round_row(x: Tensor) -> tuple[Tensor, float, int]:
    """`round_rows` of one row, [1, in], with scale and zero as numbers of Python; NaN as scale where x is not finite.

    A third of the calls, which is what a small layer's time is.
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
    from plmtune import native  # imports this package

    if native.takes(Format(8), x.dtype, x.shape[1]):
        return native.round_inputs(x)
    return torch.cat([round_inputs(part) for part in x.split(max(1, _CHUNK // x.shape[1]))])


def _native(module: Quantized, x: Tensor) -> Tensor:
    from plmtune import native

    return native.multiply(module, x)


def _parts(module: Quantized, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The reference, some rows of W at a time, whose numbers are reused memory that caches hold; in x's dtype."""
    from plmtune import native

    if module.format.dynamic:
        x = _rounded(x)
    dtype = dtype or x.dtype
    wide, step = x.to(dtype), max(64, _BYTES // dtype.itemsize // module.width // 64 * 64)
    is_native = not module.tile and native.takes(module.format, module.scales.dtype, module.width)

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


def _wide(module: Quantized, x: Tensor) -> Tensor:
    """The same in fp32, for processors that have no units for bf16."""
    return _parts(module, x, torch.float32)


def _on_cpu(
    bits: int, dtypes: tuple[torch.dtype, ...], fits: Callable[[Format, int, int], bool]
) -> Callable[[Format, torch.dtype, str, tuple[int, int]], bool]:
    def takes(format: Format, dtype: torch.dtype, device: str, shape: tuple[int, int]) -> bool:
        return device == "cpu" and format.bits == bits and dtype in dtypes and fits(format, *shape)

    return takes


def _by_native(format: Format, dtype: torch.dtype, device: str, shape: tuple[int, int]) -> bool:
    from plmtune import native

    return device == "cpu" and native.takes(format, dtype, shape[1])


_ANY = (torch.float32, torch.bfloat16, torch.float16)
# Where nothing is measured, the first that takes a layer multiplies few rows by it, and `parts` many.
KERNELS: dict[str, Kernel] = {
    "int4_tiles": Kernel(
        _int4,
        _on_cpu(4, (torch.bfloat16,), lambda format, out, width: format.group_size in _INT4_GROUPS),
        tiled=True,
    ),
    "int8": Kernel(
        _int8,
        _on_cpu(8, (torch.bfloat16,), lambda format, out, width: not format.dynamic and format.group_size is None),
    ),
    # 255 x 128 x width must stay below 2^31.
    "int8_integer": Kernel(
        _integer,
        _on_cpu(8, _ANY, lambda format, out, width: format.dynamic and format.group_size is None and width <= 2**15),
    ),
    "native": Kernel(_native, _by_native),
    "parts": Kernel(_parts, lambda format, dtype, device, shape: device == "cpu", tiled=None),
    "wide": Kernel(_wide, lambda format, dtype, device, shape: device == "cpu" and dtype != torch.float32, tiled=None),
    "reference": Kernel(reference, lambda format, dtype, device, shape: True, tiled=None),
}


def to_tiles(module: Quantized) -> bool:
    """Put a module's integers of 4 bits into the packed kernel's order, in place, and say whether that could be done.

    The order is the processor's: tiles of 64 or 32 rows, column by column, half of the rows low and half high; another
    processor's is found out by reading back, and left.
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


def choose(format: Format, dtype: torch.dtype, device: torch.device | str, shape: tuple[int, int], rows: int) -> str:
    """Return which of KERNELS multiplies `rows` rows by a matrix [out, in] of this shape fastest here."""
    return _choose(format, dtype, torch.device(device).type, shape)[bisect_left(ROWS, rows)]


def _choose(format: Format, dtype: torch.dtype, device: str, shape: tuple[int, int]) -> tuple[str, ...]:
    """The kernels of each number of rows; all of them can read the order of integers that the first wants."""
    if os.environ.get("PLMTUNE_KERNELS") == "reference":
        return ("reference",) * len(_MEASURED_ROWS)
    able = [
        name
        for name, kernel in KERNELS.items()
        if kernel.takes(format, dtype, device, shape)
        and (kernel.tiled is None or _matches_reference(name, format, dtype))
    ]
    if "native" in able:
        able = [name for name in able if not KERNELS[name].tiled]  # a decoder's integers lie as in files
    if len(able) == 1:
        return (able[0],) * len(_MEASURED_ROWS)
    if shape[0] * shape[1] < _SMALL:
        return tuple(able[0] if rows <= _FEW else "parts" for rows in _MEASURED_ROWS)
    # More rows go the same way, so few are enough to know.
    shape = (min(shape[0], max(_MAX_MEASURED // shape[1] // 64, 1) * 64), shape[1])
    key = (
        f"{_machine()} | {format.name} | {str(dtype).removeprefix('torch.')} | {shape[0]}x{shape[1]} | "
        f"{', '.join(able)}"
    )
    kept = _measured()
    if key not in kept or any(name not in able for name in kept[key]):
        kept[key] = _measure(able, format, dtype, shape)
        _keep(kept)
    return tuple(kept[key])


@functools.cache
def _machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return (
        f"{name} | {torch.backends.cpu.get_cpu_capability()} | {torch.get_num_threads()} threads | {torch.__version__}"
    )


def example(format: Format, dtype: torch.dtype, shape: tuple[int, int]) -> QuantizedLinear:
    """A layer [out, in] of random integers, to be measured or compared with."""
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
def _matches_reference(name: str, format: Format, dtype: torch.dtype) -> bool:
    """Whether a kernel says what the reference says on this processor, also of the largest numbers there are.

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
    """Have a module multiply by this kernel always, in place.

    Raises:
        RuntimeError: if this processor's order of integers is not known.
    """
    if KERNELS[name].tiled and not module.tile and not to_tiles(module):
        raise RuntimeError("the order of this processor is not known")
    if name == "int8_integer":
        module.register_buffer("sums", module.weight.sum(1, dtype=torch.int32), persistent=False)
    module.kernels = (KERNELS[name].multiply,) * len(_MEASURED_ROWS)
    return module


@torch.no_grad()
def _measure(names: list[str], format: Format, dtype: torch.dtype, shape: tuple[int, int]) -> list[str]:
    """The fastest for each number of rows, over matrices that take turns, so that no cache holds one."""
    first_copy = example(format, dtype, shape)
    seconds = {(name, rows): math.inf for name in names for rows in _MEASURED_ROWS}
    for name in names:
        modules = [use_kernel(copy.deepcopy(first_copy), name) for _ in range(_COPIES)]
        for rows in _MEASURED_ROWS:
            x, best = torch.randn(rows, shape[1]).to(dtype), min(seconds[other, rows] for other in names)
            modules[0].multiply(x)
            until = time.perf_counter() + _SECONDS
            for number in range(1, _RUNS):
                start = time.perf_counter()
                modules[number % _COPIES].multiply(x)
                end = time.perf_counter()
                # The least is asked for, since other work on the machine only adds.
                seconds[name, rows] = min(seconds[name, rows], end - start)
                if seconds[name, rows] > 3 * best or end > until:
                    break
    first = min(names, key=lambda name: seconds[name, 1])
    fit = [name for name in names if KERNELS[name].tiled in (None, bool(KERNELS[first].tiled))]
    return [first, *(min(fit, key=lambda name: seconds[name, rows]) for rows in _MEASURED_ROWS[1:])]


def _file() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "plmtune" / "kernels.json"


def _measured() -> dict[str, list[str]]:
    """What was measured before; empty where the file is absent, damaged or another version's."""
    try:
        data = load_json(_file().read_text(encoding="utf-8"))
        kept = data["kernels"] if data["version"] == _VERSION else {}
        assert all(len(names) == len(_MEASURED_ROWS) and set(names) <= set(KERNELS) for names in kept.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return {}
    return dict(kept)


def _keep(kept: Mapping[str, Any]) -> None:
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"version": _VERSION, "kernels": kept}, indent=2) + "\n", encoding="utf-8")
    except OSError:
        pass  # a folder that cannot be written: it is measured again next time


@torch.no_grad()
def prepack(model: nn.Module) -> None:
    """Give each quantized layer the kernels that are fastest here, in place, and its integers in their order.

    A decoder on a CPU gets `plmtune.native` too, where it can be had, which wants integers as they are in files. The
    expansion of MLA's latent, which each decoded token needs as a matrix, is written out, and its integers go. A model
    without quantized layers keeps all that it has; a prepacked one stays on its device and in its dtype, and cannot be
    saved.
    """
    from plmtune import native  # imports this package

    for module in model.modules():
        held = getattr(module, "kv_b_proj", None)
        if isinstance(module, MultiHeadLatentAttention) and isinstance(held, Quantized) and not held.prepacked:
            held.keep_dense()
    native.attach(model)
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding) and not module.prepacked:
            shape = (module.num_rows, module.width)
            names = _choose(module.format, module.scales.dtype, module.scales.device.type, shape)
            if KERNELS[names[0]].tiled:
                use_kernel(module, names[0])
            elif "int8_integer" in names:
                use_kernel(module, "int8_integer")
            module.kernels = tuple(KERNELS[name].multiply for name in names)
