"""decode.c's structures for ctypes, and how a module's tensors are described by them."""

from __future__ import annotations

import ctypes
from typing import cast

import torch
from torch import Tensor, nn

from plmtune.modules.linear import Linear
from plmtune.modules.quantized import Quantized, QuantizedEmbedding, QuantizedLinear

KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT4 = 2, 3
CPU = torch.device("cpu")

pointer, number, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Vector(ctypes.Structure):
    _fields_ = (("at", pointer), ("kind", number))


class Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", pointer),
        ("zeros", pointer),
        ("scales", Vector),
        ("bias", Vector),
        *((name, number) for name in ("kind", "rows", "cols", "group", "dynamic")),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, Vector) for name in ("attention_norm", "latent_norm", "ffn_norm")),
        *((name, _float) for name in ("attention_eps", "latent_eps", "ffn_eps", "scale")),
        ("cos", pointer),
        ("sin", pointer),
        *((name, number) for name in ("latent", "heads", "kv_heads", "nope", "turned", "value", "interleaved")),
        ("sparse", number),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("embedding", Matrix),
        ("head", Matrix),
        ("norm", Vector),
        ("eps", _float),
        ("num_layers", number),
    )


class Unsupported(Exception):
    """A model, or a part of one, that decode.c does not compute."""


def require(condition: object) -> None:
    if not condition:
        raise Unsupported


class TensorRefs:
    """Structures that point into tensors, and the tensors, which must stay where they are."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Tensor, int]] = []

    def address(self, tensor: Tensor) -> int:
        require(type(tensor) in (Tensor, nn.Parameter) and tensor.device == CPU)
        self.tensors.append((tensor, tensor.data_ptr()))
        return tensor.data_ptr()

    def vector(self, tensor: Tensor) -> Vector:
        require(tensor.dtype in KINDS and tensor.is_contiguous())
        return Vector(self.address(tensor), KINDS[tensor.dtype])

    def matrix(self, module: nn.Module, *, by_input: bool = False) -> Matrix:
        """A layer's matrix; by_input: its transpose is contiguous."""
        matrix = Matrix()
        if isinstance(module, Quantized) and module.dense is None:
            require(type(module) in (QuantizedLinear, QuantizedEmbedding) and not module.tile)
            format = module.format
            require(module.weight.is_contiguous() and module.weight.numel() > 0)
            matrix.kind = INT8 if format.bits == 8 else INT4
            matrix.rows, matrix.cols = module.num_rows, module.width
            matrix.group, matrix.dynamic = format.group_size or module.width, format.dynamic
            require(matrix.group % (16 if format.bits == 8 else 32) == 0)
            matrix.weight, matrix.scales = self.address(module.weight), self.vector(module.scales)
            if not format.symmetric:
                require(module.zeros.is_contiguous())
                matrix.zeros = self.address(module.zeros)
        else:
            require(type(module) in (Linear, nn.Linear, nn.Embedding, QuantizedLinear))
            weight = module.dense if isinstance(module, Quantized) else cast(Tensor, module.weight)
            assert weight is not None
            require(weight.dtype in KINDS and (weight.t() if by_input else weight).is_contiguous())
            matrix.kind, matrix.weight = KINDS[weight.dtype], self.address(weight)
            matrix.rows, matrix.cols = weight.shape
            matrix.group = matrix.cols
        bias = getattr(module, "bias", None)
        if bias is not None:
            matrix.bias = self.vector(bias)
        return matrix
