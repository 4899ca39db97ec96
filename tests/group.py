"""Processes that train together on this machine, for tests."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes


def in_group(work: Callable[[Path], dict[str, Any]], world_size: int, directory: Path) -> list[dict[str, Any]]:
    """What `work(directory)` returns on each of `world_size` ranks, two of them to a machine; by way of JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_rank, (work, world_size, port, directory), nprocs=world_size, start_method="forkserver")
    return [json.loads(path.read_text()) for path in (directory / f"{work.__name__}-{r}" for r in range(world_size))]


def _rank(rank: int, work: Callable[[Path], dict[str, Any]], world_size: int, port: int, directory: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    (directory / f"{work.__name__}-{rank}").write_text(json.dumps(work(directory)))
