"""Attention: multi-head latent attention (MLA), and grouped queries (GQA, MHA) for comparison and for Llama.

Shape suffix legend: b batch, s new tokens, t all tokens (cached + new), h heads, g query heads a KV head,
n qk_nope_head_dim, r qk_rope_head_dim, v v_head_dim, c kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from plmtune.modules.cache import LayerCache
from plmtune.modules.linear import Linear
from plmtune.modules.peft import effective_weight
from plmtune.modules.rope import RotaryEmbedding, rope_tables
from plmtune.modules.segments import Segments
from plmtune.ranges import WIDTH, check
from plmtune.registry import register

Kernel = Literal["cudnn", "padded", "plain"]

_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def choose_kernel(device: torch.device, dtype: torch.dtype, qk_dim: int, v_dim: int) -> Kernel:
    """Return how scaled_dot_product_attention is asked, for the benchmark to report.

    cudnn: Hopper and newer; cuDNN takes queries and values of different width as they are.
    padded: values padded with zeros to the queries' width, the one way into torch's flash kernels.
    plain: widths are equal; torch's own choice is right.
    """
    if qk_dim == v_dim:
        return "plain"
    # cuDNN's backward sums in no fixed order, so a run that asks for determinism goes through flash.
    if torch.are_deterministic_algorithms_enabled():
        return "padded"
    return "cudnn" if _cudnn_takes_unequal_widths(device) and dtype != torch.float32 else "padded"


def _cudnn_takes_unequal_widths(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.backends.cudnn.is_available():
        return False
    # cuDNN 9.10 is the first that torch lets run heads wider than 128, forward and backward.
    return torch.cuda.get_device_capability(device)[0] >= 9 and (torch.backends.cudnn.version() or 0) >= 91000


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None, scale: float) -> Tensor:
    """softmax(q k^T * scale) v through a fused kernel, causal where there is no mask.

    Args:
        q (Tensor): [b, h, s, n]. k (Tensor): [b, h / g, t, n]. v (Tensor): [b, h / g, t, v].
        mask (Tensor | Segments | None): boolean [b, s, t], True where a query may attend; or segments, causal
            inside each; None: causal, the last query sees all.

    Returns:
        Tensor: [b, h, s, v]
    """
    if isinstance(mask, Segments):
        return _attend_inside(q, k, v, mask, scale)
    s, t = q.shape[2], k.shape[2]
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


def _varlen_takes(q: Tensor) -> bool:
    """Whether torch's flash kernels of many lengths take such heads: Ampere and newer, forward and backward."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type != "cuda" or not half or q.shape[3] % 8 or q.shape[3] > 192:
        return False
    return torch.cuda.get_device_capability(q.device)[0] >= 8


# What a call costs on a CPU besides its work, in scores that could be computed meanwhile (measured: 15,000 to 25,000).
_SCORES_A_CALL = 20_000


def _attend_inside(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attention inside each segment alone, which costs the sum of their squares instead of the row's square."""
    b, h, s, width = q.shape[0], q.shape[1], q.shape[2], v.shape[3]
    on_gpu = _varlen_takes(q)
    if len(segments.lengths) == b:
        return attend(q, k, v, None, scale)  # each row is one
    # On a CPU there is a call for each segment, which does not pay where they are many and short.
    calls = len(segments.lengths) * _SCORES_A_CALL + segments.num_pairs * h
    if not on_gpu and (q.device.type != "cpu" or calls > b * s * s * h):
        return attend(q, k, v, segments.dense, scale)
    if width < q.shape[3]:
        v = F.pad(v, (0, q.shape[3] - width))  # neither kernel takes values of another width
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [b s, h, n]
    if on_gpu:
        from torch.nn.attention.varlen import varlen_attn  # half a CPU second

        longest, offsets = segments.longest, segments.offsets
        out = varlen_attn(
            q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=h != k.shape[1]
        )
        assert isinstance(out, Tensor)
    else:
        # split, not slices: the gradient of each slice would be a tensor of the whole's size.
        parts = zip(*(x.transpose(0, 1).split(segments.lengths, dim=1) for x in (q, k, v)), strict=True)
        out = torch.cat([attend(q[None], k[None], v[None], None, scale)[0].transpose(0, 1) for q, k, v in parts])
    return out.view(b, s, h, -1)[..., :width].transpose(1, 2)


@cache
def mark_for_compile() -> None:
    """Say what torch.compile must not trace. As decorators, these would import dynamo where nothing is compiled."""
    global _attend_inside
    # Each batch has other lengths: compiled code would be made anew for each.
    _attend_inside = torch.compiler.disable(_attend_inside)
    # Compiled code takes the answer, and the tables of RoPE, as constants.
    torch.compiler.assume_constant_result(_cudnn_takes_unequal_widths)
    torch.compiler.assume_constant_result(rope_tables)


# By the node that autograd keeps of a call: what ran, not what was asked for.
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
    """Name the kernel that attention runs through in training, by running one sequence of zeros through it.

    Args:
        model: any with attentions that have `head_shapes`, on any device; each of its shapes is tried.
        seq_len: tokens a sequence.
        dtype: what is computed in.
        device: where.
        masked: attention is given a mask.
        segments: attention is given segments.

    Returns:
        Such as "flash for CPUs, values padded from 16 to 24", or "unfused"; of several shapes, each.
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
    # A longer sequence gets no other kernel, but its remainder counts: some want the mask's rows aligned.
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
        nodes.extend(behind for behind, _ in node.next_functions if behind is not None)
    (_, qk_dim), _, (_, v_dim) = shapes
    padded = choose_kernel(device, dtype, qk_dim, v_dim) == "padded"
    return name + (f", values padded from {v_dim} to {qk_dim}" if padded else "")


@register("attention", "mla")
class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), as in PLM (arXiv 2503.12167).

    Keys and values are read from one latent of kv_lora_rank numbers a token; position goes through one rope
    key that all heads share; queries are not compressed. Several new tokens are computed un-absorbed (keys
    and values expanded), a single one absorbed over the latent itself.

    Args:
        embed_dim: width of the residual stream.
        num_heads: heads.
        max_seq_len: positions RoPE knows.
        norm: makes the latent's norm from its width.
        kv_lora_rank: width of the latent.
        qk_nope_head_dim: width a head of queries and keys without position.
        qk_rope_head_dim: width of the part that RoPE turns.
        v_head_dim: width a head of values.
        rope_theta: base of RoPE's frequencies.

    Raises:
        ValueError: for a width below 1, an odd rope width, or values wider than queries.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_seq_len: int,
        norm: Callable[[int], nn.Module],
        *,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope_theta: float = 100000.0,
    ) -> None:
        super().__init__()
        check(
            WIDTH,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
            num_heads=num_heads,
        )
        qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        if v_head_dim > qk_head_dim:
            raise ValueError(f"v_head_dim ({v_head_dim}) exceeds the width of queries and keys ({qk_head_dim})")
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.scale = qk_head_dim**-0.5
        self.q_proj = Linear(embed_dim, num_heads * qk_head_dim, bias=False)
        self.kv_a_proj = Linear(embed_dim, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_a_norm = norm(kv_lora_rank)
        self.kv_b_proj = Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = Linear(num_heads * v_head_dim, embed_dim, bias=False)
        self.rope = RotaryEmbedding(qk_rope_head_dim, max_seq_len, theta=rope_theta, interleaved=True)

    def head_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of queries, keys and values, as attention over several tokens sees them."""
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        return (self.num_heads, qk_head_dim), (self.num_heads, qk_head_dim), (self.num_heads, self.v_head_dim)

    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of each buffer: the normed latent and the turned rope key, side by side."""
        return ((1, self.kv_lora_rank + self.qk_rope_head_dim),)

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
        # -1 rather than num_heads: under tensor parallelism each process has a share of the heads.
        q = self.q_proj(x).view(b, s, -1, self.qk_nope_head_dim + self.qk_rope_head_dim)
        q_nope, q_rope = q.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        q_rope = self.rope(q_rope, input_pos, start)  # [b, s, h, r]
        latent, k_rope = self.kv_a_proj(x).split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_norm(latent)  # [b, s, c]
        k_rope = self.rope(k_rope[:, :, None], input_pos, start)  # [b, s, 1, r]
        if cache is not None:
            entry = torch.cat((latent, k_rope[:, :, 0]), dim=-1)  # [b, s, c + r]
            (kept,) = cache.append(entry[:, None])  # [b, 1, t, c + r]
            if s == 1:
                assert not isinstance(mask, Segments)  # which no cache goes with
                return self.o_proj(self._decode(q_nope[:, 0], q_rope[:, 0], kept[:, 0], mask))
            latent, k_rope = kept[:, 0].split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
            k_rope = k_rope[:, :, None]
        t = latent.shape[1]
        kv = self.kv_b_proj(latent) if cache is None or not cache.shared else self._expand_shared(latent, cache.shared)
        kv = kv.view(b, t, -1, self.qk_nope_head_dim + self.v_head_dim)
        k_nope, v = kv.split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)), dim=-1)  # [b, t, h, n + r]
        q = torch.cat((q_nope, q_rope), dim=-1)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, self.scale)
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))

    def _expand_shared(self, latent: Tensor, shared: int) -> Tensor:
        """kv_b_proj of latent (Tensor), [b, t, c], whose first `shared` tokens are the same in all rows."""
        once = self.kv_b_proj(latent[:1, :shared]).expand(latent.shape[0], -1, -1)
        return torch.cat((once, self.kv_b_proj(latent[:, shared:])), dim=1)

    def _decode(self, q_nope: Tensor, q_rope: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
        """One token's heads, [b, 1, h v], from q_nope [b, h, n], q_rope [b, h, r] and kept [b, t, c + r]."""
        # Absorbed: q (W_uk c) = (q W_uk) c, so fold W_uk into the query and attend over the latent itself as
        # one KV head that all query heads share; apply W_uv after the sum. For PLM-1.8B the cache is 8.9x
        # smaller than K and V.
        w_kv = effective_weight(self.kv_b_proj)  # [h (n + v), c]
        w_uk, w_uv = w_kv.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim)).split(
            (self.qk_nope_head_dim, self.v_head_dim), dim=1
        )  # [h, n, c], [h, v, c]
        # torch's own product of batches in bf16 copies its factors on a CPU, the whole cache among them.
        half_on_cpu = kept.device.type == "cpu" and kept.dtype == w_kv.dtype == torch.bfloat16
        if half_on_cpu and len(kept) == 1 and not torch.is_grad_enabled():
            # A bag for each head: the sum of the rows of its W_uk, each times its number of the query.
            rows = torch.arange(w_kv.shape[0]).view(w_uk.shape[0], -1)[:, : self.qk_nope_head_dim]
            q_latent = F.embedding_bag(rows, w_kv, mode="sum", per_sample_weights=q_nope[0].contiguous())[None]
        else:
            q_latent = torch.matmul(q_nope.transpose(0, 1), w_uk).transpose(0, 1)  # [b, h, c]
        query = torch.cat((q_latent, q_rope), dim=-1)  # [b, h, c + r]
        if half_on_cpu:
            summed = _attend_latent(query, kept, mask, self.scale)[..., : self.kv_lora_rank]
            heads = torch.bmm(w_uv, summed.permute(1, 2, 0)).permute(2, 0, 1)  # [b, h, v]
        else:
            scores = torch.matmul(query, kept.transpose(1, 2))  # [b, h, t]
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))  # [b, 1, t] for all heads
            weights = torch.softmax(scores.float() * self.scale, dim=-1).to(scores.dtype)
            summed = torch.matmul(weights, kept[..., : self.kv_lora_rank])  # [b, h, c]
            heads = torch.matmul(summed.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)  # [b, h, v]
        return heads.reshape(kept.shape[0], 1, -1)


# Below, a second thread's share is less than what it costs to join it (measured: about 300).
_TOKENS_A_PART = 256


def _attend_latent(query: Tensor, kept: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(query kept^T * scale) kept, [b, h, w], by torch's flash kernel for CPUs, which copies nothing.

    Args:
        query (Tensor): [b, h, w], heads in the place of queries, since they share the keys.
        kept (Tensor): [b, t, w], keys and values.
        mask (Tensor | None): boolean, [b, 1, t].
        scale: of the scores.
    """
    b, t, w = kept.shape
    query, keys = query[:, None], kept[:, None]  # [b, 1, h, w], [b, 1, t, w]
    parts = min(torch.get_num_threads(), t // _TOKENS_A_PART)
    if b > 1 or mask is not None or parts < 2 or torch.is_grad_enabled():
        mask = None if mask is None else mask[:, None]  # [b, 1, 1, t]
        return F.scaled_dot_product_attention(query, keys, keys, mask, scale=scale)[:, 0]
    # The kernel gives a thread whole rows of a batch, and here is but one: so parts of the cache become rows, and what
    # they give is joined by the logarithms of their sums, which the kernel returns beside it.
    size = t // parts
    cuts = [keys[:, :, : parts * size].view(parts, 1, size, w)]
    if parts * size < t:
        cuts.append(keys[:, :, parts * size :])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = [flash(query.expand(len(cut), -1, -1, -1), cut, cut, 0.0, False, scale=scale) for cut in cuts]
    outs, sums = (torch.cat(tensors) for tensors in zip(*found, strict=True))  # [parts, 1, h, w], [parts, 1, h]
    return (outs * sums.softmax(0)[..., None]).sum(0).to(kept.dtype)


def default_kv_heads(num_heads: int) -> int:
    """A quarter of `num_heads` where that divides, else a half, a third, or all."""
    return num_heads // next(group for group in (4, 2, 3, 1) if num_heads % group == 0)


@register("attention", "gqa")
class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with a cache of keys and values.

    Args:
        embed_dim: width of the residual stream.
        num_heads: query heads.
        max_seq_len: positions RoPE knows.
        norm: unused; given to every attention, which may norm inside.
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
        """(heads, width) of each buffer: keys (turned) and values."""
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
                # The heads of a group are queries of one KV head, so that no kernel repeats the cache for each.
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
        head_dim: width a head; None: embed_dim / num_heads.
        rope_theta: base of RoPE's frequencies.
        rope_interleaved: RoPE's pairs are neighbours, not head_dim / 2 apart.
        bias: queries, keys, values and output have biases.
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
