from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from plmtune.optim.schedules import factor, resolve
from plmtune.registry import load


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)


def rates(name: str, num_steps: int, tokens_per_step: int = 100, **settings: Any) -> list[float]:
    """The factor that each optimizer step of a run takes."""
    sgd = optimizer()
    scheduler = load("scheduler", name)(sgd, num_steps, tokens_per_step, **settings)
    taken = []
    for _ in range(num_steps):
        taken.append(sgd.param_groups[0]["lr"] / 2.0)
        sgd.step()
        scheduler.step()
    return taken


class TestResolve:
    @pytest.mark.parametrize(
        ("length", "steps"),
        [
            (7, 7),
            ("7", 7),
            ("7 steps", 7),
            ("5%", 50),
            ("0.55%", 5),
            ("100%", 1000),
            (0, 0),
            ("2B tokens", 20_000_000),
            ("300M tokens", 3_000_000),
            ("10k tokens", 100),
            ("10K tokens", 100),
            ("1.5k tokens", 15),
            ("1 token", 1),
        ],
    )
    def test_reads_steps_shares_and_tokens(self, length: int | str, steps: int) -> None:
        assert resolve("warmup", length, 1000, 100) == steps

    @pytest.mark.parametrize("length", [-1, "-5%", "101%", "many", "5k%", "1.5 steps", "2B", "1..2%", ""])
    def test_refuses_the_rest_naming_the_setting_and_its_value(self, length: int | str) -> None:
        with pytest.raises(ValueError, match=r"warmup \(.*\) is not a length"):
            resolve("warmup", length, 1000, 100)


class TestFactor:
    @pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt", "exponential"])
    def test_every_shape_falls_from_one_to_the_final_factor(self, shape: Any) -> None:
        values = [factor(s, decay=50, shape=shape, final_factor=0.2) for s in range(60)]
        assert 0.8 < values[0] < 1
        assert all(a > b for a, b in pairwise(values[:50]))
        assert values[49:] == [0.2] * 11

    def test_shapes_equal_their_formulas_at_half_way(self) -> None:
        def half(shape: Any) -> float:
            return factor(4, decay=10, shape=shape, final_factor=0.2)

        assert half("linear") == pytest.approx(0.6)
        assert half("cosine") == pytest.approx(0.6)
        assert half("sqrt") == pytest.approx(1 - 0.8 * math.sqrt(0.5))
        assert half("exponential") == pytest.approx(math.sqrt(0.2))


class TestWsdc:
    def test_equals_the_formula_written_naively(self) -> None:
        expected = []
        for step in range(100):
            if step < 10:
                expected.append((step + 1) / 10)
            elif step < 70:
                expected.append(1.0)
            elif step < 90:
                expected.append(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 69) / 20)))
            else:
                expected.append(0.1)
        assert rates("wsdc", 100, warmup=10, decay=20, constant="10%") == pytest.approx(expected)

    def test_rate_is_flat_between_warmup_and_decay(self) -> None:
        assert rates("wsdc", 200, warmup="5%", decay="20%", constant="5%")[9:150] == [1.0] * 141

    def test_first_step_moves_and_last_steps_are_constant(self) -> None:
        taken = rates("wsdc", 1000)
        assert taken[0] == pytest.approx(0.1)
        assert taken[-51:] == [0.1] * 51

    def test_phases_longer_than_the_run_are_refused_with_both_numbers(self) -> None:
        with pytest.raises(
            ValueError, match=r"warmup \(60\) \+ decay \(50\) \+ constant \(5\) steps exceed the run's 100"
        ):
            rates("wsdc", 100, warmup=60, decay=50, constant=5)

    def test_any_run_from_one_step_up_has_a_schedule_by_default(self) -> None:
        for num_steps in range(1, 40):
            assert all(0 < rate <= 1 for rate in rates("wsdc", num_steps))

    def test_a_branch_from_the_stable_phase_decays_over_all_that_constant_leaves(self) -> None:
        taken = rates("wsdc", 20, start="decay", constant=4, decay_shape="linear", final_factor=0.2)
        assert taken == pytest.approx([1 - 0.8 * (s + 1) / 16 for s in range(16)] + [0.2] * 4)

    def test_a_branch_with_a_given_decay_ends_constant(self) -> None:
        taken = rates("wsdc", 20, start="decay", decay=10, constant=4)
        assert taken[8] > 0.1
        assert taken[9:] == [0.1] * 11

    def test_a_run_that_starts_stable_has_no_warmup(self) -> None:
        assert rates("wsdc", 20, start="stable", warmup=15, decay=5, constant=0)[:15] == [1.0] * 15

    def test_a_branched_decay_continues_the_long_run(self) -> None:
        whole = rates("wsdc", 100, warmup=10, decay=20, constant=10)
        branch = rates("wsdc", 30, decay=20, constant=10, start="decay")
        assert branch == pytest.approx(whole[70:])

    def test_lengths_in_tokens_are_divided_by_the_tokens_of_a_step(self) -> None:
        assert rates("wsdc", 100, warmup="1k tokens", tokens_per_step=50) == rates("wsdc", 100, warmup=20)


class TestOthers:
    def test_wsd_ends_at_its_final_factor(self) -> None:
        taken = rates("wsd", 100, warmup=10, decay=20, decay_shape="linear", final_factor=0.5)
        assert taken[79] == 1.0
        assert taken[-1] == 0.5
        assert taken[-2] == pytest.approx(0.525)

    def test_cosine_falls_all_the_way_after_its_warmup(self) -> None:
        taken = rates("cosine", 110, warmup=10, final_factor=0.0)
        naive = [0.5 * (1 + math.cos(math.pi * (s - 9) / 101)) for s in range(10, 110)]
        assert taken == pytest.approx([(s + 1) / 10 for s in range(10)] + naive)

    def test_linear_is_a_straight_line(self) -> None:
        taken = rates("linear", 50, warmup=0, final_factor=0.1)
        assert taken == pytest.approx([1 - 0.9 * (s + 1) / 50 for s in range(50)])

    @pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
    @pytest.mark.parametrize("num_steps", [1, 2, 3, 100])
    def test_a_decay_to_zero_reaches_it_after_the_last_step(self, num_steps: int, shape: str) -> None:
        settings: dict[str, Any] = {"warmup": 0, "final_factor": 0.0}
        runs = {"wsd": {"decay": num_steps, "decay_shape": shape}, "cosine": {}, "linear": {}}
        for name, more in runs.items():
            taken = rates(name, num_steps, **settings, **more)
            assert 0 < taken[-1] < 1 and all(a > b for a, b in pairwise(taken))

    def test_steps_that_would_train_nothing_are_refused_with_their_number(self) -> None:
        with pytest.raises(ValueError, match=r"final_factor \(0\) trains nothing in the 5 steps after the decay"):
            rates("wsdc", 100, constant=5, final_factor=0.0)
        with pytest.raises(ValueError, match=r"in the 10 steps"):
            rates("wsd", 20, start="decay", decay=10)
        assert min(rates("wsdc", 100, constant=0, final_factor=0.0)) > 0

    def test_constant_stays_at_the_base_rate(self) -> None:
        assert rates("constant", 5) == [1.0] * 5
        assert rates("constant", 5, warmup=2) == [0.5, 1.0, 1.0, 1.0, 1.0]

    @pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
    def test_a_warmup_longer_than_the_run_is_refused_with_both_numbers(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"warmup \(11 steps\) exceeds the run's 10"):
            rates(name, 10, warmup=11)

    def test_impossible_final_factors_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"final_factor \(1.5\)"):
            rates("cosine", 10, final_factor=1.5)
        with pytest.raises(ValueError, match="exponential"):
            rates("wsd", 10, decay_shape="exponential", final_factor=0.0)

    @pytest.mark.parametrize("name", ["wsdc", "wsd", "cosine", "linear", "constant"])
    def test_state_is_json_and_resumes_at_the_same_rate(self, name: str) -> None:
        whole = rates(name, 50)
        sgd = optimizer()
        first = load("scheduler", name)(sgd, 50, 100)
        for _ in range(43):
            sgd.step()
            first.step()
        state = json.loads(json.dumps(first.state_dict()))
        second = load("scheduler", name)(optimizer(), 50, 100)
        second.load_state_dict(state)
        for step in range(43, 50):
            assert second.get_last_lr()[0] / 2.0 == pytest.approx(whole[step])
            second.step()
