"""Quantized models on disk: integers come back bit for bit; what is not ours or damaged is refused in a sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_plm

import plmtune
from plmtune.errors import UserError
from plmtune.models.adapters import load_adapter
from plmtune.models.hf import load_model, load_state, save_model
from plmtune.models.hf_config import read_formats, read_model_config
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, Quantized, install
from plmtune.tokenizers.tokenizer_files import byte

FORMATS = {
    "tok_embeddings": Format(8),
    "layers.0.attention.q_proj": Format(4, 32),
    "layers.0.attention.kv_b_proj": Format(8, None, True),
    "layers.0.ffn.up_proj": Format(4, 32, True),
    "layers.1.ffn.down_proj": Format(8, 32),
}


def plain() -> Decoder:
    return tiny_plm(byte().vocab_size, init_std=0.02).eval()


def quantized() -> Decoder:
    model = plain()
    install(model, FORMATS)
    for module in model.modules():
        if isinstance(module, Quantized):
            module.weight.random_(*((-128, 128) if module.format.bits == 8 else (0, 256)))
            module.scales = torch.rand(module.scales.shape).div(100).to(torch.bfloat16).float()
            if not module.format.symmetric:
                module.zeros.random_(0, 16)
    model.quantization = {"component": "mixed", "rules": {"*": "int8"}}
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    save_model(quantized(), None, directory)
    byte().save(directory)
    return directory


def change_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


class TestSaving:
    def test_what_is_loaded_is_the_model(self, saved: Path) -> None:
        model, loaded = quantized(), load_model(saved)
        state = loaded.state_dict()
        assert loaded.dtype == torch.float32 and loaded.quantization == model.quantization
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert {n: m.format for n, m in loaded.named_modules() if isinstance(m, Quantized)} == FORMATS
        assert read_formats(saved) == (FORMATS, model.quantization)
        assert read_model_config(saved) == model.config

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_saved_again_every_byte_is_the_same(self, saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
        first = saved
        if dtype != torch.float32:  # norms and what stays a float are in the file's dtype
            save_model(load_model(saved, dtype=dtype), None, first := tmp_path / "bf16")
        save_model(load_model(first), None, tmp_path / "again")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes()

    def test_files_hold_integers_and_scales_of_two_bytes(self, saved: Path) -> None:
        tensors = load_file(saved / "model.safetensors")
        assert tensors["model.embed_tokens.weight"].dtype == torch.int8
        name = "model.layers.0.self_attn.q_proj"
        assert tensors[f"{name}.weight"].shape == (4 * 24, 32) and tensors[f"{name}.weight"].dtype == torch.uint8
        assert tensors[f"{name}.scales"].dtype == torch.bfloat16 and tensors[f"{name}.zeros"].dtype == torch.int8
        size = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(name))
        assert size == FORMATS["layers.0.attention.q_proj"].num_bytes((96, 64))

    def test_torch_dtype_is_what_is_computed_in(self, saved: Path, tmp_path: Path) -> None:
        save_model(load_model(saved, dtype=torch.bfloat16), None, tmp_path / "bf16")
        config = json.loads((tmp_path / "bf16" / "config.json").read_text())
        assert config["torch_dtype"] == "bfloat16" and load_model(tmp_path / "bf16").dtype == torch.bfloat16

    def test_shards_are_as_good(self, tmp_path: Path) -> None:
        save_model(quantized(), None, tmp_path, max_shard_bytes=10_000)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        tokens = torch.arange(20)[None]
        assert torch.equal(load_model(tmp_path)(tokens), quantized()(tokens))

    def test_tensors_without_their_formats_are_refused(self, tmp_path: Path) -> None:
        model = quantized()
        with pytest.raises(ValueError, match="save the model itself"):
            save_model(model.state_dict(), model.config, tmp_path)

    def test_transformers_refuses_it(self, saved: Path) -> None:
        transformers = pytest.importorskip("transformers")
        with pytest.raises(ValueError, match="plmtune"):
            transformers.AutoConfig.from_pretrained(saved)


class TestLoading:
    def test_load_prepares_and_a_prepared_model_is_not_saved(self, saved: Path, tmp_path: Path) -> None:
        model, tokenizer = plmtune.load(saved, "cpu")
        assert all(module.prepacked for module in model.modules() if isinstance(module, Quantized))
        tokens = torch.tensor([tokenizer.encode("hello")])
        assert torch.allclose(model(tokens), quantized()(tokens), atol=1e-5)
        with pytest.raises(ValueError, match="prepare=False"):
            save_model(model, None, tmp_path / "again")
        save_model(plmtune.load(saved, "cpu", prepare=False)[0], None, tmp_path / "again")

    def test_integers_cannot_be_trained(self, saved: Path) -> None:
        with pytest.raises(UserError, match=r"cannot be trained\. Start from the checkpoint that was quantized"):
            load_state(plain(), saved)

    def test_adapters_do_not_stand_beside_integers(self, saved: Path, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(UserError, match="its base is quantized"):
            load_adapter(load_model(saved), tmp_path)


def _set(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda table: table.__setitem__(key, value)


class TestHostile:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (_set("quant_method", "bitsandbytes"), "quantized by 'bitsandbytes' cannot be read"),
            (_set("version", 2), "version is 2, and this plmtune reads 1"),
            (_set("version", True), "version is True"),
            (_set("scheme", "int8"), "scheme: must be a table"),
            (_set("formats", ["int8"]), "formats: must map formats"),
            (_set("formats", {"int8": "model.embed_tokens"}), "formats: must map formats"),
            (_set("formats", {"int3": []}), "'int3' is no format"),
            (_set("formats", {"int4_g" + "9" * 5000: []}), "formats"),
            (_set("formats", {"int4_g7": []}), "multiple of 16"),
            (_set("formats", {"int8": [7]}), "7 is named twice or no module"),
            (_set("formats", {"int8": ["model.norm"]}), "norm: a RMSNorm cannot be quantized"),
            (_set("formats", {"int8": ["model.layers.0.mlp"]}), "ffn: a SquaredReLU cannot be quantized"),
            (_set("formats", {"int8": ["model.layers.9.mlp.up_proj"]}), "has no module 'layers.9.ffn.up_proj'"),
            (_set("formats", {"int8": [""]}), "cannot be quantized"),
            (_set("formats", {"int8": ["model.embed_tokens"] * 2}), "named twice"),
            (_set("formats", {"int8_g48": ["model.embed_tokens"]}), "cannot be divided into groups of 48"),
            (_set("formats", {}), "holds the tensor"),
        ],
    )
    def test_a_config_that_lies_is_refused(
        self, saved: Path, change: Callable[[dict[str, Any]], object], message: str
    ) -> None:
        change_config(saved, change)
        with pytest.raises(UserError, match=message):
            load_model(saved)

    def test_a_config_that_is_no_table_is_refused(self, saved: Path) -> None:
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps(config | {"quantization_config": [1]}))
        with pytest.raises(UserError, match="key quantization_config: must be a table"):
            load_model(saved)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("embed_tokens.weight", lambda t: t.float(), "is of type F32, its format needs I8"),
            ("embed_tokens.weight", lambda t: t.view(torch.uint8), "is of type U8, its format needs I8"),
            ("embed_tokens.weight", lambda t: t[:-1], "has shape"),
            ("embed_tokens.scales", lambda t: t.float(), "is of type F32, its format needs BF16"),
            ("embed_tokens.scales", lambda t: t / 0, "holds numbers that are not finite"),
            ("embed_tokens.scales", lambda t: t[:, :0], "has shape"),
            ("embed_tokens.scales", lambda t: None, "misses the tensor model.embed_tokens.scales"),
            ("layers.0.self_attn.q_proj.zeros", lambda t: t + 16, "zeros must lie from 0 to 15"),
            ("layers.0.self_attn.q_proj.zeros", lambda t: t - 128, "zeros must lie from 0 to 15"),
            ("norm.weight", lambda t: t.to(torch.int8), "is of type I8; known are"),
        ],
    )
    def test_tensors_that_lie_are_refused(
        self, saved: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None], message: str
    ) -> None:
        tensors = load_file(saved / "model.safetensors")
        changed = change(tensors.pop(f"model.{name}"))
        if changed is not None:
            tensors[f"model.{name}"] = changed.contiguous()
        save_file(tensors, saved / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_model(saved)
