"""Distillation losses: train the student's next-token distribution to match a teacher's, in chunks of tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from plmtune.losses.cross_entropy import IGNORE, capped, cross_entropy
from plmtune.ranges import Range, check
from plmtune.registry import register

_TEMPERATURE = Range(above=0, most=100)
_SHARE = Range(least=0, most=1)


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


@dataclass(frozen=True)
class TeacherTopK:
    """A teacher's k most likely tokens, as they are stored.

    Attributes:
        ids: of the student's tokenizer, [n, k] integers, different ones in a row.
        log_probs: their log-probabilities, [n, k].
        log_rest: the log-probability of all other tokens together, [n]; -inf where there are none.
        num_rows: rows that the two vocabulary projections share; None: all of the student's.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    num_rows: int | None = None


class Buffers:
    """Memory that one chunk after the other computes in; a system maps each new tensor of this size page by page."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def like(self, name: str, shape: tuple[int, int], given: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor of a name, of another one's device and dtype; its numbers last until the next chunk."""
        rows, columns = shape
        key = (name, columns, dtype or given.dtype)
        if key not in self._held or len(self._held[key]) < rows:
            self._held[key] = torch.empty(shape, dtype=key[2], device=given.device)
        return self._held[key][:rows]

    def product(self, name: str, x: Tensor, weight: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor | None]:
        """`capped` logits of hidden states x (Tensor), [c, d], in fp32."""
        shape = (len(x), len(weight))
        logits, slope = capped(torch.mm(x, weight.T, out=self.like(name, shape, x)), soft_cap)
        if logits.dtype == torch.float32:
            return logits, slope
        return self.like(name, shape, x, torch.float32).copy_(logits), slope

    def log_softmax(self, name: str, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits, 1, out=self.like(name, (logits.shape[0], logits.shape[1]), logits))


class DistillationLoss(ABC):
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
    takes_top_k: ClassVar[bool] = False

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
        teacher: TeacherStates | TeacherTopK | None = None,
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

    def compare(
        self, teacher: TeacherStates | TeacherTopK, part: slice, logits: Tensor, log_q: Tensor, buffers: Buffers
    ) -> tuple[Tensor, Tensor]:
        """Return T^2 D of the tokens `part`, [c], and the gradient of the weighted loss by the student's logits.

        The gradient, [c, v], lacks the target's -1 of CE.

        Args:
            logits, log_q: the student's, and their log_softmax, [c, v]; both may be written over.
        """
        assert isinstance(teacher, TeacherStates)
        temperature, share = self.temperature, self.cross_entropy_weight
        rows = min(logits.shape[1], len(teacher.weight))  # of equal tokenizers; one projection may be padded further
        by_ce = self._share_of(log_q, buffers)
        if temperature != 1 or rows < logits.shape[1]:
            log_q = buffers.log_softmax("log_q", logits[:, :rows].div_(temperature))
        log_p = self._log_p(teacher, part, rows, buffers)
        value, grad = self.divergence(log_p, log_q)
        value.mul_(temperature**2)
        factor = (1 - share) * temperature  # T^2 / T
        if by_ce is not None:
            by_ce[:, :rows].add_(grad, alpha=factor)
            return value, by_ce
        grad = grad if factor == 1 else grad.mul_(factor)
        return value, grad if rows == logits.shape[1] else F.pad(grad, (0, logits.shape[1] - rows))

    def _share_of(self, log_q: Tensor, buffers: Buffers) -> Tensor | None:
        """cross_entropy_weight q; None where that is 0."""
        if not self.cross_entropy_weight:
            return None
        by_ce = torch.exp(log_q, out=buffers.like("by_ce", (log_q.shape[0], log_q.shape[1]), log_q))
        return by_ce.mul_(self.cross_entropy_weight)

    def _log_p(self, teacher: TeacherStates, part: slice, rows: int, buffers: Buffers) -> Tensor:
        """The teacher's log_softmax at T over its first rows, [c, rows]. The student's logits are gone after it."""
        weight = teacher.weight[:rows].to(teacher.hidden.dtype)
        theirs, _ = buffers.product("logits", teacher.hidden[part], weight, teacher.soft_cap)
        return buffers.log_softmax("log_p", theirs if self.temperature == 1 else theirs.div_(self.temperature))

    @abstractmethod
    def divergence(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Return D of each token, [c], and its gradient by logits / T, [c, v]; may write over the logarithms."""

    def take_terms(self) -> tuple[Tensor, Tensor]:
        """Return the sums of CE and of T^2 D, neither weighted, over calls with gradients since the last one."""
        sums = torch.stack(self._terms).sum(dim=0)
        self._terms.clear()
        return sums[0], sums[1]


@register("loss", "forward_kl")
class ForwardKL(DistillationLoss):
    """KL(p || q) of the teacher's p and the student's q (Hinton et al., arXiv 1503.02531): mode-covering.

    Of a teacher's k most likely tokens S alone it is the decoupled loss of LFM2 (arXiv 2511.23404): T^2 D becomes
    KL(P || Q) + P T^2 KL(p_S || q_S), with P and Q the probabilities of S without a temperature, KL(P || Q) that of the
    choice between S and the rest, and p_S and q_S the distributions at T within S. At T = 1, or where S is the whole
    vocabulary, that is KL of the distributions themselves, the rest being one token.

    Args:
        temperature, cross_entropy_weight, chunk_rows: see `DistillationLoss`.
    """

    def __init__(self, *, temperature: float = 1.0, cross_entropy_weight: float = 0.0, chunk_rows: int = 256) -> None:
        super().__init__(temperature, cross_entropy_weight, chunk_rows)

    takes_top_k: ClassVar[bool] = True

    def compare(
        self, teacher: TeacherStates | TeacherTopK, part: slice, logits: Tensor, log_q: Tensor, buffers: Buffers
    ) -> tuple[Tensor, Tensor]:
        share = self.cross_entropy_weight
        if isinstance(teacher, TeacherStates):
            if self.temperature != 1 or len(teacher.weight) < logits.shape[1]:
                return super().compare(teacher, part, logits, log_q, buffers)
            # share q + (1 - share) (q - p), with one exponential of the student's
            log_p = self._log_p(teacher, part, logits.shape[1], buffers)
            p = torch.exp(log_p, out=buffers.like("logits", (log_p.shape[0], log_p.shape[1]), log_p))
            value = log_p.sub_(log_q).mul_(p).sum(dim=1)
            return value, log_q.exp_().sub_(p, alpha=1 - share)
        ids, log_p = teacher.ids[part], teacher.log_probs[part].float()
        by_ce = self._share_of(log_q, buffers)
        unshared = 0 if teacher.num_rows is None else max(0, logits.shape[1] - teacher.num_rows)
        if unshared:
            log_q = torch.log_softmax(logits[:, : teacher.num_rows], dim=1)
        grad = log_q.exp_()  # q, and then the gradient written over it
        of_top, others = grad.gather(1, ids), grad.scatter_(1, ids, 0)
        # Not 1 - P and 1 - Q: where P is near 1, the rounding of stored numbers is as large as what is left.
        p_rest, q_rest = teacher.log_rest[part].float().exp(), others.sum(1)
        p_top, q_top = 1 - p_rest, of_top.sum(1)
        tiny = torch.finfo(torch.float32).tiny
        value = torch.xlogy(p_rest, p_rest / q_rest.clamp(min=tiny)) + torch.xlogy(p_top, p_top / q_top.clamp(min=tiny))
        # d Q / d s_i = q_i (1{i in S} - Q)
        grad = others.mul_((1 - p_rest / q_rest.clamp(min=tiny))[:, None])
        in_top = of_top * (1 - p_top / q_top.clamp(min=tiny))[:, None]
        log_p = torch.log_softmax(log_p / self.temperature, dim=1)
        within, by_scaled = self.divergence(log_p, torch.log_softmax(logits.gather(1, ids) / self.temperature, dim=1))
        value += p_top * within * self.temperature**2
        in_top += by_scaled.mul_(p_top[:, None] * self.temperature)
        grad.scatter_(1, ids, in_top)
        if by_ce is None:
            return value, F.pad(grad, (0, unshared)) if unshared else grad
        by_ce[:, : grad.shape[1]].add_(grad, alpha=1 - share)
        return value, by_ce

    def divergence(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        value = log_p.sub_(log_q).mul_(p).sum(dim=1)
        return value, log_q.exp_().sub_(p)


@register("loss", "reverse_kl")
class ReverseKL(DistillationLoss):
    """KL(q || p) of the teacher's p and the student's q (MiniLLM, arXiv 2306.08543): mode-seeking.

    Args:
        temperature, cross_entropy_weight, chunk_rows: see `DistillationLoss`.
    """

    def __init__(self, *, temperature: float = 1.0, cross_entropy_weight: float = 0.0, chunk_rows: int = 256) -> None:
        super().__init__(temperature, cross_entropy_weight, chunk_rows)

    def divergence(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
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
        teacher: TeacherStates | TeacherTopK,
        soft_cap: float | None,
        loss: DistillationLoss,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        share, w = loss.cross_entropy_weight, weight.to(hidden.dtype)
        terms = hidden.new_zeros(2, dtype=torch.float32)
        buffers = Buffers()
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(targets), loss.chunk_rows):
            part = slice(start, start + loss.chunk_rows)
            x, target = hidden[part], targets[part, None]
            valid = target != IGNORE  # [c, 1]
            target = target.where(valid, 0)
            logits, slope = buffers.product("logits", x, w, soft_cap)  # [c, v]
            log_q = buffers.log_softmax("log_q", logits)
            terms[0] -= log_q.gather(1, target).where(valid, 0).sum()
            value, grad = loss.compare(teacher, part, logits, log_q, buffers)
            del logits, log_q
            terms[1] += value.where(valid[:, 0], 0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            if share:  # d CE / d logits = q - onehot
                grad.scatter_add_(1, target, grad.new_full((len(grad), 1), -share))
            grad = (grad if slope is None else grad * slope).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ w).where(valid, 0)
            x = x.where(valid, 0)
            if grad_weight is not None and grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, x)
            elif grad_weight is not None:
                grad_weight += torch.mm(grad.T, x, out=buffers.like("weight", (len(w), x.shape[1]), x))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(terms)
        return share * terms[0] + (1 - share) * terms[1], terms

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
