"""Half precision: where numbers are rounded is as in transformers, so neither is further from fp32 than the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_families import make
from transformers import AutoModelForCausalLM

from plmtune.models.hf import load_model

# Scaled embeddings and norms of 1 + weight; normed heads; fused matrices and factors of cos and sin; layer norm.
NAMES = ["gemma2", "gemma3", "qwen3", "phi3-longrope", "gpt2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_is_as_close_to_fp32_as_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exact = make(name, tmp_path).to(dtype).float()  # of the weights as they are rounded
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager").eval()
    ids = torch.randint(3, 101, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = exact(ids).logits
    errors = [
        float((found.float() - expected).square().mean().sqrt())
        for found in (load_model(tmp_path, dtype=dtype).eval()(ids), theirs(ids).logits)
    ]
    assert errors[0] < 1.25 * errors[1]
