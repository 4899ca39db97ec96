"""The record of a launch: which backend runs it, under which job. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from plmtune.io.atomic import write_atomically
from plmtune.io.provenance import now
from plmtune.io.untrusted import load_json

RECORD = "launch.json"


@dataclass
class Launch:
    """One launch.

    Attributes:
        backend: "local" or "slurm".
        job: the number of Slurm's job; of a local launch the id of its process.
        processes: of all nodes.
        command: the words behind plmtune.
        launched: when, in UTC.
    """

    backend: str
    job: str
    nodes: int
    processes: int
    command: list[str]
    launched: str = ""

    def write(self, run_dir: Path) -> None:
        """Write RUN_DIR/launch.json; a directory that is not there is made."""
        self.launched = self.launched or now()
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / RECORD, json.dumps(asdict(self), indent=1) + "\n", user_error=True)


def read_launch(run_dir: Path) -> Launch | None:
    """What RUN_DIR/launch.json says; None if there is none, or none that can be read."""
    try:
        entry = load_json((run_dir / RECORD).read_text(encoding="utf-8"))
        launch = Launch(**entry)
    except (OSError, ValueError, TypeError):
        return None
    return launch if isinstance(launch.backend, str) and isinstance(launch.job, str) else None


def find_launches(directory: Path, known: Sequence[Path] = ()) -> Iterator[Path]:
    """Directories at or below `directory` in which a launch was recorded and no run has begun.

    Args:
        known: the runs there, which are not looked into.
    """
    inside = {path.resolve() for path in known}
    for folder, names, files in os.walk(directory):
        path = Path(folder)
        if path.resolve() in inside:
            names.clear()
        elif RECORD in files:
            names.clear()
            yield path
        names[:] = sorted(n for n in names if not n.startswith(".") and n not in ("checkpoints", "rounds", "ranks"))
