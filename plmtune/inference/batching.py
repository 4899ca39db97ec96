"""Continuous batching: many prompts share one batch, and the next prompt takes the slot of an answer that ended."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from plmtune.errors import LogitsNotFinite
from plmtune.inference.request_queue import TURN, Request, RequestQueue, Waiting
from plmtune.inference.sampling import GREEDY, check_sampling, penalize, top_k_top_p
from plmtune.modules.attributes import eval_mode
from plmtune.modules.cache import Cache, Slots
from plmtune.ranges import AT_LEAST_1, check

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder

# A prefill has at most this share of padding, and at most so many tokens.
_PADDING = 0.15
_PREFILL_TOKENS = 4096

FinishReason = Literal["stop", "end", "length"]


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        tokens: without the id that ended it, but with the tokens that one of `until` is part of.
        ended: by an end id.
        stopped: by one of `until`. If neither, max_new_tokens or max_seq_len cut it.
    """

    key: str
    tokens: list[int]
    ended: bool
    stopped: bool = False

    @property
    def finish_reason(self) -> FinishReason:
        return "end" if self.ended else "stop" if self.stopped else "length"


@dataclass(frozen=True)
class _SharedPrefix:
    """A prefix of several prompts, read once."""

    ids: bytes
    cache: Cache


@dataclass
class _Row:
    """A request with a slot. Its cache holds all tokens but the newest, which may be the prompt's last."""

    request: Request
    room: int
    written: list[int]

    @property
    def newest(self) -> int:
        return self.written[-1] if self.written else int(self.request.tokens[-1])

    @property
    def newest_at(self) -> int:
        return len(self.request.tokens) + len(self.written) - 1


@dataclass(eq=False)
class BatchedGenerator:
    """Answers requests, `batch_size` at a time, and yields each answer as soon as it is complete.

    Longer prompts go first, so that prompts that are read together, and rows that decode together, have similar
    lengths. A prefix that several prompts share is read once, and these prompts follow one another.
    An answer depends on its own prompt and seed; other rows of the batch change only how sums are rounded.
    After an exception or an interrupt `run` can be called again and continues.

    Args:
        model: used in evaluation mode.
        batch_size: rows that decode together.
        temperature, top_k, top_p, min_p: see `plmtune.inference.sampling.sample`.
        repetition_penalty: see `plmtune.inference.sampling.penalize`; 1 for none.
        end_ids: an answer ends at each of these.
        num_tokens: ids from here on have no text and are never sampled.
        decode_bytes: returns the bytes of ids, of special tokens too; needed for requests with `until`.
    """

    model: Decoder
    _: KW_ONLY
    batch_size: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    end_ids: Collection[int] = ()
    num_tokens: int | None = None
    decode_bytes: Callable[[Sequence[int]], bytes] | None = None

    def __post_init__(self) -> None:
        check(AT_LEAST_1, batch_size=self.batch_size)
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        self._by_length = bool(self.model.rope_key(1))
        # Each of these changes in one assignment, so that an interrupt leaves a consistent state.
        self._queue = RequestQueue()
        self._rows: dict[int, _Row] = {}  # by slot
        self._finished: list[Answer] = []
        self._slots: Slots | None = None
        self._shared_prefixes: tuple[_SharedPrefix, ...] = ()  # each continues the one before

    def submit(self, request: Request) -> None:
        """Add a request to the queue, also while `run` is in progress."""
        length, limit, rows = len(request.tokens), self.model.max_seq_len, self.model.vocab_size
        low, high = min(request.tokens, default=0), max(request.tokens, default=0)
        rules = {  # the first that is broken counts
            "the prompt is empty: at least one token is needed to start from": length > 0,
            f"the prompt has {length} tokens, the model's max_seq_len is {limit}: no room is left for an answer": (
                length < limit
            ),
            f"max_new_tokens must be at least 1, not {request.max_new_tokens}": request.max_new_tokens > 0,
            f"the prompt has id {low if low < 0 else high}, the model's vocabulary has {rows}": 0 <= low <= high < rows,
            "one of until is empty, so it would end before it begins": b"" not in request.until,
            "until needs an engine with decode_bytes": not request.until or self.decode_bytes is not None,
        }
        for why, kept in rules.items():
            if not kept:
                raise ValueError(f"request {request.key}: {why}")
        self._queue.add(request)

    def run(self) -> Iterator[Answer]:
        """Yield answers until no request is left, also of requests that are submitted meanwhile."""
        while True:
            while self._finished:
                yield self._finished.pop(0)
            if not self._rows and not self._queue.waiting:
                return
            self._advance()

    @torch.no_grad()
    def _advance(self) -> None:
        """Read prompts into free slots; without free slots or prompts, sample each row's next token."""
        with eval_mode(self.model):
            if self._queue.waiting and len(self._rows) < self.batch_size:
                self._read()
            else:
                self._close_up()
                self._step()
            self._retire()

    def _read(self) -> None:
        """Read prompts of similar length into free slots, and sample the first token of each answer."""
        free = [slot for slot in range(self.batch_size) if slot not in self._rows]
        group = self._choose(len(free))
        requests = [waiting.request for waiting in group]
        rooms = [min(request.max_new_tokens, self.model.max_seq_len - len(request.tokens)) for request in requests]
        slots = self._allocate(max(len(request.tokens) + room for request, room in zip(requests, rooms, strict=True)))
        device, start = self.model.device, self._start
        where = torch.tensor(free[: len(group)], device=device)
        if self._shared_prefixes:
            slots.put(self._shared_prefixes[-1].cache, where)
        rests = [waiting.length - start for waiting in group]
        written: list[list[int]] = [[] for _ in group]
        # The last token of a prompt is read here or, if it is the only one left, in the next step.
        if rests[0] > 1:
            # Padding on the right: causal attention hides it from the tokens before it, without a mask.
            tokens = torch.zeros(len(group), rests[0], dtype=torch.long)
            for row, request, rest in zip(tokens, requests, rests, strict=True):
                row[:rest] = torch.tensor(request.tokens[start:])
            states = self.model(tokens.to(device), cache=slots.prefill(where, start), hidden=True)
            states = states[torch.arange(len(group), device=device), torch.tensor(rests, device=device) - 1]
            written = [[token] for token in self._draw(states, [(request, []) for request in requests])]
        rows = [_Row(*row) for row in zip(requests, rooms, written, strict=True)]
        held = self._rows | dict(zip(free, rows, strict=False))
        self._rows, self._queue.waiting = held, self._queue.without(group)

    @property
    def _start(self) -> int:
        return self._shared_prefixes[-1].cache.length if self._shared_prefixes else 0

    @property
    def _prefix(self) -> bytes:
        return self._shared_prefixes[-1].ids if self._shared_prefixes else b""

    def _choose(self, most: int) -> list[Waiting]:
        """Return at most so many requests to read next, longest first; all begin with the last shared prefix."""
        if self._by_length and (group := self._choose_of_one_length(most)):
            return group
        while not (candidates := self._queue.continuing(self._prefix)):
            self._shared_prefixes = self._shared_prefixes[:-1]
        longest = min(candidates, key=TURN)
        while length := self._queue.length_to_share(longest, self._start):
            self._shared_prefixes = (*self._shared_prefixes, self._read_shared_prefix(longest, length))
            candidates = self._queue.continuing(self._prefix)
            longest = min(candidates, key=TURN)
        group = heapq.nsmallest(most, candidates, key=TURN)
        # Another one that shares a longer prefix waits for it to be read.
        group = [
            waiting for waiting in group if waiting is longest or not self._queue.length_to_share(waiting, self._start)
        ]
        return group[: _similar([waiting.length - self._start for waiting in group])]

    def _choose_of_one_length(self, most: int) -> list[Waiting]:
        """As `_choose`, of requests that turn keys by the same frequencies; none if all waiting ones do."""
        keys = {waiting.place: self.model.rope_key(waiting.length) for waiting in self._queue.waiting}
        if set(keys.values()) == {self.model.rope_key(1)}:
            return []
        self._shared_prefixes = ()
        longest = min(self._queue.waiting, key=TURN)
        candidates = [waiting for waiting in self._queue.waiting if keys[waiting.place] == keys[longest.place]]
        group = heapq.nsmallest(most, candidates, key=TURN)
        return group[: _similar([waiting.length for waiting in group])]

    def _read_shared_prefix(self, first: Waiting, length: int) -> _SharedPrefix:
        """Read a prompt up to `length`, from the end of the last shared prefix on."""
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
        for slot, row in enumerate(rows):
            if self._by_length and self.model.must_reread(row.newest_at, row.newest_at + 1):
                whole = torch.tensor([[*row.request.tokens, *row.written]], device=device)
                self.model(whole, cache=self._slots.prefill(torch.tensor([slot], device=device)), hidden=True)
        tokens, lengths = torch.tensor([[row.newest for row in rows], places], device=device)[:, :, None]
        if min(places) == longest:
            # A single row is the common case; slices are faster than lists of positions.
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
        """Move rows that have ended to the answers."""
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
        """Whether the answer contains one of its stop strings."""
        if not row.request.until:
            return False
        assert self.decode_bytes is not None
        # A token has at least one byte, so a stop string that has just ended lies in so many tokens.
        newest = self.decode_bytes(row.written[-max(map(len, row.request.until)) :])
        return any(text in newest for text in row.request.until)

    def _close_up(self) -> None:
        """Move rows from the end into free slots: a step computes the first n slots."""
        assert self._slots is not None
        for hole in range(len(self._rows)):
            if hole not in self._rows:
                last = max(self._rows)
                row = self._rows[last]
                self._slots.move(last, hole, row.newest_at)
                self._rows = {slot: kept for slot, kept in self._rows.items() if slot != last} | {hole: row}

    def _allocate(self, tokens: int) -> Slots:
        """Return slots for at least so many tokens, with their contents kept."""
        old = self._slots
        if old is not None and old.max_seq_len >= tokens:
            return old
        if old is not None:
            # Chains grow turn by turn; growing by half keeps the copies few.
            tokens = min(max(tokens, old.max_seq_len * 3 // 2), self.model.max_seq_len)
        new = Slots(self.model.new_cache(self.batch_size, tokens).layers)
        if old is not None:
            new.take(old)
        self._slots = new
        return new

    def _draw(self, states: Tensor, draws: list[tuple[Request, list[int]]]) -> list[int]:
        """Sample a token for each row of states, [b, d].

        Args:
            draws: of each row its request, and the tokens of its answer so far.
        """
        scores = self.model.logits(states)[:, : self.num_tokens]
        if self.repetition_penalty != 1:
            seen = [[*request.tokens, *written] for request, written in draws]
            scores = penalize(scores, seen, self.repetition_penalty)
        if self.temperature >= GREEDY:
            logits = top_k_top_p(scores / self.temperature, self.top_k, self.top_p, self.min_p)
            # The Gumbel-max trick (arXiv 1611.01144, eq. 1), with exponential instead of Gumbel noise. Sums that are
            # rounded differently in another batch change a sample only where two tokens nearly tie. A point of the
            # cumulative sum would move with every boundary below it.
            seeds = [(request.seed, len(written)) for request, written in draws]
            scores = torch.softmax(logits, -1) / _exponential(seeds, logits.shape[1], logits.device)
        best = scores.argmax(-1)  # NaN counts as the largest
        drawn: list[int] = torch.where(scores.gather(1, best[:, None])[:, 0].isfinite(), best, -1).tolist()
        if -1 in drawn:
            raise LogitsNotFinite(draws[drawn.index(-1)][0].key)
        return drawn


def _similar(lengths: list[int]) -> int:
    """Return how many of these lengths, in falling order, are read together."""
    total = 0
    for count, length in enumerate(lengths):
        padded = lengths[0] * (count + 1)
        total += length
        if count and (total < (1 - _PADDING) * padded or padded > _PREFILL_TOKENS):
            return count
    return len(lengths)


def _exponential(draws: list[tuple[int, int]], width: int, device: torch.device) -> Tensor:
    """Return exponential numbers, [b, width], each a function of (seed, number, column) on every device."""
    # A counter and an integer hash (found by github.com/skeeto/hash-prospector): torch's generators give each device
    # other numbers, and the CPU's takes eight times as long.
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
    # 31 bits, with small numbers exact: the most likely samples are decided near 0; none is 0 or infinite.
    uniform = ((x & 0x7FFFFFFF).float() + 0.5).mul_(2.0**-31).clamp_max_(1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()
