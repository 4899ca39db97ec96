"""A quantized model with torchao's tensors in place of ours: the form that torch.export and ExecuTorch's XNNPACK know.

The integers, scales and zeros are the very same ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.modules.quantized import Quantized, QuantizedEmbedding, QuantizedLinear
from plmtune.modules.torchtune_layers import quiet

with quiet():
    from torchao.quantization import IntxUnpackedToInt8Tensor


class ExportedEmbedding(QuantizedEmbedding):
    """An embedding whose rows are looked up as integers, and whose head multiplies by torchao's tensor.

    Args:
        source: an embedding of a dynamic format.
    """

    head: nn.Parameter

    def __init__(self, source: QuantizedEmbedding) -> None:
        nn.Module.__init__(self)
        self.num_rows, self.width, self.format = source.num_rows, source.width, source.format
        self.register_buffer("weight", source.integers())  # a byte each: shifts of 4 bits do not lower
        self.register_buffer("scales", source.scales)
        self.head = _parameter(source)

    def integers(self, rows: Tensor | slice | None = None) -> Tensor:
        return self.weight if rows is None else self.weight[rows]

    def project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head)


@torch.no_grad()
def to_torchao(model: nn.Module) -> None:
    """Replace, in place, a model's quantized layers by ones that torch.export lowers.

    Linear layers become `nn.Linear` over `IntxUnpackedToInt8Tensor`, with inputs rounded to 8 bits where the format is
    dynamic. An embedding of a dynamic format looks its rows up as integers and has a head as those layers have; of
    another format it becomes a plain one of floating-point numbers, the ones that its integers stand for.

    Args:
        model: not `prepare`d.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, Quantized):
            continue
        new: nn.Module
        if isinstance(module, QuantizedLinear):
            with torch.device("meta"):
                new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            new.register_parameter("weight", _parameter(module))
            new.register_parameter("bias", module.bias)
        elif isinstance(module, QuantizedEmbedding) and module.format.dynamic:
            new = ExportedEmbedding(module)
        else:
            new = nn.Embedding.from_pretrained(module.dequantize())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(module.training))


def _parameter(module: Quantized) -> nn.Parameter:
    """A module's weight as torchao's tensor, [out, in]."""
    q, scales = module.integers(), module.scales
    zeros: Any = torch.zeros_like(scales, dtype=torch.int8) if module.format.symmetric else module.zeros
    if not module.format.symmetric:
        q, zeros = q - 8, zeros - 8  # 0..15 there, -8..7 here: differences, and so the numbers, are the same
    tensor = IntxUnpackedToInt8Tensor(
        qdata=q,
        scale=scales,
        zero_point=zeros,
        target_dtype=getattr(torch, f"int{module.format.bits}"),
        block_size=(1, q.shape[1] // scales.shape[1]),
        dtype=scales.dtype,
        activation_quantization="int8_asym_per_token" if module.format.dynamic else None,
    )
    return nn.Parameter(tensor, requires_grad=False)
