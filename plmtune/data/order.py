"""The order of a run: which window of which source each step trains on, a pure function of (seed, step).

No generator has a state, and nothing depends on numpy's streams, which may change between versions: every permutation
is a Feistel network over xxh3 keys, computed for single indices. Any step is computed directly, in constant memory at
any size of corpus, and a run resumes from its step alone. (Counting the samples of a part of an epoch takes 8 bytes a
sequence.)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from plmtune.errors import did_you_mean

Ints = NDArray[np.int64]

BLOCK = 1024  # sequences whose order is computed at once
_ROUNDS = 8


@dataclass(frozen=True)
class Phase:
    """`steps` optimizer steps with one mix of sources; an empty mix weighs them by size.

    epochs: replaces a mix: how often every sequence of every source is sampled, see `over`.
    round: above 1 the phase samples what `Order.set_draw` gives it, in the shares that round 1 sampled the sources in.
    """

    name: str
    steps: int
    mix: dict[str, float] = field(default_factory=dict)
    epochs: float | None = None
    round: int = 1

    @classmethod
    def over(cls, epochs: float, num_sequences: int, global_batch_size: int) -> Phase:
        """Return a run's only phase: `epochs` passes over all its sequences; the last step may be smaller.

        The last pass of 2.5 samples half of them.
        """
        return cls("main", math.ceil(num_samples(epochs, num_sequences) / global_batch_size), epochs=epochs)


def num_samples(epochs: float, num_sequences: int) -> int:
    """Return how many sequences `epochs` passes over `num_sequences` sample."""
    return max(1, math.ceil(epochs * num_sequences - 1e-9))


def key_of(*parts: object) -> int:
    """Return a 64-bit key of the parts' text."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, parts)).encode())


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele et al. 2014): each input bit affects each output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Ints, n: int, key: int) -> Ints:
    """Map each index ([k] int64) in [0, n) to its image under the permutation of [0, n) that `key` selects.

    A Feistel network is a bijection on the next power of four whatever its round function is; an image of n
    or above is mapped again until it falls below (cycle walking, Black and Rogaway 2002): on average 4 times
    at worst.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    counters = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    round_keys = mix64(counters ^ np.uint64(key))
    out = index.astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        x = out[todo]
        left, right = x >> half, x & low
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key) & low)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """Divide `total` in proportion by largest remainders, with at least 1 for each weight above 0.

    If `total` is below their number, the largest weights get 1.
    """
    shares = {index: Fraction(str(weight)) for index, weight in enumerate(weights) if weight}  # 0.1 is a tenth
    counts = [0] * len(weights)
    by_weight = sorted(shares, key=lambda index: -shares[index])
    if len(shares) >= total:
        for index in by_weight[:total]:
            counts[index] = 1
        return counts
    while True:  # these get 1 whatever their weight; the others divide the rest
        scale = total / sum(shares.values())
        small = [index for index, share in shares.items() if share * scale < 1]
        for index in small:
            counts[index] = 1
            del shares[index]
        total -= len(small)
        if not small:
            break
    for index, share in shares.items():
        counts[index] = math.floor(share * scale)
    missing = total - sum(counts[index] for index in shares)
    for index in sorted(shares, key=lambda index: counts[index] - shares[index] * scale)[:missing]:
        counts[index] += 1
    return counts


@lru_cache(maxsize=128)
def _halves(counts: tuple[int, ...], left: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide the counts of a stretch among its first `left` sequences and the others, by largest remainders."""
    total = sum(counts)
    first, rests = zip(*(divmod(count * left, total) for count in counts), strict=True)
    larger = {*sorted(range(len(counts)), key=lambda index: -rests[index])[: left - sum(first)]}
    here = tuple(count + (index in larger) for index, count in enumerate(first))
    return here, tuple(count - taken for count, taken in zip(counts, here, strict=True))


def _counts_of(counts: tuple[int, ...], block: int) -> tuple[Ints, tuple[int, ...]]:
    """Return how many sequences of each source are before a block of a phase, and how many in it.

    The phase's counts are halved repeatedly, down to the block, so the counts of all blocks sum up to the phase's
    exactly and no other block is kept.
    """
    before = np.zeros(len(counts), dtype=np.int64)
    while (total := sum(counts)) > BLOCK:
        middle = -(-total // BLOCK) // 2
        here, there = _halves(counts, middle * BLOCK)
        if block < middle:
            counts = here
        else:
            before += np.array(here)
            counts, block = there, block - middle
    return before, counts


@lru_cache(maxsize=16)
def _layout_of(counts: tuple[int, ...], key: int) -> tuple[Ints, Ints]:
    """Return for each place of a block its source, and how many of that source precede it in the block.

    The k-th of a source's n falls at random into the k-th n-th of the block, so each step is near the shares, too.
    """
    source = np.repeat(np.arange(len(counts)), counts)
    before = np.concatenate([np.arange(count) for count in counts])
    size = np.array(counts, dtype=np.uint64)[source]
    drawn = mix64(np.arange(source.size, dtype=np.uint64) ^ np.uint64(key)) >> np.uint64(32)
    place = ((before.astype(np.uint64) << np.uint64(32)) + drawn) // size
    order = np.argsort(place, kind="stable")
    return source[order], before[order]


def check_mix(phase: Phase, sources: Sequence[str], num_sequences: int) -> None:
    """Check the mix of a phase, ValueError; one without weights takes all sources by size."""
    for name, weight in phase.mix.items():
        if name not in sources:
            near = did_you_mean(name, sources)
            raise ValueError(f"phase {phase.name}: its mix names {name}, which is no source.{near}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"phase {phase.name}: the weight of {name} is {weight}, not 0 or more")
    drawn = {name: weight for name, weight in phase.mix.items() if weight > 0}
    if phase.mix and not drawn:
        raise ValueError(f"phase {phase.name}: all weights of its mix are 0")
    if len(drawn) > num_sequences:
        counts = zip(drawn, quotas(list(drawn.values()), num_sequences), strict=True)
        left = [name for name, count in counts if not count]
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ValueError(
            f"phase {phase.name}: its mix has {len(drawn)} sources, more than its sequences ({num_sequences}), so that "
            f"nothing is drawn from {', '.join(left[:3])}{more}. Give it more steps, or these the weight 0"
        )


def show_shares(counts: Mapping[str, float], weights: Mapping[str, float]) -> str:
    """Return the share of each source with a weight, and the one that its weight asks for if they differ.

    `counts` are of sequences, or shares.
    """

    def percent(share: float) -> str:  # with one decimal place, or as many as the first digit needs
        return f"{share:.1%}" if share >= 0.0005 or not share else f"{100 * share:.1g}%"

    drawn, asked = sum(counts.values()), sum(weights.values())
    parts = []
    for name, weight in weights.items():
        if weight:
            share, wanted = percent(counts[name] / drawn), percent(weight / asked)
            parts.append(f"{name} {share}" + (f" instead of {wanted}" if share != wanted else ""))
    return ", ".join(parts)


def show_mix(mix: Mapping[str, float], num_sequences: int) -> str:
    """Return the shares of a phase's mix; empty without a mix or sequences."""
    weights = {name: weight for name, weight in sorted(mix.items()) if weight > 0}
    if not weights or num_sequences < 1:
        return ""
    counts = quotas(list(weights.values()), num_sequences)
    return show_shares(dict(zip(weights, counts, strict=True)), weights)


class Order:
    """The whole run's order of (source, window); `windows` are their numbers, other arguments those of `Batches`."""

    def __init__(
        self,
        windows: Mapping[str, int],
        phases: Sequence[Phase],
        *,
        global_batch_size: int,
        seed: int,
        skip: Mapping[str, int] | None = None,
    ) -> None:
        if not phases:
            raise ValueError("a run needs at least one phase")
        self.names = sorted(windows)  # whatever the order in the config
        self.windows = np.array([windows[name] for name in self.names], dtype=np.int64)
        self.phases = list(phases)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.skipped = np.array([(skip or {}).get(name, 0) for name in self.names], dtype=np.int64)
        # A block is computed at once and cached: numpy's cost of a call is large for a few windows.
        self._block = lru_cache(maxsize=16)(self._compute_block)
        self.first_steps = [0]  # of each phase, and the step after the last
        self._quotas: list[tuple[int, ...]] = []  # sequences of each source in a phase, where it has a mix
        self._draws: dict[int, list[Ints]] = {}  # of a later round's phase: the windows of each source, in their order
        # Samples of each source before each phase: an epoch continues over the end of a phase.
        self._samples_before = [self.skipped]
        for index, phase in enumerate(self.phases):
            if phase.steps < 1:
                raise ValueError(f"phase {phase.name} has {phase.steps} steps; it needs at least 1")
            assert phase.epochs is None or (len(self.phases) == 1 and not phase.mix and not self.skipped.any())
            if not phase.mix and not self.windows.any():
                raise ValueError(
                    f"no source has a whole window ({', '.join(self.names)}), and phase {phase.name} goes over all"
                )
            self._quotas.append(self._divide(index))
            counted = self._counts(index, self.num_sequences(index)) if phase.round == 1 else 0
            self._samples_before.append(self._samples_before[-1] + counted)
            self.first_steps.append(self.first_steps[-1] + phase.steps)
        for index in np.flatnonzero((self.drawn > 0) & (self.windows < 1))[:1]:
            raise ValueError(f"source {self.names[index]} has no whole window, yet a phase's mix draws from it")

    @property
    def num_steps(self) -> int:
        return self.first_steps[-1]

    @property
    def drawn(self) -> Ints:
        """Samples of each source in round 1, and the skipped ones."""
        return self._samples_before[-1]

    @property
    def known_steps(self) -> int:
        """The steps before the first round that is not drawn yet."""
        later = (index for index, phase in enumerate(self.phases) if phase.round > 1 and index not in self._draws)
        return self.first_steps[next(later, len(self.phases))]

    def counts(self, index: int) -> list[int]:
        """Return how many sequences of each source a phase samples."""
        return [int(count) for count in self._counts(index, self.num_sequences(index))]

    def first_round(self) -> list[Ints]:
        """Return the windows of each source that round 1 samples, ascending and each once.

        It may begin within an epoch, so that n samples are of two epochs and may repeat some of the n windows.
        """
        found = []
        for name, n, first, stop in zip(self.names, self.windows.tolist(), self.skipped, self.drawn, strict=True):
            if stop >= (-(-first // max(n, 1)) + 1) * n:  # a whole epoch
                found.append(np.arange(n))
                continue
            epoch, window = np.divmod(np.arange(first, stop), n)
            for e in np.unique(epoch).tolist():
                window[epoch == e] = permute(window[epoch == e], n, key_of(self.seed, name, e))
            found.append(np.unique(window))
        return found

    def set_draw(self, index: int, windows: Sequence[Ints]) -> None:
        """Say which windows of each source the phase of a later round samples, in their order: `counts` of each."""
        assert self.phases[index].round > 1 and [len(drawn) for drawn in windows] == self.counts(index)
        self._draws[index] = list(windows)

    def samples_seen(self, step: int) -> dict[str, int]:
        """Return the samples of each source before a step, including the skipped ones.

        Those of later rounds do not count: round 1 sampled them.
        """
        index = min(bisect_right(self.first_steps, step) - 1, len(self.phases) - 1)
        first = min((step - self.first_steps[index]) * self.global_batch_size, self.num_sequences(index))
        drawn = self._samples_before[index] + (self._counts(index, first) if self.phases[index].round == 1 else 0)
        return {name: int(count) for name, count in zip(self.names, drawn, strict=True)}

    def num_samples_seen(self, step: int) -> int:
        """Return the samples of all sources before a step."""
        return min(step * self.global_batch_size, sum(self.num_sequences(index) for index in range(len(self.phases))))

    def phase_index(self, step: int) -> int:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        return bisect_right(self.first_steps, step) - 1

    def shares(self, index: int) -> dict[str, float]:
        """Return the share of each source in a phase."""
        counts = self.counts(index)
        return {name: count / sum(counts) for name, count in zip(self.names, counts, strict=True)}

    def weights(self, index: int) -> dict[str, float]:
        """Return the weight of each source in a phase; without a mix its size, in later rounds its part of round 1."""
        sizes = self.windows if self.phases[index].round == 1 else self._samples_before[index] - self.skipped
        mix = self.phases[index].mix or dict(zip(self.names, sizes.tolist(), strict=True))
        return {name: float(mix.get(name, 0)) for name in self.names}

    def step(self, step: int) -> tuple[Ints, Ints]:
        """Return the step's sequences as (index into `names`, window), each [global_batch_size].

        The last step of a phase by epochs may have fewer.
        """
        index = self.phase_index(step)
        first = (step - self.first_steps[index]) * self.global_batch_size
        stop = min(first + self.global_batch_size, self.num_sequences(index))
        sources, windows = [], []
        for block in range(first // BLOCK, (stop - 1) // BLOCK + 1):
            part = slice(max(0, first - block * BLOCK), min(BLOCK, stop - block * BLOCK))
            source, window = self._block(index, block)
            sources.append(source[part])
            windows.append(window[part])
        return np.concatenate(sources), np.concatenate(windows)

    def _compute_block(self, phase: int, block: int) -> tuple[Ints, Ints]:
        """Return the (source, window) of each place of a block."""
        if self.phases[phase].epochs is not None:
            return self._shuffled(np.arange(block * BLOCK, (block + 1) * BLOCK))
        drawn, (source, before) = self._layout(phase, block)
        if self.phases[phase].round > 1:
            if phase not in self._draws:
                raise RuntimeError(f"phase {self.phases[phase].name} is not drawn yet: `Rounds.begin` does it")
            place = drawn[source] + before
            window = np.empty_like(place)
            for s, windows in enumerate(self._draws[phase]):
                window[source == s] = windows[place[source == s]]
            return source, window
        epoch, window = np.divmod((self._samples_before[phase] + drawn)[source] + before, self.windows[source])
        for s, e in {*zip(source.tolist(), epoch.tolist(), strict=True)}:
            here = (source == s) & (epoch == e)
            window[here] = permute(window[here], int(self.windows[s]), key_of(self.seed, self.names[s], e))
        return source, window

    def _shuffled(self, drawn: Ints) -> tuple[Ints, Ints]:
        """Return the (source, window) at places of a phase by epochs.

        Each epoch is a permutation of the concatenated windows of all sources. For a single source it is the
        permutation that a mix uses.
        """
        firsts = np.cumsum([0, *self.windows])
        epoch, place = np.divmod(drawn, firsts[-1])
        for e in np.unique(epoch).tolist():
            here = epoch == e
            place[here] = permute(place[here], int(firsts[-1]), key_of(self.seed, *self.names, e))
        source = np.searchsorted(firsts, place, side="right") - 1
        return source, place - firsts[source]

    def num_sequences(self, index: int) -> int:
        phase = self.phases[index]
        if phase.epochs is None:
            return phase.steps * self.global_batch_size
        return num_samples(phase.epochs, int(self.windows.sum()))

    def _counts(self, index: int, first: int) -> Ints:
        """Return how many of a phase's first sequences each source has."""
        if self.phases[index].epochs is not None:
            epochs, rest = divmod(first, int(self.windows.sum()))
            last = self._shuffled(np.arange(first - rest, first))[0]
            return epochs * self.windows + np.bincount(last, minlength=len(self.names))
        if first == self.num_sequences(index):
            return np.array(self._quotas[index], dtype=np.int64)
        blocks, rest = divmod(first, BLOCK)
        drawn, (source, _) = self._layout(index, blocks)
        return drawn + np.bincount(source[:rest], minlength=len(self.names))

    def _layout(self, phase: int, block: int) -> tuple[Ints, tuple[Ints, Ints]]:
        """Return the samples of each source before a block of a phase, and the block's order, see `_layout_of`."""
        before, counts = _counts_of(self._quotas[phase], block)
        return before, _layout_of(counts, key_of(self.seed, "block", phase, block))

    def _divide(self, index: int) -> tuple[int, ...]:
        """Return the sequences of each source in a phase with a mix; () for a phase by epochs."""
        phase, total = self.phases[index], self.num_sequences(index)
        if phase.epochs is not None:
            return ()
        if phase.round == 1:
            check_mix(phase, self.names, total)
        return tuple(quotas(list(self.weights(index).values()), total))
