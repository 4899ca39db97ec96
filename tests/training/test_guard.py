"""The guard refuses what is no number and what is far beyond its history; a refused update changes nothing."""

import contextlib
import json
import math
import random
import statistics
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from plmtune.errors import UserError
from plmtune.io.run_directory import RunDirectory
from plmtune.training import guard as module
from plmtune.training.guard import Guard, handle_skip, sample_locations


def fed(count: int, **settings: float) -> Guard:
    """A guard that has accepted `count` norms near 1."""
    guard = Guard(**settings)  # type: ignore[arg-type]
    draw = random.Random(0)
    for _ in range(count):
        assert guard.accepts(2.0, draw.uniform(0.9, 1.1))
    return guard


class TestAccepts:
    @pytest.mark.parametrize(
        ("loss", "norm", "reason"),
        [
            (math.nan, 1.0, "the loss is nan"),
            (math.inf, 1.0, "the loss is inf"),
            (2.0, math.nan, "the gradient norm is nan"),
            (2.0, math.inf, "the gradient norm is inf"),
        ],
    )
    def test_refuses_what_is_not_finite_from_the_first_step(self, loss: float, norm: float, reason: str) -> None:
        guard = Guard(spike_factor=0)
        assert not guard.accepts(loss, norm)
        assert (guard.skipped, guard.consecutive_skips, guard.reason) == (1, 1, reason)

    def test_refuses_a_norm_far_beyond_the_median_of_the_window(self) -> None:
        guard = Guard()
        for index in range(200):
            guard.accepts(2.0, 23.9 if index % 5 else 100.0)
        assert guard.accepts(2.0, 238.0)
        assert not guard.accepts(2.0, 812.0)
        assert guard.reason == "the gradient norm 812 is 34 times the median of the last 128 steps (23.9)"

    def test_judges_no_spike_before_a_quarter_of_the_window_is_there(self) -> None:
        assert fed(31).accepts(2.0, 1000.0)
        assert not fed(32).accepts(2.0, 1000.0)
        assert not fed(1, window=1).accepts(2.0, 1000.0)

    def test_judges_no_spike_with_factor_0_or_where_norms_were_zero(self) -> None:
        assert fed(200, spike_factor=0).accepts(2.0, 1e30)
        guard = Guard()
        for _ in range(64):
            guard.accepts(2.0, 0.0)
        assert guard.accepts(2.0, 1.0)

    def test_is_the_rule_written_naively(self) -> None:
        draw = random.Random(1)
        guard, history = Guard(spike_factor=3, window=10), list[float]()
        for _ in range(2000):
            norm = draw.lognormvariate(0, 1)
            enough = len(history) >= 2
            expected = not enough or norm <= 3 * statistics.median(history[-10:])
            assert guard.accepts(1.0, norm) == expected
            if expected:
                history.append(norm)
        assert 10 < guard.skipped < 1000

    def test_a_refused_norm_does_not_enter_the_history(self) -> None:
        guard = fed(64, patience=1000)
        before = guard.state_dict()["norms"]
        for _ in range(500):
            assert not guard.accepts(2.0, 100.0)
        assert guard.state_dict()["norms"] == before

    def test_norms_that_fall_and_drift_as_in_training_are_accepted(self) -> None:
        draw = random.Random(2)
        guard = Guard()
        for number in range(2000):
            usual = 4.0 / (1 + number / 20) + 0.3 * (1 + number / 1000)
            guard.accepts(2.0, usual * draw.lognormvariate(0, 0.4))
        assert guard.skipped == 0

    def test_a_reset_lets_a_new_phase_have_its_own_norms(self) -> None:
        guard = fed(200)
        guard.reset()
        for _ in range(40):
            assert guard.accepts(2.0, 50.0)
        assert not guard.accepts(2.0, 600.0)


class TestPatience:
    def test_is_exhausted_by_refusals_in_a_row_only(self) -> None:
        guard = Guard(patience=3)
        for loss in (math.nan, math.nan, 1.0, math.nan, math.nan):
            guard.accepts(loss, 1.0)
        assert (guard.skipped, guard.consecutive_skips, guard.exhausted) == (4, 2, False)
        guard.accepts(math.nan, 1.0)
        assert guard.exhausted

    @pytest.mark.parametrize(
        ("settings", "parts"),
        [
            ({"spike_factor": 0.5}, ["spike_factor", "0.5"]),
            ({"spike_factor": -1.0}, ["spike_factor", "-1"]),
            ({"spike_factor": math.nan}, ["spike_factor", "nan"]),
            ({"window": 0}, ["window", "0"]),
            ({"patience": 0}, ["patience", "0"]),
        ],
    )
    def test_impossible_settings_are_refused(self, settings: dict[str, float], parts: list[str]) -> None:
        with pytest.raises(ValueError) as caught:
            Guard(**settings)  # type: ignore[arg-type]
        assert all(part in str(caught.value) for part in parts)


class TestState:
    def test_a_guard_restored_through_json_decides_as_the_other(self) -> None:
        draw = random.Random(3)
        one = Guard(spike_factor=2, window=16, patience=5)
        for _ in range(50):
            one.accepts(1.0, draw.lognormvariate(0, 1))
        other = Guard(spike_factor=2, window=16, patience=5)
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        for _ in range(300):
            norm = draw.lognormvariate(0, 1)
            assert one.accepts(1.0, norm) == other.accepts(1.0, norm)
            assert (one.state_dict(), one.reason) == (other.state_dict(), other.reason)

    def test_a_smaller_window_keeps_the_newest(self) -> None:
        one, other = fed(64), Guard(window=8)
        other.load_state_dict(one.state_dict())
        assert other.state_dict()["norms"] == one.state_dict()["norms"][-8:]


class TestStop:
    def stopped(self, places: list[str], *, at: int = 812, refused: int = 3) -> str:
        guard = Guard(patience=refused)
        for _ in range(refused):
            guard.accepts(math.nan, 1.0)
        return str(guard.stop(at, places))

    def test_names_the_steps_the_cause_the_place_and_what_is_kept(self) -> None:
        assert self.stopped(["runs/data/a/train-00003.bin, tokens 512 to 768"]) == (
            "step 812: 3 updates in a row were skipped (steps 810 to 812), the last because the loss is nan. "
            "Parameters and moments are those after step 809, and saved. The batch of step 812 came from "
            "runs/data/a/train-00003.bin, tokens 512 to 768. Look at that text. If it is right, start again with a "
            "lower optimizer.lr, or resume after that step with a higher guard.spike_factor or guard.patience."
        )

    def test_shows_three_of_many_places_and_their_number(self) -> None:
        said = self.stopped([f"train-00000.bin, tokens {n} to {n + 1}" for n in range(500)])
        assert "tokens 0 to 1; train-00000.bin, tokens 1 to 2; train-00000.bin, tokens 2 to 3; and 497 more" in said
        assert "tokens 3 to 4" not in said

    def test_a_run_that_never_moved_says_so(self) -> None:
        said = self.stopped(["x"], at=1, refused=1)
        assert "step 1: the update was skipped, because the loss is nan" in said and "began with" in said


class TestPlaces:
    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "gather_texts", lambda text: [text])

    def places(self, indices: Collection[int]) -> list[str]:
        return [f"shard, row {index}" for index in indices]

    def test_are_of_the_micro_batches_that_are_not_finite(self) -> None:
        losses = [torch.tensor(value) for value in (1.0, math.nan, 2.0, math.inf)]
        assert sample_locations(losses, self.places) == ["shard, row 1", "shard, row 3"]

    def test_are_all_where_every_loss_is_finite(self) -> None:
        assert sample_locations([torch.tensor(1.0)] * 2, self.places) == ["shard, row 0", "shard, row 1"]

    def test_of_a_healthy_rank_are_left_out_when_another_has_the_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "gather_texts", lambda text: [text, "shard of rank 1, row 7"])
        assert sample_locations([torch.tensor(1.0)] * 2, self.places) == ["shard of rank 1, row 7"]


class TestHandleSkip:
    """Recipes call it after each skipped update; tests/recipes/test_guards.py has whole runs."""

    def test_a_skip_is_shown_and_the_last_of_patience_ends_the_run_saved(self, tmp_path: Path) -> None:
        guard, shown, saved = Guard(patience=2), list[str](), list[int]()
        with RunDirectory.create(tmp_path / "run", "", []) as run:
            run.begin()
            for step in (5, 6):
                guard.accepts(math.nan, 1.0, [torch.tensor(math.nan)])
                ended = (
                    pytest.raises(UserError, match=r"steps 5 to 6.*tokens 0 to 4\.")
                    if step == 6
                    else contextlib.nullcontext()
                )
                with ended:
                    handle_skip(
                        guard,
                        run,
                        step,
                        shown.append,
                        locate=lambda indices: [f"a.bin, tokens 0 to {4 * len(indices)}"],
                        save=lambda metrics, wait: saved.append(guard.consecutive_skips),
                    )
            assert run.record()["attempts"][-1]["ended_by"] == "guard"
        assert shown == [f"step {n}: update skipped, because the loss is nan" for n in (5, 6)]
        assert saved == [0]  # the resumed run counts from 0
