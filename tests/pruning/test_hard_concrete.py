"""Gates, and the multipliers that hold them to a size."""

import pytest
import torch

from plmtune.errors import UserError
from plmtune.pruning.hard_concrete import HardConcrete, Multipliers, refuse_unreachable


class TestGates:
    def test_the_probability_to_stay_is_that_of_the_samples(self) -> None:
        gates = HardConcrete({"a": 5000})
        log_alpha = torch.tensor([-4.0, -2, 0, 1, 3])
        gates.log_alpha[0].data.copy_(log_alpha.repeat_interleave(1000))
        samples = gates.sample(torch.Generator().manual_seed(0))["a"].detach().view(5, 1000)
        kept = gates.kept()["a"].detach().view(5, 1000)[:, 0]
        torch.testing.assert_close((samples > 0).float().mean(1), kept, atol=0.05, rtol=0)
        assert samples.min() == 0 and samples.max() == 1
        assert gates.scores()["a"][::1000].tolist() == [-4, -2, 0, 1, 3]

    def test_they_begin_open(self) -> None:
        assert float(HardConcrete({"a": 3}).kept()["a"].detach().min()) > 0.98


class TestMultipliers:
    def test_the_target_falls_from_the_whole_during_the_warmup(self) -> None:
        multipliers = Multipliers({"a": 0.6}, warmup=10)
        assert [multipliers.target("a", step) for step in (0, 5, 10, 50)] == pytest.approx([1, 0.8, 0.6, 0.6])

    def test_the_penalty_is_the_papers(self) -> None:
        multipliers = Multipliers({"a": 0.5, "b": 0.25}, warmup=0)
        multipliers.first.data.copy_(torch.tensor([2.0, 3]))
        multipliers.second.data.copy_(torch.tensor([5.0, 7]))
        kept = {"a": torch.tensor([1.0, 0.5]), "b": torch.tensor([0.25])}
        assert float(multipliers(kept, 1).detach()) == pytest.approx(2 * 0.25 + 5 * 0.0625)

    def test_gates_reach_their_size_and_keep_what_the_loss_needs(self) -> None:
        gates, multipliers = HardConcrete({"a": 8}), Multipliers({"a": 0.5}, warmup=20)
        ascent = {"params": [*multipliers.parameters()], "maximize": True}
        optimizer = torch.optim.Adam([{"params": [*gates.parameters()]}, ascent], lr=0.3)
        generator = torch.Generator().manual_seed(1)
        worth = torch.tensor([0.1, 1, 0.1, 1, 0.1, 1, 1, 0.1])
        for step in range(120):
            loss = -(gates.sample(generator)["a"] * worth).sum() + multipliers(gates.kept(), step)
            loss.backward()
            optimizer.step()
            gates.clip()
            optimizer.zero_grad()
        assert float(gates.kept()["a"].detach().mean()) == pytest.approx(0.5, abs=0.1)
        assert sorted(gates.scores()["a"].topk(4).indices.tolist()) == [1, 3, 5, 6]

    def test_a_gate_does_not_go_where_it_has_no_gradient(self) -> None:
        gates = HardConcrete({"a": 2})
        gates.log_alpha[0].data.copy_(torch.tensor([-90.0, 90]))
        gates.clip()
        low, high = gates.kept()["a"].tolist()
        assert (low, high) == pytest.approx((0.047, 0.998), abs=1e-3)


class TestUnreachable:
    @pytest.mark.parametrize(
        ("share", "steps", "lr", "said"),
        [
            (0.04, 500, 1.0, "mask of channels cannot be held to 4.0% of its units: .* at least 4.7%"),
            (0.5, 11, 1.0, r"50.0% of the units of channels cannot be reached in 11 steps at mask.lr=1: .* after 12 "),
            (0.5, 500, 0.01, r"after 1,141 at the earliest.* Set mask.steps=1,141 or more"),
        ],
    )
    def test_a_size_that_no_training_reaches_is_refused_with_numbers(
        self, share: float, steps: int, lr: float, said: str
    ) -> None:
        with pytest.raises(UserError, match=said):
            refuse_unreachable({"layers": 0.9, "channels": share}, steps=steps, lr=lr)

    def test_others_are_not(self) -> None:
        refuse_unreachable({"layers": 0.5, "channels": 0.05}, steps=12, lr=1.0)
