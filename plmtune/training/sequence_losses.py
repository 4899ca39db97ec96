"""The loss of each sequence of a run under its frozen model, kept beside the shards.

A directory holds parts of them, each whole or absent, see `io.checked_tensors`: the numbers of sequences, over all
sources, and their losses. Its name is a hash of what they depend on: the weights, the arithmetic, the text and how it
is cut into sequences.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from plmtune.data.batches import Batch, Batches, make_batch
from plmtune.data.order import Ints
from plmtune.errors import UserError, WeightsNotFinite
from plmtune.io import checked_tensors
from plmtune.losses.log_probs import log_probs
from plmtune.models.digest import model_digest
from plmtune.modules.decoder import Decoder
from plmtune.training import distributed
from plmtune.training.monitor import RunMonitor
from plmtune.training.runtime import Runtime

Losses = list[NDArray[np.float32]]

_VERSION = 1  # of the files
_FLUSH_SECONDS = 30.0  # what a kill may lose


@torch.no_grad()
def sequence_losses(model: Decoder, batch: Batch, runtime: Runtime) -> Tensor:
    """The mean cross-entropy of the targets that count of each row, [b], in fp32; 0 for a row without one."""
    rows, seq_len = batch.tokens.shape
    with runtime.autocast():
        hidden = model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)  # [b, s, d]
        states, targets = batch.counted(hidden)
        places = torch.arange(rows * seq_len, device=targets.device) if batch.positions is None else batch.positions
        row = places // seq_len
        settings: dict[str, Any] = model.loss_settings
        nats = -log_probs(states, model.head_weight, targets, row, rows, **settings)
    return nats / torch.bincount(row, minlength=rows).clamp(min=1)


@dataclass
class LossCache:
    """Losses on disk. Only one process of a run reads and writes them."""

    directory: Path
    _pending: list[tuple[Ints, NDArray[np.float32]]] = field(default_factory=list)
    _written: float = field(default_factory=time.monotonic)

    def read(self, num: int) -> tuple[NDArray[np.float32], list[str]]:
        """The loss of each of `num` sequences, NaN where there is none, and a line for each part that is damaged."""
        losses, damaged = np.full(num, np.nan, np.float32), []
        for note in sorted(self.directory.glob("*.json")):
            try:
                tensors, _ = checked_tensors.load(note.with_suffix(".safetensors"))
                losses[tensors["sequence"].numpy()] = tensors["loss"].numpy()
            except (OSError, ValueError, LookupError, SafetensorError) as error:
                damaged.append(f"{note}: this part of the losses cannot be used ({error}); it is measured again.")
        return losses, damaged

    def add(self, sequences: Ints, losses: NDArray[np.float32]) -> None:
        """Keep some losses; they are written by `flush`, or now if the last were written long ago."""
        self._pending.append((sequences, losses))
        if time.monotonic() - self._written > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added as a part."""
        if not self._pending:
            return
        sequences, losses = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*self._pending, strict=True))
        try:
            path = self.directory / f"{uuid.uuid4().hex}.safetensors"
            checked_tensors.save(path, {"sequence": sequences, "loss": losses})
        except OSError as error:
            raise UserError(
                f"The losses of the sequences cannot be kept: {error}. See preparation.directory."
            ) from error
        self._pending.clear()
        self._written = time.monotonic()


def measure_losses(
    model: Decoder,
    windows: Sequence[Ints],
    data: Batches,
    runtime: Runtime,
    monitor: RunMonitor,
    *,
    directory: Path,
    fingerprints: Mapping[str, str],
    title: str,
) -> Losses | None:
    """The loss of some windows of each source, read from the cache or measured and kept; None if a signal stopped it.

    Every rank must call it, and gets all of them. Which rows share a forward depends on neither the number of processes
    nor on what was measured before, so that equal weights give equal losses.

    Args:
        windows: of each source, in the order of `data.order.names`.
        directory: that of the caches of all weights.
        fingerprints: of the sources' tokens.
        title: of the progress line.
    """
    names, size, world = data.order.names, data.micro_batch_size, runtime.world_size
    arithmetic = f"{runtime.device.type} {runtime.compute_dtype}"
    texts = [(name, fingerprints[name], int(n)) for name, n in zip(names, data.order.windows, strict=True)]
    masked = data.filler().lengths is not None
    parts = [_VERSION, model_digest(model), arithmetic, torch.__version__, data.seq_len, masked, texts]
    cache = LossCache(directory / xxhash.xxh3_128_hexdigest(json.dumps(parts).encode()))
    firsts = np.cumsum([0, *data.order.windows])
    sequences = np.concatenate([first + each for first, each in zip(firsts, windows, strict=False)])
    losses = torch.zeros(len(sequences))

    def place_of(sequence: np.int64) -> tuple[str, int]:
        source = int(np.searchsorted(firsts, sequence, side="right")) - 1
        return names[source], int(sequence - firsts[source])

    def find() -> list[str]:
        found, damaged = cache.read(int(firsts[-1]))
        losses.copy_(torch.from_numpy(found[sequences]))
        return damaged

    for line in distributed.broadcast_from_rank0(find):
        monitor.message(line)
    distributed.reduce_sum(losses)  # the others hold zeros
    lacking = np.unique(losses.isnan().numpy().nonzero()[0] // size)  # numbers of micro-batches of `sequences`
    read = "read from" if not lacking.size else "measured, and kept in"
    model.eval()
    stopped = False
    for done in range(0, len(lacking), world):
        if stopped := monitor.should_stop():
            break
        # Every rank makes as many forwards, since a forward may be collective.
        now = lacking[done : done + world]
        mine = sequences[now[runtime.rank] * size :][:size] if runtime.rank < len(now) else sequences[:0]
        rows = [data.rows[name].row(index) for name, index in map(place_of, mine)] or [data.filler()]
        found = torch.zeros(world, size)
        found[runtime.rank, : len(mine)] = sequence_losses(model, make_batch(rows).to(runtime.device), runtime)[
            : len(mine)
        ].cpu()
        distributed.reduce_sum(found)
        for row, batch in zip(found, now, strict=False):
            chosen = sequences[batch * size :][:size]
            row = row[: len(chosen)]
            if not row.isfinite().all():
                name, index = place_of(chosen[int((~row.isfinite()).nonzero()[0])])
                where = data.rows[name].locate(index)
                raise WeightsNotFinite(f"{title}: the loss of {where} is not finite, so nothing can be drawn by it.")
            losses[batch * size : batch * size + len(chosen)] = row
            if runtime.rank == 0:
                cache.add(chosen, row.numpy())
        left = max(0, len(lacking) - done - world) * size
        monitor.working(f"{title}: loss of {max(0, len(sequences) - left):,}/{len(sequences):,} sequences")
    model.train()
    distributed.broadcast_from_rank0(cache.flush)
    if stopped:
        return None
    monitor.message(f"{title}: losses {read} {cache.directory}")
    return np.split(losses.numpy(), np.cumsum([len(each) for each in windows])[:-1])
