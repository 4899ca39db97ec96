"""Rounds of a pretraining: what later ones draw, kept in the run's directory, so that a resumed run has it at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from plmtune.config.sections import MultiRoundConfig
from plmtune.data.batches import Batches
from plmtune.data.order import Ints, key_of
from plmtune.data.rounds import draw
from plmtune.errors import UserError
from plmtune.io import checked_tensors
from plmtune.modules.decoder import Decoder
from plmtune.training import distributed
from plmtune.training.monitor import RunMonitor
from plmtune.training.plot import draw_losses
from plmtune.training.runtime import Runtime
from plmtune.training.sequence_losses import Losses, measure_losses


@dataclass
class Rounds:
    """The later rounds of a run; one of a single round has none, and nothing happens.

    Attributes:
        data: its order gets each draw.
        run: the run's directory.
        shards: the directory of the token shards, which gets the losses.
        fingerprints: of the sources' tokens.
        drawn: round -> checksum of its draw, which checkpoints hold.
    """

    settings: MultiRoundConfig
    data: Batches
    runtime: Runtime
    run: Path
    shards: Path
    fingerprints: Mapping[str, str]
    drawn: dict[str, str] = field(default_factory=dict)

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Read the draws of the rounds that have steps before `step`. Every rank must call it.

        Args:
            state: of the checkpoint of `step`, see `state_dict`.
        """
        order = self.data.order
        for index, phase in enumerate(order.phases):
            if phase.round == 1 or order.first_steps[index] >= step:
                continue
            counts = order.counts(index)
            number, windows = str(phase.round), torch.zeros(sum(counts), dtype=torch.int64)
            digest = state.get("drawn_rounds", {}).get(number, "")
            distributed.broadcast_from_rank0(partial(self._read, number, digest, windows))
            distributed.reduce_sum(windows)  # the others hold zeros
            self.drawn[number] = digest
            order.set_draw(index, np.split(windows.numpy(), np.cumsum(counts)[:-1]))

    def _read(self, number: str, digest: str, windows: torch.Tensor) -> None:
        path = self._path(number)
        try:
            tensors, note = checked_tensors.load(path)
            if note["file"]["xxh3_128"] != digest:
                raise ValueError("its checkpoint was made with another draw")
            if note["data"] != dict(self.fingerprints):
                raise ValueError("it was made of other data than there is now: put that back")
            windows.copy_(tensors["windows"])
        except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{path}: the draw of round {number} cannot be used ({error}). Put it back with its .json, or start a "
                f"new run from the weights of this one: init_from={self.run}"
            ) from error

    def begin(self, model: Decoder, step: int, monitor: RunMonitor) -> bool:
        """Draw the round that begins at `step`, if one does; False if a signal stopped it, and what was measured stays.

        Every rank must call it.
        """
        order = self.data.order
        if step < order.known_steps or step == order.num_steps:
            return True
        index = order.phase_index(step)
        title = order.phases[index].name
        windows, counts = order.first_round(), order.counts(index)
        losses: Losses | None = None
        if self.settings.draw == "loss":
            with monitor.paused():
                losses = measure_losses(
                    model,
                    windows,
                    self.data,
                    self.runtime,
                    monitor,
                    directory=self.shards / "losses",
                    fingerprints=self.fingerprints,
                    title=title,
                )
            if losses is None:
                return False
        drawn = [
            draw(
                windows[source],
                counts[source],
                key=key_of(order.seed, title, name),
                losses=losses[source] if losses else None,
                temperature=self.settings.temperature,
            )
            for source, name in enumerate(order.names)
        ]
        number = str(order.phases[index].round)
        self.drawn[number] = distributed.broadcast_from_rank0(lambda: self._write(number, drawn))
        order.set_draw(index, drawn)
        self._report(title, windows, losses, drawn, monitor)
        return True

    def state_dict(self) -> dict[str, dict[str, str]]:
        """What a checkpoint holds."""
        return {"drawn_rounds": dict(self.drawn)} if self.drawn else {}

    def _path(self, number: str) -> Path:
        return self.run / "rounds" / f"round-{number}.safetensors"

    def _write(self, number: str, drawn: list[Ints]) -> str:
        note = {"data": dict(self.fingerprints), "drawn": self._by_source([len(each) for each in drawn])}
        try:
            return checked_tensors.save(self._path(number), {"windows": torch.from_numpy(np.concatenate(drawn))}, note)
        except OSError as error:
            raise UserError(f"{self.run}: the draw of round {number} cannot be kept: {error}.") from error

    def _by_source(self, values: list[Any]) -> dict[str, Any]:
        return dict(zip(self.data.order.names, values, strict=True))

    def _report(
        self, title: str, windows: list[Ints], losses: Losses | None, drawn: list[Ints], monitor: RunMonitor
    ) -> None:
        """Print what was drawn, and draw a histogram of the losses."""
        of_drawn: list[Any] = [
            losses[source][np.searchsorted(windows[source], each)] if losses else None
            for source, each in enumerate(drawn)
        ]
        for source, name in enumerate(self.data.order.names):
            num, every = len(drawn[source]), len(windows[source])
            if not every:
                continue
            how = "at random"
            if losses:
                mean = of_drawn[source].mean() if num else float("nan")
                how = f"by loss: mean {mean:.4f} of the drawn, {losses[source].mean():.4f} of all"
            monitor.message(f"{title}: {num:,} sequences of {name} drawn from {every:,} {how}")
        if losses and self.runtime.is_main:
            path = self._path(title.rpartition(" ")[2]).with_suffix(".png")
            draw_losses(np.concatenate(losses), np.concatenate(of_drawn), path, title=title)
