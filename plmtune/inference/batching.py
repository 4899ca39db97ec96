"""Continuous batching: many prompts through one batch, in which a row that ends makes room for the next at once."""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from plmtune.inference.sampling import GREEDY, check_sampling, penalize, top_k_top_p
from plmtune.modules.cache import Cache, Slots

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder

# Of the tokens of a prefill at most this share is padding, and there are at most so many.
_PADDING = 0.15
_PREFILL_TOKENS = 4096
# What prompts share is read once where it is so long, and so many tokens need not be read then: it takes a forward of
# its own, which costs as much as some dozens of tokens. Prompts that are the same share all of it, however short.
_MIN_SHARED = 32
_MIN_SAVED = 256

FinishReason = Literal["stop", "end", "length"]


class NotFinite(ValueError):
    """The model's numbers for a request are NaN or infinite.

    Attributes:
        key: the request's.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"request {key}: the model gives numbers that are NaN or infinite")
        self.key = key


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        key: names the answer.
        tokens: the prompt's ids.
        max_new_tokens: the answer is cut here, or where the model's max_seq_len is reached.
        seed: decides all draws of this answer, whatever its neighbours are.
        until: the answer ends as soon as its bytes contain one of these, at whatever token they begin or end.
    """

    key: str
    tokens: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    until: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What was written for a request.

    Attributes:
        tokens: without the id that ended it, but with all that one of `until` is part of.
        ended: an end id came.
        stopped: one of `until` came. If neither did, it was cut.
    """

    key: str
    tokens: list[int]
    ended: bool
    stopped: bool = False

    @property
    def finish_reason(self) -> FinishReason:
        return "end" if self.ended else "stop" if self.stopped else "length"


@dataclass(frozen=True)
class _Waiting:
    """A request without a slot.

    Attributes:
        ids: its tokens, 4 bytes each, high byte first: they sort as the ids do, so those that begin alike meet.
        place: where it stands among those that wait; the number of its coming is the last of it, and of its turn.
        turn: when it is read: the longest go first.
    """

    request: Request
    ids: bytes
    length: int
    place: tuple[bytes, int]
    turn: tuple[int, int]

    @classmethod
    def of(cls, request: Request, number: int) -> _Waiting:
        ids, length = np.asarray(request.tokens, dtype=">u4").tobytes(), len(request.tokens)
        return cls(request, ids, length, (ids, number), (-length, number))


# Of thousands that wait the first is looked for at each read, where a function written in Python would be felt.
_IDS, _PLACE, _TURN = attrgetter("ids"), attrgetter("place"), attrgetter("turn")


@dataclass(frozen=True)
class _SharedPrefix:
    """What several prompts begin with, read once."""

    ids: bytes
    cache: Cache


@dataclass
class _Row:
    """A request that has a slot; all but the newest token, which may be the prompt's last, are in the cache."""

    request: Request
    room: int
    written: list[int]

    @property
    def newest(self) -> int:
        return self.written[-1] if self.written else int(self.request.tokens[-1])

    @property
    def newest_at(self) -> int:
        return len(self.request.tokens) + len(self.written) - 1


class BatchedGenerator:
    """Answer requests, `batch_size` at a time; an answer is yielded as soon as it is whole.

    Longer prompts go first: those read together are then of similar length, and so are those that decode together.
    What several prompts begin with is read once, and those go one after the other.
    What an answer says depends on its own prompt and seed; neighbours change only how sums are rounded.
    After an exception, an interrupt too, `run` goes on where it was.

    Args:
        model: the model; it computes as in evaluation.
        batch_size: rows that decode together.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest.
        top_p: draw from the likeliest that together reach this probability.
        min_p: draw from those at least this share as likely as the likeliest.
        repetition_penalty: see `plmtune.inference.sampling.penalize`; 1 for none.
        end_ids: an answer ends at each of these.
        num_tokens: ids from here up have no text and are never drawn.
        decode_bytes: gives the bytes of ids, special tokens their text; needed for requests with `until`.

    Raises:
        ValueError: for impossible settings.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        batch_size: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        end_ids: Collection[int] = (),
        num_tokens: int | None = None,
        decode_bytes: Callable[[Sequence[int]], bytes] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        self.model = model
        self.batch_size = batch_size
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty = repetition_penalty
        self.end_ids = frozenset(end_ids)
        self.num_tokens = num_tokens
        self.decode_bytes = decode_bytes
        self._submitted = 0
        # Each change of these is one assignment of what is true after it, so that an interrupt finds them whole.
        self._waiting: list[_Waiting] = []  # by place
        self._rows: dict[int, _Row] = {}  # by slot
        self._finished: list[Answer] = []
        self._slots: Slots | None = None
        self._shared_prefixes: tuple[_SharedPrefix, ...] = ()  # each goes on from the one before

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn; also while `run` is under way.

        Raises:
            ValueError: for an empty prompt, one with ids the model does not know, or one that leaves no room.
        """
        length, limit = len(request.tokens), self.model.max_seq_len
        if length == 0:
            raise ValueError(f"request {request.key}: the prompt is empty: at least one token is needed to start from")
        if length >= limit:
            raise ValueError(
                f"request {request.key}: the prompt has {length} tokens, the model's max_seq_len is {limit}: "
                "no room is left for an answer"
            )
        if request.max_new_tokens < 1:
            raise ValueError(f"request {request.key}: max_new_tokens must be at least 1, not {request.max_new_tokens}")
        low, high = min(request.tokens), max(request.tokens)
        if low < 0 or high >= self.model.vocab_size:
            raise ValueError(
                f"request {request.key}: the prompt has id {low if low < 0 else high}, "
                f"the model's vocabulary has {self.model.vocab_size}"
            )
        if b"" in request.until:
            raise ValueError(f"request {request.key}: one of until is empty, so it would end before it begins")
        if request.until and self.decode_bytes is None:
            raise ValueError(f"request {request.key}: until needs an engine with decode_bytes")
        self._submitted += 1
        insort(self._waiting, _Waiting.of(request, self._submitted), key=_PLACE)

    def run(self) -> Iterator[Answer]:
        """Yield answers until none is waited for; what is submitted meanwhile is answered, too."""
        while True:
            while self._finished:
                yield self._finished.pop(0)
            if not self._rows and not self._waiting:
                return
            self._advance()

    @torch.no_grad()
    def _advance(self) -> None:
        """Read as many prompts as there is room for, or else give each row its next token."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            if self._waiting and len(self._rows) < self.batch_size:
                self._read()
            else:
                self._close_up()
                self._step()
            self._retire()
        finally:
            if training:
                self.model.train()

    def _read(self) -> None:
        """Read some waiting prompts of similar length into free slots, and write the first token of each answer."""
        free = [slot for slot in range(self.batch_size) if slot not in self._rows]
        group = self._choose(len(free))
        requests = [waiting.request for waiting in group]
        rooms = [min(request.max_new_tokens, self.model.max_seq_len - len(request.tokens)) for request in requests]
        slots = self._allocate(max(len(request.tokens) + room for request, room in zip(requests, rooms, strict=True)))
        device = self.model.device
        where = torch.tensor(free[: len(group)], device=device)
        start = self._start
        if self._shared_prefixes:
            slots.put(self._shared_prefixes[-1].cache, where)
        rests = [waiting.length - start for waiting in group]
        written: list[list[int]] = [[] for _ in group]
        # Of one token alone nothing is read here: the next step of all rows begins with it.
        if rests[0] > 1:
            # Padded on the right: causal attention hides that from what stands before it, without a mask.
            tokens = torch.zeros(len(group), rests[0], dtype=torch.long)
            for row, request, rest in zip(tokens, requests, rests, strict=True):
                row[:rest] = torch.tensor(request.tokens[start:])
            states = self.model(tokens.to(device), cache=slots.prefill(where, start), hidden=True)
            states = states[torch.arange(len(group), device=device), torch.tensor(rests, device=device) - 1]
            written = [[token] for token in self._draw(states, [(request, []) for request in requests])]
        rows = [_Row(*row) for row in zip(requests, rooms, written, strict=True)]
        read = {waiting.place for waiting in group}
        self._rows, self._waiting = (
            self._rows | dict(zip(free, rows, strict=False)),
            [waiting for waiting in self._waiting if waiting.place not in read],
        )

    @property
    def _start(self) -> int:
        return self._shared_prefixes[-1].cache.length if self._shared_prefixes else 0

    def _choose(self, most: int) -> list[_Waiting]:
        """Return at most so many requests to read next, longest first; all begin with the last shared prefix."""
        while not (alike := self._begin_alike()):
            self._shared_prefixes = self._shared_prefixes[:-1]
        longest = min(alike, key=_TURN)
        while length := self._worth_sharing(longest):
            self._shared_prefixes = (*self._shared_prefixes, self._read_shared_prefix(longest, length))
            alike = self._begin_alike()
            longest = min(alike, key=_TURN)
        group = heapq.nsmallest(most, alike, key=_TURN)
        group = [waiting for waiting in group if waiting is longest or not self._worth_sharing(waiting)]
        return group[: _alike([waiting.length - self._start for waiting in group])]

    def _begin_alike(self) -> list[_Waiting]:
        """Return those that go on from the last stem; without one all."""
        if not self._shared_prefixes:
            return self._waiting
        ids = self._shared_prefixes[-1].ids
        first = bisect_right(self._waiting, ids, key=_IDS)
        # No id begins with this byte.
        end = bisect_left(self._waiting, ids + b"\xff", key=_IDS)
        return self._waiting[first:end]

    def _worth_sharing(self, first: _Waiting) -> int:
        """Return up to where to read it once, for itself and for others; 0 where that would not pay."""
        at = bisect_left(self._waiting, first.place, key=_PLACE)
        shared = []
        for others in (range(at - 1, -1, -1), range(at + 1, len(self._waiting))):
            for index in others:
                other = self._waiting[index]
                common = _common(first.ids, other.ids)
                if common - self._start < _MIN_SHARED and other.ids != first.ids:
                    break
                # A token at least is left to go on with.
                shared.append(min(common, first.length - 1, other.length - 1))
        shared.sort(reverse=True)
        spared, length = max(
            (((length - self._start) * others, length) for others, length in enumerate(shared, start=1)), default=(0, 0)
        )
        return length if spared >= _MIN_SAVED or (spared > 0 and length == first.length - 1) else 0

    def _read_shared_prefix(self, first: _Waiting, length: int) -> _SharedPrefix:
        """Read a prompt up to `length`, after what is read of it already."""
        device = self.model.device
        cache = self.model.new_cache(1, length)
        if self._shared_prefixes:
            Slots(cache.layers).put(self._shared_prefixes[-1].cache, torch.zeros(1, dtype=torch.long, device=device))
            cache.advance(self._start)
        tokens = torch.tensor(first.request.tokens[self._start : length], device=device)
        self.model(tokens[None], cache=cache, hidden=True)
        return _SharedPrefix(first.ids[: 4 * length], cache)

    def _step(self) -> None:
        rows = [self._rows[slot] for slot in range(len(self._rows))]
        places = [row.newest_at for row in rows]
        longest = max(places)
        assert self._slots is not None
        device = self.model.device
        tokens, lengths = torch.tensor([[row.newest for row in rows], places], device=device)[:, :, None]
        if min(places) == longest:
            # One row is the common case of it; slices take less time than lists of places.
            cache = self._slots.decode_same_length(len(rows), longest)
            states = self.model(tokens, cache=cache, hidden=True)
        else:
            mask = (torch.arange(longest + 1, device=device) <= lengths)[:, None]  # [b, 1, t]
            cache = self._slots.decode(lengths[:, 0], longest)
            states = self.model(tokens, mask=mask, input_pos=lengths, cache=cache, hidden=True)
        drawn = self._draw(states[:, 0], [(row.request, row.written) for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            row.written.append(token)

    def _retire(self) -> None:
        """Turn rows that have ended into answers."""
        rows, answers = {}, []
        for slot, row in self._rows.items():
            ended = bool(row.written) and row.written[-1] in self.end_ids
            stopped = not ended and self._stopped(row)
            if ended or stopped or len(row.written) >= row.room:
                tokens = row.written[: -1 if ended else None]
                answers.append(Answer(row.request.key, tokens, ended, stopped))
            else:
                rows[slot] = row
        self._rows, self._finished = rows, self._finished + answers

    def _stopped(self, row: _Row) -> bool:
        """Whether what is written ends an answer by its text."""
        if not row.request.until:
            return False
        assert self.decode_bytes is not None
        # A token has a byte at least, so the text that ends it lies in so many of them.
        newest = self.decode_bytes(row.written[-max(map(len, row.request.until)) :])
        return any(text in newest for text in row.request.until)

    def _close_up(self) -> None:
        """Move rows from the end into slots that nothing waits for: a step computes the first n slots."""
        assert self._slots is not None
        for hole in range(len(self._rows)):
            if hole not in self._rows:
                last = max(self._rows)
                row = self._rows[last]
                self._slots.move(last, hole, row.newest_at)
                self._rows = {slot: kept for slot, kept in self._rows.items() if slot != last} | {hole: row}

    def _allocate(self, tokens: int) -> Slots:
        """Return slots of at least so many tokens, what is in them kept."""
        old = self._slots
        if old is None or old.max_seq_len < tokens:
            if old is not None:
                # Chains grow turn by turn; half as much again keeps the copies few.
                tokens = min(max(tokens, old.max_seq_len * 3 // 2), self.model.max_seq_len)
            new = Slots(self.model.new_cache(self.batch_size, tokens).layers)
            if old is not None:
                new.take(old)
            self._slots = new
            return new
        return old

    def _draw(self, states: Tensor, draws: list[tuple[Request, list[int]]]) -> list[int]:
        """Return a token for each row of states, [b, d], by its request and what is written of its answer."""
        scores = self.model.logits(states)[:, : self.num_tokens]
        if self.repetition_penalty != 1:
            seen = [[*request.tokens, *written] for request, written in draws]
            scores = penalize(scores, seen, self.repetition_penalty)
        if self.temperature >= GREEDY:
            logits = top_k_top_p(scores / self.temperature, self.top_k, self.top_p, self.min_p)
            # Gumbel's way (arXiv 1611.01144, eq. 1): the arrival that comes first has the softmax's distribution. Sums
            # that are rounded otherwise in another batch change a draw only where two arrivals all but tie; drawing a
            # point of the cumulative sum would move with every boundary below it.
            seeds = [(request.seed, len(written)) for request, written in draws]
            scores = torch.softmax(logits, -1) / _exponential(seeds, logits.shape[1], logits.device)
        best = scores.argmax(-1)  # NaN counts as the largest
        drawn: list[int] = torch.where(scores.gather(1, best[:, None])[:, 0].isfinite(), best, -1).tolist()
        if -1 in drawn:
            raise NotFinite(draws[drawn.index(-1)][0].key)
        return drawn


def _common(first: bytes, second: bytes) -> int:
    """Return how many tokens two prompts have in common at their beginning."""
    length = min(len(first), len(second)) // 4
    differ = np.frombuffer(first, "u4", length) != np.frombuffer(second, "u4", length)
    return int(differ.argmax()) if differ.any() else length


def _alike(lengths: list[int]) -> int:
    """Return how many of these lengths, falling, are read together."""
    total = 0
    for count, length in enumerate(lengths):
        padded = lengths[0] * (count + 1)
        total += length
        if count and (total < (1 - _PADDING) * padded or padded > _PREFILL_TOKENS):
            return count
    return len(lengths)


def _exponential(draws: list[tuple[int, int]], width: int, device: torch.device) -> Tensor:
    """Return exponential numbers, [b, width], each a function of (seed, number, column) on every device."""
    # A counter and an integer hash (one of those found by github.com/skeeto/hash-prospector): torch's generators give
    # each device its own numbers, and a CPU's takes eight times as long.
    digests = (hashlib.blake2b(repr(draw).encode(), digest_size=8).digest() for draw in draws)
    key = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int32).view(-1, 2).to(device)
    x = torch.arange(width, dtype=torch.int32, device=device) + key[:, :1]
    # Shifts of int32 carry the sign; the mask makes them logical.
    x ^= (x >> 16) & 0xFFFF
    x *= 0x21F0AAAD
    x ^= (x >> 15) & 0x1FFFF
    x += key[:, 1:]
    x *= 0x735A2D97
    x ^= (x >> 15) & 0x1FFFF
    # 31 bits, small numbers exact: the likeliest draws are decided near 0, and none is 0 or infinite.
    uniform = ((x & 0x7FFFFFFF).float() + 0.5).mul_(2.0**-31).clamp_max_(1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()
