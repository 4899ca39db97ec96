"""Models on disk: what is written comes back bit for bit, under Hugging Face's names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from plmtune.errors import UserError
from plmtune.models.checkpoint_files import Stored, locate
from plmtune.models.hf import load_model, load_state, save_model, to_hf
from plmtune.models.hf_names import hf_name, our_name
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component

MLA = component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
GQA = component("attention", "gqa", num_kv_heads=2)


def small(attention: Component = MLA, ffn: str = "squared_relu", norm: str = "rms_norm", tied: bool = True) -> Decoder:
    torch.manual_seed(0)
    return plm(
        101,
        attention=attention,
        ffn=component("ffn", ffn, hidden_dim=96),
        norm=component("norm", norm),
        embed_dim=64,
        num_layers=3,
        num_heads=4,
        max_seq_len=64,
        tie_embeddings=tied,
    )


def assert_same(model: Decoder, other: Decoder) -> None:
    assert other.config == model.config
    state, loaded = model.state_dict(), other.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)


class TestNames:
    def test_are_the_fact_sheets(self) -> None:
        state, _ = to_hf(small())
        at = "model.layers.1."
        assert {name for name in state if name.startswith(at)} == {
            at + name + ".weight"
            for name in (
                "self_attn.q_proj",
                "self_attn.kv_a_proj_with_mqa",
                "self_attn.kv_a_layernorm",
                "self_attn.kv_b_proj",
                "self_attn.o_proj",
                "mlp.up_proj",
                "mlp.down_proj",
                "input_layernorm",
                "post_attention_layernorm",
            )
        }
        assert {name for name in state if "layers" not in name} == {
            "model.embed_tokens.weight",
            "model.norm.weight",
        }

    @pytest.mark.parametrize("model", [small(tied=False), small(GQA, "swiglu", "layer_norm")])
    def test_are_mapped_back(self, model: Decoder) -> None:
        assert all(our_name(hf_name(name)) == name for name in model.state_dict())


class TestConfigFile:
    def test_has_the_keys_of_a_plm_checkpoint(self) -> None:
        with torch.device("meta"):
            _, config = to_hf(plm(151936))
        expected = {
            "architectures": ["PLMForCausalLM"],
            "model_type": "plm",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "hidden_act": "relu2",
            "rope_theta": 100000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
        }
        assert {key: config[key] for key in expected} == expected

    def test_claims_no_architecture_that_it_is_not(self) -> None:
        assert to_hf(small(GQA, "geglu"))[1]["model_type"] == "plmtune"
        capped = component("attention", "gqa", num_kv_heads=2, soft_cap=30.0)
        assert to_hf(small(capped, "swiglu"))[1]["model_type"] == "plmtune"

    def test_claims_the_family_that_has_its_parts(self) -> None:
        assert to_hf(small(GQA))[1]["model_type"] == "arcee"  # squared ReLU
        interleaved = component("attention", "gqa", num_kv_heads=2, rope_interleaved=True)
        assert to_hf(small(interleaved, "swiglu"))[1]["model_type"] == "ernie4_5"


class TestRoundTrip:
    @pytest.mark.parametrize(
        "model",
        [
            small(),
            small(tied=False),
            small(GQA),
            small(MLA, "swiglu", "layer_norm"),
            small(component("attention", "mha", bias=True), "swiglu"),
        ],
        ids=["plm", "untied", "gqa", "swiglu-layer_norm", "mha-bias"],
    )
    def test_is_bit_equal(self, model: Decoder, tmp_path: Path) -> None:
        save_model(model, None, tmp_path)
        assert_same(model, load_model(tmp_path))

    def test_is_bit_equal_in_shards(self, tmp_path: Path) -> None:
        model = small()
        save_model(model, None, tmp_path, max_shard_bytes=60_000)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 2
        assert files == sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        assert_same(model, load_model(tmp_path))

    def test_keeps_the_files_dtype_by_default(self, tmp_path: Path) -> None:
        save_model(small().to(torch.bfloat16), None, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
        assert load_model(tmp_path).head_weight.dtype == torch.bfloat16
        assert load_model(tmp_path, dtype=torch.float32).head_weight.dtype == torch.float32

    def test_takes_a_state_under_either_names(self, tmp_path: Path) -> None:
        model = small()
        save_model(model.state_dict(), model.config, tmp_path / "ours")
        save_model(*to_hf(model), tmp_path / "theirs")
        assert_same(model, load_model(tmp_path / "ours"))
        assert_same(model, load_model(tmp_path / "theirs"))

    def test_fills_a_model_that_is_there(self, tmp_path: Path) -> None:
        model, other = small(), small()
        save_model(model, None, tmp_path)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        load_state(other, tmp_path)
        assert_same(model, other)

    def test_is_read_as_a_state_under_our_names(self, tmp_path: Path) -> None:
        model = small(tied=False)
        save_model(model, None, tmp_path, max_shard_bytes=60_000)
        locations, expected = locate(tmp_path), model.state_dict()
        assert {our_name(name) for name in locations} == expected.keys()
        assert all(torch.equal(tensor, expected[our_name(name)]) for name, tensor in Stored(locations).items())

    def test_saving_again_in_fewer_files_leaves_no_stale_shard(self, tmp_path: Path) -> None:
        save_model(small(), None, tmp_path, max_shard_bytes=60_000)
        save_model(small(), None, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

    def test_file_is_marked_as_pytorchs(self, tmp_path: Path) -> None:
        save_model(small(), None, tmp_path)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


class TestPublishedCheckpoints:
    def test_plm_without_our_key_is_read(self, tmp_path: Path) -> None:
        model = small()
        save_model(model, None, tmp_path)
        rewrite(tmp_path, lambda keys: keys.pop("plmtune"))
        assert_same(model, load_model(tmp_path))

    @pytest.mark.parametrize(
        "name",
        [
            "num_key_value_heads",
            "head_dim",
            "attention_bias",
            "mlp_bias",
            "rope_theta",
            "rms_norm_eps",
            "hidden_act",
            "tie_word_embeddings",
            "initializer_range",
            "rope_scaling",
            "rope_parameters",
        ],
    )
    def test_a_key_of_null_is_one_that_is_not_there(self, tmp_path: Path, name: str) -> None:
        model = llama(
            101,
            attention=component("attention", "mha", rope_interleaved=False, rope_theta=10000.0),
            ffn=component("ffn", "swiglu", hidden_dim=96),
            norm=component("norm", "rms_norm", eps=1e-6),
            embed_dim=64,
            num_layers=1,
            num_heads=4,
            tie_embeddings=False,
        )
        save_model(model, None, tmp_path)
        rewrite(tmp_path, lambda keys: (keys.pop("plmtune"), keys.update({name: None})))
        loaded, tokens = load_model(tmp_path), torch.randint(101, (1, 20))
        assert torch.equal(model(tokens), loaded(tokens))

    def test_a_needed_key_of_null_is_named(self, tmp_path: Path) -> None:
        save_model(small(), None, tmp_path)
        rewrite(tmp_path, lambda keys: (keys.pop("plmtune"), keys.update(hidden_size=None)))
        with pytest.raises(UserError, match="key hidden_size is missing"):
            load_model(tmp_path)

    def test_a_tied_head_of_other_numbers_is_refused(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_model(small(), None, tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        other = state["model.embed_tokens.weight"].clone()
        other[3, 3] += 1
        save_file(state | {"lm_head.weight": other}, tmp_path / "model.safetensors")
        for read in (load_model, lambda directory: load_state(small(), directory)):
            with pytest.raises(UserError, match=r"lm_head\.weight is another matrix.*tie_word_embeddings to false"):
                read(tmp_path)


def rewrite(directory: Path, change: object) -> None:
    path = directory / "config.json"
    keys = json.loads(path.read_text())
    change(keys)
    path.write_text(json.dumps(keys))


class TestNotFinite:
    @pytest.mark.parametrize(
        ("value", "dtype", "message"),
        [
            (float("nan"), torch.float32, "not finite: model.layers.1.mlp.up_proj.weight. Nothing is written"),
            (1e6, torch.float16, r"not finite \(fp16 holds no number above 65,504: bf16 does\): model.layers.1"),
        ],
    )
    def test_is_not_written(self, tmp_path: Path, value: float, dtype: torch.dtype, message: str) -> None:
        model = small()
        model.get_parameter("layers.1.ffn.up_proj.weight").data[3, 2] = value
        with pytest.raises(UserError, match=message):
            save_model(model.to(dtype), None, tmp_path / "out")
        assert not (tmp_path / "out").exists()
