"""Next-token cross entropy that never holds all logits: tokens go through the vocabulary in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from plmtune.modules.sharding import full_tensor, is_sharded
from plmtune.ranges import AT_LEAST_1, WEIGHT, check
from plmtune.registry import register

IGNORE = -100  # targets that count for nothing: padding, prompts, document borders

Loss = Callable[..., Tensor]

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@register("loss", "cross_entropy")
def cross_entropy(*, chunk_rows: int = 1024, z_loss: float = 0.0) -> Loss:
    """Sum of -log p(target) + z_loss (log Z)^2 over the targets that are not -100, in fp32; Z = sum exp(logits).

    The second term is PaLM's z-loss (arXiv 2204.02311, section 5), which keeps logits from drifting. It trains and is
    not measured: the training loss that is logged has it, a loss without gradients (validation) is the first term.

    Memory holds chunk_rows x vocabulary logits instead of tokens x vocabulary; the gradients are made in the
    forward pass, chunk by chunk (as in Liger, arXiv 2410.10989).
    Call it outside compiled regions: torch.compile would fall back to eager here.

    Args:
        chunk_rows: tokens whose logits are held at once. 1024 is near the best at most sizes on a CPU
            (benchmarks/loss.py); benchmarks/gpu.py sweeps it on a GPU.
        z_loss: weight of the second term; PaLM's is 1e-4.

    Returns:
        A function (hidden [n, d], weight [v, d], targets [n]) -> fp32 scalar sum. It computes in hidden's
        dtype, or in autocast's where that is on, as a linear layer would; `weight` may be an fp32 master. With
        soft_cap, a keyword, logits become soft_cap tanh(logit / soft_cap) first (Gemma 2, arXiv 2408.00118).

    Raises:
        ValueError: if chunk_rows is not positive, or z_loss negative.
    """
    check(AT_LEAST_1, chunk_rows=chunk_rows)
    check(WEIGHT, z_loss=z_loss)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, soft_cap: float | None = None) -> Tensor:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        z = z_loss if torch.is_grad_enabled() else 0.0
        if is_sharded(weight):
            parallel: Tensor = LossParallel.apply(hidden, weight, targets, chunk_rows, soft_cap, z)
            return parallel
        if hidden.dtype in (torch.bfloat16, torch.float16) or soft_cap is not None or z:
            result: Tensor = ChunkedLoss.apply(hidden, weight, targets, chunk_rows, soft_cap, z)
            return result
        # The native function picks far too small chunks for narrow models when it is left to choose.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows)
        weight = weight.to(hidden.dtype)
        return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)

    return loss


def capped(logits: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor | None]:
    """soft_cap tanh(logits / soft_cap), and its derivative; the logits themselves and None without a cap."""
    if soft_cap is None:
        return logits, None
    tanh = torch.tanh(logits.float() / soft_cap)
    return tanh * soft_cap, 1 - tanh * tanh


class ChunkedLoss(torch.autograd.Function):
    """The same for bf16, fp16, capped logits and z-loss, with sums and the weight's gradient in fp32.

    F.linear_cross_entropy adds the loss of its chunks up in bf16, which is off by up to 1.5% at 4096 tokens
    (tests/losses), and rounds the weight's gradient to bf16 after each chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_rows: int,
        soft_cap: float | None,
        z_loss: float,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        w = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(targets), chunk_rows):
            x = hidden[start : start + chunk_rows]
            target = targets[start : start + chunk_rows, None]
            valid = target != IGNORE  # [c, 1]
            target = target.where(valid, 0)
            logits, slope = capped(x @ w.T, soft_cap)  # [c, v]
            log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
            log_p_target = log_p.gather(1, target)
            total -= log_p_target.where(valid, 0).sum()
            if z_loss:
                log_z = logits.gather(1, target).float() - log_p_target  # [c, 1]
                total += z_loss * log_z.square().where(valid, 0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = p - onehot, written over the logits; the target's entry is taken in fp32,
            # since 0.999 and 1 are equal in bf16.
            # Of z-loss: 2 z_loss log Z p, added before p is rounded.
            of_target = torch.expm1(log_p_target)
            if z_loss:
                of_target += 2 * z_loss * log_z * log_p_target.exp()
                grad = logits.copy_(log_p.exp_().mul_(1 + 2 * z_loss * log_z))
            else:
                grad = torch.exp(log_p, out=logits)
            grad.scatter_(1, target, of_target.to(grad.dtype))
            grad = grad if slope is None else (grad * slope).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk_rows] = (grad @ w).where(valid, 0)
            if grad_weight is not None:
                grad_weight += grad.T @ x.where(valid, 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        return _scaled(ctx, upstream)


class LossParallel(torch.autograd.Function):
    """The same where tensor parallelism divides the vocabulary: no process holds a row's logits whole.

    hidden and targets are equal on every process of the weight's mesh, and so is the result. Gradients are made in the
    forward, as above: torch's `loss_parallel` must be on in both directions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: DTensor,
        targets: Tensor,
        chunk_rows: int,
        soft_cap: float | None,
        z_loss: float,
    ) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate
        from torch.distributed.tensor.parallel import loss_parallel

        mesh, whole = weight.device_mesh, [Replicate()]
        needs_grad = any(ctx.needs_input_grad)
        w = weight.detach().to(hidden.dtype).requires_grad_(needs_grad)
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            local = hidden[rows].detach().requires_grad_(needs_grad)
            target = DTensor.from_local(targets[rows], mesh, whole, run_check=False)
            with torch.set_grad_enabled(needs_grad), loss_parallel():
                x = DTensor.from_local(local, mesh, whole, run_check=False)
                logits = capped(F.linear(x, w), soft_cap)[0].float()  # [c, v / tp] on each process
                part = F.cross_entropy(logits, target, reduction="sum", ignore_index=IGNORE)
                if z_loss:
                    log_z = torch.logsumexp(logits, 1)  # [c]
                    part = part + z_loss * (log_z.square() * (target != IGNORE)).sum()
                if needs_grad:
                    of_hidden, of_weight = torch.autograd.grad(part, (local, w))
                    assert grad_hidden is not None and grad_weight is not None
                    grad_hidden[rows] = of_hidden
                    grad_weight += of_weight
            total += full_tensor(part.detach())
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        return _scaled(ctx, upstream)


def _scaled(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    """The gradients that a forward has made, times that of its result."""
    # In place: a second backward would find changed tensors, and torch then refuses it.
    grad_hidden, grad_weight = ctx.saved_tensors
    return (
        None if grad_hidden is None else grad_hidden.mul_(upstream),
        None if grad_weight is None else grad_weight.mul_(upstream).to(ctx.weight_dtype),
        *(None,) * 4,
    )
