"""Batches of rows: this rank's part of an order that depends on neither ranks nor micro-batch size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, fields, replace
from threading import Thread
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from plmtune.data.order import Order, Phase, show_shares
from plmtune.modules.segments import Segments
from plmtune.modules.shared_sequence import SharedSequence
from plmtune.parallel.context import ContextShard

IGNORE = -100  # the target that no loss counts
_PATIENCE = 2.0  # seconds that a stop waits for a thread, which may hang in a read


@dataclass(frozen=True)
class Row:
    """One row of training data."""

    tokens: NDArray[np.int64]  # [s]
    targets: NDArray[np.int64]  # [s]; one of -100 is not counted
    # Tokens of each text in the row (attention does not cross texts), padding included; None: the row is one.
    lengths: tuple[int, ...] | None = None


class EncodedRows(Protocol):
    """Rows of ids: windows over token shards (`shards`), packed conversations (`packing`).

    seq_len: tokens of each row. num_tokens: of all rows, without padding.
    """

    @property
    def seq_len(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    def row(self, index: int) -> Row:
        """Return row `index`, always the same."""

    def locate(self, index: int) -> str:
        """Return where the row's text lies, for a person."""

    def describe(self) -> str:
        """Return how much there is, for a person."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens: Tensor  # [b, s] int64
    targets: Tensor  # [b, s] int64; one of -100 is not counted
    # Where the texts lie between which there is no attention; which part of each row this is; None: causal attention.
    mask: Segments | SharedSequence | None
    input_pos: Tensor | None  # [b, s] int64 positions inside those texts; None: 0 to s - 1
    num_valid: int  # targets that count, known without asking the device
    # [num_valid] int64, theirs in `targets.flatten()`, so that no other hidden state is multiplied with the vocabulary
    positions: Tensor | None = None  # None: all count
    # Of a teacher's most likely tokens at the targets that count: ids and log-probabilities, [num_valid, k], and the
    # log-probability of the other tokens together, [num_valid].
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    top_log_rest: Tensor | None = None

    def counted(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Select from hidden (Tensor), [b, s, d]: the hidden states [n, d] of the targets that count, and these [n]."""
        hidden, targets = hidden.flatten(0, 1), self.targets.flatten()
        return (hidden, targets) if self.positions is None else (hidden[self.positions], targets[self.positions])

    def part(self, shard: ContextShard) -> Batch:
        """Return the tokens that one of several processes has that share each row, see `ContextShard`."""
        assert self.top_ids is None and not isinstance(self.mask, SharedSequence)
        chunks = shard.chunks(self.tokens.shape[1])
        places = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
        targets = self.targets[:, places]
        positions = (targets.flatten() != IGNORE).nonzero()[:, 0]
        every = torch.arange(self.tokens.shape[1]).expand_as(self.tokens) if self.input_pos is None else self.input_pos
        return replace(
            self,
            tokens=self.tokens[:, places],
            targets=targets,
            mask=SharedSequence(chunks, shard.gather, self.mask),
            input_pos=every[:, places],
            num_valid=len(positions),
            positions=positions if len(positions) < targets.numel() else None,
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device, see `moved`."""
        return replace(self, mask=self.mask.to(device) if self.mask else None, **moved(self, device))


def moved(batch: Any, device: torch.device | str) -> dict[str, Any]:
    """Return the tensors of a batch on a device, by field; the copies may still be in progress."""
    # A copy from pageable memory to a GPU waits for all work that is queued there.
    pin = torch.device(device).type == "cuda" and batch.tokens.device.type == "cpu"
    return {
        field.name: (value.pin_memory() if pin else value).to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }


# From the rows of a micro-batch: further fields of its batch.
Attach = Callable[[Sequence[Row]], dict[str, Any]]


def make_batch(rows: Sequence[Row]) -> Batch:
    """Stack rows of one length; all have `lengths`, or none."""
    tokens, targets = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in ("tokens", "targets")
    )
    positions = (targets.flatten() != IGNORE).nonzero()[:, 0]
    num_valid = len(positions)
    mask = input_pos = None
    if rows[0].lengths is not None:
        mask = Segments.of(row.lengths or () for row in rows)
        starts = mask.offsets[:-1].long().repeat_interleave(mask.offsets.diff())
        input_pos = (torch.arange(len(starts)) - starts).view_as(tokens)
    return Batch(tokens, targets, mask, input_pos, num_valid, positions if num_valid < targets.numel() else None)


def _filled(rows: list[Row], count: int, example: Callable[[], Row]) -> list[Row]:
    """Return `count` rows; those that are added have no target that counts."""
    for _ in range(count - len(rows)):
        nothing = example()
        rows.append(replace(nothing, targets=np.full_like(nothing.targets, IGNORE)))
    return rows


class Batches:
    """The training data of one rank, by step, and its share of the validation data.

    Args:
        rows: sources by name; all with rows of one length.
        phases: see `Phase`.
        validation: held-out rows by source; a source may have none.
        global_batch_size: rows a step, over all ranks: a multiple of world_size.
        micro_batch_size: rows a forward; the last of a step may hold fewer.
        rank, world_size: this process takes the rank-th equal part of each step.
        num_workers: steps that are prepared ahead, each by a thread; 0: none. Rows are copied from mapped files and
            memory, which needs no processes.
        skip: samples of each source that the run of the init checkpoint has seen.
        context: the part of each row that this process has; None: all of it.
    """

    def __init__(
        self,
        rows: Mapping[str, EncodedRows],
        phases: Sequence[Phase],
        *,
        validation: Mapping[str, EncodedRows] | None = None,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        skip: Mapping[str, int] | None = None,
        context: ContextShard | None = None,
    ) -> None:
        if not rows:
            raise ValueError("a run needs at least one source of data")
        self.rows = {name: rows[name] for name in sorted(rows)}
        held_out = validation or {}
        self.held_out = [held_out[name] for name in self.rows if name in held_out]
        (self.seq_len,) = {source.seq_len for source in (*self.rows.values(), *self.held_out)}
        self.micro_batch_size, self.num_workers = micro_batch_size, num_workers
        self.attach: Attach | None = None
        self.context = context
        self.rank, self.world_size = rank, world_size
        self.order = Order(
            {name: source.num_rows for name, source in rows.items()},
            phases,
            global_batch_size=global_batch_size,
            seed=seed,
            skip=skip,
        )

    @property
    def num_steps(self) -> int:
        return self.order.num_steps

    def phase(self, step: int) -> Phase:
        return self.order.phases[self.order.phase_index(step)]

    def _mine(self, step: int) -> list[tuple[str, int]]:
        """Return (source, row) of each of this rank's sequences."""
        sources, windows = self.order.step(step)
        part = slice(*(rank * len(sources) // self.world_size for rank in (self.rank, self.rank + 1)))
        names = self.order.names
        return [(names[s], w) for s, w in zip(sources[part].tolist(), windows[part].tolist(), strict=True)]

    def locate(self, step: int, micro_batches: Collection[int] | None = None) -> list[str]:
        """Return where each of this rank's rows of a step, or of some micro-batches of it, lies, for messages about it.

        For example "runs/data/stdlib-ae3f084abd98/train-00003.bin, tokens 12,288 to 12,544".
        """
        size = self.micro_batch_size
        return [
            self.rows[name].locate(row)
            for index, (name, row) in enumerate(self._mine(step))
            if micro_batches is None or index // size in micro_batches
        ]

    def order_digest(self, previous: str, step: int) -> str:
        """Return the running hash of the order: of `previous` and all ranks' (source, window) of this step.

        Two runs with the same hash saw the same sequences in the same order, whatever their numbers of processes and
        micro-batch sizes.
        """
        names = "\0".join([previous, *self.order.names, ""])
        rows = np.stack(self.order.step(step)).astype("<i8")
        return xxhash.xxh3_128_hexdigest(names.encode() + rows.tobytes())

    def step(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step.

        Every rank gets the same number. In a last step with fewer rows, see `Order.step`, one may count nothing.
        """
        rows = [self.rows[name].row(index) for name, index in self._mine(step)]
        per_rank = -(-len(self.order.step(step)[0]) // self.world_size)
        example = next(source for source in self.rows.values() if source.num_rows)
        return list(self._batches(_filled(rows, per_rank, lambda: example.row(0)), self.attach))

    def iterate(self, start: int = 0) -> Generator[tuple[int, list[Batch]], None, None]:
        """Yield (step, micro-batches) from `start` to the end; threads, if any, prepare them ahead.

        An error in a thread is raised here, at its step. Closing the iterator ends the threads, and does not wait for
        one that hangs in a read.
        """
        if self.num_workers == 0:
            for step in range(start, self.num_steps):
                yield step, self.step(step)
            return

        def prepare(step: int, future: Future[list[Batch]]) -> None:
            try:
                future.set_result(self.step(step))
            except BaseException as error:  # raised below
                future.set_exception(error)

        ahead: deque[tuple[Thread, Future[list[Batch]]]] = deque()
        try:
            for step in range(start, self.num_steps):
                # What the next round draws is known only when its first step is due.
                for later in range(step + len(ahead), min(self.order.known_steps, step + 1 + self.num_workers)):
                    # Daemons, not an executor: the interpreter waits for an executor's threads, and one that hangs in a
                    # read would keep a stopped run alive.
                    future: Future[list[Batch]] = Future()
                    ahead.append((Thread(target=prepare, args=(later, future), name="batches", daemon=True), future))
                    ahead[-1][0].start()
                _, due = ahead.popleft()
                while not wait([due], timeout=1).done:
                    pass  # with a timeout: Python handles a signal that comes just before a wait only after it
                yield step, due.result()
        finally:
            deadline = time.monotonic() + _PATIENCE
            for thread, _ in ahead:
                thread.join(max(0.0, deadline - time.monotonic()))

    def validation(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """Yield this rank's share of the held-out rows, always in the same order.

        Without a limit every held-out target occurs once; with one the rows are spread evenly. Every rank gets the same
        number of batches, since a forward may be collective: where the rows do not divide, some count nothing.
        """
        total = sum(source.num_rows for source in self.held_out)
        wanted = total if max_tokens is None else min(total, max(1, max_tokens // self.seq_len))
        chosen = [i * total // wanted for i in range(wanted)]
        per_rank = -(-wanted // self.world_size)
        mine = chosen[self.rank * per_rank : (self.rank + 1) * per_rank]
        firsts = np.cumsum([0, *(source.num_rows for source in self.held_out)])

        def row(index: int) -> Row:
            which = int(np.searchsorted(firsts, index, side="right")) - 1
            return self.held_out[which].row(index - int(firsts[which]))

        yield from self._batches(_filled([row(index) for index in mine], per_rank, lambda: row(0)))

    def _batches(self, rows: Sequence[Row], attach: Attach | None = None) -> Iterator[Batch]:
        for first in range(0, len(rows), self.micro_batch_size):
            chosen = rows[first : first + self.micro_batch_size]
            batch = make_batch(chosen)
            if attach:
                batch = replace(batch, **attach(chosen))
            yield batch if self.context is None else batch.part(self.context)

    def distinct_rows(self, start: int = 0) -> list[tuple[str, int]]:
        """Return (source, row) of every row that the steps from `start` on read, on any rank, once and in order.

        Before all rounds are drawn these are all rows of the first, since each may be drawn again.
        """
        found: set[tuple[int, int]] = set()
        known = self.order.known_steps
        for step in range(start if known == self.num_steps else 0, known):
            found.update(zip(*(part.tolist() for part in self.order.step(step)), strict=True))
        return [(self.order.names[source], row) for source, row in sorted(found)]

    def filler(self) -> Row:
        """Return a row without a target that counts."""
        (row,) = _filled([], 1, lambda: next(source for source in self.rows.values() if source.num_rows).row(0))
        return row

    def epochs(self) -> dict[str, float]:
        """Return how often the run sees each row of a source."""
        drawn = np.sum([self.order.counts(index) for index in range(len(self.order.phases))], axis=0)
        rows = self.order.windows
        return {name: int(drawn[i]) / int(rows[i]) for i, name in enumerate(self.order.names)}

    def describe(self) -> str:
        """Return a line a source and a line a phase for a person."""
        lines = [
            f"{name}: {self.rows[name].describe()}, seen {epochs:.2f} times" for name, epochs in self.epochs().items()
        ]
        for index, phase in enumerate(self.order.phases):
            tokens = self.order.num_sequences(index) * self.seq_len
            mix = show_shares(self.order.shares(index), self.order.weights(index))
            lines.append(f"phase {phase.name}: {phase.steps:,} steps, {tokens:,} tokens ({mix})")
        return "\n".join(lines)
