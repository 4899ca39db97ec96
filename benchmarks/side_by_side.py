"""What the CPU benchmarks share: alternated rounds, medians, the machine in words."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def medians(calls: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float = 0.3) -> dict[str, float]:
    """Return each call's median seconds over `rounds` of medians, the order turned round in every other one.

    Args:
        seconds: a call is repeated within a round until this has passed.
    """
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            times: list[float] = []
            while sum(times) < seconds:
                start = time.perf_counter()
                calls[name]()
                times.append(time.perf_counter() - start)
            taken[name].append(statistics.median(times))
    return {name: statistics.median(times) for name, times in taken.items()}


def machine() -> str:
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
