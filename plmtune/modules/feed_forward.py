"""Feed-forward layers, [b, s, d] -> [b, s, d]."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.modules.linear import Linear
from plmtune.ranges import WIDTH, check
from plmtune.registry import register


class SquareOfReLU(torch.autograd.Function):
    """relu(x)^2 with the derivative 2 relu(x): one tensor kept and two passes back, where autograd's own takes four."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return upstream * positive * 2


@register("ffn", "squared_relu")
class SquaredReLU(nn.Module):
    """PLM's FFN: down(relu(up(x))^2), no gate, no bias (Primer, arXiv 2109.08668; PLM, arXiv 2503.12167).

    With `record_sparsity` set, `sparsity` holds the share of exact zeros of the last forward's activation, as
    a tensor on the device: reading it is the only synchronisation.

    Args:
        embed_dim: width of the residual stream.
        hidden_dim: width between the two projections.

    Raises:
        ValueError: if hidden_dim is no width.
    """

    def __init__(self, embed_dim: int, *, hidden_dim: int = 8192) -> None:
        super().__init__()
        check(WIDTH, hidden_dim=hidden_dim)
        self.up_proj = Linear(embed_dim, hidden_dim, bias=False)
        self.down_proj = Linear(hidden_dim, embed_dim, bias=False)
        self.record_sparsity = False
        self.sparsity: Tensor | None = None
        self._sparse = False

    @property
    def sparse(self) -> bool:
        """Whether a single row skips the columns of `down` whose inputs are zero, which changes no result.

        Switched on, `down`'s weight is stored by input, [hidden_dim, embed_dim], so that what is needed of it lies in
        rows; to all else it is the same parameter, [embed_dim, hidden_dim], of the same memory. `devices.sparse_decode`
        measures where it pays.
        """
        return self._sparse

    @sparse.setter
    def sparse(self, on: bool) -> None:
        down = self.down_proj
        if on and type(down) not in (Linear, nn.Linear):
            raise ValueError(
                f"a {type(down).__name__} cannot skip columns: kernels of packed integers read whole rows, and adapters"
                " must be merged first"
            )
        if on != self._sparse:
            weight = down.weight.detach()
            down.weight.data = weight.t().contiguous().t() if on else weight.contiguous()  # an optimizer's, too
        self._sparse = on

    def parallel_plan(self) -> dict[str, str]:
        """How tensor parallelism divides it, see `parallel.plan`: by columns of the hidden width."""
        return {"up_proj": "colwise", "down_proj": "rowwise"}

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        hidden: Tensor = SquareOfReLU.apply(up) if torch.is_grad_enabled() else F.relu(up).square_()
        if self.record_sparsity:
            self.sparsity = (hidden.detach() == 0).float().mean(-1)  # [b, s]
        # Several rows share few zeros: together they read the weight once.
        if self._sparse and hidden.numel() == hidden.shape[-1] and not torch.is_grad_enabled():
            return self.skip_zeros(hidden)
        return self.down_proj(hidden)

    def skip_zeros(self, hidden: Tensor) -> Tensor:
        """`down` of hidden (Tensor), one row [..., hidden_dim], reading only the columns whose inputs are not zero."""
        weight = self.down_proj.weight.t()  # [hidden_dim, embed_dim], contiguous
        if weight.dtype != hidden.dtype:  # autocast
            return self.down_proj(hidden)
        values = hidden.reshape(-1)
        kept = values.nonzero().view(-1)
        # A gather of rows and a product in one kernel, which sums in fp32. On a CPU a bag is one thread's work, so each
        # makes its part of the columns, of which no sums are left to be added up in bf16.
        width = weight.shape[1]
        if len(kept) == 0:  # which embedding_bag does not take
            return hidden.new_zeros(*hidden.shape[:-1], width)
        threads = torch.get_num_threads() if hidden.device.type == "cpu" else 1
        parts = next(parts for parts in range(threads, 0, -1) if width % parts == 0)
        bags = kept * parts + torch.arange(parts, device=kept.device)[:, None]  # [parts, kept]
        factors = values[kept].expand(parts, -1)
        found = F.embedding_bag(bags, weight.view(-1, width // parts), mode="sum", per_sample_weights=factors)
        return found.view(*hidden.shape[:-1], width)


class _Gated(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        check(WIDTH, hidden_dim=hidden_dim)
        self.gate_proj = Linear(embed_dim, hidden_dim, bias=False)
        self.up_proj = Linear(embed_dim, hidden_dim, bias=False)
        self.down_proj = Linear(hidden_dim, embed_dim, bias=False)

    def parallel_plan(self) -> dict[str, str]:
        """How tensor parallelism divides it, see `parallel.plan`: by columns of the hidden width."""
        return {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


@register("ffn", "swiglu")
class SwiGLU(_Gated):
    """Llama's FFN: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, embed_dim: int, *, hidden_dim: int = 5632) -> None:
        super().__init__(embed_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@register("ffn", "geglu")
class GeGLU(_Gated):
    """Gemma's FFN: down(gelu(gate(x)) * up(x)), gelu by its tanh approximation (arXiv 2002.05202, 2403.08295)."""

    def __init__(self, embed_dim: int, *, hidden_dim: int = 2048) -> None:
        super().__init__(embed_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


@register("ffn", "gelu")
class GELU(nn.Module):
    """GPT-2's FFN: down(gelu(up(x))) (arXiv 1606.08415).

    Args:
        bias: both projections have biases.
        approximate: tanh, as GPT-2; none: the exact gelu.
        others: as for squared_relu.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        hidden_dim: int = 3072,
        bias: bool = True,
        approximate: Literal["tanh", "none"] = "tanh",
    ) -> None:
        super().__init__()
        check(WIDTH, hidden_dim=hidden_dim)
        self.approximate = approximate
        self.up_proj = Linear(embed_dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, embed_dim, bias=bias)

    def parallel_plan(self) -> dict[str, str]:
        """How tensor parallelism divides it, see `parallel.plan`: by columns of the hidden width."""
        return {"up_proj": "colwise", "down_proj": "rowwise"}

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate=self.approximate))
