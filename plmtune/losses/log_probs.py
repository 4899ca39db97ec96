"""Log-probabilities of whole answers that never hold all logits: tokens go through the vocabulary in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plmtune.losses.cross_entropy import capped
from plmtune.ranges import AT_LEAST_1, check


def log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    completion: Tensor,
    num: int,
    chunk_rows: int = 1024,
    *,
    soft_cap: float | None = None,
) -> Tensor:
    """Sum of log p(target) over the tokens of each completion, in fp32.

    Memory holds chunk_rows x vocabulary logits instead of tokens x vocabulary, in forward and in backward.
    It computes in hidden's dtype, or in autocast's where that is on, as a linear layer would; `weight` may be an
    fp32 master, or frozen.

    Args:
        hidden (Tensor): normed hidden states that predict the targets, [t, d].
        weight (Tensor): the vocabulary projection, [v, d].
        targets (Tensor): ids, [t].
        completion (Tensor): which completion each token belongs to, below num, [t].
        num: completions.
        chunk_rows: tokens whose logits are held at once.
        soft_cap: logits become soft_cap tanh(logit / soft_cap) first; None: they stay.

    Returns:
        Tensor: [num], 0 for a completion without tokens.

    Raises:
        ValueError: if chunk_rows is not positive.
    """
    check(AT_LEAST_1, chunk_rows=chunk_rows)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    per_token: Tensor = _TokenLogProbs.apply(hidden, weight, targets, chunk_rows, soft_cap)
    return per_token.new_zeros(num).index_add(0, completion, per_token)


class _TokenLogProbs(torch.autograd.Function):
    """log p(target) of each token, [t], fp32.

    Unlike cross_entropy's, the weight's gradient cannot be made in forward: each answer's tokens are multiplied by a
    factor that the loss knows only when all answers' sums are there, and this gradient is a sum over answers. So
    backward computes the logits again, one matrix product more, and has the softmax at once from the normaliser that
    forward kept. A frozen weight (LoRA) spares that: then forward makes each token's gradient without its factor,
    which takes 0.72 of the time (512 tokens x 576 x 49,152, one thread).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, soft_cap: float | None
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        w = weight.to(hidden.dtype)
        normaliser = hidden.new_empty(len(targets), dtype=torch.float32)
        result = torch.empty_like(normaliser)
        grad_hidden = torch.empty_like(hidden) if needs_hidden and not needs_weight else None
        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits, slope = capped(hidden[rows] @ w.T, soft_cap)  # [c, v]
            wide = logits.float()
            normaliser[rows] = wide.logsumexp(dim=1)
            result[rows] = wide.gather(1, targets[rows, None])[:, 0] - normaliser[rows]
            if grad_hidden is not None:
                grad = _of_logits(logits, slope, targets[rows], normaliser[rows], result[rows])
                grad_hidden[rows] = grad.to(w.dtype) @ w
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        else:
            ctx.save_for_backward(hidden, weight, targets, normaliser, result)
        ctx.chunk_rows, ctx.soft_cap = chunk_rows, soft_cap
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        factor = -upstream[:, None]  # [t, 1]
        if not needs_weight:
            (grad_hidden,) = ctx.saved_tensors
            return (grad_hidden * factor).to(grad_hidden.dtype), None, None, None, None
        hidden, weight, targets, normaliser, result = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            logits, slope = capped(hidden[rows] @ w.T, ctx.soft_cap)
            grad = _of_logits(logits, slope, targets[rows], normaliser[rows], result[rows]).to(w.dtype)
            # The factor goes to the narrow side of each product.
            if grad_hidden is not None:
                grad_hidden[rows] = (grad @ w) * factor[rows]
            grad_weight += grad.T @ (hidden[rows] * factor[rows]).to(grad.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _of_logits(logits: Tensor, slope: Tensor | None, targets: Tensor, normaliser: Tensor, log_p: Tensor) -> Tensor:
    """-d log p(target) / d logits = p - onehot, [c, v], written over the logits; slope: of their cap."""
    grad = torch.exp(logits.float().sub_(normaliser[:, None]), out=logits)
    # In fp32 before it is rounded, since 0.999 and 1 are equal in bf16.
    grad.scatter_(1, targets[:, None], torch.expm1(log_p[:, None]).to(grad.dtype))
    return grad if slope is None else grad.mul_(slope)
