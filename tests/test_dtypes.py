"""The one table of number types."""

import subprocess
import sys

import pytest
import torch

from plmtune import dtypes


@pytest.mark.parametrize("name", dtypes.NAMES)
def test_a_name_has_a_type_of_its_size(name: str) -> None:
    assert dtypes.dtype_name(dtypes.from_name(name)) == name
    assert dtypes.from_name(name).itemsize == dtypes.BYTES[name]


@pytest.mark.parametrize("code", dtypes.CODES)
def test_a_code_has_a_type(code: str) -> None:
    assert dtypes.code_of(dtypes.from_code(code)) == code


def test_a_type_without_a_name_of_ours_keeps_torchs_and_an_unknown_code_is_refused() -> None:
    assert dtypes.dtype_name(torch.int8) == "int8" and dtypes.from_code("BF16") is torch.bfloat16
    with pytest.raises(KeyError):
        dtypes.from_code("F7")


def test_the_table_imports_no_torch() -> None:
    code = "import sys, plmtune.dtypes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
