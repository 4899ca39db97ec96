"""Products and conversions of single matrices by decode.c."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from plmtune.modules.quantized import Quantized
from plmtune.native.library import library
from plmtune.native.structs import KINDS, Matrix, TensorRefs, Vector, number, pointer


def product(matrix: Matrix, x: Tensor) -> Tensor:
    """matrix x in fp32, [out], of x (Tensor), contiguous, as many numbers as the matrix has columns."""
    y = torch.empty(matrix.rows)
    vector = Vector(x.data_ptr(), KINDS[x.dtype])
    threads = ctypes.c_int(torch.get_num_threads())
    if library().plmtune_product(ctypes.byref(matrix), vector, pointer(y.data_ptr()), threads):
        raise MemoryError("out of memory in a product")
    return y


def multiply(module: Quantized, x: Tensor) -> Tensor:
    """x (Tensor), [n, in] -> [n, out], row by row, from integers in the files' order."""
    matrix = TensorRefs().matrix(module)
    matrix.bias = Vector()  # the layer adds it
    products = [product(matrix, row) for row in x.float().contiguous()]
    return torch.stack(products).to(x.dtype) if products else x.new_empty(0, module.num_rows)


def dequantize(module: Quantized, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return what `Quantized.dequantize` returns, in fp32 or bf16, from integers in the files' order."""
    start, end, _ = rows.indices(module.num_rows)
    out = torch.empty(end - start, module.width, dtype=dtype)
    library().plmtune_rows(
        ctypes.byref(TensorRefs().matrix(module)),
        number(start),
        number(end),
        pointer(out.data_ptr()),
        number(KINDS[dtype]),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out


def round_inputs(x: Tensor) -> Tensor:
    """Return what `quantized.round_inputs` returns for x (Tensor), [n, in], contiguous."""
    out, threads = torch.empty_like(x), ctypes.c_int(torch.get_num_threads())
    vector, (rows, width) = Vector(x.data_ptr(), KINDS[x.dtype]), x.shape
    if library().plmtune_round(vector, number(rows), number(width), pointer(out.data_ptr()), threads):
        raise MemoryError("out of memory in a product")
    return out
