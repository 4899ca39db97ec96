"""Products of ever new shapes: what they leave behind is bounded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plmtune.modules import linear

ROOT = Path(__file__).parents[2]


def environment(**settings: str) -> dict[str, str]:
    """The environment without what this process has set."""
    unset = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    return {key: value for key, value in os.environ.items() if key not in unset} | settings


@pytest.mark.parametrize("settings", [{}, {"LRU_CACHE_CAPACITY": "7"}])
def test_caches_of_kernels_are_bounded_before_the_first_product_unless_the_person_sets_them(
    settings: dict[str, str],
) -> None:
    code = (
        f"import os; exec(open({str(linear.__file__)!r}).read())\n"
        "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], os.environ['LRU_CACHE_CAPACITY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**settings), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["128", settings.get("LRU_CACHE_CAPACITY", "1")]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU multiplies in fp32")
def test_training_in_bf16_on_new_lengths_does_not_grow() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "memory_growth.py", "--steps", "200", "--precision", "bf16"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    first, *_, last = (int(line.split()[1]) for line in done.stdout.splitlines())
    assert last - first < 100  # MiB
