"""Adapters in a directory, as a checkpoint of a run has them."""

from pathlib import Path

from safetensors.torch import save_file

from plmtune.models.adapters import ADAPTERS, adapter_config, adapter_state, write_adapter_config
from plmtune.modules.decoder import Decoder


def save_adapter(model: Decoder, directory: Path, base: Path) -> None:
    """Write a model's adapters, which stand beside the weights in `base`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in adapter_state(model).items()},
        directory / f"{ADAPTERS}.safetensors",
    )
    write_adapter_config(directory, adapter_config(model, base))
