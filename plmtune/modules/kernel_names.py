"""The name of the attention kernel that training uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plmtune.modules.attention_kernels import attend, choose_kernel
from plmtune.modules.segments import Segments

# By the autograd node of a call: what ran, not what was requested.
_KERNEL_NAMES = {
    "ScaledDotProductCudnnAttention": "cuDNN",
    "ScaledDotProductFlashAttention": "flash",
    "ScaledDotProductFlashAttentionForCpu": "flash for CPUs",
    "ScaledDotProductEfficientAttention": "memory-efficient",
}


def kernel_names(
    model: nn.Module,
    *,
    seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
    masked: bool = False,
    segments: bool = False,
) -> str:
    """Name the kernel that attention uses in training, by running one sequence of zeros.

    Args:
        model: on any device; each shape that its attentions' `head_shapes` give is tried.
        seq_len: tokens a sequence.
        dtype: of the computation.
        device: of the computation.
        masked: attention gets a mask.
        segments: attention gets segments.

    Returns:
        For example "flash for CPUs, values padded from 16 to 24", or "unfused"; several shapes are joined by "; ".
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "head_shapes")]
    shapes = dict.fromkeys(module.head_shapes() for module in modules)
    names = dict.fromkeys(_kernel_name(shape, seq_len, dtype, device, masked, segments) for shape in shapes)
    return "; ".join(names) or "the model's own"


def _kernel_name(
    shapes: tuple[tuple[int, int], ...],
    seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
    masked: bool,
    segments: bool,
) -> str:
    # The kernel does not depend on the length, except on its remainder: some need aligned rows of the mask.
    s = min(seq_len, 512 + seq_len % 512)
    q, k, v = (
        torch.zeros(1, s, heads, width, dtype=dtype, device=device, requires_grad=True).transpose(1, 2)
        for heads, width in shapes
    )
    mask: Tensor | Segments | None = None
    if segments:
        mask = Segments.of([(s // 2, s - s // 2) if s > 1 else (s,)]).to(device)
    elif masked:
        mask = torch.ones(1, s, s, dtype=torch.bool, device=device).tril()
    with torch.enable_grad():
        nodes = [attend(q, k, v, mask, 1.0).grad_fn]
    name = "unfused"
    for node in nodes:
        assert node is not None
        kind = node.name().removesuffix("Backward0")
        if "varlen_attn" in kind:
            name = "flash over segments"
            break
        if "Attention" in kind:
            name = _KERNEL_NAMES.get(kind, kind)
            break
        nodes.extend(next_node for next_node, _ in node.next_functions if next_node is not None)
    (_, qk_dim), _, (_, v_dim) = shapes
    padded = choose_kernel(device, dtype, qk_dim, v_dim) == "padded"
    return name + (f", values padded from {v_dim} to {qk_dim}" if padded else "")
