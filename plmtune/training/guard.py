"""Which updates to skip: a loss or a gradient that is not finite, and a gradient norm far beyond its history."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from plmtune.errors import UserError
from plmtune.io import safetensors_writer
from plmtune.io.run_directory import RunDirectory
from plmtune.ranges import AT_LEAST_1, check
from plmtune.training.distributed import gather_texts

_SHOWN = 3  # locations in a message


@dataclass
class Guard:
    """Judges each update before the optimizer makes it, from two numbers: the loss and the gradient norm.

    A norm is judged by its ratio to the median of the accepted norms before it. A median does not move with one
    outlier, as a mean and a standard deviation do, and a window follows what is normal: norms fall in the first
    hundred steps and drift with the rate. In clean runs of 100 to 2,000 steps the largest ratio after the first
    quarter window was 1.9 and 2.8 at 2,048 tokens a step (the demo, Muon and AdamW), 6.4 at 64 bytes a step, and 9.2
    at 256 bytes a step with a rate far too high. A new phase can do more: from one memorised page to code the ratio
    was 11 at first and above 9 for three steps. So the factor is 10, and a new phase starts a new history. PaLM skipped
    by hand (arXiv 2204.02311, section 5.1); ZClip (arXiv 2504.02507) judges by the norm's own history, but clips.

    Ranks with equal numbers reach equal decisions.

    Args:
        spike_factor: times the median that a norm may have; 0 asks only for finite numbers.
        window: accepted norms that make the history; spikes are judged once a quarter of them is there.
        patience: refused updates in a row that should stop the run.

    Attributes:
        skipped: updates refused so far.
        consecutive_skips: updates refused since the last accepted one.
        reason: why the latest was refused, as a part of a sentence.
        losses: of the latest one's micro-batches on this rank.
    """

    spike_factor: float = 10.0
    window: int = 128
    patience: int = 3
    skipped: int = field(default=0, init=False)
    consecutive_skips: int = field(default=0, init=False)
    reason: str = field(default="", init=False)
    losses: Sequence[Tensor] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        if not (self.spike_factor == 0 or 1 < self.spike_factor < math.inf):
            raise ValueError(f"spike_factor ({self.spike_factor}) must be above 1, or 0 for none")
        check(AT_LEAST_1, window=self.window, patience=self.patience)
        self._norms: deque[float] = deque()  # accepted, oldest first
        self._sorted: list[float] = []  # the same, by size

    def accepts(self, loss: float, norm: float, losses: Sequence[Tensor] = ()) -> bool:
        """Whether to make this update. The guard records its numbers.

        Args:
            loss: of the whole step, in any unit.
            norm: of the gradient before clipping.
            losses: of this rank's micro-batches, by which `handle_skip` finds the text with the fault.
        """
        self.losses = losses
        self.reason = self._fault(loss, norm)
        if self.reason:
            self.skipped, self.consecutive_skips = self.skipped + 1, self.consecutive_skips + 1
            return False
        self.consecutive_skips = 0
        self._norms.append(norm)
        bisect.insort(self._sorted, norm)
        if len(self._norms) > self.window:
            del self._sorted[bisect.bisect_left(self._sorted, self._norms.popleft())]
        return True

    @property
    def exhausted(self) -> bool:
        """Whether `patience` updates in a row were refused, so that the run should stop."""
        return self.consecutive_skips >= self.patience

    def _fault(self, loss: float, norm: float) -> str:
        for name, value in {"the loss": loss, "the gradient norm": norm}.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        count = len(self._sorted)
        if self.spike_factor and count >= max(self.window // 4, 1):
            median = (self._sorted[count // 2] + self._sorted[(count - 1) // 2]) / 2
            # Where most norms were zero there is no scale to judge by.
            if norm > self.spike_factor * median > 0:
                return (
                    f"the gradient norm {norm:.3g} is {norm / median:.3g} times the median of the last {count} "
                    f"steps ({median:.3g})"
                )
        return ""

    def reset(self) -> None:
        """Start a new history of norms, as for a phase with other text."""
        self._norms.clear()
        self._sorted.clear()

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint; JSON keeps each float exactly."""
        return {"skipped": self.skipped, "consecutive_skips": self.consecutive_skips, "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a guard's state; a smaller window keeps the newest norms, and an empty state changes nothing."""
        if not state:
            return
        self.skipped = int(state["skipped"])
        self.consecutive_skips = int(state.get("consecutive_skips", state.get("in_a_row", 0)))  # "in_a_row": old name
        self._norms = deque(state["norms"][-self.window :])
        self._sorted = sorted(self._norms)

    def stop(self, step: int, locations: Sequence[str]) -> UserError:
        """The error to raise when `exhausted` at a step, whose tokens come from `locations`, over all ranks."""
        count = self.consecutive_skips
        first = step - count + 1
        several = f"{count} updates in a row were skipped (steps {first} to {step}), the last because"
        what = several if count > 1 else "the update was skipped, because"
        kept = f"those after step {first - 1}" if first > 1 else "those that the run began with"
        shown, more = "; ".join(locations[:_SHOWN]), len(locations) - _SHOWN
        shown += f"; and {more:,} more" if more > 0 else ""
        return UserError(
            f"step {step}: {what} {self.reason}. Parameters and moments are {kept}, and saved. The batch of step "
            f"{step} came from {shown}. Look at that text. If it is right, start again with a "
            "lower optimizer.lr, or resume after that step with a higher guard.spike_factor or guard.patience."
        )


def handle_skip(
    guard: Guard,
    run: RunDirectory,
    step: int,
    message: Callable[[str], None],
    locate: Callable[[Collection[int]], list[str]],
    save: Callable[..., object],
) -> None:
    """Report an update that the guard skipped; after `patience` of them in a row, save and end the run.

    Args:
        step: the skipped one, counted from 1.
        message: shows a line.
        locate: gives the files and offsets of micro-batches of this step and rank, see `sample_locations`.
        save: (metrics, *, wait) saves the state after the last accepted update.
    """
    message(f"step {step}: update skipped, because {guard.reason}")
    if not guard.exhausted:
        return
    error = guard.stop(step, sample_locations(guard.losses, locate))
    guard.consecutive_skips = 0  # the resumed run counts from 0
    save({}, wait=True)  # a resumed run starts after this step
    run.note(ended_by="guard")  # a restart by torchrun must not undo it
    raise error


def not_finite(named: Mapping[str, Tensor]) -> str:
    """The names of tensors that hold NaN or an infinity, on any rank; else empty. Every rank must call it."""
    return safetensors_writer.listed([*dict.fromkeys(_gathered(safetensors_writer.not_finite(named)))])


def sample_locations(losses: Sequence[Tensor], locate: Callable[[Collection[int]], list[str]]) -> list[str]:
    """Where the text of a skipped update comes from, over all ranks. Every rank must call it.

    These are the locations of micro-batches whose loss is not finite; if all are finite, those of all micro-batches,
    since the gradient norm is of all together.
    """
    bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    return _gathered(locate(bad)) or _gathered(locate(range(len(losses))))


def _gathered(lines: list[str]) -> list[str]:
    return [line for text in gather_texts("\n".join(lines)) for line in text.splitlines()]
