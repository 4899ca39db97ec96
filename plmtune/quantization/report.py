"""The report of a quantization: size and loss before and after, as JSON and as lines for a person."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import Any

from plmtune.io.atomic import write_atomically
from plmtune.units import show_bytes

FILE = "quantize.json"


@dataclass
class Report:
    """The contents of quantize.json.

    Attributes:
        checkpoint: that was quantized.
        scheme: name and settings. dtype: of the unquantized tensors.
        calibration_tokens, sensitivity_tokens, test_tokens: of the text.
        bytes, bytes_before: of the files of weights.
        loss, loss_before: nats a token; None without text to measure on.
        formats: module name -> name of its format.
    """

    checkpoint: str
    scheme: dict[str, Any]
    dtype: str
    calibration_tokens: int
    bytes: int
    bytes_before: int
    sensitivity_tokens: int
    test_tokens: int
    loss_before: float | None
    loss: float | None
    formats: dict[str, str]

    def write(self, directory: Path) -> None:
        write_atomically(directory / FILE, json.dumps(asdict(self), indent=1) + "\n")

    def lines(self, directory: Path) -> list[str]:
        """Size and loss before and after, and the commands that use the model."""
        size, before = show_bytes(self.bytes, self.bytes_before), show_bytes(self.bytes_before)
        lines = [f"{directory}: {size}, {self.bytes / self.bytes_before:.1%} of the {before} in {self.dtype}"]
        if self.loss is not None and self.loss_before is not None:
            old, new = self.loss_before, self.loss
            lines.append(
                f"loss {old:.4f} -> {new:.4f} nats a token ({new - old:+.4f}), perplexity {exp(old):.2f} -> "
                f"{exp(new):.2f} on {self.test_tokens:,} tokens of the data"
            )
        lines.append(f"try it: plmtune generate {directory} --prompt 'Hello'")
        return [*lines, f"how fast it is: plmtune bench {directory}"]
