"""A PLM's two forms in llama.cpp: predicted bytes are those of written files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from plmtune.devices import costs, latent_form
from plmtune.devices.costs import ModelShape
from plmtune.devices.latent_form import Form
from plmtune.devices.measured_models import _stored
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.lint import cached_numbers
from plmtune.models.deepseek import deepseek
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte

MLA = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 16}
SIZES: dict[str, Any] = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 64}


def tiny() -> Decoder:
    made: Decoder = plm(
        byte().vocab_size,
        attention=component("attention", "mla", **MLA),
        ffn=component("ffn", "squared_relu", hidden_dim=96),
        **SIZES,
    )
    return made


def tiny_deepseek() -> Decoder:
    made: Decoder = deepseek(
        byte().vocab_size,
        attention=component("attention", "mla", latent_eps=1e-6, q_lora_rank=32, **MLA),
        ffn=component("ffn", "swiglu", hidden_dim=96),
        **SIZES,
    )
    return made


@pytest.fixture(scope="module")
def paper() -> ModelShape:
    with torch.device("meta"):
        return ModelShape.of(plm(151936))


class TestModels:
    def test_of_the_paper(self, paper: ModelShape) -> None:
        own, other = latent_form.of_model(paper, "q8_0") or (None, None)
        assert own is not None and other is not None
        assert (own.cached, other.cached) == (327_680, 36_864)
        assert other.file - own.file == 32 * 8192 * 2048 * 34 // 32  # a second up projection a layer
        assert latent_form.comparison(own, other, 4096) == (
            "a cache of 144.00 MiB instead of 1.25 GiB at 4,096 tokens, a file of 2.34 GiB instead of 1.81 GiB: less "
            "memory from 1,962 tokens on"
        )

    def test_others_have_one_form(self) -> None:
        with torch.device("meta"):
            model = llama(96, **SIZES | {"num_heads": 6, "embed_dim": 96})
        assert latent_form.of_model(ModelShape.of(model), "q8_0") is None

    def test_a_latent_wider_than_the_heads_never_pays(self) -> None:
        assert latent_form.comparison(Form(10, 100), Form(20, 150), 5).endswith("more memory at any context")

    def test_attention_over_the_latent_takes_the_work_that_ours_takes(self, paper: ModelShape) -> None:
        other = paper.as_deepseek2()
        assert costs.attention_flops(other, "llama.cpp", 100) == costs.attention_flops(paper, "plmtune", 100)
        assert costs.prompt_attention_flops(other, 100, "llama.cpp") > costs.prompt_attention_flops(paper, 100)
        # No scores of a whole batch with flash attention.
        assert costs.workspace_bytes(other, "llama.cpp", 512, 4096) < costs.workspace_bytes(
            paper, "llama.cpp", 512, 4096
        )


class TestFiles:
    @pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
    def test_take_the_bytes_that_are_predicted(self, kind: str, tmp_path: Path) -> None:
        model = tiny()
        write_gguf(model, byte(), tmp_path / "own.gguf", kind=kind)
        write_gguf(model, byte(), tmp_path / "other.gguf", kind=kind, as_="deepseek2")
        predicted = latent_form.of_model(ModelShape.of(model), kind.lower())
        assert predicted is not None
        for path, form in zip(("own.gguf", "other.gguf"), predicted, strict=True):
            with opened_gguf(tmp_path / path) as file:
                assert sum(tensor.num_bytes for tensor in file.tensors.values()) == form.file
            own, other, is_second = latent_form.of_file(tmp_path / path) or (None, None, None)
            assert own is not None and other is not None
            assert (own.cached, other.cached) == tuple(form.cached for form in predicted)
            assert is_second is (path == "other.gguf")
            # The other one is estimated by the copies alone.
            assert (other if is_second else own).file == (tmp_path / path).stat().st_size
            assert other.file - own.file == pytest.approx(predicted[1].file - predicted[0].file, abs=8192)

    def test_of_a_deepseek_cache_the_latent_and_have_no_other_form(self, tmp_path: Path) -> None:
        model = tiny_deepseek()
        write_gguf(model, byte(), tmp_path / "a.gguf", kind="F16")
        assert latent_form.of_file(tmp_path / "a.gguf") is None
        _, cached, _ = _stored(tmp_path / "a.gguf")
        model_shape = ModelShape.of(model)
        assert cached == costs.cache_bytes(model_shape, "llama.cpp") == 2 * cached_numbers(model.config, "deepseek2")
        assert cached == 2 * 2 * (64 + 8)
        with opened_gguf(tmp_path / "a.gguf") as file:
            held = sum(tensor.num_bytes for tensor in file.tensors.values())
        assert costs.weights(model_shape, "llama.cpp", "f16").file == held
