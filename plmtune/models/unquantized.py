"""Checkpoints that a recipe changes: described and loaded only if their weights are floats, and finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from plmtune.errors import UserError
from plmtune.io.safetensors_writer import listed, not_finite
from plmtune.models.adapters import holds_adapters, load_model, read_model_config
from plmtune.models.assemble import meta_model
from plmtune.models.checkpoint_files import CONFIG, read_json
from plmtune.modules.decoder import Decoder


def build_on_meta(checkpoint: Path, verb: str = "quantize") -> Any:
    """The model of a checkpoint, which must not be quantized, on the meta device.

    Args:
        verb: what a recipe does with it, for messages.
    """
    if not holds_adapters(checkpoint) and "quantization_config" in read_json(checkpoint, CONFIG):
        raise UserError(
            f"{checkpoint} is quantized already. {verb.capitalize()} its original (quantize.json names it)."
        )
    return meta_model(read_model_config(checkpoint), str(checkpoint))


def load_finite(
    checkpoint: Path, device: torch.device, verb: str = "quantize", dtype: torch.dtype | None = torch.float32
) -> Decoder:
    """Load a checkpoint's model, and refuse weights that are not finite.

    Args:
        verb: as for `build_on_meta`.
        dtype: None: the file's.
    """
    model: Decoder = load_model(checkpoint, device, dtype).eval()
    if names := not_finite(dict(model.named_parameters())):
        raise UserError(
            f"{checkpoint}: its weights are not finite ({listed(names)}): its training diverged, or it is damaged. "
            f"{verb.capitalize()} an earlier checkpoint or another model."
        )
    return model
