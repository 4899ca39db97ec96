"""Which kernel multiplies by a quantized layer: measured once a machine, and set up by `prepack`.

The fastest kernel depends on processor, threads, shape and rows. Measurements are kept in a file of the user's cache.
`PLMTUNE_KERNELS=reference` uses the reference everywhere, so that numbers do not depend on the machine.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import time
from pathlib import Path

import torch
from torch import nn

from plmtune import native
from plmtune.inference.quantized_kernels import KERNELS, example, matches_reference, use_kernel
from plmtune.io import provenance
from plmtune.io.atomic import user_cache, write_atomically
from plmtune.io.untrusted import load_json
from plmtune.modules.mla import MultiHeadLatentAttention
from plmtune.modules.quantized import Format, Quantized

_MEASURED_ROWS = (1, 8, 64, 256)  # each stands for the rows up to one of ROWS, and for more
_FEW = 8  # measured rows up to which no matrix is dequantized
_SMALL = 2**16  # numbers of a matrix below which nothing is measured
_MAX_MEASURED = 2**21  # numbers of a matrix that is measured
_RUNS, _COPIES, _SECONDS = 10, 4, 0.05
_VERSION = 2  # of the file


def choose(format: Format, dtype: torch.dtype, device: torch.device, shape: tuple[int, int]) -> tuple[str, ...]:
    """Return which of KERNELS multiplies fastest here by a matrix [out, in]: for rows up to each of ROWS, and for more.

    All of them can read the order of integers that the first needs.
    """
    if device.type != "cpu" or os.environ.get("PLMTUNE_KERNELS") == "reference":
        return ("reference",) * len(_MEASURED_ROWS)
    candidates = [
        name
        for name, kernel in KERNELS.items()
        if kernel.supports(format, dtype, shape[1]) and (kernel.tiled is None or matches_reference(name, format, dtype))
    ]
    if "native" in candidates:
        candidates = [name for name in candidates if not KERNELS[name].tiled]  # which a native decoder cannot read
    if len(candidates) == 1:
        return (candidates[0],) * len(_MEASURED_ROWS)
    if shape[0] * shape[1] < _SMALL:
        return tuple(candidates[0] if rows <= _FEW else "parts" for rows in _MEASURED_ROWS)
    # Rows of W behave the same, so a few are enough to measure.
    shape = (min(shape[0], max(_MAX_MEASURED // shape[1] // 64, 1) * 64), shape[1])
    size, numbers = f"{shape[0]}x{shape[1]}", str(dtype).removeprefix("torch.")
    key = " | ".join((_machine(), format.name, numbers, size, ", ".join(candidates)))
    kept = _measured()
    if key not in kept or any(name not in candidates for name in kept[key]):
        kept[key] = _measure(candidates, format, dtype, shape)
        with contextlib.suppress(OSError):  # an unwritable folder: measured again next time
            _file().parent.mkdir(parents=True, exist_ok=True)
            write_atomically(_file(), json.dumps({"version": _VERSION, "kernels": kept}, indent=2) + "\n")
    return tuple(kept[key])


@functools.cache
def _machine() -> str:
    name, capability = provenance.device_name(torch.device("cpu")), torch.backends.cpu.get_cpu_capability()
    return f"{name} | {capability} | {torch.get_num_threads()} threads | {torch.__version__}"


def _file() -> Path:
    return user_cache() / "kernels.json"


@torch.no_grad()
def _measure(names: list[str], format: Format, dtype: torch.dtype, shape: tuple[int, int]) -> list[str]:
    """The fastest for each number of rows; several matrices take turns, so that no cache holds one."""
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
                # The minimum: other work on the machine only adds.
                seconds[name, rows] = min(seconds[name, rows], end - start)
                if seconds[name, rows] > 3 * best or end > until:
                    break
    first = min(names, key=lambda name: seconds[name, 1])
    fit = [name for name in names if KERNELS[name].tiled in (None, bool(KERNELS[first].tiled))]
    return [first, *(min(fit, key=lambda name: seconds[name, rows]) for rows in _MEASURED_ROWS[1:])]


def _measured() -> dict[str, list[str]]:
    """Earlier measurements; empty where the file is missing, damaged or of another version."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        data = load_json(_file().read_text(encoding="utf-8"))
        kept = dict(data["kernels"]) if data["version"] == _VERSION else {}
        if all(len(names) == len(_MEASURED_ROWS) and set(names) <= set(KERNELS) for names in kept.values()):
            return kept
    return {}


@torch.no_grad()
def prepack(model: nn.Module) -> None:
    """Give each quantized layer the kernels that are fastest here, in place, and its integers in their order.

    A decoder on a CPU also gets `plmtune.native` where it is available. MLA's kv_b_proj, which each decoded token needs
    as a matrix, is dequantized for good. A prepacked model stays on its device and in its dtype, and cannot be saved; a
    model without quantized layers changes only in how it decodes.
    """
    for module in model.modules():
        held = getattr(module, "kv_b_proj", None)
        if isinstance(module, MultiHeadLatentAttention) and isinstance(held, Quantized) and not held.prepacked:
            held.keep_dense()
    native.attach(model)
    for module in model.modules():
        if isinstance(module, Quantized) and not module.prepacked:
            shape = (module.num_rows, module.width)
            names = choose(module.format, module.scales.dtype, module.scales.device, shape)
            if KERNELS[names[0]].tiled:
                use_kernel(module, names[0])
            elif "int8_integer" in names:
                use_kernel(module, "int8_integer")
            module.kernels = tuple(KERNELS[name].multiply for name in names)
