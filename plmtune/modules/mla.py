"""Multi-head latent attention (MLA); shape suffixes as in `attention_kernels`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.modules.attention_kernels import attend
from plmtune.modules.cache import LayerCache
from plmtune.modules.linear import Linear
from plmtune.modules.peft import effective_weight
from plmtune.modules.rope import RotaryEmbedding
from plmtune.modules.segments import Segments
from plmtune.modules.sharding import to_local, to_local_of_heads
from plmtune.modules.shared_sequence import Mask, SharedSequence
from plmtune.modules.shortcut import add_shortcut
from plmtune.ranges import TINY, WIDTH, check
from plmtune.registry import Component, component, register


@register("attention", "mla")
class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), as in PLM (arXiv 2503.12167).

    Keys and values are projected from one latent of kv_lora_rank numbers a token. One RoPE key, which all heads
    share, encodes the position. Queries come from a latent where q_lora_rank says so. Several new tokens are computed
    un-absorbed (keys and values expanded), a single one absorbed over the latent itself.

    Args:
        embed_dim: width of the residual stream.
        num_heads: heads.
        max_seq_len: positions of RoPE.
        norm: width -> the latent's norm.
        kv_lora_rank: width of the latent.
        qk_nope_head_dim: width a head of queries and keys without position.
        qk_rope_head_dim: width of the part that RoPE rotates.
        v_head_dim: width a head of values.
        rope_theta: base of RoPE's frequencies.
        rope_interleaved: RoPE's pairs are neighbours, not qk_rope_head_dim / 2 apart.
        rope_scaling: of RoPE's frequencies, for long contexts.
        q_lora_rank: width of the latent that queries are projected from; None: from the hidden state.
        latent_eps: eps of the latents' norms; None: as the layers' norms.
        shortcut: beside attention, from its input.

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
        rope_interleaved: bool = True,
        rope_scaling: Component = component("rope_scaling", "none"),  # noqa: B008
        q_lora_rank: int | None = None,
        latent_eps: float | None = None,
        shortcut: Component = component("shortcut", "none"),  # noqa: B008
    ) -> None:
        super().__init__()
        check(TINY, latent_eps=latent_eps)
        check(
            WIDTH,
            q_lora_rank=q_lora_rank,
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
        self.q_lora_rank = q_lora_rank
        if q_lora_rank is None:
            self.q_proj = Linear(embed_dim, num_heads * qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(embed_dim, q_lora_rank, bias=False)
            self.q_a_norm = norm(q_lora_rank)
            self.q_b_proj = Linear(q_lora_rank, num_heads * qk_head_dim, bias=False)
        self.kv_a_proj = Linear(embed_dim, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_a_norm = norm(kv_lora_rank)
        self.kv_b_proj = Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = Linear(num_heads * v_head_dim, embed_dim, bias=False)
        if latent_eps is not None:
            for latent_norm in (self.kv_a_norm, *([] if q_lora_rank is None else [self.q_a_norm])):
                latent_norm.eps = latent_eps  # type: ignore[assignment]
        self.shortcut: nn.Module | None = shortcut(embed_dim=embed_dim)
        scaling = rope_scaling()
        self.scale = qk_head_dim**-0.5 * (scaling.softmax_factor if scaling is not None else 1.0)
        self.rope = RotaryEmbedding(
            qk_rope_head_dim, max_seq_len, theta=rope_theta, interleaved=rope_interleaved, scaling=scaling
        )

    def parallel_plan(self) -> dict[str, str]:
        """How tensor parallelism divides it, see `parallel.plan`: by heads; the latents are whole on every process."""
        latents = dict.fromkeys(("q_a_proj", "q_a_norm", "kv_a_proj", "kv_a_norm"), "replicate")
        return {**latents, "q_proj": "colwise", "q_b_proj": "colwise", "kv_b_proj": "colwise", "o_proj": "rowwise"}

    def head_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of queries, keys and values, as attention over several tokens sees them."""
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        return (self.num_heads, qk_head_dim), (self.num_heads, qk_head_dim), (self.num_heads, self.v_head_dim)

    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, width) of each buffer: the normed latent and the rotated RoPE key, side by side."""
        return ((1, self.kv_lora_rank + self.qk_rope_head_dim),)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask = None,
        input_pos: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend from x (Tensor), hidden states, [b, s, d]; the other arguments are `Decoder.forward`'s."""
        return add_shortcut(self._attend(x, mask, input_pos, cache), x, self.shortcut)

    def _attend(self, x: Tensor, mask: Mask, input_pos: Tensor | None, cache: LayerCache | None) -> Tensor:
        b, s, _ = x.shape
        start = cache.start if cache else 0
        # -1 rather than num_heads: under tensor parallelism each process has a share of the heads.
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q = q.view(b, s, -1, self.qk_nope_head_dim + self.qk_rope_head_dim)
        q_nope, q_rope = q.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        q_rope = self.rope(q_rope, input_pos, start)  # [b, s, h, r]
        latent, k_rope = self.kv_a_proj(x).split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        latent = to_local(self.kv_a_norm(latent))  # [b, s, c]
        k_rope = self.rope(to_local_of_heads(k_rope)[:, :, None], input_pos, start)  # [b, s, 1, r]
        if cache is not None:
            entry = torch.cat((latent, k_rope[:, :, 0]), dim=-1)  # [b, s, c + r]
            (kept,) = cache.append(entry[:, None])  # [b, 1, t, c + r]
            if s == 1:
                assert not isinstance(mask, Segments | SharedSequence)  # the decoder refuses them with a cache
                return self.o_proj(self._decode(q_nope[:, 0], q_rope[:, 0], kept[:, 0], mask))
            latent, k_rope = kept[:, 0].split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
            k_rope = k_rope[:, :, None]
        if isinstance(mask, SharedSequence):  # kv_lora_rank + qk_rope_head_dim numbers a token, not all heads' keys
            gathered = mask.gather(torch.cat((latent, k_rope[:, :, 0]), dim=-1), 1)
            latent, k_rope = gathered.split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
            k_rope = k_rope[:, :, None]
        t = latent.shape[1]
        kv = self.kv_b_proj(latent) if cache is None or not cache.shared else self._expand_shared(latent, cache.shared)
        kv = kv.view(b, t, -1, self.qk_nope_head_dim + self.v_head_dim)
        k_nope, v = kv.split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)), dim=-1)  # [b, t, h, n + r]
        q = torch.cat((q_nope, q_rope), dim=-1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if isinstance(mask, SharedSequence):
            out = mask.attend(q, k, v, self.scale)
        else:
            out = attend(q, k, v, mask, self.scale)
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
        # On a CPU torch's batched product in bf16 copies its factors, the whole cache included.
        half_on_cpu = kept.device.type == "cpu" and kept.dtype == w_kv.dtype == torch.bfloat16
        if half_on_cpu and len(kept) == 1 and not torch.is_grad_enabled():
            # One bag a head: the sum of the rows of its W_uk, weighted by its query.
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


# Below, a second thread costs more than it saves (measured: about 300).
_TOKENS_A_PART = 256


def _attend_latent(query: Tensor, kept: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(query kept^T * scale) kept, [b, h, w], by torch's flash kernel for CPUs, which copies nothing.

    Args:
        query (Tensor): [b, h, w]; heads take the place of queries, since they share the keys.
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
    # The kernel parallelises over rows of a batch, and here is only one. So parts of the cache become rows, and their
    # outputs are combined by the log-sum-exps that the kernel also returns.
    size = t // parts
    cuts = [keys[:, :, : parts * size].view(parts, 1, size, w)]
    if parts * size < t:
        cuts.append(keys[:, :, parts * size :])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = [flash(query.expand(len(cut), -1, -1, -1), cut, cut, 0.0, False, scale=scale) for cut in cuts]
    outs, sums = (torch.cat(tensors) for tensors in zip(*found, strict=True))  # [parts, 1, h, w], [parts, 1, h]
    return (outs * sums.softmax(0)[..., None]).sum(0).to(kept.dtype)
