"""One decoded token as a module that ExecuTorch lowers, with the cache in its buffers.

MLA is absorbed over a cache of latents, so that PLM-1.8B keeps 18,432 numbers a token and not 163,840.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.modules.decoder import Decoder
from plmtune.modules.feed_forward import SwiGLU
from plmtune.modules.gqa import GroupedQueryAttention
from plmtune.modules.mla import MultiHeadLatentAttention
from plmtune.modules.norm import RMSNorm
from plmtune.modules.peft import effective_weight
from plmtune.modules.quantized import Quantized, QuantizedEmbedding, QuantizedLinear
from plmtune.modules.rope import RotaryEmbedding

# Added to a masked score: finite, because XNNPACK's softmax subtracts, and infinity minus infinity is NaN.
_MASKED = -1e9


class Norm(nn.Module):
    """RMSNorm by operations that XNNPACK has: the mean of a row is a product with 1 / d."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = nn.Parameter(norm.weight.detach(), requires_grad=False)
        width = norm.weight.shape[0]
        self.register_buffer("average", torch.full((1, width), 1 / width))

    average: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (Tensor): [s, d] -> [s, d]."""
        return x * torch.rsqrt(F.linear(x * x, self.average) + self.eps) * self.weight


class Rope(nn.Module):
    """RoPE at one position. A product with ones and zeros, which is exact, gives the partner of each number."""

    def __init__(self, rope: RotaryEmbedding, max_seq_len: int) -> None:
        super().__init__()
        self.dim, _, _, interleaved = rope.settings
        index = torch.arange(self.dim)
        partner = index ^ 1 if interleaved else (index + self.dim // 2) % self.dim
        self.register_buffer("swap", F.one_hot(partner, self.dim).float())
        # x cos + partner sin: with one number of each pair set to 1 the output is the tables.
        first = partner > index
        of_first, of_second = (
            rope(x.float().expand(1, max_seq_len, 1, -1))[0, :, 0] for x in (first, ~first)
        )  # [max_seq_len, dim]
        self.register_buffer("cos", torch.where(first, of_first, of_second))
        self.register_buffer("sin", torch.where(first, of_second, of_first))

    swap: Tensor
    cos: Tensor
    sin: Tensor

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x (Tensor): [h, dim], position (Tensor): [1] -> [h, dim]."""
        return x * self.cos[position] + F.linear(x, self.swap) * self.sin[position]


class LatentStep(nn.Module):
    """One token of MLA, absorbed over its own cache of `max_seq_len` positions; projections may be quantized."""

    cache: Tensor
    w_uk: Tensor
    w_uv: Tensor

    def __init__(self, attention: MultiHeadLatentAttention, rope: Rope, max_seq_len: int) -> None:
        super().__init__()
        self.nope, self.rank = attention.qk_nope_head_dim, attention.kv_lora_rank
        self.width = self.rank + attention.qk_rope_head_dim
        self.scale = attention.scale
        self.q_proj, self.kv_a_proj, self.o_proj = attention.q_proj, attention.kv_a_proj, attention.o_proj
        self.norm, self.rope = _norm(attention.kv_a_norm), rope
        heads = effective_weight(attention.kv_b_proj).detach().unflatten(0, (attention.num_heads, -1))  # [h, n + v, c]
        self.num_heads = attention.num_heads
        self.register_buffer("w_uk", heads[:, : self.nope].contiguous())
        self.register_buffer("w_uv", heads[:, self.nope :].transpose(1, 2).contiguous())
        self.register_buffer("cache", torch.zeros(max_seq_len, self.width), persistent=False)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """x (Tensor): [1, d]; position (Tensor): [1]; mask (Tensor): [t], added to scores -> [1, d]."""
        q = self.q_proj(x).view(self.num_heads, -1)
        q_rope = self.rope(q[:, self.nope :], position)
        kv = self.kv_a_proj(x)
        self.cache.index_put_(
            (position,), torch.cat((self.norm(kv[:, : self.rank]), self.rope(kv[:, self.rank :], position)), dim=-1)
        )
        kept = self.cache[None]  # [1, t, c + r]
        q_latent = torch.bmm(q[:, None, : self.nope], self.w_uk)[:, 0]  # [h, c]
        query = torch.cat((q_latent, q_rope), dim=-1) * self.scale
        # The query is transposed and not the cache, which is far larger.
        scores = torch.bmm(kept, query.transpose(0, 1)[None])[0].transpose(0, 1) + mask  # [h, t]
        summed = torch.bmm(torch.softmax(scores, dim=-1)[None], kept)[0, :, : self.rank]  # [h, c]
        return self.o_proj(torch.bmm(summed[:, None], self.w_uv).view(1, -1))


class GroupedStep(nn.Module):
    """One token of grouped-query attention over its own cache of `max_seq_len` keys and values."""

    keys: Tensor
    values: Tensor
    starts: Tensor

    def __init__(self, attention: GroupedQueryAttention, rope: Rope, max_seq_len: int) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = attention.num_kv_heads, attention.head_dim
        self.scale = attention.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj, self.rope = attention.o_proj, rope
        # A row is a position of a head, and a head's positions are contiguous: one index writes all heads.
        shape = (attention.num_kv_heads * max_seq_len, attention.head_dim)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)
        self.register_buffer("starts", torch.arange(attention.num_kv_heads) * max_seq_len)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """x (Tensor): [1, d]; position (Tensor): [1]; mask (Tensor): [t], added to scores -> [1, d]."""
        heads = (self.num_kv_heads, -1, self.head_dim)
        q, k, v = (proj(x).view(-1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        rows = self.starts + position
        self.keys.index_put_((rows,), self.rope(k, position))
        self.values.index_put_((rows,), v)
        query = (self.rope(q, position) * self.scale).view(heads)  # [k, g, head_dim]
        scores = torch.bmm(self.keys.view(heads), query.transpose(1, 2)).transpose(1, 2) + mask  # [k, g, t]
        out = torch.bmm(torch.softmax(scores, dim=-1), self.values.view(heads))
        return self.o_proj(out.reshape(1, -1))


class LayerStep(nn.Module):
    """One token of a layer of the parts that `lint` lets pass."""

    def __init__(self, layer: Any, rope: Rope, max_seq_len: int) -> None:
        super().__init__()
        step = LatentStep if isinstance(layer.attention, MultiHeadLatentAttention) else GroupedStep
        self.attention = step(layer.attention, rope, max_seq_len)
        self.attention_norm, self.ffn_norm = _norm(layer.attention_norm), _norm(layer.ffn_norm)
        self.up_proj, self.down_proj = layer.ffn.up_proj, layer.ffn.down_proj
        self.gate_proj = layer.ffn.gate_proj if isinstance(layer.ffn, SwiGLU) else None

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), position, mask)
        normed = self.ffn_norm(x)
        up = self.up_proj(normed)
        if self.gate_proj is None:
            up = F.relu(up)
            return x + self.down_proj(up * up)
        gate = self.gate_proj(normed)
        return x + self.down_proj(gate * torch.sigmoid(gate) * up)


class QuantizedEmbeddingStep(nn.Module):
    """Looks up rows of a quantized embedding: a byte a number, whatever its bits, because shifts do not lower."""

    q: Tensor
    scales: Tensor

    def __init__(self, source: QuantizedEmbedding) -> None:
        super().__init__()
        q = source.integers()
        if not source.format.symmetric:
            q = (q.unflatten(-1, (source.zeros.shape[1], -1)) - source.zeros[..., None]).flatten(-2)
        self.register_buffer("q", q)
        self.register_buffer("scales", source.scales)

    def forward(self, ids: Tensor) -> Tensor:
        scales = F.embedding(ids, self.scales)
        q = F.embedding(ids, self.q).to(scales.dtype)
        return (q.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


class DecoderStep(nn.Module):
    """One token of a decoder by operations that ExecuTorch lowers; equal to `Decoder` token by token.

    Args:
        model: in fp32; its linear layers are shared, not copied.
        max_seq_len: positions of the cache.
    """

    positions: Tensor

    def __init__(self, model: Decoder, max_seq_len: int) -> None:
        super().__init__()
        layers: list[Any] = list(model.layers)
        rope = Rope(layers[0].attention.rope, max_seq_len)
        self.layers = nn.ModuleList(LayerStep(layer, rope, max_seq_len) for layer in layers)
        self.norm = _norm(model.norm)
        embedding = model.tok_embeddings
        self.embedding: nn.Module = (
            QuantizedEmbeddingStep(embedding) if isinstance(embedding, QuantizedEmbedding) else embedding
        )
        self.head = _as_linear(embedding if model.tied else model.output)
        self.register_buffer("positions", torch.arange(max_seq_len))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """tokens (Tensor): [1, 1]; input_pos (Tensor): [1] -> logits [1, v]."""
        x = self.embedding(tokens[0])
        mask = torch.where(self.positions <= input_pos, 0.0, _MASKED)
        for layer in self.layers:
            x = layer(x, input_pos, mask)
        return self.head(self.norm(x))


def _norm(norm: nn.Module) -> nn.Module:
    return Norm(norm) if isinstance(norm, RMSNorm) else norm


def _as_linear(head: nn.Module) -> nn.Module:
    """The head, tied or not: integers where its format is dynamic, else floating point."""
    if isinstance(head, Quantized) and head.format.dynamic:
        with torch.device("meta"):
            linear = QuantizedLinear(head.width, head.num_rows, head.format)
        linear.weight, linear.scales = head.weight, head.scales
        return linear
    weight = effective_weight(head).detach()
    with torch.device("meta"):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain
