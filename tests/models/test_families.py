"""Every family computes what transformers computes, and is written as transformers reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import FAMILIES, SIZES, config_of, make
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from plmtune import native
from plmtune.errors import UserError
from plmtune.models.families import by_component, by_model_type
from plmtune.models.family import Keys
from plmtune.models.hf import load_model, save_model
from plmtune.models.hf_config import read_model_config
from plmtune.modules.decoder import Decoder
from plmtune.native.decoder import NativeDecoder
from plmtune.registry import describe_components

LENGTH = 24  # past every window and every original context of the made checkpoints


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(directory, transformers' model, ours) of a family, made once."""
    held: dict[str, tuple[Path, Any, Decoder]] = {}

    def get(name: str) -> tuple[Path, Any, Decoder]:
        if name not in held:
            directory = tmp_path_factory.mktemp("families") / name
            theirs = make(name, directory)
            held[name] = directory, theirs, load_model(directory).eval()
        return held[name]

    yield get


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, made: Any) -> tuple[Path, Any, Decoder]:
    found: tuple[Path, Any, Decoder] = made(request.param)
    return found


# Those that docs/edge.md names: the others are decoded by PyTorch.
NATIVE = {"llama", "qwen2", "mistral-full", "arcee", "ernie4_5", "deepseek_v2", "deepseek_v3-yarn"}
NATIVE |= {f"llama-{form}" for form in ("untied-wide", "llama3", "linear", "yarn", "mqa")}


@pytest.mark.skipif(native.unavailable_reason() is not None, reason="decoding is eager here")
def test_decodes_natively_where_the_docs_say_it(
    request: pytest.FixtureRequest, family: tuple[Path, Any, Decoder]
) -> None:
    assert (NativeDecoder().bind(family[2]) is not None) == (request.node.callspec.params["family"] in NATIVE)


def some_ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(1))


def loaded_by_transformers(directory: Path) -> Any:
    """The model that transformers makes of a config.json, with the numbers of the file."""
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    missing, unexpected = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_gradients")
class TestLogits:
    def test_of_whole_sequences_equal_transformers(self, family: tuple[Path, Any, Decoder]) -> None:
        _, theirs, ours = family
        torch.testing.assert_close(ours(some_ids()), theirs(some_ids()).logits, atol=1e-4, rtol=0)

    def test_one_token_at_a_time_equal_transformers(self, family: tuple[Path, Any, Decoder]) -> None:
        _, theirs, ours = family
        ids, cache, past = some_ids(), ours.new_cache(2, LENGTH), None
        for at in range(LENGTH):
            found = theirs(ids[:, at : at + 1], past_key_values=past, use_cache=True)
            past = found.past_key_values
            torch.testing.assert_close(ours(ids[:, at : at + 1], cache=cache), found.logits, atol=1e-4, rtol=0)

    def test_of_a_prompt_and_what_follows_it_equal_the_whole(self, family: tuple[Path, Any, Decoder]) -> None:
        _, _, ours = family
        if ours.rope_key(1):
            pytest.skip("the length decides the frequencies, and cached keys keep theirs, as in transformers")
        ids, cache = some_ids(), ours.new_cache(2, LENGTH)
        parts = [ours(part, cache=cache) for part in ids.split((10, 1, 9, 4), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), ours(ids), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_of_a_padded_row_equal_those_of_the_row_alone(self, family: tuple[Path, Any, Decoder], side: str) -> None:
        _, theirs, ours = family
        ids, pad = some_ids(), 5
        real = torch.ones(2, LENGTH, dtype=torch.bool)
        real[0, :pad] = False
        if side == "right":
            real = real.flip(1)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        mask = real[:, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() | torch.eye(LENGTH, dtype=torch.bool)
        found = ours(ids, mask=mask, input_pos=positions)
        for row in range(2):
            for module in theirs.modules():
                if hasattr(module, "max_seq_len_cached"):  # dynamic frequencies stay those of the longest text so far
                    module.max_seq_len_cached = 0
            want = theirs(ids[row][real[row]][None]).logits[0]
            torch.testing.assert_close(found[row][real[row]], want, atol=1e-4, rtol=0)


class TestFiles:
    def test_come_back_as_they_were(self, family: tuple[Path, Any, Decoder], tmp_path: Path) -> None:
        directory, theirs, ours = family
        save_model(ours, None, tmp_path)
        before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        config = AutoConfig.from_pretrained(tmp_path).to_dict()
        config.pop("plmtune")
        own = {"_name_or_path", "transformers_version"}
        expected = theirs.config.to_dict()
        assert {key: config.get(key) for key in expected if key not in own} == {
            key: value for key, value in expected.items() if key not in own
        }

    @torch.no_grad()
    def test_of_a_model_without_a_source_are_read_by_transformers_as_the_same_model(
        self, family: tuple[Path, Any, Decoder], tmp_path: Path
    ) -> None:
        _, _, ours = family
        source, ours.source_keys = ours.source_keys, {}
        try:
            save_model(ours, None, tmp_path)
        finally:
            ours.source_keys = source
        found = loaded_by_transformers(tmp_path)(some_ids()).logits
        torch.testing.assert_close(found, ours(some_ids()), atol=1e-4, rtol=0)

    def test_of_our_own_are_read_as_the_same_model(self, family: tuple[Path, Any, Decoder], tmp_path: Path) -> None:
        _, _, ours = family
        save_model(ours, None, tmp_path)
        assert load_model(tmp_path).config == ours.config
        edit(tmp_path, lambda keys: keys.pop("plmtune"))
        assert load_model(tmp_path).computation() == ours.computation()

    def test_without_the_prefix_of_the_language_model_are_read(self, made: Any, tmp_path: Path) -> None:
        directory, _, ours = made("gpt2")
        state = load_file(directory / "model.safetensors")
        buffer = {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}  # which old files hold
        save_file({name.removeprefix("transformer."): tensor for name, tensor in state.items()} | buffer,
                  tmp_path / "model.safetensors")  # fmt: skip
        (tmp_path / "config.json").write_text((directory / "config.json").read_text())
        assert all(map(torch.equal, load_model(tmp_path).parameters(), ours.parameters()))


def edit(directory: Path, change: Any) -> None:
    path = directory / "config.json"
    keys = json.loads(path.read_text())
    change(keys)
    path.write_text(json.dumps(keys))


def old_spelling(keys: dict[str, Any]) -> None:
    """Spell keys as transformers 4 does."""
    table = dict(keys.pop("rope_parameters", {}))
    if "full_attention" in table:
        keys["rope_local_base_freq"] = table["sliding_attention"]["rope_theta"]
        table = dict(table["full_attention"])
    if table:
        keys["rope_theta"] = table.pop("rope_theta")
        if "partial_rotary_factor" in table:
            keys["partial_rotary_factor"] = table.pop("partial_rotary_factor")
        keys["rope_scaling"] = None if table["rope_type"] == "default" else {"type": table.pop("rope_type"), **table}
    keys["torch_dtype"] = keys.pop("dtype", "float32")


class TestKeys:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_every_key_of_transformers_is_used_or_known_to_change_nothing(self, name: str, tmp_path: Path) -> None:
        config = config_of(name)
        keys = Keys(json.loads(config.to_json_string(use_diff=False)), tmp_path / "config.json")
        by_model_type()[config.model_type].read(keys)
        assert keys.unread({*config.to_dict(), *type(config)().to_dict()}) - {"vocab_size"} == set()

    @pytest.mark.parametrize("name", FAMILIES)
    def test_of_both_spellings_describe_the_same_model(self, name: str, tmp_path: Path) -> None:
        config_of(name).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").touch()
        new = read_config(tmp_path)
        edit(tmp_path, old_spelling)
        assert read_config(tmp_path) == new

    @pytest.mark.parametrize(
        ("name", "change", "named"),
        [
            ("qwen3", {"num_experts": 8}, "num_experts"),
            ("llama", {"vision_config": {"hidden_size": 8}}, "vision_config"),
            ("llama", {"mlp_bias": True}, "mlp_bias"),
            ("llama", {"hidden_act": "relu"}, "hidden_act"),
            ("deepseek_v3", {"first_k_dense_replace": 1}, "first_k_dense_replace"),
            ("qwen2", {"use_sliding_window": True, "layer_types": None}, "sliding windows"),
            ("llama", {"rope_parameters": {"rope_type": "mrope"}}, "mrope"),
            ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
            ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_scaling.*differs from rope_param"),
            ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "without rope_scaling"),
            ("gemma3", {"layer_types": ["chunked_attention"]}, "chunked_attention"),
            ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
            ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
            ("llama", {"num_attention_heads": "six"}, "num_attention_heads"),
        ],
    )
    def test_of_what_no_family_computes_are_refused_by_name(
        self, name: str, change: dict[str, Any], named: str, tmp_path: Path
    ) -> None:
        config_of(name).save_pretrained(tmp_path)
        edit(tmp_path, lambda keys: keys.update(change))
        with pytest.raises(UserError, match=named):
            read_config(tmp_path)

    def test_of_an_unknown_family_the_known_ones_are_named(self, tmp_path: Path) -> None:
        config_of("llama").save_pretrained(tmp_path)
        edit(tmp_path, lambda keys: keys.update(model_type="mamba", ssm_width=3))
        families = r"mamba.*plm, llama, qwen2, qwen3, smollm3, mistral.*nearest is llama, .* key ssm_width"
        with pytest.raises(UserError, match=families):
            read_config(tmp_path)

    @pytest.mark.parametrize(
        ("model_type", "said"),
        [
            ("olmo2", "nearest is llama, which knows all its keys, but"),
            ("qwen3_moe", "nearest is qwen3, which lacks the keys .*moe_intermediate_size"),
            ("gemma3", "text_config is of model_type 'gemma3_text', which loads"),
            ("qwen2_vl", "text_config is of model_type 'qwen2_vl_text', which does not load"),
            ("t5", "keys are like those of none of them"),
        ],
    )
    def test_of_an_unknown_family_the_nearest_is_named(self, model_type: str, said: str, tmp_path: Path) -> None:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=said):
            read_config(tmp_path)


def read_config(directory: Path) -> dict[str, Any]:
    """The `config` of a directory whose weights are not looked at."""
    save_file({f"tensor.{index}": torch.zeros(1) for index in range(9)}, directory / "model.safetensors")
    return read_model_config(directory)


def test_each_family_has_a_registered_model_and_each_model_but_pangu_alpha_a_family() -> None:
    assert by_component().keys() | {"pangu_alpha"} == describe_components()["model"].keys()


@torch.no_grad()
def test_minicpm_equals_a_granite_of_the_same_scales(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "granite", **{**SIZES, "tie_word_embeddings": True}, embedding_multiplier=3.0, residual_multiplier=0.7 / 2**0.5,
        logits_scaling=4.0, attention_multiplier=8**-0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path)
    scales = {"model_type": "minicpm", "scale_emb": 3, "scale_depth": 0.7, "dim_model_base": 12}
    edit(tmp_path, lambda keys: keys.update(scales))
    ours = load_model(tmp_path).eval()
    torch.testing.assert_close(ours(some_ids()), theirs(some_ids()).logits, atol=1e-4, rtol=0)
    save_model(ours, None, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: written[key] for key in scales} == scales
