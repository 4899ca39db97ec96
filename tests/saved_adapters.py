"""Adapters in a directory, as a checkpoint of a run has them."""

from pathlib import Path

from plmtune.io import safetensors_writer
from plmtune.models.adapters import ADAPTERS, adapter_config, adapter_state, write_adapter_config
from plmtune.modules.decoder import Decoder


def save_adapter(model: Decoder, directory: Path, base: Path) -> None:
    """Write a model's adapters, which stand beside the weights in `base`."""
    directory.mkdir(parents=True, exist_ok=True)
    safetensors_writer.write(directory / f"{ADAPTERS}.safetensors", adapter_state(model))
    write_adapter_config(directory, adapter_config(model, base))
