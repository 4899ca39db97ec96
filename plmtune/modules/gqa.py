"""Grouped-query and multi-head attention.

Shape suffixes: b batch, s new tokens, t all tokens (cached + new), h heads, g query heads a KV head,
n qk_nope_head_dim, r qk_rope_head_dim, v v_head_dim, c kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.modules.attention_kernels import attend
from plmtune.modules.cache import LayerCache
from plmtune.modules.linear import Linear
from plmtune.modules.rope import RotaryEmbedding
from plmtune.modules.segments import Segments
from plmtune.ranges import WIDTH, check
from plmtune.registry import register


def default_kv_heads(num_heads: int) -> int:
    """A quarter of `num_heads` where that divides, else a half, a third, or all."""
    return num_heads // next(group for group in (4, 2, 3, 1) if num_heads % group == 0)


@register("attention", "gqa")
class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with a cache of keys and values.

    Args:
        embed_dim: width of the residual stream.
        num_heads: query heads.
        max_seq_len: positions of RoPE.
        norm: unused; every attention gets it.
        num_kv_heads: heads of keys and values; each serves num_heads / num_kv_heads query heads. None:
            `default_kv_heads`.
        head_dim: width a head; None: embed_dim / num_heads.
        rope_theta: base of RoPE's frequencies.
        rope_interleaved: RoPE's pairs are neighbours, not head_dim / 2 apart as in Hugging Face's Llama.
        bias: queries, keys, values and output have biases.

    Raises:
        ValueError: if heads do not divide, or a width below 1 or odd.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_seq_len: int,
        norm: Callable[[int], nn.Module],
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 100000.0,
        rope_interleaved: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check(WIDTH, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        if num_kv_heads is None:
            num_kv_heads = default_kv_heads(num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) is not a multiple of num_kv_heads ({num_kv_heads})")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim ({embed_dim}) is not a multiple of num_heads ({num_heads})")
            head_dim = embed_dim // num_heads
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_kv_heads = num_kv_heads
        self.q_proj = Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, embed_dim, bias=bias)
        self.rope = RotaryEmbedding(head_dim, max_seq_len, theta=rope_theta, interleaved=rope_interleaved)

    def head_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of queries, keys and values."""
        return (self.num_heads, self.head_dim), (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.head_dim)

    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of each buffer: keys (rotated) and values."""
        return ((self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.head_dim))

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | Segments | None = None,
        input_pos: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend from x (Tensor), hidden states, [b, s, d]; the other arguments are `Decoder.forward`'s."""
        b, s, _ = x.shape
        start = cache.start if cache else 0
        q = self.rope(self.q_proj(x).view(b, s, -1, self.head_dim), input_pos, start).transpose(1, 2)
        k = self.rope(self.k_proj(x).view(b, s, -1, self.head_dim), input_pos, start).transpose(1, 2)
        v = self.v_proj(x).view(b, s, -1, self.head_dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)  # [b, h / g, t, head_dim]
            if s == 1:
                # The heads of a group become queries of one KV head, so that no kernel repeats the cache for each head.
                q = q.reshape(b, k.shape[1], -1, self.head_dim)
                every = mask[:, None] if isinstance(mask, Tensor) else None  # [b, 1, 1, t]
                out = F.scaled_dot_product_attention(q, k, v, every)  # [b, h / g, g, head_dim]
                return self.o_proj(out.reshape(b, 1, -1))
        out = attend(q, k, v, mask, self.head_dim**-0.5)
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))


@register("attention", "mha")
def mha(
    embed_dim: int,
    num_heads: int,
    max_seq_len: int,
    norm: Callable[[int], nn.Module],
    *,
    head_dim: int | None = None,
    rope_theta: float = 100000.0,
    rope_interleaved: bool = False,
    bias: bool = False,
) -> GroupedQueryAttention:
    """Multi-head attention (arXiv 1706.03762): each query head has its own key and value head.

    Args:
        head_dim, rope_theta, rope_interleaved, bias: as for gqa.
    """
    return GroupedQueryAttention(
        embed_dim,
        num_heads,
        max_seq_len,
        norm,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        rope_theta=rope_theta,
        rope_interleaved=rope_interleaved,
        bias=bias,
    )
