"""Distillation losses: the student's distribution of the next token is drawn to a teacher's, in chunks of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plmtune.losses.cross_entropy import IGNORE, capped, cross_entropy
from plmtune.ranges import Range, check
from plmtune.registry import register

_TEMPERATURE = Range(above=0, most=100)
_SHARE = Range(least=0, most=1)
TERMS = ("cross_entropy", "divergence")  # names of the two metrics that `take_terms` returns

# (log p of the teacher, log q of the student), [c, v] each, which it may write over
# -> the divergence of each token, [c], and its gradient by the student's logits / T, [c, v].
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TeacherStates:
    """What a teacher's logits are computed from.

    Attributes:
        hidden: final hidden states of the tokens that count, [n, d of the teacher].
        weight: of its vocabulary projection, [v, d of the teacher]. Its row i is the token i of the student, or
            where the student's tokenizer was compressed from the teacher's, of the i-th token that was kept.
        soft_cap: of its logits, as for `cross_entropy`.
    """

    hidden: Tensor
    weight: Tensor
    soft_cap: float | None = None


class DistillationLoss:
    """Sum over tokens of cross_entropy_weight CE + (1 - cross_entropy_weight) T^2 D(p, q), in fp32.

    p = softmax(teacher's logits / T), q = softmax(student's logits / T), both over the rows that the two
    vocabulary projections share. T^2 keeps the size of gradients as T changes (Hinton et al., arXiv 1503.02531).
    Logits of chunk_rows tokens are held at once, of student and teacher alike; gradients are made in the forward.
    Without gradients (validation) it is CE, and reads no teacher.

    Args:
        temperature: T.
        cross_entropy_weight: share of the loss on the text itself; 0 distils alone.
        chunk_rows: tokens whose logits are held at once.

    Raises:
        ValueError: if a setting is out of its range.
    """

    needs_teacher: ClassVar[bool] = True
    divergence: Divergence

    def __init__(self, temperature: float, cross_entropy_weight: float, chunk_rows: int) -> None:
        check(_TEMPERATURE, temperature=temperature)
        check(_SHARE, cross_entropy_weight=cross_entropy_weight)
        self._cross_entropy = cross_entropy(chunk_rows=chunk_rows)
        self.temperature, self.cross_entropy_weight, self.chunk_rows = temperature, cross_entropy_weight, chunk_rows
        self._terms: list[Tensor] = []

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        teacher: TeacherStates | None = None,
        soft_cap: float | None = None,
    ) -> Tensor:
        """Return the loss, an fp32 scalar.

        Args:
            hidden: of the student, [n, d]; it computes in its dtype, or in autocast's where that is on.
            weight: of the student's vocabulary projection, [v, d]; perhaps an fp32 master.
            targets: [n], -100 for tokens that do not count.
            teacher: None only without gradients.
        """
        if not torch.is_grad_enabled():
            return self._cross_entropy(hidden, weight, targets, soft_cap=soft_cap)
        assert teacher is not None
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        loss, terms = ChunkedDistillation.apply(hidden, weight, targets, teacher, soft_cap, self)
        self._terms.append(terms)
        return loss

    def take_terms(self) -> tuple[Tensor, Tensor]:
        """Return the sums of CE and of D, neither weighted, over calls with gradients since the last one."""
        sums = torch.stack(self._terms).sum(dim=0)
        self._terms.clear()
        return sums[0], sums[1]


@register("loss", "forward_kl")
class ForwardKL(DistillationLoss):
    """KL(p || q) of the teacher's p and the student's q (Hinton et al., arXiv 1503.02531): q covers all of p.

    Args:
        temperature, cross_entropy_weight, chunk_rows: see `DistillationLoss`.
    """

    def __init__(self, *, temperature: float = 1.0, cross_entropy_weight: float = 0.0, chunk_rows: int = 256) -> None:
        super().__init__(temperature, cross_entropy_weight, chunk_rows)

    @staticmethod
    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        value = log_p.sub_(log_q).mul_(p).sum(dim=1)
        return value, log_q.exp_().sub_(p)


@register("loss", "reverse_kl")
class ReverseKL(DistillationLoss):
    """KL(q || p) of the teacher's p and the student's q (MiniLLM, arXiv 2306.08543): q stays where p is high.

    Args:
        temperature, cross_entropy_weight, chunk_rows: see `DistillationLoss`.
    """

    def __init__(self, *, temperature: float = 1.0, cross_entropy_weight: float = 0.0, chunk_rows: int = 256) -> None:
        super().__init__(temperature, cross_entropy_weight, chunk_rows)

    @staticmethod
    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        q = log_q.exp()
        ratio = log_q.sub_(log_p)
        value = (q * ratio).sum(dim=1)
        return value, ratio.sub_(value[:, None]).mul_(q)  # d q_j / d s_i = q_j (1{i = j} - q_i)


@register("loss", "jsd")
class JensenShannon(DistillationLoss):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, equation 1).

    Args:
        beta: share of the teacher in m; 0.5 is the symmetric divergence.
        temperature, cross_entropy_weight, chunk_rows: see `DistillationLoss`.

    Raises:
        ValueError: if beta is not between 0 and 1, where the divergence is 0.
    """

    def __init__(
        self,
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        cross_entropy_weight: float = 0.0,
        chunk_rows: int = 256,
    ) -> None:
        check(Range(above=0, below=1), beta=beta)
        super().__init__(temperature, cross_entropy_weight, chunk_rows)
        self.beta = beta

    def divergence(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        beta = self.beta
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        q = log_q.exp()
        of_p = log_p.exp().mul_(log_p.sub_(log_m)).sum(dim=1)
        ratio = log_q.sub_(log_m)
        of_q = (q * ratio).sum(dim=1)
        # The derivative by q is (1 - beta) log(q / m): the derivatives of m cancel, since m sums to 1.
        grad = ratio.sub_(of_q[:, None]).mul_(q).mul_(1 - beta)
        return beta * of_p + (1 - beta) * of_q, grad


class ChunkedDistillation(torch.autograd.Function):
    """`DistillationLoss`, chunk by chunk, with sums and the weight's gradient in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: TeacherStates,
        soft_cap: float | None,
        loss: DistillationLoss,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        share, temperature = loss.cross_entropy_weight, loss.temperature
        w, w_teacher = weight.to(hidden.dtype), teacher.weight.to(teacher.hidden.dtype)
        rows = min(len(w), len(w_teacher))  # of equal tokenizers; one projection may be padded further
        terms = hidden.new_zeros(2, dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(targets), loss.chunk_rows):
            chunk = slice(start, start + loss.chunk_rows)
            x, target = hidden[chunk], targets[chunk, None]
            valid = target != IGNORE  # [c, 1]
            target = target.where(valid, 0)
            logits, slope = capped(x @ w.T, soft_cap)  # [c, v]
            logits = logits.float()
            theirs, _ = capped(teacher.hidden[chunk] @ w_teacher[:rows].T, teacher.soft_cap)
            log_p = torch.log_softmax(theirs.float().div_(temperature), dim=1)
            del theirs
            value, by_logits = loss.divergence(log_p, torch.log_softmax(logits[:, :rows] / temperature, dim=1))
            terms[1] += value.where(valid[:, 0], 0).sum()
            log_q = torch.log_softmax(logits, dim=1)
            terms[0] -= log_q.gather(1, target).where(valid, 0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = log_q.exp_()  # d CE / d logits = q - onehot
            grad.scatter_add_(1, target, torch.full_like(grad[:, :1], -1.0)).mul_(share)
            grad[:, :rows] += by_logits.mul_((1 - share) * temperature)  # T^2 / T
            grad = grad.where(valid, 0)
            grad = (grad if slope is None else grad * slope).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ w
            if grad_weight is not None:
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(terms)
        return share * terms[0] + (1 - share) * temperature**2 * terms[1], terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        # In place: a second backward would find changed tensors, and torch then refuses it.
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden.mul_(upstream),
            None if grad_weight is None else grad_weight.mul_(upstream).to(ctx.weight_dtype),
            *(None,) * 4,
        )
