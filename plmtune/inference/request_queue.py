"""Requests for text, and the queue in which they wait: prompts with equal beginnings are neighbours."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A shared prefix is read once where it has so many tokens, and spares reading so many: it takes a forward of its own,
# which costs as much as some dozens of tokens. Equal prompts share all of it, however short.
_MIN_SHARED = 32
_MIN_SAVED = 256


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        key: names the answer.
        tokens: ids of the prompt.
        max_new_tokens: longest answer; the model's max_seq_len limits it too.
        seed: decides all samples of this answer, whatever other requests are in the batch.
        until: the answer ends as soon as its bytes contain one of these, at any position inside a token.
    """

    key: str
    tokens: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    until: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Waiting:
    """A request in the queue.

    Attributes:
        ids: its tokens, 4 bytes each, high byte first, so that bytes sort as ids do.
        place: sort key of the queue: the ids, then the number of the request.
        turn: sort key of the reading: the longest first, then by number.
    """

    request: Request
    ids: bytes
    length: int
    place: tuple[bytes, int]
    turn: tuple[int, int]


# Looked up for thousands of requests at each read, where a Python function would be slow.
_IDS, _PLACE, TURN = attrgetter("ids"), attrgetter("place"), attrgetter("turn")


class RequestQueue:
    """Waiting requests in the order of their ids.

    Attributes:
        waiting: replaced by one assignment at a time, so that an interrupt leaves a complete list.
    """

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []
        self._count = 0

    def add(self, request: Request) -> None:
        self._count += 1
        ids, length = np.asarray(request.tokens, dtype=">u4").tobytes(), len(request.tokens)
        insort(self.waiting, Waiting(request, ids, length, (ids, self._count), (-length, self._count)), key=_PLACE)

    def without(self, taken: Collection[Waiting]) -> list[Waiting]:
        places = {waiting.place for waiting in taken}
        return [waiting for waiting in self.waiting if waiting.place not in places]

    def continuing(self, ids: bytes) -> list[Waiting]:
        """The requests whose prompts continue `ids` by at least one token."""
        if not ids:
            return self.waiting
        first = bisect_right(self.waiting, ids, key=_IDS)
        # No id begins with this byte.
        end = bisect_left(self.waiting, ids + b"\xff", key=_IDS)
        return self.waiting[first:end]

    def length_to_share(self, first: Waiting, start: int) -> int:
        """The length of a prefix of a request that pays to be read once for several requests; 0: none does.

        Args:
            start: tokens that are in the cache already.
        """
        at = bisect_left(self.waiting, first.place, key=_PLACE)
        ids, shared = np.frombuffer(first.ids, "u4"), []
        for others in (range(at - 1, -1, -1), range(at + 1, len(self.waiting))):
            for index in others:
                other = self.waiting[index]
                common = count_shared(ids, np.frombuffer(other.ids, "u4"))
                if common - start < _MIN_SHARED and other.ids != first.ids:
                    break
                # At least one token must remain to be read.
                shared.append(min(common, first.length - 1, other.length - 1))
        shared.sort(reverse=True)
        saved, length = max(
            (((length - start) * others, length) for others, length in enumerate(shared, start=1)), default=(0, 0)
        )
        return length if saved >= _MIN_SAVED or (saved > 0 and length == first.length - 1) else 0


def count_shared(a: NDArray[Any], b: NDArray[Any]) -> int:
    """The length of the common prefix."""
    length = min(a.size, b.size)
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length
