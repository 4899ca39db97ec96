"""A feed-forward layer whose activation is a series, [b, s, d] -> [b, s, d]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.modules.feed_forward import SquareOfReLU
from plmtune.modules.linear import Linear
from plmtune.modules.sharding import to_local_of_heads
from plmtune.ranges import WIDTH, Range, check
from plmtune.registry import register

Base = Literal["swiglu", "geglu", "gelu", "squared_relu"]

_gelu: Callable[[Tensor], Tensor] = partial(F.gelu, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    squared: Tensor = SquareOfReLU.apply(x)
    return squared


# The base's activation, that of the further terms, whether it has a gate, and whether it has biases. The slope of a
# squared ReLU at 0 is 0: a further term of that kind would never leave its start, so it is a silu.
_BASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], bool, bool]] = {
    "swiglu": (F.silu, F.silu, True, False),
    "geglu": (_gelu, _gelu, True, False),
    "gelu": (_gelu, _gelu, False, True),
    "squared_relu": (_squared_relu, F.silu, False, False),
}


@register("ffn", "siaf")
class SIAF(nn.Module):
    """Series informed activation function (PanGu-pi, arXiv 2312.17276, eq. 7): down(s(gate(x)) * up(x)) with

        s(x) = sum over i = 1..num_terms of sigma_i(a_i x + b_i)

    in place of one activation sigma; a_i and b_i are learned numbers, a pair for each term of each layer. The paper's
    models have Llama's SwiGLU and two terms. The layer starts as its base, a = (1, 0, ...) and b = 0 (ours; the paper
    gives no start): sigma(0) = 0 for each of the activations here. Weight decay leaves a and b out, as all vectors,
    and so does muon.

    Args:
        embed_dim: width of the residual stream.
        hidden_dim: width between the projections.
        num_terms: activations that are summed; 1 has a scale and a bias, too.
        base: the component whose activation becomes a series: swiglu or geglu, which have a gate; gelu, with biases and
            the tanh approximation; squared_relu, whose further terms are silu(a_i x + b_i).

    Raises:
        ValueError: if hidden_dim is no width, or num_terms below 1.
    """

    def __init__(self, embed_dim: int, *, hidden_dim: int = 5632, num_terms: int = 2, base: Base = "swiglu") -> None:
        super().__init__()
        check(WIDTH, hidden_dim=hidden_dim)
        check(Range(least=1, most=64), num_terms=num_terms)
        self.base = base
        first, further, gated, bias = _BASES[base]
        self._terms = [first] + [further] * (num_terms - 1)
        self.gate_proj = Linear(embed_dim, hidden_dim, bias=False) if gated else None
        self.up_proj = Linear(embed_dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, embed_dim, bias=bias)
        self.series_scale = nn.Parameter(torch.empty(num_terms))
        self.series_bias = nn.Parameter(torch.empty(num_terms))
        self.initial = {"series_scale": (1.0, *[0.0] * (num_terms - 1)), "series_bias": 0.0}

    def parallel_plan(self) -> dict[str, str]:
        """How tensor parallelism divides it, see `parallel.plan`: by columns of the hidden width."""
        projections = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        return {**projections, "series_scale": "parameter_whole", "series_bias": "parameter_whole"}

    @staticmethod
    def extends(component: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The settings with which the layer starts equal to another FFN; None: with none."""
        bias = settings.get("bias", False)
        if component not in _BASES or bias is not _BASES[component][3] or settings.get("approximate") == "none":
            return None
        return {"base": component, "hidden_dim": settings["hidden_dim"]}

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(self._series(up))
        return self.down_proj(self._series(self.gate_proj(x)) * up)

    def _series(self, x: Tensor) -> Tensor:
        # Numbers without dimensions leave autocast's dtype of x as it is.
        terms = zip(
            self._terms, *(to_local_of_heads(p).unbind() for p in (self.series_scale, self.series_bias)), strict=True
        )
        total, *others = (sigma(a * x + b) for sigma, a, b in terms)
        for term in others:
            total = total + term
        return total
