"""The supervised objective that opens refinement, before preference training."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from plmtune.losses.cross_entropy import cross_entropy
from plmtune.registry import register


@register("loss", "sft_refine")
class SftRefine:
    """Cross entropy over pairs (ARIES, arXiv 2502.05605): L_SFT = -[log pi(y_w | x) + log pi(y_w | T(x, y_l))].

    It computes `cross_entropy`; the data differ. The recipe reads `data_kind` and makes two conversations of each
    pair: the chosen answer to the prompt, and to the refinement template filled with prompt and rejected
    answer. Prompt and rejected answer are masked.

    Args:
        chunk_rows, z_loss: as for cross_entropy.

    Raises:
        ValueError: if chunk_rows is not positive, or z_loss negative.
    """

    data_kind: ClassVar[str] = "refinements"

    def __init__(self, *, chunk_rows: int = 1024, z_loss: float = 0.0) -> None:
        self._cross_entropy = cross_entropy(chunk_rows=chunk_rows, z_loss=z_loss)

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, *, soft_cap: float | None = None) -> Tensor:
        """Sum over targets [n] that are not -100, from hidden [n, d] and weight [v, d], an fp32 scalar."""
        return self._cross_entropy(hidden, weight, targets, soft_cap=soft_cap)
