"""A discrete-event simulation of processes that compute, send, receive and reduce over links which they share.

Each process runs its program in order. Computing and waiting take its time; what it sends does not. A transfer or a
collective occupies the ports it goes through, one at a time and first come, first served: so two transfers through one
port take twice as long. A collective starts when its last member has come.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Do = Literal["compute", "send", "receive", "collective", "start", "wait"]


@dataclass(frozen=True)
class Op:
    """One line of a program.

    Attributes:
        do: compute; send and receive a message; take part in a collective, or start one and wait for it later.
        name: what a timeline calls it.
        seconds: of computing, of the message or of the collective, once its ports are free.
        key: of the message or the collective, equal on all that take part.
        ports: that are occupied meanwhile; of a collective, those of this member.
        members: of the collective.
    """

    do: Do
    name: str
    seconds: float = 0.0
    key: Hashable = None
    ports: tuple[Hashable, ...] = ()
    members: int = 1


@dataclass(frozen=True)
class Span:
    """What a process did from one time to another, in seconds."""

    process: int
    name: str
    start: float
    end: float
    do: Do


@dataclass
class Simulated:
    """Times in seconds.

    Attributes:
        makespan: the end of the last process.
        busy: seconds that each process computed.
        spans: in the order of their starts on each process; waits are the gaps.
    """

    makespan: float
    busy: list[float]
    spans: list[Span]

    @property
    def idle(self) -> float:
        """The share of all processes' time in which they did not compute."""
        return 1 - sum(self.busy) / (self.makespan * len(self.busy)) if self.makespan else 0.0


@dataclass
class _Meeting:
    """A collective on its way."""

    arrived: int = 0
    latest: float = 0.0
    ports: list[Hashable] = field(default_factory=list)
    waiting: list[tuple[int, float, Op]] = field(default_factory=list)
    end: float | None = None


def simulate(programs: Sequence[Sequence[Op]]) -> Simulated:
    """Run a program on each process.

    Raises:
        ValueError: if all processes wait, with the first operation that is never answered.
    """
    left = [deque(program) for program in programs]
    clock = [0.0] * len(programs)
    free: dict[Hashable, float] = {}
    messages: dict[Hashable, float] = {}
    receivers: dict[Hashable, int] = {}
    meetings: dict[Hashable, _Meeting] = {}
    busy = [0.0] * len(programs)
    spans: list[Span] = []
    ready = [(0.0, process) for process in range(len(programs))]

    def through(ports: Sequence[Hashable], start: float, seconds: float) -> tuple[float, float]:
        start = max([start, *(free.get(port, 0.0) for port in ports)])
        for port in ports:
            free[port] = start + seconds
        return start, start + seconds

    def resume(process: int, time: float) -> None:
        clock[process] = max(clock[process], time)
        heapq.heappush(ready, (clock[process], process))

    while ready:
        now, process = heapq.heappop(ready)
        if not left[process]:
            continue
        op = left[process][0]
        if op.do == "compute":
            left[process].popleft()
            spans.append(Span(process, op.name, now, now + op.seconds, op.do))
            busy[process] += op.seconds
            resume(process, now + op.seconds)
        elif op.do == "send":
            left[process].popleft()
            _, messages[op.key] = through(op.ports, now, op.seconds)
            resume(process, now)
            if op.key in receivers:
                resume(receivers.pop(op.key), messages[op.key])
        elif op.do == "receive":
            if op.key not in messages:
                receivers[op.key] = process
            elif messages[op.key] > now:
                resume(process, messages[op.key])
            else:
                left[process].popleft()
                resume(process, now)
        elif op.do == "wait":
            meeting = meetings.setdefault(op.key, _Meeting())
            if meeting.end is None:
                meeting.waiting.append((process, now, op))
            else:
                left[process].popleft()
                resume(process, max(now, meeting.end))
        else:
            left[process].popleft()
            meeting = meetings.setdefault(op.key, _Meeting())
            meeting.arrived += 1
            meeting.latest = max(meeting.latest, now)
            meeting.ports += op.ports
            if op.do == "start":
                resume(process, now)
            else:
                meeting.waiting.append((process, now, op))
            if meeting.arrived == op.members:
                start, meeting.end = through(meeting.ports, meeting.latest, op.seconds)
                for other, _, its in meeting.waiting:
                    if its.do == "collective":
                        spans.append(Span(other, its.name, start, meeting.end, its.do))
                    resume(other, meeting.end)
    if stuck := next(((i, program[0]) for i, program in enumerate(left) if program), None):
        process, op = stuck
        raise ValueError(f"process {process} waits for ever: {op.do} {op.name} ({op.key}) is never answered")
    return Simulated(max(clock, default=0.0), busy, spans)


def count(spans: Sequence[Span]) -> Mapping[str, float]:
    """Seconds of all processes by name."""
    found: dict[str, float] = {}
    for span in spans:
        found[span.name] = found.get(span.name, 0.0) + span.end - span.start
    return found
