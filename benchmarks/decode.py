"""Decoding one token of PLM-1.8B at 2048 cached tokens: three ways to keep what attention needs.

    python benchmarks/decode.py [--quick]

absorbed     ours: the latent alone, 576 numbers a token, attended to as it is
expanded     keys and values of all heads, 5120 numbers a token, as public runtimes keep them
re-expanding the latent alone, expanded to keys and values at every step

The core is what differs (from the query to the heads' output); attention adds the projections in and out,
which all three share; a layer adds norms and FFN. On a machine that others use, too, give --threads 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from side_by_side import machine, medians
from torch import Tensor

from plmtune.models.plm import plm
from plmtune.modules.attention_kernels import attend
from plmtune.modules.cache import LayerCache
from plmtune.modules.decoder import DecoderLayer
from plmtune.modules.mla import MultiHeadLatentAttention


class Bench:
    """One layer of PLM-1.8B with `t` tokens in each kind of cache."""

    def __init__(self, batch_size: int, t: int) -> None:
        torch.manual_seed(0)
        layer = plm(16, num_layers=1).layers[0]
        assert isinstance(layer, DecoderLayer) and isinstance(layer.attention, MultiHeadLatentAttention)
        self.layer, self.mla, self.t = layer, layer.attention, t
        self.x = torch.randn(batch_size, 1, 2048)
        self.latent = torch.randn(batch_size, 1, t + 1, 576)
        self.k, self.v = self.expand(self.latent[:, 0])
        self.k, self.v = self.k.contiguous(), self.v.contiguous()

    def expand(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [b, h, t, 192] and values [b, h, t, 128] of kept latents, [b, t, 576]."""
        latent, k_rope = kept.split((512, 64), dim=-1)
        kv = self.mla.kv_b_proj(latent).unflatten(-1, (16, 256)).transpose(1, 2)
        k_rope = k_rope[:, None].expand(-1, 16, -1, -1)
        return torch.cat((kv[..., :128], k_rope), dim=-1), kv[..., 128:]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Query [b, h, 1, 192] and the new token's entry, [b, 1, 576]."""
        q_nope, q_rope = self.mla.q_proj(x).unflatten(-1, (16, 192)).split((128, 64), dim=-1)
        latent, k_rope = self.mla.kv_a_proj(x).split((512, 64), dim=-1)
        q = torch.cat((q_nope, self.mla.rope(q_rope, start=self.t)), dim=-1).transpose(1, 2)
        turned = self.mla.rope(k_rope[:, :, None], start=self.t)[:, :, 0]
        return q, torch.cat((self.mla.kv_a_norm(latent), turned), dim=-1)

    def core(self, way: str, q: Tensor, entry: Tensor) -> Tensor:
        """Heads' output, [b, 1, 2048]."""
        if way == "absorbed":
            self.latent[:, 0, self.t :] = entry
            return self.mla._decode(q[:, :, 0, :128], q[:, :, 0, 128:], self.latent[:, 0], None)
        if way == "expanded":
            # The new token alone is expanded; flash would need values padded to 192, so this is spelled out.
            self.k[:, :, self.t :], self.v[:, :, self.t :] = self.expand(entry)
            scores = (q @ self.k.transpose(-1, -2)) * self.mla.scale
            out = scores.softmax(-1) @ self.v
        else:
            self.latent[:, 0, self.t :] = entry
            out = attend(q, *self.expand(self.latent[:, 0]), None, self.mla.scale)
        return out.transpose(1, 2).flatten(2)

    def attention(self, way: str, x: Tensor) -> Tensor:
        if way == "absorbed":
            return self.mla(x, cache=LayerCache((self.latent,), self.t))
        return self.mla.o_proj(self.core(way, *self.project(x)))

    def whole_layer(self, way: str) -> Tensor:
        h = self.x + self.attention(way, self.layer.attention_norm(self.x))
        return h + self.layer.ffn(self.layer.ffn_norm(h))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 tokens, three rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.set_num_threads(arguments.threads)
    t, rounds = (256, 3) if quick else (2048, 7)
    print(machine())
    print(f"one layer of PLM-1.8B, {t} cached tokens, fp32\n")
    print("| batch | part | absorbed | expanded | ratio | re-expanding | ratio |\n|---|---|---|---|---|---|---|")
    for batch_size in (1, 4):
        bench = Bench(batch_size, t)
        q, entry = bench.project(bench.x)
        ways = ("absorbed", "expanded", "re-expanding")
        expected = bench.attention("absorbed", bench.x)
        for way in ways[1:]:
            torch.testing.assert_close(bench.attention(way, bench.x), expected, atol=1e-4, rtol=1e-3)
        parts: dict[str, Callable[[str], object]] = {
            "core": partial(bench.core, q=q, entry=entry),
            "attention": partial(bench.attention, x=bench.x),
            "layer": bench.whole_layer,
        }
        for part, call in parts.items():
            times = medians({way: partial(call, way) for way in ways}, rounds=rounds, seconds=0.15)
            mine, expanded, again = (times[way] for way in ways)
            print(
                f"| {batch_size} | {part} | {mine * 1e3:.2f} ms "
                f"| {expanded * 1e3:.2f} ms | {expanded / mine:.2f}x "
                f"| {again * 1e3:.1f} ms | {again / mine:.1f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
