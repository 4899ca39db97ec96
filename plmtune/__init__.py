"""plmtune: small language models for edge devices, from raw text to a file that a device runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plmtune.registry import component, register

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from plmtune.modules.decoder import Decoder
    from plmtune.tokenizers.tokenizer import Tokenizer

__all__ = ["component", "load", "register"]
__version__ = "0.1.0"


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    prepare: bool = True,
) -> tuple[Decoder, Tokenizer]:
    """Return (model, tokenizer) of a checkpoint, of a model directory, or of a run's newest checkpoint.

    Adapters come merged into their base.

    Args:
        path: a directory in Hugging Face's form, or a run directory.
        device: None: cuda where there is one, else cpu.
        dtype: None keeps the file's.
        prepare: give quantized layers the kernels that are fastest on this machine; such a model cannot be saved.
    """
    import torch

    from plmtune.inference.kernel_choice import prepack
    from plmtune.models.adapters import load_model, load_model_tokenizer
    from plmtune.models.checkpoint_files import checkpoint_directory

    directory = checkpoint_directory(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_model_tokenizer(directory)
    model = load_model(directory, device, dtype).eval()
    if prepare:
        prepack(model)
    return model, tokenizer
