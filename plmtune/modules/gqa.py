"""Grouped-query and multi-head attention; shape suffixes as in `attention_kernels`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.modules.attention_kernels import attend, window_mask, window_mask_by_position
from plmtune.modules.cache import LayerCache
from plmtune.modules.linear import Linear
from plmtune.modules.rope import RotaryEmbedding
from plmtune.modules.sharding import to_local
from plmtune.modules.shared_sequence import Mask, SharedSequence
from plmtune.modules.shortcut import add_shortcut
from plmtune.ranges import WIDTH, Range, check
from plmtune.registry import Component, component, register

_GATE_WIDTH = 32  # numbers of a hidden state that the gate of value embeddings reads


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
        output_bias: whether the output has one; None: as bias.
        qk_norm: norm each head's queries and keys before RoPE (Qwen3, Gemma 3).
        rope: turn queries and keys; without it the layer sees no positions (NoPE, arXiv 2305.19466).
        rope_dim: numbers a head that RoPE turns, the first ones; None: all.
        rope_scaling: of RoPE's frequencies, for long contexts.
        window: tokens that a query sees, itself included (sliding window, arXiv 2310.06825); None: all.
        soft_cap: scores become soft_cap tanh(score / soft_cap) (Gemma 2, arXiv 2408.00118).
        scale: of the scores; None: head_dim^-1/2.
        value_embed: add a learned vector of the token to the values: v = W_v x + 2 sigmoid(G x[:32]) e(token), a gate a
            KV head, after nanochat (`value_embeds`; modded-nanogpt's gate has this range). In a model the last layer
            and each value_embed-th one before it have it (2: alternate layers); None: none. The decoder holds the
            tables e.
        shortcut: beside attention, from its input.

    Attributes:
        value_embed_width: numbers of a token's e; 0: the layer has none.

    Raises:
        ValueError: if heads do not divide, or a width below 1 or odd.
    """

    added_settings = ("value_embed",)  # what they add can start without an effect, see `models.added_parts`
    takes_query = True

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
        output_bias: bool | None = None,
        qk_norm: bool = False,
        rope: bool = True,
        rope_dim: int | None = None,
        rope_scaling: Component = component("rope_scaling", "none"),  # noqa: B008
        window: int | None = None,
        soft_cap: float | None = None,
        scale: float | None = None,
        value_embed: int | None = None,
        shortcut: Component = component("shortcut", "none"),  # noqa: B008
    ) -> None:
        super().__init__()
        check(WIDTH, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window)
        check(WIDTH, value_embed=value_embed)
        check(Range(above=0, most=1e6), soft_cap=soft_cap, scale=scale)
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
        self.window, self.soft_cap = window, soft_cap
        self.scale = head_dim**-0.5 if scale is None else scale
        self.rope_dim = head_dim if rope_dim is None else rope_dim
        if not 0 < self.rope_dim <= head_dim:
            raise ValueError(f"rope_dim ({rope_dim}) must lie between 1 and head_dim ({head_dim})")
        self.q_proj = Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, embed_dim, bias=bias if output_bias is None else output_bias)
        self.q_norm = norm(head_dim) if qk_norm else None
        self.k_norm = norm(head_dim) if qk_norm else None
        self.value_embed_width = 0 if value_embed is None else num_kv_heads * head_dim
        self.value_gate: nn.Parameter | None = None
        if value_embed is not None:
            # No layer of its own: too small for adapters and integers.
            self.value_gate = nn.Parameter(torch.empty(num_kv_heads, min(_GATE_WIDTH, embed_dim)))
        self.shortcut: nn.Module | None = shortcut(embed_dim=embed_dim)
        self.rope: RotaryEmbedding | None = None
        if rope:
            self.rope = RotaryEmbedding(
                self.rope_dim, max_seq_len, theta=rope_theta, interleaved=rope_interleaved, scaling=rope_scaling()
            )

    def parallel_plan(self) -> dict[str, str]:
        """How tensor parallelism divides it, see `parallel.plan`: by heads."""
        projections = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise")
        return {
            **projections,
            "o_proj": "rowwise",
            "q_norm": "heads",
            "k_norm": "heads",
            "value_gate": "parameter_rows",
        }

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
        mask: Mask = None,
        input_pos: Tensor | None = None,
        cache: LayerCache | None = None,
        value: Tensor | None = None,
        query: Tensor | None = None,
    ) -> Tensor:
        """Attend from x (Tensor), hidden states, [b, s, d]; mask, input_pos and cache are `Decoder.forward`'s.

        Args:
            value (Tensor | None): the tokens' value embeddings, [b, s, value_embed_width], where the layer has them.
            query (Tensor | None): what queries are projected from, [b, s, d]; None: x.
        """
        return add_shortcut(
            self._attend(x, mask, input_pos, cache, value, x if query is None else query), x, self.shortcut
        )

    def _attend(
        self,
        x: Tensor,
        mask: Mask,
        input_pos: Tensor | None,
        cache: LayerCache | None,
        value: Tensor | None,
        query: Tensor,
    ) -> Tensor:
        b, s, _ = x.shape
        start = cache.start if cache else 0
        read = ((self.q_proj, query), (self.k_proj, x), (self.v_proj, x))
        q, k, v = (proj(of).view(b, s, -1, self.head_dim) for proj, of in read)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.value_gate is not None:
            assert value is not None, "the decoder passes them"
            gate = 2 * torch.sigmoid(
                to_local(F.linear(x[..., : self.value_gate.shape[1]], self.value_gate))
            )  # [b, s, h / g]
            v = v + gate[..., None] * value.view(b, s, -1, self.head_dim)
        q, k = (self._turn(part, input_pos, start).transpose(1, 2) for part in (q, k))
        v = v.transpose(1, 2)
        window = self.window
        if cache is not None:
            k, v = cache.append(k, v)  # [b, h / g, t, head_dim]
            t = k.shape[2]
            if window is not None and window < t and cache.lengths is not None:
                # Rows end at different places, so the window is a part of each row's mask.
                mask = window_mask(mask if isinstance(mask, Tensor) else None, window, s, t, cache.lengths, k.device)
                window = None
            if s == 1 and self.soft_cap is None:
                if window is not None and window < t:
                    k, v = k[:, :, -window:], v[:, :, -window:]
                    mask = mask[..., -window:] if isinstance(mask, Tensor) else None
                # The heads of a group become queries of one KV head, so that no kernel repeats the cache for each head.
                q = q.reshape(b, k.shape[1], -1, self.head_dim)
                every = mask[:, None] if isinstance(mask, Tensor) else None  # [b, 1, 1, t]
                out = F.scaled_dot_product_attention(q, k, v, every, scale=self.scale)  # [b, h / g, g, head_dim]
                return self.o_proj(out.reshape(b, 1, -1))
        if isinstance(mask, SharedSequence):
            k, v = mask.gather(k, 2), mask.gather(v, 2)
            out = mask.attend(q, k, v, self.scale, window=window, soft_cap=self.soft_cap)
            return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))
        shared = cache.shared if cache is not None else 0
        if cache is not None and not shared:
            input_pos = None  # a row of the cache is one text: places are distances
        if window is not None and window < k.shape[2] and isinstance(mask, Tensor) and input_pos is not None:
            mask, window = window_mask_by_position(mask, window, input_pos, shared), None
        out = attend(q, k, v, mask, self.scale, window=window, soft_cap=self.soft_cap)
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))

    def _turn(self, x: Tensor, input_pos: Tensor | None, start: int) -> Tensor:
        """RoPE of x (Tensor), [b, s, h, head_dim]."""
        if self.rope is None:
            return x
        if self.rope_dim == self.head_dim:
            return self.rope(x, input_pos, start)
        turned, kept = x.split((self.rope_dim, self.head_dim - self.rope_dim), dim=-1)
        return torch.cat((self.rope(turned, input_pos, start), kept), dim=-1)


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
