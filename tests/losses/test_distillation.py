from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plmtune.losses.cross_entropy import cross_entropy
from plmtune.losses.distillation import ForwardKL, JensenShannon, ReverseKL, TeacherStates, TeacherTopK

LOSSES = {"forward_kl": ForwardKL, "reverse_kl": ReverseKL, "jsd": JensenShannon}


def batch(
    n: int = 90, v: int = 61, teacher_rows: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, TeacherStates]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 12, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, 12, generator=generator).requires_grad_()
    targets = torch.randint(min(v, teacher_rows or v), (n,), generator=generator)
    targets[::5] = -100
    teacher = torch.randn(n, 20, generator=generator).to(dtype), torch.randn(teacher_rows or v, 20, generator=generator)
    return hidden, weight, targets, TeacherStates(*teacher)


def cap(logits: Tensor, soft_cap: float | None) -> Tensor:
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def naive(
    name: str,
    leaves: tuple[Tensor, Tensor, Tensor, TeacherStates],
    temperature: float,
    share: float,
    soft_cap: float | None = None,
    beta: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, targets, teacher = leaves
    logits = cap(hidden.double() @ weight.double().T, soft_cap)
    theirs = cap(teacher.hidden.double() @ teacher.weight.double().T, teacher.soft_cap)
    rows = min(logits.shape[1], theirs.shape[1])
    ce, divergence = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for ours, other, target in zip(logits, theirs, targets.tolist(), strict=True):
        if target == -100:
            continue
        p, q = torch.softmax(other[:rows] / temperature, 0), torch.softmax(ours[:rows] / temperature, 0)
        ce = ce - torch.log_softmax(ours, 0)[target]
        if name == "forward_kl":
            divergence = divergence + (p * (p / q).log()).sum()
        elif name == "reverse_kl":
            divergence = divergence + (q * (q / p).log()).sum()
        else:
            m = beta * p + (1 - beta) * q
            divergence = divergence + beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    return share * ce + (1 - share) * temperature**2 * divergence, ce, temperature**2 * divergence


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", LOSSES)
class TestDivergences:
    @pytest.mark.parametrize(
        "temperature, share, chunk_rows, soft_caps",
        [
            (1.0, 0.0, 1, (None, None)),
            (2.0, 0.3, 32, (None, None)),
            (0.5, 1.0, 7, (None, 4.0)),
            (3.0, 0.5, 500, (5.0, None)),
        ],
    )
    def test_equals_the_formula_written_naively(
        self, name: str, temperature: float, share: float, chunk_rows: int, soft_caps: tuple[float | None, float | None]
    ) -> None:
        hidden, weight, targets, teacher = batch()
        teacher = TeacherStates(teacher.hidden, teacher.weight, soft_caps[1])
        loss = LOSSES[name](temperature=temperature, cross_entropy_weight=share, chunk_rows=chunk_rows)
        ours = loss(hidden, weight, targets, teacher=teacher, soft_cap=soft_caps[0])
        theirs, *parts = naive(name, (hidden, weight, targets, teacher), temperature, share, soft_caps[0])
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        assert torch.stack(loss.take_terms()).tolist() == pytest.approx([part.item() for part in parts], rel=1e-5)
        for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs)), strict=True):
            assert relative(a, b) < 1e-5

    @pytest.mark.parametrize("rows", [50, 70])
    def test_a_projection_padded_further_is_compared_on_the_rows_of_both(self, name: str, rows: int) -> None:
        leaves = batch(teacher_rows=rows)
        ours = LOSSES[name](cross_entropy_weight=0.2)(*leaves[:3], teacher=leaves[3])
        theirs, *_ = naive(name, leaves, 1.0, 0.2)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        for a, b in zip(*(torch.autograd.grad(x, leaves[:2]) for x in (ours, theirs)), strict=True):
            assert relative(a, b) < 1e-5

    def test_the_teacher_itself_has_no_divergence_and_gives_no_gradient(self, name: str) -> None:
        hidden, weight, targets, _ = batch()
        same = TeacherStates(hidden.detach(), weight.detach())
        distil = LOSSES[name](temperature=2.0)
        loss = distil(hidden, weight, targets, teacher=same)
        assert abs(float(distil.take_terms()[1])) < 1e-5
        assert all(float(g.abs().max()) < 1e-5 for g in torch.autograd.grad(loss, (hidden, weight)))

    def test_bf16_is_near_fp32(self, name: str) -> None:
        leaves = batch(dtype=torch.bfloat16)
        ours = LOSSES[name](cross_entropy_weight=0.5)(*leaves[:3], teacher=leaves[3])
        theirs, *_ = naive(name, leaves, 1.0, 0.5)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-2)

    def test_without_gradients_it_is_the_cross_entropy(self, name: str) -> None:
        hidden, weight, targets, _ = batch()
        with torch.no_grad():
            measured = LOSSES[name](temperature=2.0)(hidden, weight, targets)
            assert torch.equal(measured, cross_entropy()(hidden, weight, targets))

    def test_settings_out_of_range_are_refused(self, name: str) -> None:
        for setting in ({"temperature": 0.0}, {"cross_entropy_weight": 1.5}, {"chunk_rows": 0}):
            with pytest.raises(ValueError, match=next(iter(setting))):
                LOSSES[name](**setting)


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_jsd_weighs_the_teacher_by_beta(beta: float) -> None:
    leaves = batch()
    ours = JensenShannon(beta=beta)(*leaves[:3], teacher=leaves[3])
    theirs, *_ = naive("jsd", leaves, 1.0, 0.0, beta=beta)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for a, b in zip(*(torch.autograd.grad(x, leaves[:2]) for x in (ours, theirs)), strict=True):
        assert relative(a, b) < 1e-5


def top_k(teacher: TeacherStates, k: int) -> TeacherTopK:
    every = torch.log_softmax(teacher.hidden.double() @ teacher.weight.double().T, dim=1)
    log_p, ids = every.topk(k)
    return TeacherTopK(ids, log_p, every.scatter(1, ids, -torch.inf).logsumexp(1), len(teacher.weight))


class TestTopK:
    @pytest.mark.parametrize("share", [0.0, 0.3])
    @pytest.mark.parametrize("rows", [61, 50, 70])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_the_whole_vocabulary_gives_what_the_logits_give(self, temperature: float, rows: int, share: float) -> None:
        hidden, weight, targets, teacher = batch(teacher_rows=rows)
        loss = ForwardKL(temperature=temperature, cross_entropy_weight=share)
        shared = TeacherStates(teacher.hidden, teacher.weight[:61])
        stored, online = (loss(hidden, weight, targets, teacher=t) for t in (top_k(shared, min(rows, 61)), teacher))
        assert stored.item() == pytest.approx(online.item(), rel=1e-5)
        for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (stored, online)), strict=True):
            assert relative(a, b) < 1e-5

    @pytest.mark.parametrize("k, temperature", [(1, 1.0), (5, 1.0), (5, 2.0), (60, 0.7)])
    def test_equals_the_decoupled_formula_written_naively(self, k: int, temperature: float) -> None:
        hidden, weight, targets, teacher = batch()
        stored = top_k(teacher, k)
        ours = ForwardKL(temperature=temperature)(hidden, weight, targets, teacher=stored)
        theirs = torch.zeros((), dtype=torch.float64)
        logits = hidden.double() @ weight.double().T
        for s, ids, log_p, target in zip(logits, stored.ids, stored.log_probs, targets.tolist(), strict=True):
            if target == -100:
                continue
            p, q = log_p.exp().sum(), torch.softmax(s, 0)[ids].sum()
            p_in, q_in = torch.softmax(log_p / temperature, 0), torch.softmax(s[ids] / temperature, 0)
            binary = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            theirs = theirs + binary + p * temperature**2 * (p_in * (p_in / q_in).log()).sum()
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs)), strict=True):
            assert relative(a, b) < 1e-5

    def test_a_certain_teacher_and_a_certain_student_give_finite_gradients(self) -> None:
        hidden, weight, targets, _ = batch()
        sure = TeacherTopK(torch.zeros(90, 1, dtype=torch.long), torch.zeros(90, 1), torch.full((90,), -torch.inf))
        loss = ForwardKL()(hidden * 1000, weight, targets, teacher=sure)
        assert torch.isfinite(loss) and all(
            torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, weight))
        )


class _Allocated(TorchDispatchMode):
    """The most bytes of tensors that were made inside, and alive, at the end of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key and key not in self._storages and storage.nbytes():
            self._storages.add(key)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.alive -= size


def _peak(step: Callable[[], Tensor]) -> int:
    with _Allocated() as allocated:
        step().backward()
    return allocated.peak


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_memory_at_a_vocabulary_of_152k_is_a_third_of_full_logits_at_most(temperature: float) -> None:
    """Of forward and backward, counted by tensors; a narrow model, so that logits are nearly all of it.

    An eighth of the tokens is a chunk, as 256 of 2,048.
    """
    v, n = 151_936, 64
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True)
    teacher, targets = TeacherStates(torch.randn(n, 12), torch.randn(v, 12)), torch.randint(v, (n,))
    chunked = ForwardKL(temperature=temperature, cross_entropy_weight=0.5, chunk_rows=8)

    def full() -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        log_q = torch.log_softmax(logits / temperature, dim=1)
        log_p = torch.log_softmax(torch.nn.functional.linear(teacher.hidden, teacher.weight) / temperature, dim=1)
        divergence = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return 0.5 * torch.nn.functional.cross_entropy(logits, targets, reduction="sum") + 0.5 * divergence

    ours, theirs = _peak(lambda: chunked(hidden, weight, targets, teacher=teacher)), _peak(full)
    assert ours <= theirs / 3, f"{ours / 2**20:.0f} MiB and {theirs / 2**20:.0f} MiB"
