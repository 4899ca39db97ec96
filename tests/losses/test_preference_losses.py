from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plmtune.losses.aries import Aries
from plmtune.losses.bradley_terry import BradleyTerry
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.losses.dpo import Dpo
from plmtune.losses.ipo import Ipo
from plmtune.losses.kto import Kto
from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, MISMATCHED, Comparisons, PreferenceLoss
from plmtune.losses.sft_refine import SftRefine
from plmtune.losses.simpo import Simpo
from plmtune.registry import load

LOSSES = [Dpo(), Ipo(), Simpo(), Kto(), Aries(), BradleyTerry()]


def example(n: int = 7, kind: int | None = DIRECT, kl: float = 0.8) -> Comparisons:
    """Numbers of the size that real answers have; fp64, so that formulas agree to the last digits."""
    generator = torch.Generator().manual_seed(0)

    def draw(mean: float, spread: float) -> Tensor:
        return mean + spread * torch.randn(n, generator=generator, dtype=torch.float64)

    reference_chosen, reference_rejected = draw(-60, 20), draw(-60, 20)
    return Comparisons(
        chosen=(reference_chosen + draw(1, 4)).requires_grad_(),
        rejected=(reference_rejected + draw(0, 4)).requires_grad_(),
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_tokens=torch.randint(1, 80, (n,), generator=generator),
        rejected_tokens=torch.randint(1, 80, (n,), generator=generator),
        kind=torch.arange(n) % 3 if kind is None else torch.full((n,), kind),
        kl=torch.tensor(kl, dtype=torch.float64),
    )


def at_reference(kind: int | None = DIRECT) -> Comparisons:
    c = example(kind=kind)
    same = {"chosen": c.reference_chosen.clone(), "rejected": c.reference_rejected.clone()}
    return Comparisons(**{**vars(c), **same})


def numbers(c: Comparisons) -> list[tuple[float, ...]]:
    """(log-ratio of chosen, of rejected, log-probability of chosen, of rejected, lengths) of each comparison."""
    fields = (c.chosen, c.rejected, c.reference_chosen, c.reference_rejected, c.chosen_tokens, c.rejected_tokens)
    rows = zip(*(field.tolist() for field in fields), strict=True)
    return [(w - rw, li - rl, w, li, nw, nl) for w, li, rw, rl, nw, nl in rows]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def close(ours: Tensor, expected: list[float]) -> bool:
    return ours.tolist() == pytest.approx(expected, rel=1e-12)


class TestFormulas:
    """Each loss against its equation, written naively."""

    def test_dpo(self) -> None:
        c = example()
        assert close(Dpo(beta=0.3)(c), [-math.log(sigmoid(0.3 * (w - li))) for w, li, *_ in numbers(c)])

    def test_dpo_with_labels_that_may_be_wrong_and_a_likely_chosen_answer(self) -> None:
        c = example()
        expected = [
            -0.9 * math.log(sigmoid(0.1 * (w - li))) - 0.1 * math.log(sigmoid(0.1 * (li - w))) - 0.5 * log_p / length
            for w, li, log_p, _, length, _ in numbers(c)
        ]
        assert close(Dpo(beta=0.1, label_smoothing=0.1, nll_weight=0.5)(c), expected)

    def test_ipo_of_means_and_of_sums(self) -> None:
        c = example()
        means = [(w / nw - li / nl - 1 / (2 * 0.2)) ** 2 for w, li, _, _, nw, nl in numbers(c)]
        assert close(Ipo(beta=0.2)(c), means)
        assert close(Ipo(beta=0.2, average=False)(c), [(w - li - 1 / (2 * 0.2)) ** 2 for w, li, *_ in numbers(c)])

    def test_simpo(self) -> None:
        c = example()
        expected = [-math.log(sigmoid(2.5 * p / nw - 2.5 * q / nl - 1.4)) for _, _, p, q, nw, nl in numbers(c)]
        assert close(Simpo(beta=2.5, gamma=1.4)(c), expected)

    @pytest.mark.parametrize("kl", [0.8, -0.8])
    def test_kto_whose_baseline_is_never_negative(self, kl: float) -> None:
        c, z = example(kl=kl), max(kl, 0.0)
        expected = [
            1.5 * (1 - sigmoid(0.1 * (w - z))) + 0.7 * (1 - sigmoid(0.1 * (z - li))) for w, li, *_ in numbers(c)
        ]
        assert close(Kto(desirable_weight=1.5, undesirable_weight=0.7)(c), expected)

    def test_aries_sends_each_comparison_to_the_loss_of_its_kind(self) -> None:
        c = example(n=9, kind=None)
        direct = [-0.3 * math.log(sigmoid(0.1 * (w - li))) for w, li, *_ in numbers(c)]
        refined = [0.7 * (0.5 - 0.02 * (w - li)) ** 2 for w, li, *_ in numbers(c)]
        expected = [d if k == DIRECT else r for d, r, k in zip(direct, refined, c.kind.tolist(), strict=True)]
        assert set(c.kind.tolist()) == {DIRECT, GIVEN_REJECTED, GIVEN_CHOSEN}
        assert close(Aries(alpha=0.7, beta_dpo=0.1, beta_ref=0.02)(c), expected)

    def test_bradley_terry(self) -> None:
        c = example()
        expected = [-math.log(sigmoid(0.1 * (p - q) - 0.5)) for _, _, p, q, *_ in numbers(c)]
        scores = Comparisons(**{**vars(c), "chosen": 0.1 * c.chosen, "rejected": 0.1 * c.rejected})
        assert close(BradleyTerry(margin=0.5)(scores), expected)


class TestAtTheReference:
    def test_dpo_is_log_2_and_prefers_the_chosen_answer(self) -> None:
        assert close(Dpo()(at_reference()), [math.log(2)] * 7)
        c = example()
        chosen, rejected = torch.autograd.grad(Dpo()(c).sum(), (c.chosen, c.rejected))
        assert (chosen < 0).all() and torch.equal(chosen, -rejected)

    def test_aries_is_log_2_for_the_pair_and_one_half_for_its_refinements(self) -> None:
        loss = Aries(alpha=0.8)(at_reference(kind=None))
        kind = at_reference(kind=None).kind
        assert close(loss[kind == DIRECT], [0.2 * math.log(2)] * 3)
        one = loss[kind == GIVEN_REJECTED][0] + loss[kind == GIVEN_CHOSEN][0]
        assert one.item() == pytest.approx(0.8 / 2, rel=1e-12)

    def test_rewards_are_zero_where_they_are_measured_from_it(self) -> None:
        for loss in (Dpo(), Ipo(), Kto(), Aries()):
            assert not any(part.any() for part in loss.rewards(at_reference()))


class TestAries:
    @pytest.mark.parametrize("kind", [GIVEN_REJECTED, GIVEN_CHOSEN])
    def test_a_square_is_beta_squared_times_ipo_of_sums(self, kind: int) -> None:
        c = example(kind=kind)
        ipo = Ipo(beta=0.025, average=False)(c)
        assert close(Aries(alpha=1.0, beta_ref=0.025)(c), (0.025**2 * ipo).tolist())

    def test_both_squares_want_the_chosen_answer(self) -> None:
        c = example(n=60, kind=None)
        (chosen,) = torch.autograd.grad(Aries()(c).sum(), c.chosen)
        # h is far below 1 / (2 beta_ref) = 50 here.
        assert (chosen < 0).all()

    def test_alpha_of_nothing_is_dpo_and_of_one_is_refinement_alone(self) -> None:
        c = example(n=9, kind=None)
        direct = c.kind == DIRECT
        assert torch.equal(Aries(alpha=0.0)(c)[direct], Dpo()(c)[direct])
        assert not Aries(alpha=0.0)(c)[~direct].any() and not Aries(alpha=1.0)(c)[direct].any()

    def test_rewards_have_the_beta_of_their_term(self) -> None:
        c = example(n=9, kind=None)
        chosen, _ = Aries(beta_dpo=0.1, beta_ref=0.02).rewards(c)
        beta = torch.where(c.kind == DIRECT, 0.1, 0.02)
        assert torch.allclose(chosen / c.chosen_ratio, beta.double())


class TestKto:
    def test_an_answer_that_is_not_there_counts_nothing(self) -> None:
        c = example(n=2)
        none = torch.zeros(2, dtype=torch.float64)
        one_sided = Comparisons(
            **{
                **vars(c),
                "rejected": none.clone().requires_grad_(),
                "reference_rejected": none,
                "rejected_tokens": torch.tensor([0, 0]),
            }
        )
        loss = Kto()(one_sided)
        assert close(loss, [1 - sigmoid(0.1 * (w - 0.8)) for w, *_ in numbers(c)])
        chosen, rejected = torch.autograd.grad(loss.sum(), (one_sided.chosen, one_sided.rejected))
        assert chosen.all() and not rejected.any()

    def test_mismatched_answers_are_trained_on_by_nothing(self) -> None:
        c = example(kind=MISMATCHED)
        loss = Kto()(c)
        loss.sum().backward()
        assert not loss.any() and c.chosen.grad is not None and not c.chosen.grad.any()

    def test_the_baseline_carries_no_gradient(self) -> None:
        c = example()
        c.kl.requires_grad_()
        Kto()(c).sum().backward()
        assert c.kl.grad is None and c.chosen.grad is not None


class TestAll:
    @pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
    def test_gradients_are_those_of_finite_differences(self, loss: PreferenceLoss) -> None:
        c = example(n=9, kind=None)

        def of(chosen: Tensor, rejected: Tensor) -> Tensor:
            return loss(Comparisons(**{**vars(c), "chosen": chosen, "rejected": rejected}))

        assert torch.autograd.gradcheck(of, (c.chosen, c.rejected))

    @pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
    def test_rewards_order_the_answers_and_carry_no_gradient(self, loss: PreferenceLoss) -> None:
        chosen, rejected = loss.rewards(example())
        assert not chosen.requires_grad and not rejected.requires_grad and chosen.shape == rejected.shape == (7,)

    @pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
    def test_are_finite_far_from_the_reference(self, loss: PreferenceLoss) -> None:
        c = example()
        far = Comparisons(**{**vars(c), "chosen": (c.chosen - 1e5).detach().requires_grad_()})
        value = loss(far)
        (grad,) = torch.autograd.grad(value.sum(), far.chosen)
        assert value.isfinite().all() and grad.isfinite().all()

    def test_say_what_they_must_be_given(self) -> None:
        assert all(loss.data_kind == "comparisons" for loss in LOSSES)
        wanted = {
            type(loss): (loss.needs_reference, loss.contexts, loss.mismatched, loss.scalar_head) for loss in LOSSES
        }
        assert wanted == {
            Dpo: (True, False, False, False),
            Ipo: (True, False, False, False),
            Simpo: (False, False, False, False),
            Kto: (True, False, True, False),
            Aries: (True, True, False, False),
            BradleyTerry: (False, False, False, True),
        }

    @pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
    def test_those_without_a_reference_do_not_read_it(self, loss: PreferenceLoss) -> None:
        c = example()
        other = Comparisons(**{**vars(c), "reference_chosen": c.reference_chosen + 5})
        assert torch.equal(loss(c), loss(other)) != loss.needs_reference

    @pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "kto", "aries", "bradley_terry", "sft_refine"])
    def test_are_found_by_their_names(self, name: str) -> None:
        assert type(load("loss", name)()).__name__.lower() == name.replace("_", "")

    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("dpo", {"beta": 0.0}, r"beta \(0.0\)"),
            ("dpo", {"beta": math.nan}, r"beta \(nan\)"),
            ("dpo", {"label_smoothing": 0.5}, r"label_smoothing \(0.5\) must be at least 0 and below 0.5"),
            ("dpo", {"nll_weight": -1.0}, r"nll_weight \(-1.0\)"),
            ("ipo", {"beta": -0.1}, r"beta \(-0.1\)"),
            ("simpo", {"gamma": -0.1}, r"gamma \(-0.1\)"),
            ("kto", {"desirable_weight": -1.0}, r"desirable_weight \(-1.0\)"),
            ("kto", {"desirable_weight": 0.0, "undesirable_weight": 0.0}, r"\(0.0\) must not both be 0"),
            ("aries", {"alpha": 1.1}, r"alpha \(1.1\) must be at least 0 and at most 1"),
            ("aries", {"beta_ref": math.inf}, r"beta_ref \(inf\)"),
            ("bradley_terry", {"margin": -1.0}, r"margin \(-1.0\)"),
            ("sft_refine", {"chunk_rows": 0}, r"chunk_rows \(0\)"),
        ],
    )
    def test_impossible_numbers_are_refused_by_name(self, name: str, settings: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load("loss", name)(**settings)


class TestSftRefine:
    def test_is_cross_entropy_over_refinements(self) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(9, 4, generator=generator), torch.randn(11, 4, generator=generator)
        targets = torch.tensor([1, -100, 3, 4, 5, -100, 7, 8, 9])
        assert SftRefine.data_kind == "refinements"
        assert torch.equal(SftRefine()(hidden, weight, targets), cross_entropy()(hidden, weight, targets))


@pytest.mark.slow  # importing TRL alone takes ten seconds
class TestAgainstTrl:
    """TRL's own code on the same log-probabilities: its loss methods, on a trainer that is nothing but its settings."""

    def answers(self, n: int = 6) -> SimpleNamespace:
        """Log-probabilities of each token of n pairs; lengths differ; TRL's layout, chosen rows before rejected."""
        generator = torch.Generator().manual_seed(1)
        width = 12
        mask = torch.zeros(2 * n, width, dtype=torch.int64)
        for row in mask:
            start, length = torch.randint(1, 4, (2,), generator=generator).tolist()
            row[start : start + 2 * length + 1] = 1
        leaf = (-3 * torch.rand(2 * n, width - 1, generator=generator)).requires_grad_()
        per_token = leaf * mask[:, 1:]
        reference = (per_token.detach() + 0.3 * torch.randn(per_token.shape, generator=generator) * mask[:, 1:]).sum(1)
        sums, tokens = per_token.sum(1), mask.sum(1)
        ours = Comparisons(
            *sums.chunk(2), *reference.chunk(2), *tokens.chunk(2), torch.zeros(n), torch.tensor(math.nan)
        )
        return SimpleNamespace(mask=mask, leaf=leaf, per_token=per_token, reference=reference, ours=ours)

    def trainer(self, **settings: Any) -> SimpleNamespace:
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda x: x
        )
        return SimpleNamespace(
            accelerator=accelerator,
            model=torch.nn.Module(),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
            aux_loss_enabled=False,
            precompute_ref_logps=True,
            ld_alpha=None,
            use_weighting=False,
            f_divergence_type="reverse_kl",
            label_smoothing=0.0,
            loss_weights=[1.0],
            **settings,
        )

    @staticmethod
    def output(per_token: Tensor) -> SimpleNamespace:
        zeros = torch.zeros_like(per_token)
        return SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def dpo_trainer(self, a: SimpleNamespace, **settings: Any) -> Tensor:
        dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL is not installed")
        reference_chosen, reference_rejected = a.reference.chunk(2)
        inputs = {
            "input_ids": torch.zeros_like(a.mask),
            "attention_mask": torch.ones_like(a.mask),
            "completion_mask": a.mask,
            "ref_chosen_logps": reference_chosen,
            "ref_rejected_logps": reference_rejected,
        }
        trainer = self.trainer(**settings)
        loss: Tensor = dpo_trainer.DPOTrainer._compute_loss(
            trainer, lambda **_: self.output(a.per_token), inputs, return_outputs=False
        )
        return loss

    def agree(self, ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        grads = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs))
        assert torch.allclose(*grads, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("beta", [0.1, 0.5])
    def test_dpo(self, beta: float) -> None:
        a = self.answers()
        self.agree(Dpo(beta=beta)(a.ours).mean(), self.dpo_trainer(a, beta=beta, loss_types=["sigmoid"]), a.leaf)

    @pytest.mark.parametrize("beta", [0.1, 0.5])
    def test_ipo(self, beta: float) -> None:
        a = self.answers()
        self.agree(Ipo(beta=beta)(a.ours).mean(), self.dpo_trainer(a, beta=beta, loss_types=["ipo"]), a.leaf)

    def test_dpo_rewards(self) -> None:
        a = self.answers()
        dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL is not installed")
        trainer = self.trainer(beta=0.1, loss_types=["sigmoid"])
        chosen, rejected = a.reference.chunk(2)
        masks = {"input_ids": a.mask, "attention_mask": a.mask, "completion_mask": a.mask}
        inputs = {**masks, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: self.output(a.per_token), inputs, False)
        theirs = [trainer._metrics["train"][f"rewards/{side}"][0] for side in ("chosen", "rejected")]
        assert [side.mean().item() for side in Dpo().rewards(a.ours)] == pytest.approx(theirs, rel=1e-5)

    def cpo_trainer(self, chosen: Tensor, rejected: Tensor, **settings: Any) -> Tensor:
        cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="TRL is not installed")
        losses: Tensor = cpo_trainer.CPOTrainer.cpo_loss(
            SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), alpha=0.0, **settings), chosen, rejected
        )[0]
        return losses.mean()

    def test_simpo(self) -> None:
        a = self.answers()
        means = (a.ours.chosen / a.ours.chosen_tokens, a.ours.rejected / a.ours.rejected_tokens)
        theirs = self.cpo_trainer(*means, loss_type="simpo", beta=2.5, simpo_gamma=1.4, label_smoothing=0.0)
        self.agree(Simpo(beta=2.5, gamma=1.4)(a.ours).mean(), theirs, a.leaf)

    def test_label_smoothing(self) -> None:
        # TRL's DPO has it no more; its CPO is DPO with an equal reference for both answers.
        a = self.answers()
        theirs = self.cpo_trainer(a.ours.chosen, a.ours.rejected, loss_type="sigmoid", beta=0.1, label_smoothing=0.2)
        zeros = torch.zeros(6)
        ours = Comparisons(**{**vars(a.ours), "reference_chosen": zeros, "reference_rejected": zeros})
        self.agree(Dpo(label_smoothing=0.2)(ours).mean(), theirs, a.leaf)

    @pytest.mark.parametrize("shift", [2.0, -2.0])
    def test_kto(self, shift: float) -> None:
        kto_trainer = pytest.importorskip("trl.trainer.kto_trainer", reason="TRL is not installed")
        a = self.answers()
        mismatched = self.answers().per_token.detach()
        ref_mismatched = mismatched.sum(1) - shift
        ids = torch.zeros_like(a.mask)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(a.mask),
            "completion_mask": a.mask,
            "KL_input_ids": ids + 1,
            "KL_attention_mask": torch.ones_like(a.mask),
            "KL_completion_mask": a.mask,
            "label": torch.tensor([True] * 6 + [False] * 6),
            "ref_logps": a.reference,
            "ref_KL_logps": ref_mismatched,
        }
        trainer = self.trainer(
            beta=0.1, loss_type="kto", calculate_KL=True, desirable_weight=1.5, undesirable_weight=0.7
        )
        trainer._compute_kl_logps = lambda model, inputs: kto_trainer.KTOTrainer._compute_kl_logps(
            trainer, model, inputs
        )
        theirs = kto_trainer.KTOTrainer._compute_loss(
            trainer,
            lambda input_ids, **_: self.output(mismatched if input_ids[0, 0] else a.per_token),
            batch,
            return_outputs=False,
        )
        kl = (mismatched.sum(1) - ref_mismatched).mean()
        ours = Comparisons(**{**vars(a.ours), "kl": kl})
        loss = Kto(beta=0.1, desirable_weight=1.5, undesirable_weight=0.7)(ours)
        self.agree(loss.sum() / 12, theirs, a.leaf)  # TRL's mean is over answers, ours over pairs

    def test_bradley_terry(self) -> None:
        reward_trainer = pytest.importorskip("trl.trainer.reward_trainer", reason="TRL is not installed")
        scores = torch.randn(12, 1, generator=torch.Generator().manual_seed(2), requires_grad=True)
        trainer = self.trainer(args=SimpleNamespace(center_rewards_coefficient=None))
        inputs = {"attention_mask": torch.ones(12, 3), "margin": torch.full((6,), 0.3)}
        theirs = reward_trainer.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs)
        c = Comparisons(*scores[:, 0].chunk(2), *([torch.zeros(6)] * 6))
        self.agree(BradleyTerry(margin=0.3)(c).mean(), theirs, scores)

    def test_a_likely_chosen_answer(self) -> None:
        # TRL's "sft" term is a mean over the batch's tokens, ours over each answer's: equal where lengths are.
        a = self.answers(n=1)
        theirs = self.dpo_trainer(a, beta=0.1, loss_types=["sft"])
        ours = Dpo(nll_weight=1.0)(a.ours) - Dpo()(a.ours)
        self.agree(ours.mean(), theirs, a.leaf)
