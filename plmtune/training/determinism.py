"""The cost of deterministic algorithms, and keeping the random state."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


def measure_cost(step: Callable[[], object], device: torch.device, *, rounds: int = 3) -> float:
    """Time a step (a forward and a backward) with and without deterministic algorithms, and restore the random state.

    Returns the median of (seconds deterministic) / (seconds without) over rounds, in which the order alternates. Every
    rank must call it.
    """
    ratios = []
    with preserve_random_state(device):
        for index in range(rounds + 1):
            seconds = {}
            for deterministic in (True, False) if index % 2 else (False, True):
                torch.use_deterministic_algorithms(deterministic)
                seconds[deterministic] = measure_seconds(step, device)
            ratios.append(seconds[True] / seconds[False])
    return statistics.median(ratios[1:])  # the first warms up


def measure_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a step, with the work that it queues on a GPU."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random generators and `torch.use_deterministic_algorithms` after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        random.setstate(python)
        np.random.set_state(numpy)
