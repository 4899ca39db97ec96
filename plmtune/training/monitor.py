"""The monitor of a run: its progress line, metrics.jsonl, loggers, and the signals that stop it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.metrics import MetricsFile
from plmtune.io.provenance import device_name
from plmtune.io.run_directory import RunDirectory, resume_command
from plmtune.io.signals import StopSignals
from plmtune.io.terminal import Progress
from plmtune.training import distributed
from plmtune.training.loggers import Logger
from plmtune.training.runtime import peak_memory_bytes
from plmtune.units import show_bytes, show_count, show_duration


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rates of the next step: `lr` of the first group, `lr/NAME` of each other named one.

    A group without a name is logged by its index where its rate differs from the first's.
    """
    found: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        rate = float(group["lr"])  # torchao's is a tensor that the scheduler changes in place
        if index == 0:
            found["lr"] = rate
        elif "name" in group or rate != found["lr"]:
            found[f"lr/{group.get('name', index)}"] = rate
    return found


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after `step`; 0 is never."""
    return every > 0 and step % every == 0


@dataclass
class RunMonitor:
    """Shows and records a run's metrics, and watches for signals to stop.

    Every rank makes one and calls `should_stop` at the same steps; rank 0 writes.

    Keys of metrics: loss, lr, grad_norm and tokens (so far) of training; validation_loss, bits_per_byte and
    sparsity/0, sparsity/1, ... of a validation. Lines with a loss also get time (seconds of training in
    this process), tokens_per_second, mfu and memory_bytes, the keys of `metrics.TIMING`.

    Args:
        run: where metrics.jsonl is.
        loggers: on rank 0; they get the same metrics.
        num_steps: of the run (0: not known yet); the attribute may be changed.
        start_step: the step that was restored; lines of later steps are cut off.
        device: whose memory is shown.
        tokens_per_step: over all ranks, for the rate.
        flops_per_token: forward and backward, for MFU.
        peak_flops: of all devices together in the run's arithmetic, for MFU; None shows no MFU.
        every_seconds: between lines where stderr is no terminal.

    Attributes:
        failure: why metrics can no longer be written, a sentence for the end of the run; else empty. A failure stops
            the run as a signal does, and every rank has it once `should_stop` was true.
    """

    run: RunDirectory
    loggers: Sequence[Logger]
    num_steps: int
    start_step: int = 0
    _: KW_ONLY
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it never changes)
    tokens_per_step: int | None = None
    flops_per_token: float | None = None
    peak_flops: float | None = None
    every_seconds: float = 10.0
    failure: str = field(default="", init=False)

    def __post_init__(self) -> None:
        run = self.run
        self._file = MetricsFile(run.metrics, start_step=self.start_step) if run.is_main else None
        self._signals = StopSignals(
            "finishing the step and saving; a second one ends it unsaved." if run.is_main else ""
        )
        self._previous = (self.start_step, 0.0)  # step and seconds of the last line with a loss
        self._paused = 0.0
        self._line = Progress(self.every_seconds, shown=run.is_main)
        self._reached, self._shown = "", False

    def __enter__(self) -> RunMonitor:
        self._signals.__enter__()
        self.run.note(step=self.start_step, device=device_name(self.device))
        self._began = time.perf_counter()
        self._reached = f"step {self.start_step}/{self.num_steps}" if self.num_steps else ""
        return self

    def __exit__(self, *error: object) -> None:
        self._line.close(keep=True)
        self._signals.__exit__(*error)
        if self._file is not None:
            with self._noting_failures(str(self._file.path)):
                self._file.flush()
            self._file.close()
        for logger in self.loggers:
            with self._noting_failures(type(logger).__name__):
                logger.close()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if not self.run.is_main:
            return
        assert self._file is not None
        entry = dict(values)
        if "loss" in entry:
            entry |= self._timing(step)
        with self._noting_failures(str(self._file.path)):
            self._file.append(step, entry)
        for logger in self.loggers:
            with self._noting_failures(type(logger).__name__):
                logger.log(step, entry)
        self._show(step, entry)

    def start(self, *lines: str) -> None:
        """Print where the run is, the step that it resumes after, and some lines more."""
        resuming = f", resuming after step {self.start_step}" if self.start_step else ""
        for line in (f"run: {self.run.path}{resuming}", *lines):
            self.message(line)

    def measure(self, step: int, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Validate and log what is measured; the time does not count as training."""
        with self.paused():
            metrics = validate()
        if metrics:
            self.log(step, metrics)
        return metrics

    def ends_after(self, step: int, *, saved: int, stop: bool) -> bool:
        """Record the newest saved step; return `stop`. Call it after `should_stop`, once the state is saved."""
        self.run.note_saved(saved)
        self.raise_failure()
        if stop:
            self.stopped(step)
        return stop

    def raise_failure(self) -> None:
        """Raise UserError, on every rank, if metrics can no longer be written."""
        if self.failure:
            raise UserError(self.failure)

    def stopped(self, step: int) -> None:
        """Show how to resume a run that stops after `step`."""
        self.message(f"stopped after step {step}; resume with: {resume_command(self.run.path)}")

    def should_stop(self) -> bool:
        """Whether to stop: any rank got a signal, or metrics cannot be written. Every rank must call it."""
        stop = distributed.any_rank(self._signals.heard or bool(self.failure))
        if stop:
            self.failure = distributed.broadcast_from_rank0(lambda: self.failure)
        return stop

    @contextlib.contextmanager
    def _noting_failures(self, name: str) -> Iterator[None]:
        """Record a failed write, so that the run first saves its state."""
        try:
            yield
        except Exception as error:  # a logger's own: of a network, a disk, a server
            reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
            if not self.failure:
                failed, resume = f"{name} cannot be written: {reason}.", resume_command(self.run.path)
                self.failure = f"{failed} The run has saved its state; fix this, then resume with: {resume}"
                self.message(f"{failed} Finishing the step and saving.")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the block's time as training, as for a validation or a save."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def answers(self, done: int, total: int, tokens_per_second: float) -> None:
        """Show the progress of generating answers."""
        self.working(f"answers {done:,}/{total:,}", f"{show_count(tokens_per_second)} tok/s", last=done == total)

    def working(self, *parts: str, last: bool = False) -> None:
        """Show the progress of work between steps."""
        self._line.update(*([self._reached] if self._reached else []), *parts, now=last)

    def message(self, text: str) -> None:
        """Print a line above the progress line."""
        with contextlib.suppress(OSError):  # the terminal is gone, or the disk full that keeps the output
            if self.run.is_main:
                terminal.echo(text, err=True)

    def _timing(self, step: int) -> dict[str, float | int]:
        seconds = time.perf_counter() - self._began - self._paused
        last_step, last_seconds = self._previous
        self._previous = (step, seconds)
        timing: dict[str, float | int] = {"time": round(seconds, 3), "memory_bytes": peak_memory_bytes(self.device)}
        if self.tokens_per_step and step > last_step and seconds > last_seconds:
            rate = (step - last_step) * self.tokens_per_step / (seconds - last_seconds)
            timing["tokens_per_second"] = round(rate, 1)
            if self.flops_per_token and self.peak_flops:
                timing["mfu"] = round(rate * self.flops_per_token / self.peak_flops, 4)
        return timing

    def _show(self, step: int, entry: Mapping[str, Any]) -> None:
        if "loss" not in entry:
            keys = ("validation_loss", "bits_per_byte", "ema_validation_loss")
            shown = [f"{k} {entry[k]:.4f}" for k in keys if entry.get(k) is not None]
            shown += [f"{k.removeprefix('eval/')} {v:.4f}" for k, v in entry.items() if k.startswith("eval/")]
            if shown:
                self.message(f"step {step}: {' · '.join(shown)}")
            return
        self._reached = f"step {step}/{self.num_steps}"
        done, seconds = step - self.start_step, time.perf_counter() - self._began
        # Pauses count here: validations and saves are part of the time to wait.
        loss, *others = format_metrics(entry, seconds / done * (self.num_steps - step) if done > 0 else None)
        self._line.update(f"{self._reached} · {loss}", *others, now=not self._shown or step == self.num_steps)
        self._shown = True


def format_metrics(entry: Mapping[str, Any], eta_seconds: float | None) -> list[str]:
    """The parts of the progress line: loss (and cross entropy beside a teacher), time left, speed, learning rate, MFU,
    memory."""
    parts = [f"loss {entry['loss']:.4f}"]
    if "cross_entropy" in entry:
        parts.append(f"cross entropy {entry['cross_entropy']:.4f}")
    if eta_seconds is not None:
        parts.append(f"ETA {show_duration(eta_seconds)}")
    if "tokens_per_second" in entry:
        parts.append(f"{show_count(entry['tokens_per_second'])} tok/s")
    if "lr" in entry:
        parts.append(f"lr {entry['lr']:.2e}")
    if "mfu" in entry:
        parts.append(f"MFU {entry['mfu']:.1%}")
    if "memory_bytes" in entry:
        parts.append(show_bytes(entry["memory_bytes"]))
    return parts
