"""Files of architectures whose tensors are held in another form, or that llama.cpp rounds more, pass verification."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plmtune.export import verify_cache
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.verify import verify
from plmtune.models.deepseek import deepseek
from plmtune.models.gemma import gemma2
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gpt2 import gpt2
from plmtune.models.hf import save_model
from plmtune.models.llama import llama
from plmtune.models.mistral import mistral
from plmtune.models.plm import plm
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
    "granite_swa": lambda: mistral(
        288,
        attention=component("attention", "gqa", num_kv_heads=2, window=6, rope_scaling=LLAMA3),
        ffn=component("ffn", "swiglu", hidden_dim=96),
        layers=["local", "global"],
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


def save(model: Decoder, directory: Path) -> Decoder:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(model, None, directory)
    byte().save(directory)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_file_passes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = save(MODELS[name](), tmp_path / "model")
    write_gguf(model, byte(), tmp_path / "a.gguf", kind="F32")
    with opened_gguf(tmp_path / "a.gguf") as file:
        assert file.metadata["general.architecture"] == name
    report = verify(tmp_path / "a.gguf", tmp_path / "model", positions=16, threads=1)
    assert [found for found in report.checks if not found.passed] == []


class TestPlmAsDeepseek2:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Decoder:
        torch.manual_seed(0)
        mla = component("attention", "mla", **MLA | {"q_lora_rank": None, "qk_nope_head_dim": 32})
        made = plm(288, attention=mla, ffn=component("ffn", "squared_relu", hidden_dim=96), **SIZES)
        return save(made, tmp_path / "model")

    @pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
    def test_passes_with_and_without_flash_attention(self, kind: str, model: Decoder, tmp_path: Path) -> None:
        write_gguf(model, byte(), tmp_path / "a.gguf", kind=kind, as_="deepseek2")
        report = verify(tmp_path / "a.gguf", tmp_path / "model", positions=16, threads=1)
        assert [found for found in report.checks if not found.passed] == []
        checks = {found.name: found for found in report.checks}
        assert checks["KL with flash attention"].value < 5e-5 or kind == "Q8_0"
        # 2 layers of a latent of 32 and a key of 8, in fp32.
        assert (checks["cache: bytes a token that differ"].remark or "").startswith("of 320 in fp32")
        if kind == "F32":
            assert checks["log-probabilities: largest difference"].value < 1e-4

    def test_a_wrong_gate_fails_by_its_name(self, model: Decoder, tmp_path: Path) -> None:
        write_gguf(model, byte(), tmp_path / "a.gguf", kind="F32", as_="deepseek2")
        with opened_gguf(tmp_path / "a.gguf") as file:
            gate = file.tensors["blk.0.ffn_gate.weight"]
        data = np.memmap(tmp_path / "a.gguf", np.uint8, "r+")
        data[gate.start : gate.start + gate.num_bytes].view(np.float32)[:] *= 1.5
        data.flush()
        report = verify(tmp_path / "a.gguf", tmp_path / "model", positions=16, threads=1)
        cause = "layers.0.ffn.up_proj.weight, as blk.0.ffn_gate.weight: it is 1.5 times the checkpoint's"
        assert not report.passed and report.cause.startswith(cause)

    def test_another_cache_than_computed_fails(
        self, model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_gguf(model, byte(), tmp_path / "a.gguf", kind="F32", as_="deepseek2")
        monkeypatch.setattr(verify_cache, "cached_numbers", lambda config, architecture: 2 * 2 * 4 * 40)
        report = verify(tmp_path / "a.gguf", tmp_path / "model", positions=16, threads=1)
        (failed,) = report.failed
        assert failed.cause == "llama.cpp caches 336 bytes a token in fp32, and 2,560 were computed"
