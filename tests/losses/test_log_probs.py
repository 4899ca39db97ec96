from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plmtune.losses.cross_entropy import cross_entropy
from plmtune.losses.log_probs import log_probs

NUM = 6  # completions, of which the last has no token


def batch(n: int = 300, d: int = 24, v: int = 97, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """(hidden, weight, targets, completion, a factor for each completion)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator)
    completion = torch.randint(NUM - 1, (n,), generator=generator)
    return hidden, weight, targets, completion, torch.randn(NUM, generator=generator)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, completion: Tensor) -> Tensor:
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(NUM)]
    for h, t, c in zip(hidden.double(), targets.tolist(), completion.tolist(), strict=True):
        logits = weight.double() @ h
        sums[c] = sums[c] + logits[t] - logits.exp().sum().log()
    return torch.stack(sums)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


class TestLogProbs:
    @pytest.mark.parametrize("chunk_rows", [1, 64, 300, 5000])
    def test_equal_the_formula_written_naively_at_any_chunk(self, chunk_rows: int) -> None:
        hidden, weight, targets, completion, factors = batch()
        ours = log_probs(hidden, weight, targets, completion, NUM, chunk_rows)
        theirs = naive(hidden, weight, targets, completion)
        assert ours.dtype == torch.float32
        assert relative(ours, theirs) < 1e-6
        # Another factor for each completion, as a preference loss has.
        pairs = (torch.autograd.grad((x * factors).sum(), (hidden, weight)) for x in (ours, theirs))
        assert all(relative(a, b) < 1e-5 for a, b in zip(*pairs, strict=True))

    def test_are_minus_the_cross_entropy_of_the_same_tokens(self) -> None:
        hidden, weight, targets, _, _ = batch()
        (ours,) = log_probs(hidden, weight, targets, torch.zeros_like(targets), 1)
        assert ours.item() == pytest.approx(-cross_entropy()(hidden, weight, targets).item(), rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_no_token_are_zero_with_zero_gradients(self, dtype: torch.dtype) -> None:
        hidden, weight, targets, completion, _ = batch(n=0, dtype=dtype)
        values = log_probs(hidden, weight, targets, completion, NUM)
        values.sum().backward()
        assert values.tolist() == [0.0] * NUM
        assert weight.grad is not None and not weight.grad.any()

    def test_of_one_completion_depend_on_its_own_tokens_alone(self) -> None:
        hidden, weight, targets, completion, _ = batch()
        (grad,) = torch.autograd.grad(log_probs(hidden, weight, targets, completion, NUM)[2], hidden)
        assert torch.equal(grad.any(dim=1), completion == 2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_are_the_same_without_gradients(self, dtype: torch.dtype) -> None:
        leaves = batch(dtype=dtype)[:4]
        with torch.no_grad():
            values = log_probs(*leaves, NUM, 64)
        assert not values.requires_grad
        assert torch.equal(values, log_probs(*leaves, NUM, 64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_frozen_weight_gets_no_gradient_and_changes_none(self, dtype: torch.dtype) -> None:
        hidden, weight, targets, completion, factors = batch(dtype=dtype)
        both = (log_probs(hidden, weight, targets, completion, NUM) * factors).sum()
        frozen = (log_probs(hidden, weight.detach(), targets, completion, NUM) * factors).sum()
        assert torch.equal(torch.autograd.grad(frozen, hidden)[0], torch.autograd.grad(both, hidden)[0])

    def test_a_second_backward_gives_the_same(self) -> None:
        hidden, weight, targets, completion, _ = batch(dtype=torch.bfloat16)
        total = log_probs(hidden, weight, targets, completion, NUM).sum()
        first, second = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_never_hold_more_than_a_chunk_of_logits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            largest = 0

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor):
                    self.largest = max(self.largest, out.numel())
                return out

        hidden, weight, targets, completion, _ = batch(n=400, d=8, v=1000)
        with Watch() as watch:
            log_probs(hidden, weight, targets, completion, NUM, chunk_rows=10).sum().backward()
        assert watch.largest == 10 * 1000

    def test_a_chunk_of_no_rows_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"chunk_rows \(0\)"):
            log_probs(*batch()[:4], NUM, chunk_rows=0)


class TestHalfPrecision:
    def test_sums_of_bf16_products_are_fp32(self) -> None:
        hidden, weight, targets, completion, factors = batch(n=2000, dtype=torch.bfloat16)
        rounded = weight.detach().bfloat16().float().requires_grad_()
        exact_hidden = hidden.detach().float().requires_grad_()
        ours = log_probs(hidden, weight, targets, completion, NUM, 100)
        exact = log_probs(exact_hidden, rounded, targets, completion, NUM)
        assert ours.dtype == torch.float32
        # Sums of some 2,000 in bf16 would be off by up to 4 each.
        assert (ours - exact).abs().max() < 1.0
        grad_hidden, grad_weight = torch.autograd.grad((ours * factors).sum(), (hidden, weight))
        exact_grads = torch.autograd.grad((exact * factors).sum(), (exact_hidden, rounded))
        assert grad_hidden.dtype == torch.bfloat16 and grad_weight.dtype == torch.float32
        assert relative(grad_hidden, exact_grads[0]) < 0.02
        assert relative(grad_weight, exact_grads[1]) < 0.02

    def test_a_target_that_is_nearly_certain_keeps_its_gradient(self) -> None:
        # p = 1 - 1e-3 is 1 in bf16: taken from it, the gradient would be 0.
        weight = torch.tensor([[4.0], [-2.90625]], requires_grad=True)
        hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.int64)
        (grad,) = torch.autograd.grad(log_probs(hidden, weight, zero, zero, 1), weight)
        p = torch.softmax(weight[:, 0], 0)[0].item()
        assert grad[0].item() == pytest.approx(1 - p, rel=0.01)

    def test_autocast_decides_the_dtype_as_it_does_for_a_linear_layer(self) -> None:
        hidden, weight, targets, completion, _ = batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = log_probs(hidden, weight, targets, completion, NUM)
        assert torch.equal(inside, log_probs(hidden.bfloat16(), weight, targets, completion, NUM))
        assert torch.autograd.grad(inside.sum(), weight)[0].dtype == torch.float32
