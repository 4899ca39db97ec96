"""Quantized linear layers with torchao's tensors, which torch.export and XNNPACK accept.

Integers, scales and zeros are unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from plmtune.modules.quantized import QuantizedLinear
from plmtune.modules.torchtune_layers import quiet

with quiet():
    from torchao.quantization import IntxUnpackedToInt8Tensor


@torch.no_grad()
def to_torchao(model: nn.Module) -> None:
    """Replace a model's quantized linear layers, in place, by layers that torch.export lowers.

    They become `nn.Linear` over `IntxUnpackedToInt8Tensor`, with inputs rounded to 8 bits where the format is dynamic.

    Args:
        model: quantized, without fake-quantized layers.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedLinear):
            continue
        with torch.device("meta"):
            new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        new.register_parameter("weight", _parameter(module))
        new.register_parameter("bias", module.bias)
        model.set_submodule(name, new.train(module.training))


def _parameter(module: QuantizedLinear) -> nn.Parameter:
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
