"""Watching: what is written and shown, and that a signal lets the step finish."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from plmtune.errors import UserError
from plmtune.io.metrics import MetricsFile, read, without_timing
from plmtune.io.run_directory import RunDirectory
from plmtune.optim.optimizers import adamw, muon
from plmtune.registry import load
from plmtune.training import loggers
from plmtune.training import monitor as module
from plmtune.training.monitor import RunMonitor, format_metrics, learning_rates


class Recorder:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict]] = []
        self.closed = False

    def log(self, step, values) -> None:
        self.lines.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def run(tmp_path):
    with RunDirectory.create(tmp_path / "run", "", ["test"]) as run:
        yield run


class TestLog:
    def test_the_file_and_every_logger_get_the_same(self, run):
        recorder = Recorder()
        with RunMonitor(run, [recorder], 2, tokens_per_step=100, flops_per_token=6.0, peak_flops=1e9) as monitor:
            monitor.log(1, {"loss": 2.0, "lr": 0.1})
            monitor.log(1, {"validation_loss": 2.5})
        entries = read(run.metrics)
        assert [(e.pop("step"), e) for e in entries] == recorder.lines
        assert recorder.closed
        assert set(entries[0]) == {"loss", "lr", "time", "memory_bytes", "tokens_per_second", "mfu"}
        assert without_timing(entries[0]) == {"loss": 2.0, "lr": 0.1}
        assert set(entries[1]) == {"validation_loss"}

    def test_rates_follow_from_their_definitions(self, run, monkeypatch):
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        with RunMonitor(run, [], 100, tokens_per_step=500, flops_per_token=6.0, peak_flops=3000.0) as monitor:
            clock.now = 10.0
            monitor.log(10, {"loss": 2.0})
            with monitor.paused():
                clock.now += 4.0
            clock.now += 6.0
            monitor.log(16, {"loss": 1.0})
        first, second = read(run.metrics)
        assert first["tokens_per_second"] == 500.0  # 10 steps of 500 tokens in 10 seconds
        assert first["mfu"] == 1.0  # 500 tokens x 6 FLOPs a second of 3000
        assert second["tokens_per_second"] == 6 * 500 / 6.0  # the pause does not count

    def test_lines_are_shown_where_there_is_no_terminal(self, run, capsys):
        with RunMonitor(run, [], 4, every_seconds=1000) as monitor:
            for step in range(1, 5):
                monitor.log(step, {"loss": 2.0 / step})
            monitor.log(4, {"validation_loss": 0.75, "bits_per_byte": 0.5})
        assert [line.split(" · ")[0] for line in capsys.readouterr().err.splitlines()] == [
            "step 1/4",
            "step 4/4",
            "step 4: validation_loss 0.7500",
        ]

    def test_a_nan_loss_is_shown_and_recorded(self, run, capsys):
        with RunMonitor(run, [], 1) as monitor:
            monitor.log(1, {"loss": float("nan")})
        assert "loss nan" in capsys.readouterr().err
        assert read(run.metrics)[0]["not_finite"] == {"loss": "nan"}

    def test_other_ranks_write_nothing(self, tmp_path, capsys):
        other = RunDirectory(tmp_path / "other")
        with RunMonitor(other, [], 1) as monitor:
            monitor.log(1, {"loss": 1.0})
            monitor.message("hello")
        assert not (tmp_path / "other").exists()
        assert capsys.readouterr().err == ""


def test_a_run_that_does_not_know_its_steps_yet_shows_none(run, capsys):
    with RunMonitor(run, [], 0) as monitor:
        monitor.answers(3, 7, 100.0)
        monitor.answers(7, 7, 100.0)
    said = capsys.readouterr().err
    assert "answers 7/7" in said and "step" not in said


def test_the_line_reads_as_a_person_expects():
    entry = {"loss": 2.34567, "lr": 3e-4, "tokens_per_second": 12345, "mfu": 0.412, "memory_bytes": 3 * 2**30}
    parts = ["loss 2.3457", "ETA 1:02:05", "12.3K tok/s", "lr 3.00e-04", "MFU 41.2%", "3.00 GiB"]
    assert format_metrics(entry, 3725) == parts


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
    def test_one_asks_to_stop_and_the_step_finishes(self, run, number):
        before = signal.getsignal(number)
        with RunMonitor(run, [], 2) as monitor:
            assert not monitor.should_stop()
            os.kill(os.getpid(), number)
            assert monitor.should_stop()
            monitor.log(1, {"loss": 1.0})
        assert signal.getsignal(number) is before

    def test_one_that_torchrun_sends_on_is_not_a_second_one(self, run, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with RunMonitor(run, [], 2) as monitor:
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 5.0))
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert monitor.should_stop()

    def test_a_second_one_ends_at_once(self, tmp_path):
        code = f"""
import time
from plmtune.training.monitor import RunMonitor
from plmtune.io.run_directory import RunDirectory
with RunMonitor(RunDirectory.create({str(tmp_path / "run")!r}, "", []), [], 2):
    print("watching", flush=True)
    while True: time.sleep(0.01)
"""
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "watching\n"
        child.send_signal(signal.SIGTERM)
        assert child.stderr.readline() == "\n"
        assert "SIGTERM: finishing the step" in child.stderr.readline()
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        child.communicate()
        assert child.returncode == 128 + signal.SIGTERM

    def test_a_terminal_that_goes_away_asks_to_stop_unless_the_run_is_to_outlive_it(self, run):
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
        try:
            with RunMonitor(run, [], 2) as monitor:
                os.kill(os.getpid(), signal.SIGHUP)
                assert monitor.should_stop()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
            with RunMonitor(run, [], 2) as monitor:
                os.kill(os.getpid(), signal.SIGHUP)
                assert not monitor.should_stop()
        finally:
            signal.signal(signal.SIGHUP, before)


class TestFailures:
    def test_metrics_that_cannot_be_written_ask_to_stop_and_are_written_when_they_can_be(self, run, monkeypatch):
        def full(self: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with RunMonitor(run, [], 3) as monitor:
            monitor.log(1, {"validation_loss": 1.0})
            with monkeypatch.context() as patch:
                patch.setattr(MetricsFile, "flush", full)
                monitor.log(2, {"validation_loss": 1.0})
            assert monitor.should_stop()
            assert monitor.failure.startswith(f"{run.metrics} cannot be written: No space left on device")
            assert f"plmtune resume {run.path}" in monitor.failure
        assert [entry["step"] for entry in read(run.metrics)] == [1, 2]

    def test_the_other_loggers_continue_when_one_fails_at_any_time(self, run):
        class Broken(Recorder):
            def log(self, step, values) -> None:
                raise ConnectionError("gone")

            def close(self) -> None:
                raise ConnectionError("gone for good")

        recorder = Recorder()
        with RunMonitor(run, [Broken(), recorder], 3) as monitor:
            monitor.log(1, {"validation_loss": 1.0})
        assert recorder.lines == [(1, {"validation_loss": 1.0})]
        assert recorder.closed
        assert monitor.failure.startswith("Broken cannot be written: ConnectionError: gone.")

    def test_what_cannot_be_shown_ends_no_run(self, run, monkeypatch):
        full = Path("/dev/full").open("w")  # noqa: SIM115 (it cannot be closed without an error)
        with RunMonitor(run, [], 3) as monitor:
            monkeypatch.setattr(sys, "stderr", full)
            monitor.log(1, {"loss": 1.0})
            monitor.message("hello")
            monkeypatch.undo()
            assert not monitor.should_stop()
        with pytest.raises(OSError, match="No space left"):
            full.close()


class TestLoggers:
    def test_tensorboard_holds_the_numbers(self, tmp_path):
        logger = load("logger", "tensorboard")(tmp_path, {})
        logger.log(1, {"loss": 2.5, "phase": "math", "bad": float("nan")})
        logger.log(2, {"loss": 1.5})
        logger.close()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert events.Tags()["scalars"] == ["loss"]
        assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]

    def test_tensorboard_hides_the_steps_that_a_resumed_run_writes_again(self, tmp_path):
        for first, last in ((1, 5), (3, 6)):
            logger = load("logger", "tensorboard")(tmp_path, {})
            for step in range(first, last):
                logger.log(step, {"loss": float(step)})
            logger.close()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize("name", ["wandb", "trackio"])
    def test_a_missing_package_is_named_with_its_extra(self, tmp_path, monkeypatch, name):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"needs the package {name} \(extra {name}\)"):
            load("logger", name)(tmp_path, {})

    def test_a_resumed_run_keeps_its_wandb_chart(self, tmp_path, monkeypatch):
        calls = []

        class Module:
            class util:
                generate_id = staticmethod(lambda: f"id{len(calls)}")

            @staticmethod
            def init(**keys):
                calls.append(keys)

        monkeypatch.setattr(loggers, "_need", lambda *_, **__: Module)
        for _ in range(2):
            load("logger", "wandb")(tmp_path, {"seed": 1}, mode="offline")
        assert [call["id"] for call in calls] == ["id0", "id0"]
        assert calls[0]["name"] == Path(tmp_path).name

    def test_jsonl_adds_nothing_to_metrics_jsonl(self, tmp_path):
        logger = load("logger", "jsonl")(tmp_path, {})
        logger.log(1, {"loss": 1.0})
        logger.close()
        assert list(tmp_path.iterdir()) == []


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.norm = nn.Embedding(4, 8), nn.Linear(8, 8), nn.LayerNorm(8)


class TestLearningRates:
    def test_groups_of_one_rate_are_logged_once(self) -> None:
        assert learning_rates(adamw(Small(), lr=0.1)) == {"lr": 0.1}

    def test_muon_and_its_adamw_are_logged_by_name_equal_or_not(self) -> None:
        assert learning_rates(muon(Small(), lr=0.1)) == {"lr": 0.1, "lr/adamw": 0.1}
        assert learning_rates(muon(Small(), lr=0.1, adamw_lr_factor=2.0)) == {"lr": 0.1, "lr/adamw": 0.2}

    def test_a_group_without_a_name_is_logged_by_its_index_where_it_differs(self) -> None:
        model = Small()
        groups = [{"params": [model.norm.weight]}, {"params": [model.norm.bias], "lr": torch.tensor(0.5)}]
        assert learning_rates(torch.optim.SGD(groups, lr=0.1)) == {"lr": 0.1, "lr/1": 0.5}
