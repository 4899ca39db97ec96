"""Checkpoints are complete or absent, and training resumes from them bit by bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from toy import Toy, train_step

from plmtune.errors import UserError, WeightsNotFinite
from plmtune.io import checksummed_json, manifest
from plmtune.io.manifest import check_files, steps
from plmtune.training import state as training_state
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.runtime import Runtime
from plmtune.training.trainer_state import latest_valid

OPTIMIZERS = {
    "fused AdamW": lambda model: torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.ndim > 1]},
         {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=0.01, fused=True,
    ),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "SGD with momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
}  # fmt: skip


class Run:
    """A toy in training, with its checkpoints."""

    def __init__(
        self, directory: Path, optimizer: str = "fused AdamW", *, keep: int = 2, width: int = 16, **settings: Any
    ) -> None:
        self.runtime = Runtime.choose(device="cpu", precision="fp32", seed=3).start()
        self.model = Toy(width=width)
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 0.9**step)
        self.checkpoints = Checkpoints(directory, keep=keep, **settings)

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            losses.append(train_step(self.runtime, self.model, self.model, self.optimizer, step)[0])
            self.scheduler.step()
        return losses

    def save(self, step: int, **state: object) -> Path:
        return self.checkpoints.save(
            step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state=state,
            wait=True,
        )

    def restore(self) -> dict | None:
        path = latest_valid(self.checkpoints.directory)
        if path is None:
            return None
        return self.checkpoints.restore(path, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)

    def bytes(self) -> list[bytes]:
        tensors, rest = training_state.optimizer_state_dict(self.model, self.optimizer)
        everything = {**self.model.state_dict(), **tensors}
        return [f"{rest}{training_state.scheduler_state_dict(self.scheduler)}".encode()] + [
            name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(everything.items())
        ]


class TestExactness:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_training_resumes_bit_by_bit(self, tmp_path, optimizer):
        undisturbed = Run(tmp_path, optimizer)
        undisturbed.train(0, 3)
        undisturbed.save(3)
        losses = undisturbed.train(3, 6)

        resumed = Run(tmp_path, optimizer)
        torch.nn.init.normal_(resumed.model.tok_embeddings.weight)  # nothing may stay of the fresh model
        assert resumed.restore() == {"step": 3}
        assert resumed.train(3, 6) == losses
        assert resumed.bytes() == undisturbed.bytes()

    def test_eight_bit_adamw_resumes_bit_by_bit(self, tmp_path, monkeypatch):
        optim = pytest.importorskip("torchao.optim")
        # What it compiles is elementwise; eager gives the same protocol without a compiler's seconds.
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        monkeypatch.setitem(OPTIMIZERS, "8-bit", lambda model: optim.AdamW8bit(model.parameters(), lr=0.01))
        undisturbed = Run(tmp_path, "8-bit", width=64)
        undisturbed.train(0, 2)
        path = undisturbed.save(2)
        undisturbed.train(2, 4)

        resumed = Run(tmp_path, "8-bit", width=64)
        resumed.restore()
        state = resumed.optimizer.state[resumed.model.layers[0].up.weight]
        assert type(state["exp_avg"]).__name__ == "OptimState8bit"
        assert isinstance(resumed.optimizer.param_groups[0]["lr"], torch.Tensor)
        resumed.train(2, 4)
        assert resumed.bytes() == undisturbed.bytes()
        stored = load_file(path / "optimizer.safetensors")
        assert stored["layers.0.up.weight/exp_avg/codes"].dtype == torch.uint8

    def test_random_generators_are_restored(self, tmp_path):
        run = Run(tmp_path)
        run.save(1)
        expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
        torch.rand(7), np.random.rand(7), random.random()
        run.restore()
        assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected

    def test_the_caller_gets_back_what_it_gave(self, tmp_path):
        run = Run(tmp_path)
        run.save(1, phase="math", tokens=123, best=0.1 + 0.2)
        assert run.restore() == {"step": 1, "phase": "math", "tokens": 123, "best": 0.1 + 0.2}

    def test_without_a_checkpoint_there_is_nothing_to_restore(self, tmp_path):
        assert Run(tmp_path / "none").restore() is None


class TestDirectory:
    def test_the_newest_are_kept(self, tmp_path):
        run = Run(tmp_path, keep=2)
        for step in (1, 2, 3):
            run.save(step)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "latest",
            "step-00000002",
            "step-00000003",
        ]
        assert (tmp_path / "latest").read_text() == "step-00000003\n"

    def test_keep_0_keeps_all(self, tmp_path):
        run = Run(tmp_path, keep=0)
        for step in (1, 2, 3):
            run.save(step)
        assert steps(tmp_path) == [1, 2, 3]

    def test_a_negative_keep_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"keep \(-1\)"):
            Checkpoints(tmp_path, keep=-1)

    def test_the_same_step_can_be_saved_again(self, tmp_path):
        run = Run(tmp_path)
        run.save(1, attempt=1)
        run.save(1, attempt=2)
        assert run.restore() == {"step": 1, "attempt": 2}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]

    def test_holds_no_pickle(self, tmp_path):
        path = Run(tmp_path).save(1)
        assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
        assert not any(b"\x80\x02" in file.read_bytes()[:2] for file in path.iterdir())

    def test_what_a_dead_process_left_is_removed(self, tmp_path):
        (tmp_path / ".tmp-step-00000001").mkdir()
        (tmp_path / ".tmp-step-00000001" / "model.safetensors").write_bytes(b"half")
        (tmp_path / ".latest.tmp-7").touch()
        Checkpoints(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_an_exchange_that_was_cut_short_is_undone(self, tmp_path):
        run = Run(tmp_path)
        path = run.save(1, phase="kept")
        path.rename(tmp_path / ".old-step-00000001")
        resumed = Run(tmp_path)
        assert resumed.restore() == {"step": 1, "phase": "kept"}


class Slow(Checkpoints):
    """Holds each writing back until it is let go, and counts those under way."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self.let_go, self.under_way, self.most = threading.Event(), 0, 0

    def _write(self, step, tensors, rest):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        assert self.let_go.wait(20)
        try:
            return super()._write(step, tensors, rest)
        finally:
            self.under_way -= 1


class TestInTheBackground:
    @pytest.fixture
    def run(self, tmp_path):
        run = Run(tmp_path)
        run.checkpoints = Slow(tmp_path)
        yield run
        run.checkpoints.let_go.set()
        run.checkpoints.close()

    def begin(self, run: Run, step: int) -> None:
        run.checkpoints.save(step, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)

    def test_what_is_saved_is_the_state_at_the_save_whatever_training_does_then(self, run, tmp_path):
        run.train(0, 2)
        saved = run.bytes()
        self.begin(run, 2)
        run.train(2, 4)
        assert run.bytes() != saved
        run.checkpoints.let_go.set()
        run.checkpoints.wait()
        other = Run(tmp_path)
        other.restore()
        assert other.bytes() == saved

    def test_it_has_no_name_before_it_is_complete(self, run, tmp_path):
        self.begin(run, 1)
        run.checkpoints.poll()
        assert steps(tmp_path) == []
        run.checkpoints.let_go.set()
        run.checkpoints.wait()
        assert steps(tmp_path) == [1]
        check_files(tmp_path / "step-00000001")

    def test_there_are_never_two_at_a_time(self, run, tmp_path):
        self.begin(run, 1)
        run.checkpoints.let_go.set()
        for step in (2, 3):
            run.train(step - 1, step)
            self.begin(run, step)
            assert step - 1 in steps(tmp_path)
        run.checkpoints.wait()
        assert run.checkpoints.most == 1
        assert steps(tmp_path) == [2, 3]

    def test_a_failure_of_the_writer_surfaces_at_the_next_step_and_the_one_before_stays_valid(self, run, tmp_path):
        run.checkpoints.let_go.set()
        run.save(1, which="whole")
        run.checkpoints.let_go.clear()
        self.begin(run, 2)
        run.checkpoints.poll()
        (tmp_path / ".tmp-step-00000002").rmdir()
        run.checkpoints.let_go.set()
        with pytest.raises(UserError, match=r"step 2 cannot be written to .*step-00000002.*needs about [\d,]+ bytes"):
            run.checkpoints.wait()
        assert Run(tmp_path).restore() == {"step": 1, "which": "whole"}
        run.save(3)  # and the next one may succeed
        assert steps(tmp_path) == [1, 3]

    def test_without_background_it_is_there_at_once(self, tmp_path):
        run = Run(tmp_path, background=False)
        self.begin(run, 1)
        assert steps(tmp_path) == [1]


class TestFiles:
    def test_large_states_stand_in_several_files_with_an_index_and_come_back(self, tmp_path):
        run = Run(tmp_path, file_bytes=4000)
        run.train(0, 2)
        path = run.save(2)
        names = {file.name for file in path.iterdir()}
        assert {"model.safetensors.index.json", "optimizer.safetensors.index.json"} <= names
        assert "model.safetensors" not in names
        other = Run(tmp_path)
        other.restore()
        assert other.bytes() == run.bytes()

    def test_a_bit_flipped_in_one_of_several_is_found(self, tmp_path):
        run = Run(tmp_path, file_bytes=4000)
        run.save(1)
        run.save(2)
        file = sorted((tmp_path / "step-00000002").glob("model-*"))[-1]
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert run.restore() == {"step": 1}


class TestBest:
    def scores(self, tmp_path: Path, values: list[float | None], **settings: Any) -> tuple[list[int], str]:
        run = Run(tmp_path, keep=1, best="score", **settings)
        for step, value in enumerate(values, 1):
            run.checkpoints.save(
                step, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler, wait=True,
                metrics={} if value is None else {"score": value},
            )  # fmt: skip
        best = tmp_path / "best"
        return steps(tmp_path), best.read_text().strip() if best.exists() else ""

    def test_is_kept_beside_the_newest(self, tmp_path):
        assert self.scores(tmp_path, [3.0, 1.0, 2.0, 2.5]) == ([2, 4], "step-00000002")

    def test_may_be_the_highest(self, tmp_path):
        assert self.scores(tmp_path, [3.0, 1.0, 2.0], mode="max") == ([1, 3], "step-00000001")

    def test_of_equal_values_the_newest_counts(self, tmp_path):
        assert self.scores(tmp_path, [1.0, 2.0, 1.0, 2.0]) == ([3, 4], "step-00000003")

    @pytest.mark.parametrize("kind", ["", "given_rejected/", "given_chosen/"])
    def test_a_checkpoint_of_an_earlier_version_counts_by_the_old_name_of_its_metric(self, tmp_path, kind):
        run = Run(tmp_path, keep=1, best=f"validation/{kind}logratio_margin", mode="max")
        for step, metrics in enumerate(({f"{kind}h": 3.0}, {f"{kind}h": 1.0}, {f"{kind}logratio_margin": 2.0}), 1):
            run.checkpoints.save(
                step, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler, wait=True,
                metrics={f"validation/{name}": value for name, value in metrics.items()},
            )  # fmt: skip
        assert steps(tmp_path) == [1, 3]
        assert (tmp_path / "best").read_text() == "step-00000001\n"

    def test_a_step_that_was_not_measured_or_gave_nan_is_none(self, tmp_path):
        assert self.scores(tmp_path, [None, 5.0, None, float("nan")]) == ([2, 4], "step-00000002")

    def test_without_any_there_is_none(self, tmp_path):
        assert self.scores(tmp_path, [None, None]) == ([2], "")

    def test_outlives_a_resume(self, tmp_path):
        self.scores(tmp_path, [1.0, 2.0])
        run = Run(tmp_path, keep=1, best="score")
        run.restore()
        run.checkpoints.save(
            3, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler, metrics={"score": 3.0}, wait=True
        )
        assert steps(tmp_path) == [1, 3]


class TestDamage:
    @pytest.fixture
    def run(self, tmp_path):
        run = Run(tmp_path)
        run.save(1, which="older")
        run.save(2, which="newer")
        return run

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
    def test_any_flipped_bit_is_found_named_and_passed_over(self, run, tmp_path, caplog, name):
        file = tmp_path / "step-00000002" / name
        whole = file.read_bytes()
        generator = random.Random(name)
        for _ in range(20):
            data = bytearray(whole)
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            file.write_bytes(data)
            with pytest.raises(UserError, match=name):
                check_files(file.parent)
        assert run.restore() == {"step": 1, "which": "older"}
        assert name in caplog.text
        assert "Resuming from" in caplog.text

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
    @pytest.mark.parametrize("share", [0, 0.5, 0.999])
    def test_a_truncated_file_is_passed_over(self, run, tmp_path, caplog, name, share):
        file = tmp_path / "step-00000002" / name
        os.truncate(file, int(file.stat().st_size * share))
        assert run.restore() == {"step": 1, "which": "older"}
        assert name in caplog.text

    def test_a_missing_file_is_passed_over(self, run, tmp_path):
        (tmp_path / "step-00000002" / "optimizer.safetensors").unlink()
        assert run.restore() == {"step": 1, "which": "older"}

    def test_a_symlink_is_not_followed(self, run, tmp_path):
        file = tmp_path / "step-00000002" / "state.json"
        file.rename(tmp_path / "elsewhere.json")
        file.symlink_to(tmp_path / "elsewhere.json")
        assert run.restore() == {"step": 1, "which": "older"}

    def test_when_none_is_valid_the_reasons_are_given(self, run, tmp_path):
        for step in (1, 2):
            os.truncate(tmp_path / f"step-0000000{step}" / "state.json", 3)
        with pytest.raises(UserError, match=r"No checkpoint in .* is valid: .*step-00000002.*step-00000001"):
            run.restore()

    def test_a_damaged_one_can_be_replaced_at_its_step(self, run, tmp_path):
        os.truncate(tmp_path / "step-00000002" / "state.json", 3)
        run.restore()
        run.save(2, which="again")
        assert run.restore() == {"step": 2, "which": "again"}


class TestMisfits:
    def test_another_model_is_refused_by_tensor_and_shapes(self, tmp_path):
        Run(tmp_path).save(1)
        with pytest.raises(UserError, match=r"tok_embeddings.weight .*\[32, 16\].*\[32, 24\]"):
            Run(tmp_path, width=24).restore()

    def test_another_optimizer_is_refused(self, tmp_path):
        Run(tmp_path, "AdamW").save(1)
        with pytest.raises(UserError, match="optimizer"):
            Run(tmp_path, "SGD").restore()

    def test_another_grouping_is_refused(self, tmp_path):
        Run(tmp_path, "fused AdamW").save(1)
        with pytest.raises(UserError, match="2 groups of parameters, this run's 1"):
            Run(tmp_path, "AdamW").restore()


class TestDiskFull:
    def test_the_previous_checkpoint_stays_valid_and_nothing_partial_is_left(self, tmp_path):
        # In its own process: the limit on file sizes, which stands for a full disk, cannot be lifted again.
        code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import resource, signal
from pathlib import Path
from test_checkpoint import Run, UserError
run = Run(Path({str(tmp_path)!r}))
run.save(1, which="whole")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
try:
    run.save(2)
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert str(tmp_path / "step-00000002") in done.stdout
        assert "File too large" in done.stdout
        assert "bytes" in done.stdout
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
        assert Run(tmp_path).restore() == {"step": 1, "which": "whole"}

    def test_too_little_room_is_reported_before_anything_is_written(self, tmp_path, monkeypatch):
        run = Run(tmp_path)
        run.save(1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
        with pytest.raises(UserError, match=r"step-00000002: 1,000 bytes are free. It needs about [\d,]+ bytes"):
            run.save(2)
        assert steps(tmp_path) == [1]

    def test_a_writer_that_fails_leaves_nothing(self, tmp_path):
        run = Run(tmp_path)

        def fail(directory: Path) -> None:
            raise RuntimeError("a bug in the writer")

        run.checkpoints.write_metadata = fail
        with pytest.raises(RuntimeError, match="a bug"):
            run.save(1)
        assert list(tmp_path.iterdir()) == []


class TestKilled:
    @pytest.mark.slow  # tests/benchmarks/test_reliability.py kills saves by default
    def test_a_kill_in_the_middle_of_saves_never_leaves_a_torn_checkpoint(self, tmp_path):
        code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_checkpoint import Run
run = Run(Path({str(tmp_path)!r}))
state = run.restore()
step = state["step"] if state else 0
print("ready", flush=True)
while True:
    step += 1
    run.save(step)
    print(step, flush=True)
"""
        generator = random.Random(1)
        reached = 0
        for _ in range(2):
            child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            for _ in range(generator.randrange(1, 5)):
                saved = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
            assert saved > reached
            reached = saved
            state = Run(tmp_path).restore()
            assert state is not None
            assert state["step"] >= saved
            check_files(tmp_path / f"step-{state['step']:08d}")
        assert not list(tmp_path.glob(".*"))


class TestManifest:
    def test_a_name_that_leads_out_is_refused(self, tmp_path):
        path = Run(tmp_path).save(1)
        content = checksummed_json.loads((path / "manifest.json").read_bytes())
        content["files"]["../latest"] = content["files"].pop("state.json")
        (path / "manifest.json").write_bytes(checksummed_json.dumps(content))
        with pytest.raises(UserError, match="not a plain file name"):
            check_files(path)

    @pytest.mark.parametrize(
        "content",
        [
            {"files": {"a": 5}, "format": 1, "step": 1},
            {"files": ["a"], "format": 1, "step": 1},
            {"files": {"a": {"xxh3_128": "0"}}, "format": 1, "step": 1},
            {"files": {"a": {"bytes": "1", "xxh3_128": "0"}}, "format": 1, "step": 1},
            {"files": {}, "step": 1},
        ],
    )
    def test_one_that_is_well_sealed_nonsense_is_refused(self, tmp_path, content):
        (tmp_path / "manifest.json").write_bytes(checksummed_json.dumps(content))
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            check_files(tmp_path)

    @pytest.mark.parametrize("text", ["[" * 100_000, " " * 5_000_000, "\x80\x04]q\x00.", "[]", "{}"])
    def test_one_that_is_no_manifest_is_refused(self, tmp_path, text):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            check_files(tmp_path)

    def test_a_checkpoint_that_is_a_link_is_passed_over(self, tmp_path):
        Run(tmp_path / "elsewhere").save(5)
        run = Run(tmp_path / "here")
        run.save(1)
        (tmp_path / "here" / "step-00000005").symlink_to(tmp_path / "elsewhere" / "step-00000005")
        assert run.restore() == {"step": 1}


class TestHostileState:
    """Files under a manifest that vouches for them, as an attacker would write it."""

    @pytest.fixture
    def path(self, tmp_path):
        return Run(tmp_path).save(1)

    def put(self, path: Path, name: str, data: bytes) -> None:
        (path / name).write_bytes(data)
        (path / "manifest.json").unlink()
        manifest.write(path, 1, {})

    @pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "model.safetensors"])
    def test_a_pickle_runs_nothing_and_is_refused_by_name(self, path, tmp_path, name):
        canary = tmp_path / "canary"
        self.put(path, name, f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
        with pytest.raises(UserError, match=re.escape(name)):
            Run(tmp_path).restore()
        assert not canary.exists()

    @pytest.mark.parametrize(
        "change",
        [
            {"random": []},
            {"random": {"states": [{}], "of": [0]}},
            {"random": {"states": [], "of": [7]}},
            {"state": 5},
            {"scheduler": None},
            {"optimizer": {"groups": [], "values": {}, "quantized": {}}},
            {"step": "x"},
        ],
    )
    def test_a_state_that_lies_is_a_sentence(self, path, tmp_path, change):
        document = json.loads((path / "state.json").read_text())
        self.put(path, "state.json", json.dumps({**document, **change}).encode())
        with pytest.raises(UserError, match="step-00000001"):
            Run(tmp_path).restore()

    def test_random_generators_of_the_wrong_size_are_a_sentence(self, path, tmp_path):
        document = json.loads((path / "state.json").read_text())
        document["random"]["states"][0]["torch"] = "AAAA"
        self.put(path, "state.json", json.dumps(document).encode())
        with pytest.raises(UserError, match="step-00000001"):
            Run(tmp_path).restore()

    @pytest.mark.parametrize("text", ["[" * 100_000, " " * (17 << 20)])
    def test_one_that_is_no_json_or_absurdly_large_is_refused(self, path, tmp_path, text):
        self.put(path, "state.json", text.encode())
        with pytest.raises(UserError, match=r"state\.json"):
            Run(tmp_path).restore()


class TestPruning:
    def test_what_a_resume_passed_over_does_not_count_among_the_newest(self, tmp_path):
        run = Run(tmp_path)
        run.save(300)
        file = run.save(337) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        resumed = Run(tmp_path)
        assert resumed.restore() == {"step": 300}
        resumed.save(400)
        assert steps(tmp_path) == [300, 400]

    def test_a_damaged_word_on_the_metric_is_no_best(self, tmp_path):
        run = Run(tmp_path, keep=1, best="score")
        given = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler, "wait": True}
        run.checkpoints.save(1, metrics={"score": 1.0}, **given)
        path = run.checkpoints.save(2, metrics={"score": 3.5}, **given)
        (path / "state.json").write_text((path / "state.json").read_text().replace('"score": 3.5', '"score": 0.5'))
        run.checkpoints.save(3, metrics={"score": 3.0}, **given)
        assert steps(tmp_path) == [1, 3]
        assert (tmp_path / "best").read_text() == "step-00000001\n"


class TestAfterAFailure:
    def test_the_next_save_is_made_all_the_same(self, tmp_path):
        run = Run(tmp_path)
        run.checkpoints = Slow(tmp_path)
        given = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler}
        run.checkpoints.save(2, **given)
        (tmp_path / ".tmp-step-00000002").rmdir()
        run.checkpoints.let_go.set()
        run.checkpoints.save(5, wait=True, **given)
        assert steps(tmp_path) == [5]


class TestStrangers:
    def test_weights_that_the_manifest_does_not_know_are_refused(self, tmp_path):
        run = Run(tmp_path, file_bytes=4000)
        path = run.save(1)
        (path / "model.safetensors").write_bytes(b"planted")
        with pytest.raises(UserError, match=r"model\.safetensors is not in manifest\.json"):
            check_files(path)

    def test_a_file_that_is_not_there_is_not_vouched_for(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            manifest.write(tmp_path, 1, {"model.safetensors": {"bytes": 3, "xxh3_128": "0"}})


class TestNotFinite:
    @pytest.mark.parametrize("background", [True, False])
    @pytest.mark.parametrize("where", ["weights", "moments"])
    def test_is_never_saved_and_the_checkpoints_before_stay(self, tmp_path: Path, where: str, background: bool) -> None:
        run = Run(tmp_path / "c", background=background)
        run.train(0, 2)
        run.save(2)
        spoilt = next(run.model.parameters())
        (spoilt if where == "weights" else run.optimizer.state[spoilt]["exp_avg"]).data.view(-1)[0] = float("inf")
        with pytest.raises(
            WeightsNotFinite, match=r"step 4: weights or moments are not finite \(.*newest .* that of step 2\."
        ):
            run.save(4)
        assert steps(tmp_path / "c") == [2]
        assert (tmp_path / "c/latest").read_text() == "step-00000002\n"
        assert not list((tmp_path / "c").glob(".tmp*"))

    def test_one_that_an_older_version_saved_is_not_resumed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = Run(tmp_path / "c")
        run.train(0, 1)
        next(run.model.parameters()).data.view(-1)[0] = float("nan")
        with monkeypatch.context() as patch:
            patch.setattr("plmtune.io.safetensors_writer.not_finite", lambda named: [])
            path = run.save(1)
        other = Run(tmp_path / "c")
        with pytest.raises(UserError, match=r"step-00000001 cannot be resumed: it holds weights .* Delete it"):
            other.checkpoints.restore(path, model=other.model, optimizer=other.optimizer, scheduler=other.scheduler)
