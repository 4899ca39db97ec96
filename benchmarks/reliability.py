"""Kills, fills, flips and signals real runs, and counts what survives: the figures of docs/reliability.md.

    python benchmarks/reliability.py            all bars, full counts
    python benchmarks/reliability.py --quick    each once or a few times
    python benchmarks/reliability.py --only save,flip --json figures.json

Every run is compared with one that nothing disturbed. Exit code 1 if anything did not pass.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from side_by_side import machine
from trials import damage, disks, ranks, saves, stops
from trials.place import Place
from trials.tally import Tally, table

Trial = Callable[[Place, int, random.Random], Tally]


@dataclass(frozen=True)
class Bar:
    """A trial with how often it is made, in full and with --quick, and whether it can be made here."""

    trial: Trial
    full: int
    quick: int
    possible: Callable[[], bool] = lambda: True


BARS = {
    "kill": [Bar(stops.killed, 10, 3)],
    "save": [Bar(saves.killed_while_saving, 200, 10)],
    "flip": [Bar(damage.flipped, 100, 10), Bar(damage.flipped_command, 2, 1)],
    "disk": [
        Bar(disks.limited, 5, 1),
        Bar(disks.full, 10, 2, disks.can_mount),
        Bar(disks.full_metrics, 5, 1, disks.can_mount),
    ],
    "signal": [Bar(stops.signalled, 10, 1), Bar(stops.signalled_twice, 5, 1)],
    "ranks": [Bar(ranks.killed_rank, 5, 1)],
    "lock": [Bar(stops.locked, 5, 1), Bar(stops.started_together, 10, 2)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BARS), help=f"of {','.join(BARS)}")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := [name for name in chosen if name not in BARS]:
        parser.error(f"--only: {', '.join(unknown)}: unknown; there are {', '.join(BARS)}")
    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory(prefix="reliability-") as directory:
        place = Place(Path(directory) / "place")
        for name in chosen:
            for bar in BARS[name]:
                if not bar.possible():
                    print(f"{name}: no small disk can be mounted here; left out", file=sys.stderr)
                    continue
                count = bar.quick if options.quick else bar.full
                tallies.append(bar.trial(place, count, random.Random(f"{options.seed} {name}")))
                if options.json:  # after each bar: a long trial that is broken off has shown something
                    results = {"machine": machine(), "bars": [asdict(tally) for tally in tallies]}
                    options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}\n\n{table(tallies)}")
    sys.exit(not all(tally.all_passed for tally in tallies))


if __name__ == "__main__":
    main()
