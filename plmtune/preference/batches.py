"""Preference pairs as rows of tokens: an answer beside its rival, behind the one prompt that both answer."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from plmtune.data.order import key_of, num_samples, permute
from plmtune.data.packing import pack
from plmtune.data.preferences import Pair
from plmtune.data.rows import Refused
from plmtune.errors import UserError
from plmtune.preference.refinement import UNSHOWN, Refinement
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Unused

Ids = NDArray[np.int32]
Ints = NDArray[np.int64]

# What the two answers of a comparison are given (arXiv 2502.05605): the question alone, or the question with an
# earlier answer to refine. In the last kind the one answer belongs to another question (KTO, arXiv 2402.01306).
DIRECT, GIVEN_REJECTED, GIVEN_CHOSEN, MISMATCHED = range(4)

_TRIES = 64  # pairs that a mismatched answer is looked for in
_TOKENS = 4096  # of a batch of `PreferenceBatches.all`, where a row is not longer


@dataclass(frozen=True)
class Comparison:
    """A prompt and the two answers whose probabilities are compared.

    kind: DIRECT, GIVEN_REJECTED, GIVEN_CHOSEN or MISMATCHED.
    prompt, chosen, rejected: int32 ids; answers with the token that ends them, None where there is none.
    pair: which pair it was made of, counted from 0 among those that can be used.
    place: where that pair stands, "FILE, row 17".
    """

    kind: int
    prompt: Ids
    chosen: Ids | None
    rejected: Ids | None
    pair: int
    place: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and both answers."""
        return sum(ids.size for ids in (self.prompt, self.chosen, self.rejected) if ids is not None)

    @property
    def longest(self) -> int:
        """Tokens of the longest of the three."""
        return max(ids.size for ids in (self.prompt, self.chosen, self.rejected) if ids is not None)


def make_comparisons(
    pairs: Iterable[Pair],
    template: ChatTemplate,
    refinement: Refinement | None,
    seq_len: int,
    *,
    contexts: bool = False,
    mismatched: bool = False,
) -> tuple[list[Comparison], Refused, list[str]]:
    """Make the comparisons of each pair; answers are always whole.

    A pair whose prompt and longer answer exceed seq_len is refused. A refinement prompt that leaves no room for the
    answers has its earlier answer shortened from the end (else, cut from the right, the row would lose its answers
    and train on nothing, unnoticed); where no room is left for any of it, that comparison alone is refused.

    Args:
        pairs: pairs with one answer only are refused, unless `mismatched` says that the loss can use them.
        template: writes prompts and answers.
        refinement: fills in an earlier answer; needed for `contexts`.
        seq_len: most tokens of a prompt and one answer.
        contexts: make the two refinement comparisons of each pair as well.
        mismatched: make for each pair one of its prompt with another pair's answer as well.

    Returns:
        The comparisons, those of a pair in a row; what was refused; remarks for a person.
    """
    made: list[Comparison] = []
    refused, unused = Refused(), Unused()
    shortened = lacking = count = 0
    for pair in pairs:
        try:
            prompt = template.encode_prompt(pair.prompt, unused)
            answers = (pair.answer("chosen"), pair.answer("rejected"))
            chosen, rejected = (None if said is None else template.encode_answer(said, unused) for said in answers)
        except BadRow as error:
            refused.add(pair.place, str(error))
            continue
        if (chosen is None or rejected is None) and not mismatched:
            refused.add(pair.place, "has one answer only, while this loss compares two (loss=kto takes single answers)")
            continue
        if chosen is not None and rejected is not None and np.array_equal(chosen, rejected):
            refused.add(pair.place, "has two answers that the chat template makes equal")
            continue
        room = seq_len - max(ids.size for ids in (chosen, rejected) if ids is not None)
        if prompt.size > room:
            refused.add(pair.place, f"has a prompt that with its longer answer exceeds seq_len ({seq_len})")
            continue
        made.append(Comparison(DIRECT, prompt, chosen, rejected, count, pair.place))
        if contexts and pair.chosen is not None and pair.rejected is not None:
            assert refinement is not None
            for kind, earlier in ((GIVEN_REJECTED, pair.rejected), (GIVEN_CHOSEN, pair.chosen)):
                try:
                    if not pair.shows_all:
                        raise BadRow(UNSHOWN)
                    context = refinement.encode(template, pair.prompt, earlier, max_len=room)
                except BadRow as error:
                    refused.add(pair.place, str(error))
                    continue
                if context is None:
                    refused.add(
                        pair.place,
                        f"leaves no room in seq_len ({seq_len}) for an earlier answer to refine",
                    )
                    continue
                ids, cut = context
                shortened += cut
                made.append(Comparison(kind, ids, chosen, rejected, count, pair.place))
        count += 1
    if mismatched and made:
        made, lacking = _with_mismatched(made, seq_len)
    notes = [unused.describe()] if unused else []
    if shortened:
        were = "earlier answer was" if shortened == 1 else "earlier answers were"
        notes.append(f"{shortened:,} {were} shortened, so that the answers that follow fit into seq_len ({seq_len})")
    if lacking:
        have = "pair has" if lacking == 1 else "pairs have"
        notes.append(f"{lacking:,} {have} no mismatched answer for the kl: none fits behind the prompt")
    return made, refused, notes


def _with_mismatched(made: list[Comparison], seq_len: int) -> tuple[list[Comparison], int]:
    """Put behind each pair's comparisons its prompt with the answer of the next pair that fits."""
    direct = [comparison for comparison in made if comparison.kind == DIRECT]
    answers = [c.chosen if c.chosen is not None else c.rejected for c in direct]
    found: dict[int, Comparison] = {}
    for index, own in enumerate(direct):
        for step in range(1, min(_TRIES, len(direct))):
            other = (index + step) % len(direct)
            answer = answers[other]
            same = np.array_equal(direct[other].prompt, own.prompt)  # then the answer is to this very question
            if answer is not None and own.prompt.size + answer.size <= seq_len and not same:
                found[own.pair] = replace(own, kind=MISMATCHED, chosen=answer, rejected=None)
                break
    out: list[Comparison] = []
    for comparison, following in zip(made, [*made[1:], None], strict=True):
        out.append(comparison)
        if (following is None or following.pair != comparison.pair) and comparison.pair in found:
            out.append(found[comparison.pair])
    return out, len(direct) - len(found)


@dataclass(frozen=True)
class ComparisonBatch:
    """One micro-batch of n comparisons with t answer tokens, in b rows of s tokens; several stand in a row.

    A comparison stands as prompt, chosen, rejected: both answers see the prompt and not each other, and the positions
    of both go on from the prompt's. A batch of no comparisons keeps ranks in step.

    tokens, input_pos: [b, s] int64.
    mask: [b, s, s] bool, True where a query (row) may attend.
    positions: [t] int64, flat positions in [b * s] whose hidden states predict the answers' tokens.
    targets: [t] int64, those tokens.
    completion: [t] int64, whose they are: 2i is the chosen answer of comparison i, 2i + 1 its rejected one.
    lengths: [2n] int64, tokens of each answer; 0: there is none.
    ends: [2n] int64, flat position of each answer's last token; where there is none, of the prompt's.
    kind: [n] int64.
    index: [n] int64, place of the comparison in the list that the batches were made of.
    num_pairs: pairs whose direct comparison is here.
    num_tokens: tokens that are no padding.
    kl_only: its comparisons are mismatched: measured before the others, not trained on. Ranks agree on it, also where
        one of them has none.
    """

    tokens: Tensor
    input_pos: Tensor
    mask: Tensor
    positions: Tensor
    targets: Tensor
    completion: Tensor
    lengths: Tensor
    ends: Tensor
    kind: Tensor
    index: Tensor
    num_pairs: int
    num_tokens: int
    kl_only: bool = False

    def to(self, device: torch.device | str) -> ComparisonBatch:
        """Return the batch on a device; the copy may still be under way."""
        # From pageable memory a copy to a GPU would first wait for all work that is queued there.
        pin = torch.device(device).type == "cuda" and self.tokens.device.type == "cpu"
        move: dict[str, Any] = {
            field.name: (value.pin_memory() if pin else value).to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **move)


def make_batch(
    comparisons: Sequence[Comparison], rows: Sequence[Sequence[int]], *, kl_only: bool = False, pad_id: int = 0
) -> ComparisonBatch:
    """Lay out rows of comparisons, given by their indices; rows are as long as the longest.

    Padding attends to itself alone, so that no row of attention is empty.
    """
    order = [index for row in rows for index in row]
    widths = [sum(comparisons[index].num_tokens for index in row) for row in rows]
    b, s = max(1, len(rows)), max([1, *widths])
    tokens = np.full((b, s), pad_id, dtype=np.int64)
    input_pos = np.zeros((b, s), dtype=np.int64)
    mask = np.zeros((b, s, s), dtype=np.bool_)
    triangle = np.tri(max([1, *(comparisons[index].longest for index in order)]), dtype=np.bool_)
    positions, targets, lengths, ends = [], [], [], []
    for number, row in enumerate(rows):
        at = 0
        for index in row:
            held = comparisons[index]
            size = held.prompt.size
            prompt = slice(at, at + size)
            tokens[number, prompt] = held.prompt
            input_pos[number, prompt] = np.arange(size)
            mask[number, prompt, prompt] = triangle[:size, :size]
            at += size
            last = number * s + at - 1  # of the prompt: it predicts the first token of both answers
            for answer in (held.chosen, held.rejected):
                ids = np.empty(0, dtype=np.int32) if answer is None else answer
                here = slice(at, at + ids.size)
                tokens[number, here] = ids
                input_pos[number, here] = size + np.arange(ids.size)
                mask[number, here, prompt] = True
                mask[number, here, here] = triangle[: ids.size, : ids.size]
                before = number * s + at - 1 + np.arange(ids.size)
                before[:1] = last
                positions.append(before)
                targets.append(ids)
                lengths.append(ids.size)
                at += ids.size
                ends.append(number * s + at - 1 if ids.size else last)
        padding = np.arange(at, s)
        mask[number, padding, padding] = True
    if not rows:
        mask[:] = True
    kind = np.array([comparisons[index].kind for index in order], dtype=np.int64)
    counts = np.array(lengths, dtype=np.int64)
    nothing = np.empty(0, dtype=np.int64)
    return ComparisonBatch(
        tokens=torch.from_numpy(tokens),
        input_pos=torch.from_numpy(input_pos),
        mask=torch.from_numpy(mask),
        positions=torch.from_numpy(np.concatenate([nothing, *positions])),
        targets=torch.from_numpy(np.concatenate([nothing, *targets])),
        completion=torch.from_numpy(np.repeat(np.arange(counts.size), counts)),
        lengths=torch.from_numpy(counts),
        ends=torch.from_numpy(np.array(ends, dtype=np.int64)),
        kind=torch.from_numpy(kind),
        index=torch.from_numpy(np.array(order, dtype=np.int64)),
        kl_only=kl_only,
        num_pairs=int((kind == DIRECT).sum()),
        num_tokens=sum(widths),
    )


class PreferenceBatches:
    """The comparisons of one rank, any step at once.

    Which pairs a step takes is a pure function of (seed, step): each epoch is a permutation of all pairs. All
    comparisons of a pair are in one step. Ranks and micro-batches only divide the same global step: each comparison
    goes to the rank with the fewest tokens yet, and every rank makes equally many micro-batches, since they may have
    to meet in each forward. Mismatched comparisons come first in a step, in micro-batches of their own.

    Args:
        comparisons: from `make_comparisons`.
        seq_len: rows hold up to 2 * seq_len tokens.
        global_batch_size: pairs a step, over all ranks.
        micro_batch_size: rows a forward; the last of a step may hold fewer.
        seed: of the order.
        rank, world_size: this process's share.
        epochs: how often each pair is seen; the last step takes what is left.
        steps: their number, instead of `epochs`.
        holdout: share of the pairs kept for validation; pairs with one prompt stay together.
        as_trained: `all` gives the batches of the first epoch's steps, in place of batches that are the same for any
            micro_batch_size and number of ranks. bf16 rounds by a batch's shape (see `benchmarks/rounding.py`).
        pad_id: fills up rows.

    Raises:
        ValueError: for sizes or shares that cannot be.
        UserError: if there is no pair to train on.
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
        steps: int | None = None,
        holdout: float = 0.0,
        as_trained: bool = False,
        pad_id: int = 0,
    ) -> None:
        sizes = {"seq_len": seq_len, "global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
        for name, value in [*sizes.items(), ("steps", steps)]:
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if not 0 < epochs < math.inf:
            raise ValueError(f"epochs ({epochs}) must be above 0")
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout ({holdout}) must be at least 0 and below 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank ({rank}) must be below world_size ({world_size})")
        self.comparisons = comparisons
        self.row_len = 2 * seq_len
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.as_trained = as_trained
        self.pad_id = pad_id
        self._lengths = [comparison.num_tokens for comparison in comparisons]
        longest = max(self._lengths, default=0)
        if longest > self.row_len:
            raise ValueError(f"a comparison of {longest} tokens exceeds a row of 2 * seq_len ({self.row_len})")
        members: dict[int, list[int]] = {}
        for index, comparison in enumerate(comparisons):
            members.setdefault(comparison.pair, []).append(index)
        self._members = list(members.values())  # the comparisons of each pair
        self._held = self._hold_out(holdout)
        held = set(self._held)
        self._train = np.array([pair for pair in range(len(self._members)) if pair not in held], dtype=np.int64)
        if not self._train.size:
            raise UserError("There is no preference pair to train on. Give other data, or a longer seq_len")
        # Pairs that are drawn, over all steps; the last step takes what is left.
        self._drawn = steps * global_batch_size if steps else num_samples(epochs, self._train.size)
        self.num_steps = -(-self._drawn // global_batch_size)

    @property
    def num_pairs(self) -> tuple[int, int]:
        """Pairs to train on, and pairs held out."""
        return self._train.size, len(self._held)

    def step(self, step: int) -> list[ComparisonBatch]:
        """Return this rank's micro-batches of a step, whatever was asked before."""
        return list(self._batches(self._pairs(step).tolist()))

    def iterate(self, start: int = 0) -> Generator[tuple[int, list[ComparisonBatch]], None, None]:
        """Yield (step, micro-batches) from `start` to the end."""
        for step in range(start, self.num_steps):
            yield step, self.step(step)

    def validation(self) -> Iterator[ComparisonBatch]:
        """Yield this rank's share of the held-out pairs, in an order that is always the same."""
        yield from self._batches(self._held)

    def all(self) -> Iterator[ComparisonBatch]:
        """Yield this rank's share of every comparison that a step or the validation takes, each once over all ranks.

        What stands together in a batch depends neither on micro_batch_size nor on the number of ranks, which take the
        batches in turn. So what is computed of them is the same to the last digit, wherever a run is resumed.
        With `as_trained` they are the first epoch's own batches and the validation's; where its last step goes on with
        the second epoch, or takes a pair twice, those comparisons come twice.
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
                yield make_batch(self.comparisons, mine, kl_only=kl_only, pad_id=self.pad_id)

    def locate(self, step: int, micro_batches: Collection[int] | None = None) -> list[str]:
        """Return where the pairs of this rank's comparisons of a step stand, for messages about a bad step.

        Args:
            micro_batches: the indices of those that are asked for, among the ones that are not kl_only; None: all.
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
        """Return the running hash of the order: of `previous` and the pairs of this step over all ranks."""
        return xxhash.xxh3_128_hexdigest(previous.encode() + b"\0" + self._pairs(step).astype("<i8").tobytes())

    def describe(self) -> str:
        """Return two lines for a person."""
        train, held = self.num_pairs
        seen = self._drawn / train
        each = len(self.comparisons) / len(self._members)
        mean = sum(self._lengths) / len(self._members)
        again = ""
        if train < (a_step := min(self.global_batch_size, self._drawn)):
            often = f"{a_step / train:.3g} times"
            again = f" (fewer pairs than global_batch_size: each is seen {often} in a step)"
        return (
            f"{train:,} pair{_s(train)}, seen {seen:.2f} times, {held:,} held out; "
            f"{each:.2g} comparison{_s(each)} and {mean:,.0f} tokens a pair\n"
            f"{self.num_steps:,} step{_s(self.num_steps)} of {self.global_batch_size:,} "
            f"pair{_s(self.global_batch_size)}{again}"
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
        """Choose the pairs for validation by a hash of their prompts, so that no prompt stands on both sides."""
        wanted = round(holdout * len(self._members)) or int(holdout > 0)
        if not wanted:
            return []
        by_prompt: dict[int, list[int]] = {}
        for pair, members in enumerate(self._members):
            key = xxhash.xxh3_64_intdigest(self.comparisons[members[0]].prompt.tobytes())
            by_prompt.setdefault(key, []).append(pair)
        # A prompt of very many pairs could take far more than the share, or leave nothing to train on.
        most = min(max(2 * wanted, min(map(len, by_prompt.values()))), len(self._members) - 1)
        held: list[int] = []
        for _, group in sorted(by_prompt.items()):
            if len(held) < wanted and len(held) + len(group) <= most:
                held += group
        return sorted(held)

    def _batches(self, pairs: Collection[int]) -> Iterator[ComparisonBatch]:
        for kl_only in (True, False):
            for rows in self._divide(pairs, kl_only=kl_only):
                yield make_batch(self.comparisons, rows, kl_only=kl_only, pad_id=self.pad_id)

    def _divide(self, pairs: Collection[int], *, kl_only: bool) -> list[list[list[int]]]:
        """Return this rank's micro-batches of some pairs, of each its rows: mismatched comparisons, or the others."""
        ranks = self._pack_ranks(self._members_of(pairs, kl_only))
        size = self.micro_batch_size
        number = max(-(-len(rows) // size) for rows in ranks)
        return [ranks[self.rank][size * i : size * (i + 1)] for i in range(number)]

    def _members_of(self, pairs: Collection[int], kl_only: bool) -> list[int]:
        """Return the comparisons of some pairs: the mismatched ones, or the others."""
        every = (index for pair in pairs for index in self._members[pair])
        return [index for index in every if (self.comparisons[index].kind == MISMATCHED) is kl_only]

    def _pack_ranks(self, chosen: list[int]) -> list[list[list[int]]]:
        """Deal comparisons out to the ranks, about equal in tokens, and pack each rank's into rows."""
        loads = [(0, rank) for rank in range(self.world_size)]
        dealt: list[list[int]] = [[] for _ in loads]
        for index in sorted(chosen, key=lambda index: -self._lengths[index]):
            load, rank = loads[0]
            dealt[rank].append(index)
            heapq.heapreplace(loads, (load + self._lengths[index], rank))
        return [self._pack(mine) for mine in dealt]

    def _pack(self, chosen: list[int]) -> list[list[int]]:
        """Pack comparisons, the longest first, into rows; fullest first, as rows are trimmed to their neighbours."""
        rows: dict[int, list[int]] = {}
        numbers = pack(np.array([self._lengths[index] for index in chosen], dtype=np.int64), self.row_len)
        for index, number in zip(chosen, numbers.tolist(), strict=True):
            rows.setdefault(number, []).append(index)
        return sorted(rows.values(), key=lambda row: -sum(self._lengths[index] for index in row))


def _s(count: float) -> str:
    return "" if count == 1 else "s"
