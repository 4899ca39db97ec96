"""Batches of packed windows: this rank's slices of an order that no rank or batch size can change."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from plmtune.data.order import Order, Phase
from plmtune.data.shards import Shards
from plmtune.errors import UserError

IGNORE = -100  # the target that no loss counts
_PATIENCE = 2.0  # seconds that a stop waits for a thread, which may hang in a read of a dead file system


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    tokens, targets: [b, s] int64; a target of -100 is not counted.
    mask: [b, s, s] bool, True where a query (row) may attend, or None for plain causal attention.
    input_pos: [b, s] int64 positions inside documents, or None for 0 to s - 1.
    num_valid: targets that count, known without asking the device.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor | None
    input_pos: Tensor | None
    num_valid: int

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device; the copy may still be under way."""
        # From pageable memory a copy to a GPU would first wait for all work that is queued there.
        pin = torch.device(device).type == "cuda"
        move = {
            name: (value.pin_memory() if pin else value).to(device, non_blocking=True)
            for name in ("tokens", "targets", "mask", "input_pos")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **move)


def make_batch(tokens: Tensor, targets: Tensor, *, eos_id: int | None) -> Batch:
    """Make a batch of rows; with `eos_id` documents do not see each other.

    An end-of-document token belongs to the document that it ends. Positions start again behind it, and what
    it would predict, the first token of another document, is not counted.

    Args:
        tokens, targets: [b, s] int64.
        eos_id: None: rows are one text, and each eos predicts the next document's first token.
    """
    if eos_id is None:
        return Batch(tokens, targets, None, None, int((targets != IGNORE).sum()))
    ends = tokens == eos_id
    document = ends.cumsum(1) - ends.long()  # [b, s]: documents that ended before this token
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    behind_end = torch.zeros_like(tokens)
    behind_end[:, 1:] = torch.where(ends[:, :-1], places[:, 1:], 0)
    input_pos = places - behind_end.cummax(1).values
    mask = (document[:, :, None] == document[:, None, :]).tril()
    targets = targets.masked_fill(ends, IGNORE)
    return Batch(tokens, targets, mask, input_pos, int((targets != IGNORE).sum()))


class Batches:
    """The training data of one rank, any step at once, and its share of the validation data.

    Args:
        shards: sources by name; all by one tokenizer.
        phases: see `Phase`.
        seq_len: tokens a sequence.
        global_batch_size: sequences a step, over all ranks.
        micro_batch_size: sequences a forward; the last of a step may hold fewer.
        seed: of the order.
        rank, world_size: this process takes the rank-th equal part of each step.
        document_mask: keep attention and counted targets inside documents.
        num_workers: threads that prepare steps ahead; 0: none. They only copy out of mapped files, which
            needs no process of its own.
        skip: sequences of each source to pass over, as seen by the run that this one goes on from.

    Raises:
        ValueError: for sizes that do not divide, a mix that cannot be (see `Order`).
        UserError: for a source too short for a single sequence.
    """

    def __init__(
        self,
        shards: Mapping[str, Shards],
        phases: Sequence[Phase],
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        document_mask: bool = False,
        num_workers: int = 0,
        skip: Mapping[str, int] | None = None,
    ) -> None:
        sizes = {
            "seq_len": seq_len,
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers ({num_workers}) must be at least 0")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank ({rank}) must be below world_size ({world_size})")
        if global_batch_size % world_size:
            raise ValueError(f"global_batch_size ({global_batch_size}) must be a multiple of world_size ({world_size})")
        if not shards:
            raise ValueError("a run needs at least one source of data")
        if len({(s.manifest.tokenizer, s.eos_id) for s in shards.values()}) > 1:
            raise ValueError(f"the sources {', '.join(sorted(shards))} come from different tokenizers")
        for name, source in shards.items():
            if source.train.num_windows(seq_len) < 1:
                raise UserError(
                    f"Source {name} ({source.directory}) has {source.train.num_tokens:,} training tokens, "
                    f"too few for seq_len={seq_len} and its last target. Give more text or a shorter seq_len"
                )
        self.shards = {name: shards[name] for name in sorted(shards)}
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.order = Order(
            {name: source.train.num_windows(seq_len) for name, source in shards.items()},
            phases,
            global_batch_size=global_batch_size,
            seed=seed,
            skip=skip,
        )
        self.eos_id = next(iter(shards.values())).eos_id
        self._document_eos = self.eos_id if document_mask else None

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.order.num_steps

    def drawn_before(self, step: int) -> dict[str, int]:
        """Return the sequences that the run drew from each source before a step."""
        return self.order.drawn_before(step)

    def phase(self, step: int) -> Phase:
        """Return the phase of a step."""
        return self.order.phases[self.order.phase_index(step)]

    def _mine(self, step: int) -> list[tuple[str, int]]:
        """Return (source, window) of each of this rank's sequences."""
        sources, windows = self.order.step(step)
        per_rank = self.order.global_batch_size // self.world_size
        part = slice(self.rank * per_rank, (self.rank + 1) * per_rank)
        names = self.order.names
        return [(names[s], w) for s, w in zip(sources[part].tolist(), windows[part].tolist(), strict=True)]

    def places(self, step: int, micro_batches: Collection[int] | None = None) -> list[str]:
        """Return where each of this rank's sequences of a step lies, for messages about a bad step.

        Such as "runs/data/stdlib-ae3f084abd98/train-00003.bin, tokens 12,288 to 12,544": counted from 0 inside the
        file; the last one is only a target. A sequence that spans files names each.

        Args:
            micro_batches: the indices of those that are asked for; None: all.
        """
        size = self.micro_batch_size
        return [
            ", and ".join(
                f"{self.shards[name].directory / file}, tokens {first:,} to {last:,}"
                for file, first, last in self.shards[name].train.locate(window, self.seq_len)
            )
            for index, (name, window) in enumerate(self._mine(step))
            if micro_batches is None or index // size in micro_batches
        ]

    def order_digest(self, previous: str, step: int) -> str:
        """Return the running hash of the order: of `previous` and all ranks' (source, window) of this step.

        Two runs that began with the same `previous` and have the same hash saw the same sequences in the same order,
        whatever the number of processes and the sizes of their micro-batches.
        """
        sources, windows = self.order.step(step)
        names = "\0".join([previous, *self.order.names, ""])
        rows = np.stack([sources, windows]).astype("<i8")
        return xxhash.xxh3_128_hexdigest(names.encode() + rows.tobytes())

    def step(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step, whatever was asked before."""
        rows = [self.shards[name].train.window(window, self.seq_len) for name, window in self._mine(step)]
        return list(self._batches(rows))

    def iterate(self, start: int = 0) -> Generator[tuple[int, list[Batch]], None, None]:
        """Yield (step, micro-batches) from `start` to the end, made ahead by threads if there are any.

        An error in a thread is raised here, at its step. Closing the iterator ends the threads, and a thread that
        hangs in a read keeps no one waiting.
        """
        if self.num_workers == 0:
            for step in range(start, self.num_steps):
                yield step, self.step(step)
            return
        # Daemons, not an executor: the interpreter would not end before an executor's threads have, and one that
        # hangs in a read would keep a stopped run alive.
        asked: SimpleQueue[tuple[int, Future[list[Batch]]] | None] = SimpleQueue()
        threads = [
            Thread(target=self._serve, args=(asked,), name=f"batches-{index}", daemon=True)
            for index in range(self.num_workers)
        ]
        for thread in threads:
            thread.start()
        ahead: deque[Future[list[Batch]]] = deque()
        try:
            for step in range(start, self.num_steps):
                for later in range(step + len(ahead), min(self.num_steps, step + 2 * self.num_workers)):
                    ahead.append(Future())
                    asked.put((later, ahead[-1]))
                due = ahead.popleft()
                while not wait([due], timeout=1).done:
                    pass  # in turns: a signal that comes just before a wait is heard only after it
                yield step, due.result()
        finally:
            for future in ahead:
                future.cancel()
            for _ in threads:
                asked.put(None)
            deadline = time.monotonic() + _PATIENCE
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self, asked: SimpleQueue[tuple[int, Future[list[Batch]]] | None]) -> None:
        """Make the steps that are asked for until None is."""
        while task := asked.get():
            step, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self.step(step))
            except BaseException as error:  # raised where the step is waited for
                future.set_exception(error)

    def validation(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """Yield this rank's share of the held-out tokens, in an order that is always the same.

        Without a limit every held-out token but each source's first is a target once; the last sequence of
        a source is filled up with targets that do not count. With a limit the sequences are spread evenly.
        Every rank gets equally many batches, since they may have to meet in each forward: where the sequences
        do not divide, some rows count nothing.
        """
        counts = [-(-max(0, s.validation.num_tokens - 1) // self.seq_len) for s in self.shards.values()]
        total = sum(counts)
        wanted = total if max_tokens is None else min(total, max(1, max_tokens // self.seq_len))
        chosen = [i * total // wanted for i in range(wanted)]
        per_rank = -(-wanted // self.world_size)
        mine = chosen[self.rank * per_rank : (self.rank + 1) * per_rank]
        firsts = np.cumsum([0, *counts])
        splits = [source.validation for source in self.shards.values()]

        def row(index: int) -> NDArray[np.int64]:
            which = int(np.searchsorted(firsts, index, side="right")) - 1
            start = (index - int(firsts[which])) * self.seq_len
            return splits[which].read(start, start + self.seq_len + 1)

        nothing = np.empty(0, dtype=np.int64)
        rows = [row(index) for index in mine] + [nothing] * (per_rank - len(mine))
        yield from self._batches(rows)

    def _batches(self, rows: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """Stack rows of at most seq_len + 1 tokens; what shorter ones lack does not count."""
        for first in range(0, len(rows), self.micro_batch_size):
            group = rows[first : first + self.micro_batch_size]
            tokens = np.full((len(group), self.seq_len), self.eos_id, dtype=np.int64)
            targets = np.full((len(group), self.seq_len), IGNORE, dtype=np.int64)
            for i, row in enumerate(group):
                length = max(0, row.size - 1)
                tokens[i, :length] = row[:-1]
                targets[i, :length] = row[1:]
            yield make_batch(torch.from_numpy(tokens), torch.from_numpy(targets), eos_id=self._document_eos)

    def epochs(self) -> dict[str, float]:
        """Return how often the run sees each source."""
        drawn, windows = self.order.drawn - self.order.skipped, self.order.windows
        return {name: int(drawn[i]) / int(windows[i]) for i, name in enumerate(self.order.names)}

    def describe(self) -> str:
        """Return a line a source and a line a phase for a person."""
        lines = [
            f"{name}: {self.shards[name].train.num_tokens:,} tokens, seen {epochs:.2f} times"
            for name, epochs in self.epochs().items()
        ]
        for index, phase in enumerate(self.order.phases):
            tokens = phase.steps * self.order.global_batch_size * self.seq_len
            shares = self.order.shares(index).items()
            mix = ", ".join(f"{name} {share:.1%}" for name, share in shares if share)
            lines.append(f"phase {phase.name}: {phase.steps:,} steps, {tokens:,} tokens ({mix})")
        return "\n".join(lines)
