"""Linear layers whose product with a single row runs as fast as the weight can be read."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# In bf16 a CPU's products go through oneDNN, which compiles code for each shape and keeps it: 1,024 shapes in its own
# cache and as many in torch's, 0.3 MiB each. Texts of ever new lengths fill both (benchmarks/memory_growth.py). Read
# once, at a process's first product.
for _name, _capacity in {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "1"}.items():
    os.environ.setdefault(_name, _capacity)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of x (Tensor), [..., in], and weight (Tensor), [out, in].

    One row of bf16 on a CPU goes through the matrix-vector product: without bf16 units torch's matrix product reaches
    half of its speed there (measured: 1.0x for 768 x 768, 1.4x to 2.6x for PLM-1.8B's shapes). Both sum in fp32.
    """
    one_row = x.numel() == x.shape[-1]
    if one_row and x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu" and type(x) is Tensor:
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """`nn.Linear` over `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.bias is not None else linear(x, self.weight)
