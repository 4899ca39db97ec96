"""Files of architectures whose tensors are held in another form, or that llama.cpp rounds more, pass verification."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plmtune.export.gguf_writer import write_gguf
from plmtune.export.verify import verify
from plmtune.models.deepseek import deepseek
from plmtune.models.gemma import gemma2
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gpt2 import gpt2
from plmtune.models.hf import save_model
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte

SIZES: dict[str, Any] = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 64, "init_std": 0.15}
LLAMA3 = component("rope_scaling", "llama3", original_max_seq_len=16)
MLA = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
MODELS: dict[str, Callable[[], Decoder]] = {
    "llama": lambda: llama(
        288,
        attention=component("attention", "gqa", num_kv_heads=2, rope_scaling=LLAMA3),
        ffn=component("ffn", "swiglu", hidden_dim=96),
        **SIZES,
    ),
    "gemma2": lambda: gemma2(
        288,
        attention=component("attention", "gqa", num_kv_heads=2, head_dim=16, window=8, soft_cap=50.0, scale=0.25),
        ffn=component("ffn", "geglu", hidden_dim=96),
        **SIZES,
    ),
    "deepseek2": lambda: deepseek(
        288,
        attention=component("attention", "mla", latent_eps=1e-6, **MLA),
        ffn=component("ffn", "swiglu", hidden_dim=96),
        **SIZES,
    ),
    "gpt2": lambda: gpt2(
        288,
        attention=component("attention", "gqa", num_kv_heads=4, rope=False, bias=True),
        ffn=component("ffn", "gelu", hidden_dim=96),
        **SIZES,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_passes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(model, None, tmp_path / "model")
    byte().save(tmp_path / "model")
    write_gguf(model, byte(), tmp_path / "a.gguf", kind="F32")
    with opened_gguf(tmp_path / "a.gguf") as file:
        assert file.metadata["general.architecture"] == name
    report = verify(tmp_path / "a.gguf", tmp_path / "model", positions=16, threads=1)
    assert [found for found in report.checks if not found.passed] == []
