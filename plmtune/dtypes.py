"""Number types by their names: ours (bf16), and those in the headers of safetensors and GGUF files (BF16).

The table imports no torch, so that commands can name the types before torch is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Code in the header of a safetensors file -> torch's name. Floating-point types have the same code in GGUF files.
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
          "F8_E5M2": "float8_e5m2"}  # fmt: skip
_CODES = {torch_name: code for code, torch_name in _TORCH.items()}
# Name in configs, options and tables -> code.
_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}

CODES = tuple(_TORCH)
FLOAT_CODES = ("F64", "F32", "F16", "BF16")  # of the weights that are read
NAMES = tuple(_NAMES)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def from_name(name: str) -> torch.dtype:
    """``bf16`` -> torch.bfloat16."""
    return from_code(_NAMES[name])


def from_code(code: str) -> torch.dtype:
    """``BF16`` -> torch.bfloat16.

    Raises:
        KeyError: for a type that plmtune does not know.
    """
    import torch

    found: torch.dtype = getattr(torch, _TORCH[code])
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> ``bf16``; torch's own name for a type that has no name of ours."""
    torch_name = str(dtype).removeprefix("torch.")
    return next((name for name, code in _NAMES.items() if _TORCH[code] == torch_name), torch_name)


def code_of(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> ``BF16``."""
    return _CODES[str(dtype).removeprefix("torch.")]
