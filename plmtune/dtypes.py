"""Number types by their names: ours (bf16), and those in the headers of safetensors and GGUF files (BF16).

The table imports no torch, so that commands can name the types before torch is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class _Type(NamedTuple):
    code: str  # in the header of a safetensors file; floating-point types have the same code in GGUF files
    torch_name: str
    name: str = ""  # in configs, options and tables


_TYPES = (
    _Type("F64", "float64"),
    _Type("F32", "float32", "fp32"),
    _Type("F16", "float16", "fp16"),
    _Type("BF16", "bfloat16", "bf16"),
    _Type("I64", "int64"),
    _Type("I32", "int32"),
    _Type("I16", "int16"),
    _Type("I8", "int8"),
    _Type("U8", "uint8"),
    _Type("BOOL", "bool"),
    _Type("F8_E4M3", "float8_e4m3fn"),
    _Type("F8_E5M2", "float8_e5m2"),
)

CODES = tuple(row.code for row in _TYPES)
FLOAT_CODES = ("F64", "F32", "F16", "BF16")  # of the weights that are read
NAMES = ("fp32", "bf16", "fp16")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def from_name(name: str) -> torch.dtype:
    """``bf16`` -> torch.bfloat16."""
    return _dtype(next(row for row in _TYPES if row.name == name))


def from_code(code: str) -> torch.dtype:
    """``BF16`` -> torch.bfloat16.

    Raises:
        KeyError: for a type that plmtune does not know.
    """
    for row in _TYPES:
        if row.code == code:
            return _dtype(row)
    raise KeyError(code)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> ``bf16``; torch's own name for a type that has no name of ours."""
    return _row(dtype).name or str(dtype).removeprefix("torch.")


def code_of(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> ``BF16``."""
    return _row(dtype).code


def _row(dtype: torch.dtype) -> _Type:
    torch_name = str(dtype).removeprefix("torch.")
    for row in _TYPES:
        if row.torch_name == torch_name:
            return row
    raise KeyError(f"{dtype} has no name in files")


def _dtype(row: _Type) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, row.torch_name)
    return found
