"""Fused attention: which kernel computes softmax(q k^T) v, and calls to it.

Shape suffixes: b batch, s new tokens, t all tokens (cached + new), h heads, g query heads a KV head,
n qk_nope_head_dim, r qk_rope_head_dim, v v_head_dim, c kv_lora_rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from plmtune.modules.rope import rope_tables
from plmtune.modules.segments import Segments

Kernel = Literal["cudnn", "padded", "plain"]

_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def choose_kernel(device: torch.device, dtype: torch.dtype, qk_dim: int, v_dim: int) -> Kernel:
    """Return how `attend` calls scaled_dot_product_attention.

    cudnn: Hopper and newer; cuDNN supports queries and values of different width.
    padded: values are padded with zeros to the queries' width, as torch's flash kernels need.
    plain: widths are equal; torch chooses.
    """
    if qk_dim == v_dim:
        return "plain"
    # cuDNN's backward sums in no fixed order: a deterministic run uses flash.
    if torch.are_deterministic_algorithms_enabled():
        return "padded"
    return "cudnn" if _cudnn_supports_unequal_widths(device) and dtype != torch.float32 else "padded"


def _cudnn_supports_unequal_widths(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.backends.cudnn.is_available():
        return False
    # torch allows heads wider than 128, forward and backward, from cuDNN 9.10 on.
    return torch.cuda.get_device_capability(device)[0] >= 9 and (torch.backends.cudnn.version() or 0) >= 91000


def window_mask(mask: Tensor | None, window: int, s: int, t: int, last: Tensor | int, device: torch.device) -> Tensor:
    """A mask, [b or 1, s, t], whose queries see themselves and the window - 1 tokens before them.

    Args:
        mask (Tensor | None): boolean [b, s, t]; None: causal.
        s, t: queries and keys.
        last: the key's place of the last query, of all rows or of each, [b].
    """
    at = torch.arange(1 - s, 1, device=device) + (last[:, None] if isinstance(last, Tensor) else last)  # [b or 1, s]
    back = at.view(-1, s)[..., None] - torch.arange(t, device=device)  # [b or 1, s, t]
    seen = back < window
    return seen & (mask if mask is not None else back >= 0)


def window_mask_by_position(mask: Tensor, window: int, input_pos: Tensor, shared: int) -> Tensor:
    """As `window_mask`, of rows in which texts branch, so that places are no distances.

    Args:
        mask (Tensor): boolean, [b, s, shared + s].
        input_pos (Tensor): [b, s].
        shared: keys before them, at positions 0, 1, ...
    """
    before = torch.arange(shared, device=input_pos.device).expand(len(input_pos), -1)
    back = input_pos[:, :, None] - torch.cat((before, input_pos), dim=1)[:, None]  # [b, s, shared + s]
    return mask & (back < window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | Segments | None,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v through a fused kernel, causal where there is no mask.

    Args:
        q (Tensor): [b, h, s, n]. k (Tensor): [b, h / g, t, n]. v (Tensor): [b, h / g, t, v].
        mask (Tensor | Segments | None): boolean [b, s, t], True where a query may attend; or segments, causal
            inside each; None: causal, the last query sees all.
        window: tokens that a query sees, itself included; None: all.
        soft_cap: scores become soft_cap tanh(score / soft_cap); no fused kernel does that.

    Returns:
        Tensor: [b, h, s, v]
    """
    if isinstance(mask, Segments):
        return _attend_segments(q, k, v, mask, scale, window, soft_cap)
    s, t = q.shape[2], k.shape[2]
    if window is not None and window < t:
        mask = window_mask(mask, window, s, t, t - 1, q.device)
    if soft_cap is not None:
        return _attend_soft_capped(q, k, v, mask, scale, soft_cap)
    if mask is not None:
        mask = mask[:, None]
    elif 1 < s < t:
        # is_causal aligns at the first token; new tokens after a cache need the diagonal at the last.
        mask = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)
    kernel = choose_kernel(q.device, q.dtype, q.shape[3], v.shape[3])
    width = v.shape[3]
    if kernel == "padded":
        v = F.pad(v, (0, q.shape[3] - width))
    context: AbstractContextManager[None] = (
        sdpa_kernel(_CUDNN_FIRST, set_priority=True) if kernel == "cudnn" else nullcontext()
    )
    with context:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None and s > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out[..., :width]


def _attend_soft_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, soft_cap: float) -> Tensor:
    groups = q.unflatten(1, (k.shape[1], -1))  # [b, h / g, g, s, n]
    scores = torch.matmul(groups, k[:, :, None].transpose(-1, -2)).float() * scale  # [b, h / g, g, s, t]
    scores = soft_cap * torch.tanh(scores / soft_cap)
    s, t = scores.shape[-2:]
    if mask is None:
        mask = torch.ones(1, s, t, dtype=torch.bool, device=q.device).tril(t - s)
    weights = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1).to(v.dtype)
    return torch.matmul(weights, v[:, :, None]).flatten(1, 2)


def _varlen_supports(q: Tensor) -> bool:
    """Whether torch's variable-length flash kernels support such heads, forward and backward: Ampere and newer."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type != "cuda" or not half or q.shape[3] % 8 or q.shape[3] > 192:
        return False
    return torch.cuda.get_device_capability(q.device)[0] >= 8


# Overhead of a call on a CPU, in scores that could be computed in that time (measured: 15,000 to 25,000).
_SCORES_A_CALL = 20_000


def _attend_segments(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, soft_cap: float | None
) -> Tensor:
    """Attention inside each segment, which costs the sum of their squared lengths instead of the row's square."""
    b, h, s, width = q.shape[0], q.shape[1], q.shape[2], v.shape[3]
    on_gpu = _varlen_supports(q) and soft_cap is None
    if len(segments.lengths) == b:
        return attend(q, k, v, None, scale, window=window, soft_cap=soft_cap)  # each row is one segment
    # On a CPU each segment is a call, which does not pay for many short ones.
    calls = len(segments.lengths) * _SCORES_A_CALL + segments.num_pairs * h
    if not on_gpu and (q.device.type != "cpu" or calls > b * s * s * h):
        return attend(q, k, v, segments.dense, scale, window=window, soft_cap=soft_cap)
    if width < q.shape[3]:
        v = F.pad(v, (0, q.shape[3] - width))  # both kernels need values of the same width
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [b s, h, n]
    if on_gpu:
        from torch.nn.attention.varlen import varlen_attn  # half a CPU second

        longest, offsets = segments.longest, segments.offsets
        seen = (-1 if window is None else window - 1, 0)
        out = varlen_attn(
            q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=seen, enable_gqa=h != k.shape[1]
        )
        assert isinstance(out, Tensor)
    else:
        # split, not slices: the gradient of each slice would be a tensor of the whole's size.
        parts = zip(*(x.transpose(0, 1).split(segments.lengths, dim=1) for x in (q, k, v)), strict=True)
        found = [
            attend(q[None], k[None], v[None], None, scale, window=window, soft_cap=soft_cap)[0] for q, k, v in parts
        ]
        out = torch.cat([heads.transpose(0, 1) for heads in found])
    return out.view(b, s, h, -1)[..., :width].transpose(1, 2)


@cache
def mark_for_compile() -> None:
    """Mark what torch.compile must not trace. As decorators, these would import dynamo where nothing is compiled."""
    global _attend_segments
    # Lengths differ in each batch, and each would be compiled again.
    _attend_segments = torch.compiler.disable(_attend_segments)
    # Compiled code has the answer, and RoPE's tables, as constants.
    torch.compiler.assume_constant_result(_cudnn_supports_unequal_widths)
    torch.compiler.assume_constant_result(rope_tables)
