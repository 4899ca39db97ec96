"""Bad updates are skipped, counted and, three in a row, end the run; five runs of one seed are one run."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from cli_runs import SMALL, Run, metrics, refusal, start, weights
from plmtune.recipes import preference, pretrain, sft
from safetensors.torch import load_file, save_file
from torch import Tensor

from plmtune.data.batches import Batch
from plmtune.io import safetensors_writer

Fault = Callable[[Tensor], Tensor]


def nan_loss(loss: Tensor) -> Tensor:
    return loss * math.nan


def scaled_gradient(factor: float) -> Fault:
    """A gradient `factor` times as large, under a loss that is as it was."""

    def fault(loss: Tensor) -> Tensor:
        loss.register_hook(lambda gradient: gradient * factor)
        return loss

    return fault


FAULTS = {"nan loss": nan_loss, "inf gradient": scaled_gradient(math.inf), "spike": scaled_gradient(1e6)}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
    """Put a fault into one micro-batch of some steps (from 1); gives the tokens of those micro-batches."""

    def put(fault: Fault, *steps: int, micro_batch: int = 0) -> list[Tensor]:
        whole, seen, hit = pretrain.Pretrain._loss, Counter[tuple[Any, int]](), list[Tensor]()

        def loss(self: Any, batch: Batch) -> Tensor:
            summed = whole(self, batch)
            step = self.step + 1
            if not torch.is_grad_enabled() or step not in steps:
                return summed
            seen[self, step] += 1
            if seen[self, step] != micro_batch + 1:
                return summed
            hit.append(batch.tokens)
            return fault(summed)

        monkeypatch.setattr(pretrain.Pretrain, "_loss", loss)
        return hit

    return put


def learned(run: Path, step: int) -> dict[str, str]:
    """Hashes of the files of parameters and moments that were saved after a step."""
    directory = run / f"checkpoints/step-{step:08}"
    files = sorted(directory.glob("*.safetensors"))
    assert {path.name.split("-")[0].split(".")[0] for path in files} == {"model", "optimizer"}
    return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in files}


def entry(run: Path, step: int) -> dict[str, Any]:
    return next(line for line in metrics(run) if line["step"] == step and "loss" in line)


class TestSkipping:
    @pytest.mark.parametrize(
        ("fault", "optimizer"),
        [
            ("nan loss", "adamw"),
            ("inf gradient", "adamw"),
            ("spike", "adamw"),
            ("nan loss", "muon"),
            pytest.param("nan loss", "adamw_8bit", marks=pytest.mark.slow),
        ],
    )
    def test_an_update_is_skipped_whole_counted_and_logged(
        self, place: Path, spoil: Callable[..., Any], capfd: Any, fault: str, optimizer: str
    ) -> None:
        spoil(FAULTS[fault], 7)
        start("run_dir=run", f"optimizer={optimizer}", "guard.window=16", "checkpoint={every: 1, keep: 0}",
              "log_every=5")  # fmt: skip
        run = place / "run"
        assert learned(run, 6) == learned(run, 7)
        assert learned(run, 7) != learned(run, 8)
        assert entry(run, 7)["skipped"] == 1
        assert "step 7: update skipped" in capfd.readouterr().err
        last = entry(run, 12)
        assert math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"])
        # The schedule is a function of the step: it does not wait.
        assert entry(run, 12)["lr"] < entry(run, 5)["lr"]

    def test_a_clean_run_skips_nothing(self, place: Path) -> None:
        start("run_dir=run", "phases=[{name: main, steps: 60}]", "validation.every=0", "checkpoint.every=0")
        assert not any("skipped" in line for line in metrics(place / "run"))

    @pytest.mark.parametrize("cut", [1, 5])
    def test_a_run_resumed_behind_a_skip_equals_one_that_never_stopped(
        self, place: Path, spoil: Callable[..., Any], cut: int
    ) -> None:
        # At the first step there are no moments yet, and torch would warn of the schedule.
        spoil(nan_loss, 1, 4, 5, 9)
        start("run_dir=whole", "checkpoint={every: 1, keep: 0}")
        shutil.copytree(place / "whole", place / "cut")
        for path in (place / "cut/checkpoints").glob("step-*"):
            if int(path.name[5:]) > cut:
                shutil.rmtree(path)
        record = json.loads((place / "cut/run.json").read_text())
        (place / "cut/run.json").write_text(json.dumps({**record, "status": "running"}))
        start("run_dir=cut", "checkpoint={every: 1, keep: 0}", "resume=true")
        assert metrics(place / "cut") == metrics(place / "whole")
        assert weights(place / "cut") == weights(place / "whole")
        assert entry(place / "cut", 9)["skipped"] == 4

    def test_another_phase_may_have_other_norms(self, place: Path, spoil: Callable[..., Any]) -> None:
        spoil(scaled_gradient(1e3), *range(7, 13))
        start("run_dir=run", "guard.window=16",
              "phases=[{name: one, steps: 6}, {name: two, steps: 6}]", "micro_batch_size=4")  # fmt: skip
        assert not any("skipped" in line for line in metrics(place / "run"))
        said = refusal("run_dir=again", "guard.window=16", "micro_batch_size=4")
        assert "step 9: 3 updates in a row" in said and "times the median of the last 6 steps" in said


class TestStopping:
    def test_three_in_a_row_name_the_steps_and_the_very_tokens(self, place: Path, spoil: Callable[..., Any]) -> None:
        hit = spoil(nan_loss, 4, 6, 7, 8, micro_batch=1)
        said = refusal("run_dir=run", "guard.patience=3")
        assert said.startswith("step 8: 3 updates in a row were skipped (steps 6 to 8), the last because the loss is")
        assert "after step 5" in said and "guard.spike_factor" in said
        assert json.loads((place / "run/run.json").read_text())["status"] == "failed"
        assert entry(place / "run", 8)["skipped"] == 4
        found = re.findall(r"(\S+train-00000\.bin), tokens ([\d,]+) to ([\d,]+)", said)
        assert len(found) == 2  # the two rows of the micro-batch that had the fault, and none of the other
        for (path, first, last), row in zip(found, hit[-1], strict=True):
            first, last = (int(text.replace(",", "")) for text in (first, last))
            assert last - first == 32
            stored = np.fromfile(place / path, dtype=np.uint16)
            assert stored[first:last].tolist() == row.tolist()

    def test_resumed_it_continues_after_the_batch_and_loses_no_step(
        self, place: Path, spoil: Callable[..., Any]
    ) -> None:
        spoil(nan_loss, 6, 7, 8)
        refusal("run_dir=run", "checkpoint={every: 0, keep: 0}")
        assert (place / "run/checkpoints/step-00000008").is_dir()
        start("run_dir=run", "checkpoint={every: 0, keep: 0}", "resume=true")
        assert entry(place / "run", 9)["loss"] > 0 and entry(place / "run", 12)["loss"] > 0
        assert "skipped" not in entry(place / "run", 12)

    def test_resumed_it_counts_skips_from_0(self, place: Path, spoil: Callable[..., Any]) -> None:
        spoil(nan_loss, 3, 4, 5, 6, 7, 9, 10, 11)
        refusal("run_dir=run")
        said = refusal("run_dir=run", "resume=true")
        assert "step 11: 3 updates in a row were skipped (steps 9 to 11)" in said
        assert entry(place / "run", 7)["skipped"] == 5  # of the whole run

    def test_a_finite_fault_names_the_whole_batch(self, place: Path, spoil: Callable[..., Any]) -> None:
        spoil(scaled_gradient(1e6), *range(6, 12), micro_batch=1)
        said = refusal("run_dir=run", "guard={window: 8, patience: 1}")
        assert "step 6: the update was skipped, because the gradient norm" in said
        assert "; and 1 more." in said  # of four rows

    @pytest.mark.parametrize("setting", ["spike_factor=0.5", "window=0", "patience=0"])
    def test_an_impossible_setting_ends_before_training(self, place: Path, setting: str) -> None:
        assert "guard" in (said := refusal(f"guard.{setting}", "run_dir=run")) and setting.split("=")[0] in said
        assert not (place / "run").exists()


@pytest.fixture
def spoil_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the update of one step (from 1) put a NaN into a parameter."""

    def put(step: int, name: str, row: int = 0) -> None:
        done = [0]

        def spoiling(whole: Callable[..., Any]) -> Callable[..., Any]:
            def train_step(recipe: Any, *arguments: Any) -> Any:
                found = whole(recipe, *arguments)
                done[0] += 1
                if done[0] == step:
                    recipe.model.get_parameter(name).data[row] = math.nan
                return found

            return train_step

        for recipe in (pretrain.Pretrain, sft.Sft, preference.Preference):
            monkeypatch.setattr(recipe, "train_step", spoiling(recipe.train_step))

    return put


class TestWeights:
    """An update that makes weights of no use ends the run; nothing is saved of them."""

    def kept(self, run: Path) -> list[str]:
        saved = sorted(path.name for path in (run / "checkpoints").glob("[!.]*-*"))
        for path in (run / "checkpoints").glob("step-*/*.safetensors"):
            assert not safetensors_writer.not_finite(load_file(path)), path
        return saved

    def test_the_step_that_made_them_so_is_named(self, place: Path, spoil_weights: Callable[..., None]) -> None:
        spoil_weights(5, "layers.0.ffn.up_proj.weight")
        said = refusal("run_dir=run")
        assert said.startswith(
            "step 6: weights are not finite since the update of step 5 (layers.0.ffn.up_proj.weight)"
        )
        assert "newest checkpoint is that of step 3. Start again with a lower optimizer.lr" in said
        assert self.kept(place / "run") == ["step-00000003"]
        record = json.loads((place / "run/run.json").read_text())
        assert record["status"] == "failed" and record["attempts"][-1]["ended_by"] == "guard"

    @pytest.mark.parametrize("background", ["true", "false"])
    def test_those_that_no_loss_sees_are_found_when_they_are_saved(
        self, place: Path, spoil_weights: Callable[..., None], background: str
    ) -> None:
        spoil_weights(4, "tok_embeddings.weight", row=1)  # of a byte that the text does not have
        said = refusal("run_dir=run", f"checkpoint.background={background}", "model.tie_embeddings=false")
        assert re.match(r"step 6: weights or moments are not finite \(model\.embed_tokens\.weight\)", said), said
        assert self.kept(place / "run") == ["step-00000003"]

    def test_those_of_the_last_update_are_found_before_anything_is_made_of_them(
        self, place: Path, spoil_weights: Callable[..., None]
    ) -> None:
        spoil_weights(12, "norm.weight")
        said = refusal("run_dir=run", "sample.max_new_tokens=4")
        assert said.startswith("step 12: weights are not finite since the update of step 12 (norm.weight)")
        assert self.kept(place / "run") == ["step-00000003", "step-00000006", "step-00000009"]

    def test_no_run_starts_from_such(self, place: Path) -> None:
        start("run_dir=run")
        (path,) = (place / "run/checkpoints").glob("step-00000012/model.safetensors")
        held = load_file(path)
        held["model.norm.weight"][3] = math.inf
        (place / "bad").mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(path.with_name(name), place / "bad")
        save_file(held, place / "bad/model.safetensors")
        assert refusal("run_dir=next", "init_from=bad").startswith(
            "init_from=bad: its weights are not finite (norm.weight)"
        )
        assert not (place / "next").exists()


FAULTY = """
import os, torch
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.registry import register

@register("loss", "faulty")
def faulty(*, steps: list[int] = [5, 8, 9, 10], rank: str = "1"):
    whole, number = cross_entropy(), 0

    def loss(hidden, weight, targets):
        nonlocal number
        number += torch.is_grad_enabled()  # one micro-batch a step
        bad = torch.is_grad_enabled() and number in steps and os.environ.get("RANK", "0") == rank
        return whole(hidden, weight, targets) * (float("nan") if bad else 1.0)

    return loss
"""


class TestCommandLine:
    @pytest.mark.slow
    @pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
    def test_a_fault_on_one_rank_is_skipped_by_both_and_stops_both(
        self, place: Path, plmtune: Run, strategy: str
    ) -> None:
        (place / "faulty.py").write_text(FAULTY)
        # Before its first step DDP has a backward that changes nothing.
        steps = "loss.steps=[6,9,10,11]" if strategy == "ddp" else "loss.steps=[5,8,9,10]"
        done = plmtune("run", "--import", "faulty", "pretrain", *SMALL, "loss=faulty", f"runtime.strategy={strategy}",
                       "run_dir=run", "checkpoint={every: 1, keep: 0}", steps, processes=2)  # fmt: skip
        run = place / "run"
        assert learned(run, 4) == learned(run, 5) != learned(run, 6)
        assert (entry(run, 5)["skipped"], entry(run, 10)["skipped"]) == (1, 4)
        assert math.isfinite(entry(run, 7)["loss"]) and entry(run, 10)["not_finite"]["loss"] == "nan"
        assert done.returncode != 0
        (said,) = set(re.findall(r"plmtune: (step 10: .*)", done.stderr))
        assert "(steps 8 to 10), the last because the loss is nan" in said
        assert len(re.findall(r"train-00000\.bin, tokens", said)) == 2  # rank 1's two rows, and none of rank 0

    @pytest.mark.slow
    def test_one_process_exits_with_2(self, place: Path, plmtune: Run) -> None:
        (place / "faulty.py").write_text(FAULTY)
        done = plmtune("run", "--import", "faulty", "pretrain", *SMALL, "loss=faulty", "loss.rank='0'",
                       "micro_batch_size=4", "run_dir=run")  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "plmtune: step 10: 3 updates in a row" in done.stderr and "Traceback" not in done.stderr


class TestFiveRuns:
    @pytest.mark.parametrize("deterministic", ["false", "true"])
    def test_of_one_seed_are_equal_to_the_bit(self, place: Path, deterministic: str) -> None:
        for index in range(5):
            start(f"run_dir=run{index}", f"runtime.deterministic={deterministic}", "document_mask=true",
                  "phases=[{name: main, steps: 6}]", "checkpoint.every=0")  # fmt: skip
        assert len({weights(place / f"run{index}") for index in range(5)}) == 1
        assert all(metrics(place / f"run{index}") == metrics(place / "run0") for index in range(1, 5))

    def test_the_cost_of_determinism_and_the_kernel_are_printed_without_side_effects(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
    ) -> None:
        start("run_dir=measured", "runtime.deterministic=true")
        said = capfd.readouterr().err
        assert re.search(r"deterministic algorithms: \d+\.\d\dx", said)
        assert "attention: flash for CPUs, values padded from" in said
        monkeypatch.setattr(pretrain, "measure_cost", lambda *arguments: 1.0)
        start("run_dir=not_measured", "runtime.deterministic=true")
        assert weights(place / "measured") == weights(place / "not_measured")
        assert metrics(place / "measured") == metrics(place / "not_measured")
