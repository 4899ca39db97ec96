"""The report of a pruning: what was kept, size and loss before and after, as JSON and as lines for a person."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import exp
from pathlib import Path
from typing import Any

from plmtune.io.atomic import write_atomically
from plmtune.io.tables import Column, Table
from plmtune.units import runs_of, show_bytes

FILE = "prune.json"


@dataclass
class Report:
    """The contents of prune.json.

    Attributes:
        checkpoint: that was pruned.
        importance: of units, by what it was measured. depth: of layers; None: no layer went.
        dtype: of the weights that were written.
        calibration_tokens, test_tokens: of the text.
        sizes_before, sizes: settings of the model -> sizes.
        layers: numbers of those that were kept.
        units: group -> units that were kept, both numbered as in the checkpoint; a group that is not named was kept
            whole.
        parameters, parameters_before, bytes, bytes_before: of the weights.
        loss, loss_before: nats a token; None without text to measure on.
        forced: why the cut was larger than it should be; empty: it was not.
        measured: what layers and masks were found to be.
    """

    checkpoint: str
    importance: str | None
    depth: str | None
    dtype: str
    calibration_tokens: int
    test_tokens: int
    sizes_before: dict[str, int]
    sizes: dict[str, int]
    layers: Sequence[int]
    units: dict[str, Sequence[int]]
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    loss_before: float | None
    loss: float | None
    forced: str = ""
    measured: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        write_atomically(directory / FILE, json.dumps(asdict(self), indent=1) + "\n")

    def table(self) -> Table:
        """Sizes, parameters, bytes and loss before and after."""
        table = Table(["", Column("before", right=True), Column("after", right=True), Column("kept", right=True)])

        def add(name: str, before: int, after: int, shown: tuple[str, str] | None = None) -> None:
            table.add(name, *(shown or (f"{before:,}", f"{after:,}")), f"{after / before:.1%}")

        for name, before in self.sizes_before.items():
            if self.sizes[name] != before:
                add(name, before, self.sizes[name])
        add("parameters", self.parameters_before, self.parameters)
        sizes = show_bytes(self.bytes_before), show_bytes(self.bytes, self.bytes_before)
        add(f"weights in {self.dtype}", self.bytes_before, self.bytes, sizes)
        if self.loss is not None and self.loss_before is not None:
            table.add(f"loss on {self.test_tokens:,} tokens", f"{self.loss_before:.4f}", f"{self.loss:.4f}", "")
            table.add("perplexity", f"{exp(self.loss_before):.2f}", f"{exp(min(self.loss, 50)):.2f}", "")
        return table

    def lines(self, directory: Path) -> list[str]:
        """What stays, and the commands that use the model."""
        lines = []
        if self.depth is not None:
            lines.append(f"layers kept, by {self.depth}: {ranges(self.layers)}")
        if self.importance is not None:
            lines.append(f"units kept, by {self.importance}: {FILE}, key units")
        return [*lines, f"train it further: plmtune run pretrain init_from={directory}"]


def ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs_of(numbers))
