from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plmtune.losses.cross_entropy import cross_entropy
from plmtune.losses.sft_refine import SftRefine
from plmtune.registry import load


def batch(n: int = 300, d: int = 24, v: int = 97, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for h, t in zip(hidden.double(), targets.tolist(), strict=True):
        if t != -100:
            logits = weight.double() @ h
            total = total + logits.exp().sum().log() - logits[t]
    return total


def naive_z(hidden: Tensor, weight: Tensor, targets: Tensor, z: float, soft_cap: float | None) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for h, t in zip(hidden.double(), targets.tolist(), strict=True):
        if t != -100:
            logits = weight.double() @ h
            logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
            log_z = logits.exp().sum().log()
            total = total + log_z - logits[t] + z * log_z**2
    return total


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, leaves)]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


class TestCrossEntropy:
    @pytest.mark.parametrize("chunk_rows", [1, 64, 300, 5000])
    def test_equals_the_formula_written_naively_at_any_chunk(self, chunk_rows: int) -> None:
        leaves = batch()
        ours, theirs = cross_entropy(chunk_rows=chunk_rows)(*leaves), naive(*leaves)
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        pairs = zip(gradients(ours, *leaves[:2]), gradients(theirs, *leaves[:2]), strict=True)
        assert all(relative(a, b) < 1e-5 for a, b in pairs)

    def test_masked_rows_get_no_gradient(self) -> None:
        hidden, weight, targets = batch()
        (grad,) = torch.autograd.grad(cross_entropy(chunk_rows=64)(hidden, weight, targets), hidden)
        assert not grad[::5].any()
        assert grad[1::5].all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("rows", [0, 7])
    def test_no_valid_target_gives_zero_and_zero_gradients(self, dtype: torch.dtype, rows: int) -> None:
        hidden, weight, _ = batch(n=rows, dtype=dtype)
        loss = cross_entropy()(hidden, weight, torch.full((rows,), -100))
        loss.backward()
        assert loss.item() == 0.0
        assert hidden.grad is not None and not hidden.grad.any()
        assert weight.grad is not None and not weight.grad.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_the_same_without_gradients(self, dtype: torch.dtype) -> None:
        hidden, weight, targets = batch(dtype=dtype)
        loss = cross_entropy(chunk_rows=64)
        with torch.no_grad():
            value = loss(hidden, weight, targets)
        assert not value.requires_grad
        assert value.item() == pytest.approx(loss(hidden, weight, targets).item(), rel=1e-6)

    def test_gradient_follows_what_the_loss_is_multiplied_by(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            leaves = batch(dtype=dtype)
            once = gradients(cross_entropy()(*leaves), *leaves[:2])
            halved = gradients(cross_entropy()(*leaves) / 2, *leaves[:2])
            assert all(relative(h, o / 2) < 1e-6 for h, o in zip(halved, once, strict=True))

    def test_a_chunk_of_no_rows_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"chunk_rows \(0\)"):
            cross_entropy(chunk_rows=0)

    def test_is_found_by_its_name(self) -> None:
        assert load("loss", "cross_entropy") is cross_entropy


class TestZLoss:
    @pytest.mark.parametrize("soft_cap", [None, 2.0])
    @pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
    def test_equals_the_formula_written_naively(self, dtype: torch.dtype, near: float, soft_cap: float | None) -> None:
        hidden, _, targets = batch(dtype=dtype)
        # Small, so that the weight's own rounding to bf16 is not what is compared.
        weight = (batch()[1].detach() / 4).to(dtype).float().requires_grad_()
        loss = cross_entropy(chunk_rows=64, z_loss=0.05)
        ours, theirs = (
            loss(hidden, weight, targets, soft_cap=soft_cap),
            naive_z(hidden, weight, targets, 0.05, soft_cap),
        )
        assert ours.item() == pytest.approx(theirs.item(), rel=near)
        exact = gradients(theirs, hidden, weight)
        assert all(relative(a, b) < near for a, b in zip(gradients(ours, hidden, weight), exact, strict=True))
        frozen = loss(hidden, weight.detach(), targets, soft_cap=soft_cap)
        assert relative(gradients(frozen, hidden)[0], exact[0]) < near
        headless = loss(hidden.detach(), weight, targets, soft_cap=soft_cap)
        assert relative(gradients(headless, weight)[0], exact[1]) < near

    def test_a_small_weight_is_not_lost_in_the_rounding_of_bf16(self) -> None:
        # z-loss alone moves the sum of a token's gradients over the vocabulary from 0, by 2 z_loss log Z: here 0.004,
        # which bf16 loses beside 1.
        hidden, weight, targets = batch(n=64, v=500, dtype=torch.bfloat16)
        flat = (weight.detach() / 8).requires_grad_()
        plain, with_z = (gradients(cross_entropy(z_loss=z)(hidden, flat, targets), flat)[0].sum(0) for z in (0.0, 3e-4))
        exact = [gradients(naive_z(hidden, flat.bfloat16(), targets, z, None), flat)[0].sum(0) for z in (0.0, 3e-4)]
        assert relative(with_z - plain, exact[1] - exact[0]) < 0.5

    def test_without_gradients_it_is_the_cross_entropy(self) -> None:
        leaves = batch()
        with torch.no_grad():
            assert cross_entropy(z_loss=0.1)(*leaves).item() == cross_entropy()(*leaves).item()

    def test_a_negative_weight_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"z_loss \(-0.1\)"):
            cross_entropy(z_loss=-0.1)

    def test_the_loss_of_refinements_has_it_and_caps_logits(self) -> None:
        leaves = batch()
        ours = SftRefine(z_loss=0.1)(*leaves, soft_cap=3.0)
        assert ours.item() == cross_entropy(z_loss=0.1)(*leaves, soft_cap=3.0).item()


class TestHalfPrecision:
    def test_bf16_hidden_with_an_fp32_weight_is_near_the_fp32_loss(self) -> None:
        hidden, weight, targets = batch(n=512, dtype=torch.bfloat16)
        ours = cross_entropy(chunk_rows=100)(hidden, weight, targets)
        rounded = weight.to(torch.bfloat16).float()
        exact = F.cross_entropy(hidden.float() @ rounded.T, targets, reduction="sum")
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(exact.item(), rel=2e-3)
        grad_hidden, grad_weight = torch.autograd.grad(ours, (hidden, weight))
        assert grad_hidden.dtype == torch.bfloat16 and grad_weight.dtype == torch.float32
        exact_grads = torch.autograd.grad(
            F.cross_entropy(hidden.float() @ weight.T, targets, reduction="sum"), (hidden, weight)
        )
        assert relative(grad_hidden, exact_grads[0]) < 0.02
        assert relative(grad_weight, exact_grads[1]) < 0.02

    def test_sums_many_chunks_more_exactly_than_the_native_function(self) -> None:
        # The reason for this class. Should the native sum become exact one day, this fails and it can go.
        hidden, weight, targets = batch(n=4096, dtype=torch.bfloat16)
        weight = weight.to(torch.bfloat16)
        with torch.no_grad():
            exact = F.cross_entropy(hidden.float() @ weight.float().T, targets, reduction="sum").item()
            ours = cross_entropy(chunk_rows=64)(hidden, weight, targets).item()
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64)
            native = F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options).item()
        assert abs(ours / exact - 1) < 1e-3
        assert abs(ours - exact) < abs(native - exact) / 4

    def test_autocast_decides_the_dtype_as_it_does_for_a_linear_layer(self) -> None:
        hidden, weight, targets = batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = cross_entropy()(hidden, weight, targets)
        assert inside.dtype == torch.float32
        assert inside.item() == cross_entropy()(hidden.bfloat16(), weight, targets).item()
        assert torch.autograd.grad(inside, weight)[0].dtype == torch.float32

    def test_a_second_backward_is_refused_instead_of_wrong(self) -> None:
        hidden, weight, targets = batch(dtype=torch.bfloat16)
        loss = cross_entropy()(hidden, weight, targets)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError):
            loss.backward()

    def test_a_frozen_weight_gets_no_gradient(self) -> None:
        hidden, weight, targets = batch(dtype=torch.bfloat16)
        loss = cross_entropy()(hidden, weight.detach(), targets)
        (alone,) = torch.autograd.grad(loss, hidden)
        (both,) = torch.autograd.grad(cross_entropy()(hidden, weight, targets), hidden)
        assert torch.equal(alone, both)
