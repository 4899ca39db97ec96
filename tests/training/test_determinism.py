"""What determinism costs is measured without a trace."""

import random

import numpy as np
import pytest
import torch

from plmtune.training import determinism
from plmtune.training.determinism import measure_cost

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only a test moves."""
    now = [0.0]
    monkeypatch.setattr(determinism.time, "perf_counter", lambda: now[0])
    return now


class TestMeasureCost:
    @pytest.mark.parametrize("enabled", [False, True])
    def test_is_the_median_of_rounds_after_the_first(self, clock: list[float], enabled: bool) -> None:
        modes: list[bool] = []

        def step() -> None:
            deterministic = torch.are_deterministic_algorithms_enabled()
            modes.append(deterministic)
            # A first round that compiles, and one that something else disturbs.
            slow = 50.0 if len(modes) in (1, 5) else 0.0
            clock[0] += slow + (3.0 if deterministic else 2.0)

        torch.use_deterministic_algorithms(enabled)
        try:
            assert measure_cost(step, CPU) == 1.5
            assert torch.are_deterministic_algorithms_enabled() is enabled
        finally:
            torch.use_deterministic_algorithms(False)
        assert modes == [False, True, True, False] * 2

    def test_random_generators_and_flags_are_as_before(self) -> None:
        def step() -> None:
            torch.rand(3), np.random.rand(3), random.random()

        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            torch.manual_seed(1), np.random.seed(1), random.seed(1)
            expected = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()
            torch.manual_seed(1), np.random.seed(1), random.seed(1)
            measure_cost(step, CPU)
            assert (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) == expected
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        finally:
            torch.use_deterministic_algorithms(False)

    def test_a_step_that_fails_leaves_the_flags_too(self) -> None:
        def step() -> None:
            raise RuntimeError("no deterministic implementation")

        with pytest.raises(RuntimeError, match="no deterministic"):
            measure_cost(step, CPU)
        assert not torch.are_deterministic_algorithms_enabled()
