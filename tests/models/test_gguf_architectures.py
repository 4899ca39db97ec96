"""Every family in llama.cpp: a GGUF file gives the model's log-probabilities, and comes back as the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_families import FAMILIES, SIZES
from torch import Tensor
from torch.nn.functional import gelu
from transformers import AutoConfig, AutoModelForCausalLM

import plmtune
from plmtune.errors import UserError
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.runtimes import open_runtime
from plmtune.models import gguf_windows
from plmtune.models.families import by_model_type
from plmtune.models.gguf import convert
from plmtune.models.gguf_keys import Metadata
from plmtune.models.gguf_match import build, match
from plmtune.models.gguf_rope import read_latent_scaling
from plmtune.models.hf_config import build_on_meta
from plmtune.modules.decoder import Decoder
from plmtune.tokenizers.bpe import from_ranks
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled

ROWS = 288
IDS = torch.randint(3, 200, (24,), generator=torch.Generator().manual_seed(1)).tolist()  # past every window

# Changes to `FAMILIES`: what llama.cpp does not compute is left out.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied-wide": {},
    "llama-llama3": {},
    "llama-linear": {},
    "llama-yarn": {},
    "llama-mqa": {},
    "qwen2": {},
    "qwen3": {"attention_bias": False},
    "smollm3": {},
    "smollm3-interval": {},
    "mistral": {},
    "mistral-full": {},
    "ministral": {},
    "gemma2": {"query_pre_attn_scalar": 10},
    "gemma3": {"query_pre_attn_scalar": 10},
    "gemma3-scaled": {"query_pre_attn_scalar": 10, "head_dim": 10},
    "phi3": {},
    "phi4-mini": {},
    "minicpm": {},
    "granite": {},
    "arcee": {},
    "ernie4_5": {},
    "starcoder2": {"sliding_window": None},
    "stablelm": {},
    "glm": {"head_dim": 8},
    "deepseek_v3": {},
    "deepseek_v3-yarn": {},
    "deepseek_v2": {},
    "youtu": {"rms_norm_eps": 1e-6},
    "gpt2": {},
}


def few_tokens() -> Tokenizer:
    """The first tokens of the bundled tokenizer, with its three special ones."""
    held = bundled().vocabulary
    ranks = {token: rank for rank, token in enumerate(held.tokens[: ROWS - 10])}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Tokenizer(from_ranks(ranks, held.pattern, held.normalization, specials, "few"), vocab_size=ROWS)


def made(name: str, directory: Path, **changes: Any) -> Decoder:
    """A model of a family with random numbers and as many rows as the tokenizer has.

    Args:
        directory: where its config.json is put.
    """
    model_type, keys = FAMILIES.get(name, (name, {}))
    sizes = {"vocab_size": ROWS, "hidden_size": 48} if model_type == "gpt2" else SIZES | {"vocab_size": ROWS}
    keys = {**sizes, **keys, **(changes or CHANGES.get(name, {}))}
    if name == "minicpm":  # which transformers lacks
        directory.mkdir()
        scales = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16, "rms_norm_eps": 1e-5}
        (directory / "config.json").write_text(json.dumps(keys | scales | {"model_type": name}))
    else:
        AutoConfig.for_model(model_type, **keys).save_pretrained(directory)
    model = build_on_meta(directory, 1000).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.init_weights(generator)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise) if parameter.ndim > 1 else parameter.add_(noise)
    return model.eval()


def expected(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS]))[0].log_softmax(-1)


def gelu_of_llama_cpp(x: Tensor, approximate: str = "none") -> Tensor:
    """On a CPU llama.cpp looks up what F16 gives for F16; logits of these models then differ by 1e-3."""
    found: Tensor = gelu(x.half().float(), approximate=approximate).half().float()
    return torch.where(x.abs() < 10, found, gelu(x, approximate=approximate))


def in_llama_cpp(path: Path) -> Tensor:
    """What llama.cpp says of the token after IDS."""
    with open_runtime(path, threads=1, prefer="xllamacpp", exact=True) as runtime:
        return runtime.log_probs(IDS, 1)[0]


@pytest.mark.parametrize("name", CHANGES)
class TestFamilies:
    def test_are_the_same_in_llama_cpp_and_come_back(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(F, "gelu", gelu_of_llama_cpp)
        model, tokenizer = made(name, tmp_path / "theirs"), few_tokens()
        write_gguf(model, tokenizer, tmp_path / "a.gguf", kind="F32")
        most = 5e-4 if name.startswith("gemma") else 1e-4  # an input of gelu that F16 rounds the other way
        torch.testing.assert_close(in_llama_cpp(tmp_path / "a.gguf"), expected(model)[-1], rtol=0, atol=most)
        convert(tmp_path / "a.gguf", tmp_path / "out")
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written["model_type"] in by_model_type()
        loaded, _ = plmtune.load(tmp_path / "out", "cpu")
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        for tensor, numbers in model.state_dict().items():
            torch.testing.assert_close(state[tensor], numbers, rtol=0, atol=1e-6)
        torch.testing.assert_close(expected(loaded), expected(model), rtol=0, atol=1e-5)
        again, first = match(loaded.config), match(model.config)
        assert again.architecture == first.architecture
        assert again.keys.keys() == first.keys.keys()
        for key, value in first.keys.items():
            assert again.keys[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("llama-dynamic", {}, r"attention.rope_scaling at the longest \(layers.0\)"),
            ("gemma3", {"query_pre_attn_scalar": 12}, r"attention.scale \(layers.0\) is 0.288\d*, in llama.cpp 0.316"),
            (
                "gemma2",
                {"query_pre_attn_scalar": 10, "layer_types": ["full_attention"] * 3},
                r"attention.window \(layers.0\)",
            ),
            ("youtu", {"rms_norm_eps": 1e-5}, r"attention.q_a_norm.eps \(layers.0\) is 1e-06, in llama.cpp 1e-05"),
            ("gpt2", {"activation_function": "gelu"}, r"ffn.approximate \(layers.0\) is 'none', in llama.cpp 'tanh'"),
            ("glm", {"head_dim": 12}, r"a model glm with heads as wide as embed_dim \(48\) in all, not 72"),
            ("arcee", {"attention_bias": True}, r"attention.q_proj.bias \(layers.0\) is \(60,\), in llama.cpp missing"),
            ("starcoder2", {"hidden_act": "gelu"}, r"ignores the sliding window \(7\)"),
            ("qwen3", {"attention_bias": True}, r"attention.q_proj.bias \(layers.0\) is \(60,\), in llama.cpp missing"),
        ],
    )
    def test_name_what_llama_cpp_does_not_compute(
        self, name: str, changes: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=message):
            write_gguf(made(name, tmp_path / "theirs", **changes), few_tokens(), tmp_path / "a.gguf", kind="F32")
        assert not (tmp_path / "a.gguf").exists()

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("deepseek_v3", {**FAMILIES["deepseek_v3"][1], "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
            (
                "llama",
                {**FAMILIES["phi3-longrope"][1], "head_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 1},
            ),
        ],
    )
    def test_scaling_that_an_architecture_computes_otherwise_is_refused(
        self, name: str, changes: dict[str, Any], tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=r"rope.scaling"):
            write_gguf(made(name, tmp_path / "theirs", **changes), few_tokens(), tmp_path / "a.gguf", kind="F32")

    def test_a_model_without_rope_is_refused(self, tmp_path: Path) -> None:
        model = made("smollm3", tmp_path / "theirs", no_rope_layers=[0, 0, 0, 0], num_hidden_layers=4)
        with pytest.raises(UserError, match=r"attention.rope"):
            write_gguf(model, few_tokens(), tmp_path / "a.gguf", kind="F32")

    def test_a_window_as_long_as_the_context_changes_nothing(self, tmp_path: Path) -> None:
        model = made("mistral", tmp_path / "theirs", sliding_window=64)
        write_gguf(model, few_tokens(), tmp_path / "a.gguf", kind="F32")
        torch.testing.assert_close(in_llama_cpp(tmp_path / "a.gguf"), expected(model)[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi3", "phi4-mini", "gpt2"])
@torch.no_grad()
def test_a_converted_file_is_read_by_transformers(name: str, tmp_path: Path) -> None:
    model = made(name, tmp_path / "theirs")
    write_gguf(model, few_tokens(), tmp_path / "a.gguf", kind="F32")
    convert(tmp_path / "a.gguf", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    logits = theirs.eval()(torch.tensor([IDS])).logits[0].log_softmax(-1)
    torch.testing.assert_close(logits, expected(model), rtol=0, atol=1e-4)


def test_divisors_of_frequencies_that_are_not_llama_3s_are_kept(tmp_path: Path) -> None:
    plain = made("llama", tmp_path / "theirs")
    divisors = [1.0, 1.25, 3.0, 2.0]
    scaling = {"component": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
    config = plain.config | {"attention": plain.config["attention"] | {"rope_scaling": scaling}}
    model = build(config, "config").to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    write_gguf(model, few_tokens(), tmp_path / "a.gguf", kind="F32")
    torch.testing.assert_close(in_llama_cpp(tmp_path / "a.gguf"), expected(model)[-1], rtol=0, atol=1e-4)
    convert(tmp_path / "a.gguf", tmp_path / "out")
    loaded, _ = plmtune.load(tmp_path / "out", "cpu")
    torch.testing.assert_close(expected(loaded), expected(model), rtol=0, atol=1e-5)


class TestYarnOfALatent:
    """YaRN in deepseek2 multiplies cos and sin, and the scores."""

    @pytest.mark.parametrize(
        "scaling",
        [
            {"mscale": 0.7, "mscale_all_dim": 0.7},
            {"mscale": 0.5, "mscale_all_dim": 1.0},
            {},
            {"attention_factor": 1.0},
            {"factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        ],
    )
    def test_is_the_same_in_llama_cpp_and_comes_back(self, scaling: dict[str, Any], tmp_path: Path) -> None:
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16} | scaling
        keys = FAMILIES["deepseek_v3-yarn"][1] | {"rope_scaling": yarn}
        model = made("deepseek_v3", tmp_path / "theirs", **keys)
        write_gguf(model, few_tokens(), tmp_path / "a.gguf", kind="F32")
        torch.testing.assert_close(in_llama_cpp(tmp_path / "a.gguf"), expected(model)[-1], rtol=0, atol=1e-4)
        convert(tmp_path / "a.gguf", tmp_path / "out")
        loaded, _ = plmtune.load(tmp_path / "out", "cpu")
        torch.testing.assert_close(expected(loaded), expected(model), rtol=0, atol=5e-5)

    @pytest.mark.parametrize("changes", [{"yarn_log_multiplier": None}, {"yarn_log_multiplier": -0.2}])
    def test_without_the_multiplier_or_with_flatter_scores_is_refused(self, changes: dict[str, Any]) -> None:
        held = {"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_log_multiplier": 0.1} | changes
        metadata = {f"deepseek2.rope.scaling.{key}": value for key, value in held.items() if value is not None}
        keys = Metadata("a.gguf", "deepseek2", metadata, {}, torch.zeros)
        with pytest.raises(UserError, match=r"a.gguf: deepseek2.rope.scaling.(type|yarn_log_multiplier) is"):
            read_latent_scaling(keys, 8, 10000.0, 64)


def test_a_file_with_attention_sinks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"blk.0.attn_sinks.weight and the others have a share of attention"):
        gguf_windows.read_windows(_metadata(made("mistral", tmp_path / "theirs"), sinks=0.6))


def _metadata(model: Decoder, *, sinks: float) -> Metadata:
    keys, tensors = gguf_windows.write_windows(model.config)
    tensors = {name: tensor.fill_(sinks) for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Metadata("a.gguf", "granite_swa", {f"granite_swa.{key}": held for key, held in keys.items()}, shapes,
                    tensors.__getitem__)  # fmt: skip
