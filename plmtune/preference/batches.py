"""The order of preference training: which comparisons a step takes, and how ranks and micro-batches divide them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from plmtune.data.order import key_of, num_samples, permute
from plmtune.data.packing import pack
from plmtune.data.preferences import Pair
from plmtune.errors import UserError
from plmtune.io.terminal import track
from plmtune.losses.preference import MISMATCHED, PreferenceLoss
from plmtune.preference.comparisons import Comparison, ComparisonBatch, make_batch, make_comparisons
from plmtune.preference.refinement import Refinement
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.training.runtime import Runtime
from plmtune.units import show_number_of

Ints = NDArray[np.int64]

_TOKENS = 4096  # of a batch of `PreferenceBatches.all`, unless one row is longer


def open_batches(
    pairs: Sequence[Pair],
    template: ChatTemplate,
    refinement: Refinement,
    loss: PreferenceLoss,
    runtime: Runtime,
    *,
    seq_len: int,
    rope_key: Callable[[int], object],
    **settings: Any,
) -> tuple[PreferenceBatches, list[str]]:
    """The batches that a loss needs of pairs, with `settings` of `PreferenceBatches`, and notes on what is left out.

    Args:
        rope_key: the model's.
    """
    comparisons, refused, notes = make_comparisons(
        track(pairs, "pairs encoded", shown=runtime.is_main),
        template,
        refinement,
        seq_len,
        contexts=loss.contexts,
        mismatched=loss.mismatched,
        rope_key=rope_key,
    )
    if refused:
        left_out = show_number_of(len(refused), "comparison" if loss.contexts else "pair")
        notes.append(f"{left_out} left out:\n{refused.describe()}")
    if not comparisons:
        raise UserError("None of the pairs can be trained on.\n" + "\n".join(notes))
    batches = PreferenceBatches(
        comparisons,
        seq_len=seq_len,
        rank=runtime.data_rank,
        world_size=runtime.data_world_size,
        as_trained=runtime.compute_dtype != torch.float32,
        **settings,
    )
    return batches, notes


class PreferenceBatches:
    """The comparisons of one rank, with access to any step.

    The pairs of a step are a pure function of (seed, step): each epoch is a permutation of all pairs. All comparisons
    of a pair are in one step. Ranks and micro-batches divide the same global step: each comparison goes to the rank
    with the fewest tokens so far, and every rank has the same number of micro-batches, because ranks may communicate in
    each forward. Mismatched comparisons come first in a step, in micro-batches of their own.

    Args:
        seq_len: rows hold up to 2 * seq_len tokens.
        global_batch_size: pairs a step, over all ranks.
        micro_batch_size: rows a forward; the last of a step may hold fewer.
        seed: of the order.
        epochs: passes over the pairs; the last step may be smaller.
        holdout: share of the pairs kept for validation; pairs with one prompt stay together.
        as_trained: `all` yields the batches of the first epoch's steps instead of batches that do not depend on
            micro_batch_size and the number of ranks. In bf16 rounding depends on a batch's shape (see
            `benchmarks/rounding.py`).
    """

    def __init__(
        self,
        comparisons: Sequence[Comparison],
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        epochs: float = 1.0,
        holdout: float = 0.0,
        as_trained: bool = False,
    ) -> None:
        self.comparisons, self.row_len = comparisons, 2 * seq_len
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.seed, self.rank, self.world_size, self.as_trained = seed, rank, world_size, as_trained
        self._lengths = [comparison.num_tokens for comparison in comparisons]
        assert max(self._lengths, default=0) <= self.row_len
        members: dict[int, list[int]] = {}
        for index, comparison in enumerate(comparisons):
            members.setdefault(comparison.pair, []).append(index)
        self._members = list(members.values())  # the comparisons of each pair
        self._held = self._hold_out(holdout)
        held = set(self._held)
        self._train = np.array([pair for pair in range(len(self._members)) if pair not in held], dtype=np.int64)
        if not self._train.size:
            raise UserError("There is no preference pair to train on. Give other data, or a longer seq_len")
        # Over all steps; the last step may be smaller.
        self._drawn = num_samples(epochs, self._train.size)
        self.num_steps = -(-self._drawn // global_batch_size)

    @property
    def num_pairs(self) -> tuple[int, int]:
        """Pairs to train on, and pairs held out."""
        return self._train.size, len(self._held)

    def step(self, step: int) -> list[ComparisonBatch]:
        """Return this rank's micro-batches of a step."""
        return list(self._batches(self._pairs(step).tolist()))

    def iterate(self, start: int = 0) -> Iterator[tuple[int, list[ComparisonBatch]]]:
        """Yield (step, micro-batches) from `start` to the end."""
        for step in range(start, self.num_steps):
            yield step, self.step(step)

    def validation(self) -> Iterator[ComparisonBatch]:
        """Yield this rank's share of the held-out pairs, in an order that is always the same."""
        yield from self._batches(self._held)

    def all(self) -> Iterator[ComparisonBatch]:
        """Yield this rank's share of every comparison of all steps and the validation, each once over all ranks.

        The batches are dealt to the ranks one by one, and a batch depends neither on micro_batch_size nor on the number
        of ranks. So numbers that are computed from them are equal to the last digit wherever a run is resumed.
        With `as_trained` they are the batches of the first epoch and of the validation. Where the last step of the
        epoch continues with the second epoch, or has a pair twice, those comparisons come twice.
        """
        if self.as_trained:
            for step in range(min(self.num_steps, -(-self._train.size // self.global_batch_size))):
                yield from self.step(step)
            yield from self.validation()
            return
        drawn = [self._pairs(step) for step in range(self.num_steps)]
        pairs = sorted({*np.concatenate(drawn).tolist(), *self._held})
        size = max(1, _TOKENS // self.row_len)
        for kl_only in (True, False):
            rows = self._pack(sorted(self._members_of(pairs, kl_only), key=lambda index: -self._lengths[index]))
            batches = [rows[at : at + size] for at in range(0, len(rows), size)]
            batches += [[]] * (-len(batches) % self.world_size)  # ranks may have to meet in each forward
            for mine in batches[self.rank :: self.world_size]:
                yield make_batch(self.comparisons, mine, kl_only=kl_only)

    def locate(self, step: int, micro_batches: Collection[int] | None = None) -> list[str]:
        """Return the places of the pairs of this rank's comparisons of a step, for messages about a bad step.

        micro_batches: indices among those that are not kl_only; None: all.
        """
        found = {
            self.comparisons[index].place: None
            for number, rows in enumerate(self._divide(self._pairs(step).tolist(), kl_only=False))
            if micro_batches is None or number in micro_batches
            for row in rows
            for index in row
        }
        return list(found)

    def order_digest(self, previous: str, step: int) -> str:
        """Return the running hash of the order: over `previous` and the pairs of this step on all ranks."""
        return xxhash.xxh3_128_hexdigest(previous.encode() + b"\0" + self._pairs(step).astype("<i8").tobytes())

    def describe(self) -> str:
        train, held = self.num_pairs
        each = len(self.comparisons) / len(self._members)
        mean = sum(self._lengths) / len(self._members)
        a_step = min(self.global_batch_size, self._drawn)
        often = f" (fewer pairs than global_batch_size: each is seen {a_step / train:.3g} times in a step)"
        return (
            f"{show_number_of(train, 'pair')}, seen {self._drawn / train:.2f} times, {held:,} held out; "
            f"{each:.2g} comparison{'' if each == 1 else 's'} and {mean:,.0f} tokens a pair\n"
            f"{show_number_of(self.num_steps, 'step')} of {show_number_of(self.global_batch_size, 'pair')}"
            f"{often if train < a_step else ''}"
        )

    def _pairs(self, step: int) -> Ints:
        """Return the pairs of a step, over all ranks."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        first = step * self.global_batch_size
        drawn = np.arange(first, min(first + self.global_batch_size, self._drawn))
        epoch, place = np.divmod(drawn, self._train.size)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            place[here] = permute(place[here], self._train.size, key_of(self.seed, "pairs", e))
        return self._train[place]

    def _hold_out(self, holdout: float) -> list[int]:
        """Choose the pairs for validation by a hash of their prompts, so that no prompt is on both sides."""
        wanted = round(holdout * len(self._members)) or int(holdout > 0)
        if not wanted:
            return []
        by_prompt: dict[int, list[int]] = {}
        for pair, members in enumerate(self._members):
            key = xxhash.xxh3_64_intdigest(self.comparisons[members[0]].prompt.tobytes())
            by_prompt.setdefault(key, []).append(pair)
        # A prompt with very many pairs could exceed the share by far, or leave nothing to train on.
        most = min(max(2 * wanted, min(map(len, by_prompt.values()))), len(self._members) - 1)
        held: list[int] = []
        for _, group in sorted(by_prompt.items()):
            if len(held) < wanted and len(held) + len(group) <= most:
                held += group
        return sorted(held)

    def _batches(self, pairs: Collection[int]) -> Iterator[ComparisonBatch]:
        for kl_only in (True, False):
            for rows in self._divide(pairs, kl_only=kl_only):
                yield make_batch(self.comparisons, rows, kl_only=kl_only)

    def _divide(self, pairs: Collection[int], *, kl_only: bool) -> list[list[list[int]]]:
        """Return the rows of this rank's micro-batches: those of mismatched comparisons, or the others."""
        ranks = self._pack_ranks(self._members_of(pairs, kl_only))
        size = self.micro_batch_size
        number = max(-(-len(rows) // size) for rows in ranks)
        return [ranks[self.rank][size * i : size * (i + 1)] for i in range(number)]

    def _members_of(self, pairs: Collection[int], kl_only: bool) -> list[int]:
        """Return the comparisons of some pairs: the mismatched ones, or the others."""
        every = (index for pair in pairs for index in self._members[pair])
        return [index for index in every if (self.comparisons[index].kind == MISMATCHED) is kl_only]

    def _pack_ranks(self, chosen: list[int]) -> list[list[list[int]]]:
        """Divide comparisons among the ranks, with about equal numbers of tokens, and pack each rank's into rows."""
        loads = [(0, rank) for rank in range(self.world_size)]
        dealt: list[list[int]] = [[] for _ in loads]
        for index in sorted(chosen, key=lambda index: -self._lengths[index]):
            load, rank = loads[0]
            dealt[rank].append(index)
            heapq.heapreplace(loads, (load + self._lengths[index], rank))
        return [self._pack(mine) for mine in dealt]

    def _pack(self, chosen: list[int]) -> list[list[int]]:
        """Pack comparisons, longest first, into rows, fullest first: a micro-batch is as long as its longest row."""
        rows: dict[int, list[int]] = {}
        numbers = pack(np.array([self._lengths[index] for index in chosen], dtype=np.int64), self.row_len)
        for index, number in zip(chosen, numbers.tolist(), strict=True):
            rows.setdefault(number, []).append(index)
        return sorted(rows.values(), key=lambda row: -sum(self._lengths[index] for index in row))
