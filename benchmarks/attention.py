"""Attention at PLM's head shapes (16 heads, 192 / 128): our fused core against softmax written out.

    python benchmarks/attention.py [--quick]

Forward and backward of one causal sequence in fp32; the manual side is what a plain implementation does:
scores, mask, fp32 softmax, product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from side_by_side import machine, medians
from torch import Tensor

from plmtune.modules.attention_kernels import attend, choose_kernel

HEADS, QK, V = 16, 192, 128


def manual(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    s = q.shape[2]
    future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(future, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 tokens, three rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.set_num_threads(arguments.threads)
    s = 256 if quick else 2048
    torch.manual_seed(0)
    q, k = (torch.randn(1, HEADS, s, QK, requires_grad=True) for _ in range(2))
    v = torch.randn(1, HEADS, s, V, requires_grad=True)
    gradient = torch.randn(1, HEADS, s, V)

    def step(core: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(core(), (q, k, v), gradient)

    def ours() -> Tensor:
        return attend(q, k, v, None, QK**-0.5)

    def theirs() -> Tensor:
        return manual(q, k, v, QK**-0.5)

    torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-4)
    print(machine())
    print(f"{s} tokens, fp32, values {choose_kernel(q.device, q.dtype, QK, V)}\n")
    print("| | ours | manual | ratio |\n|---|---|---|---|")
    with torch.no_grad():
        forward = medians({"ours": ours, "manual": theirs}, rounds=3 if quick else 5)
    both = medians({"ours": step(ours), "manual": step(theirs)}, rounds=3 if quick else 5)
    for name, times in (("forward", forward), ("forward + backward", both)):
        mine, other = times["ours"], times["manual"]
        print(f"| {name} | {mine * 1e3:.0f} ms | {other * 1e3:.0f} ms | {other / mine:.2f}x |")


if __name__ == "__main__":
    main()
