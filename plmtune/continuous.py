"""Continuous batching: many prompts through one batch, in which a row that ends makes room for the next at once."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from plmtune.generation import check_sampling, keep_likeliest
from plmtune.modules.cache import Slots

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder

# Of the tokens of a prefill at most this share is padding, and there are at most so many.
_PADDING = 0.15
_PREFILL_TOKENS = 4096


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        key: names the answer.
        tokens: the prompt's ids.
        max_new_tokens: the answer is cut here, or where the model's max_seq_len is reached.
        seed: decides all draws of this answer, whatever its neighbours are.
    """

    key: str
    tokens: Sequence[int]
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What was written for a request.

    Attributes:
        tokens: without the id that ended it.
        ended: an end id came; else it was cut.
    """

    key: str
    tokens: list[int]
    ended: bool


@dataclass
class _Row:
    """A request that has a slot; all but the newest token are in the cache."""

    request: Request
    room: int
    written: list[int]

    @property
    def newest_at(self) -> int:
        return len(self.request.tokens) + len(self.written) - 1


class Engine:
    """Answer requests, `batch_size` at a time; an answer is yielded as soon as it is whole.

    Longer prompts go first: those read together are then of similar length, and so are those that decode together.
    What an answer says depends on its own prompt and seed; neighbours change only how sums are rounded.
    After an exception, an interrupt too, `run` goes on where it was.

    Args:
        model: the model; it computes as in evaluation.
        batch_size: rows that decode together.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest.
        top_p: draw from the likeliest that together reach this probability.
        end_ids: an answer ends at each of these.
        num_tokens: ids from here up have no text and are never drawn.

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
        end_ids: Collection[int] = (),
        num_tokens: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        check_sampling(temperature, top_k, top_p)
        self.model = model
        self.batch_size = batch_size
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.end_ids = frozenset(end_ids)
        self.num_tokens = num_tokens
        # Each change of these is one assignment of what is true after it, so that an interrupt finds them whole.
        self._waiting: list[Request] = []
        self._rows: dict[int, _Row] = {}  # by slot
        self._finished: list[Answer] = []
        self._slots: Slots | None = None

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
        self._waiting.append(request)

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
        # The sort is stable, so equals go in the order in which they came.
        waiting = sorted(self._waiting, key=lambda request: -len(request.tokens))
        group = waiting[: _alike([len(request.tokens) for request in waiting[: len(free)]])]
        rooms = [min(request.max_new_tokens, self.model.max_seq_len - len(request.tokens)) for request in group]
        slots = self._allocate(max(len(request.tokens) + room for request, room in zip(group, rooms, strict=True)))
        device = self.model.head_weight.device
        lengths = torch.tensor([len(request.tokens) for request in group], device=device)
        # Padded on the right: causal attention hides that from what stands before it, without a mask.
        tokens = torch.zeros(len(group), len(group[0].tokens), dtype=torch.long)
        for row, request in zip(tokens, group, strict=True):
            row[: len(request.tokens)] = torch.tensor(request.tokens)
        cache = slots.prefill(torch.tensor(free[: len(group)], device=device))
        states = self.model(tokens.to(device), cache=cache, hidden=True)
        states = states[torch.arange(len(group), device=device), lengths - 1]
        drawn = self._draw(states, [(request.seed, 0) for request in group])
        rows = [_Row(request, room, [token]) for request, room, token in zip(group, rooms, drawn, strict=True)]
        self._rows, self._waiting = self._rows | dict(zip(free, rows, strict=False)), waiting[len(group) :]

    def _step(self) -> None:
        rows = [self._rows[slot] for slot in range(len(self._rows))]
        places = [row.newest_at for row in rows]
        longest = max(places)
        assert self._slots is not None
        device = self.model.head_weight.device
        tokens, lengths = torch.tensor([[row.written[-1] for row in rows], places], device=device)[:, :, None]
        if min(places) == longest:
            # One row is the common case of it; slices take less time than lists of places.
            cache = self._slots.decode_alike(len(rows), longest)
            states = self.model(tokens, cache=cache, hidden=True)
        else:
            mask = (torch.arange(longest + 1, device=device) <= lengths)[:, None]  # [b, 1, t]
            cache = self._slots.decode(lengths[:, 0], longest)
            states = self.model(tokens, mask=mask, input_pos=lengths, cache=cache, hidden=True)
        drawn = self._draw(states[:, 0], [(row.request.seed, len(row.written)) for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            row.written.append(token)

    def _retire(self) -> None:
        """Turn rows that have ended into answers."""
        rows, answers = {}, []
        for slot, row in self._rows.items():
            ended = row.written[-1] in self.end_ids
            if ended or len(row.written) >= row.room:
                answers.append(Answer(row.request.key, row.written[: -1 if ended else None], ended))
            else:
                rows[slot] = row
        self._rows, self._finished = rows, self._finished + answers

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

    def _draw(self, states: Tensor, draws: list[tuple[int, int]]) -> list[int]:
        """Return a token for each row of states, [b, d], by its (seed, number of the token in its answer)."""
        logits = F.linear(states, self.model.head_weight).float()[:, : self.num_tokens]
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        logits = keep_likeliest(logits / self.temperature, self.top_k, self.top_p)
        # Gumbel's way (arXiv 1611.01144, eq. 1): the arrival that comes first has the softmax's distribution. Sums
        # that are rounded otherwise in another batch change a draw only where two arrivals all but tie; drawing a
        # point of the cumulative sum would move with every boundary below it.
        weight = torch.softmax(logits, -1)
        return (weight / _exponential(draws, logits.shape[1], logits.device)).argmax(-1).tolist()


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
