"""Spellings that published config.json files have besides the usual ones, in several families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import SIZES, make
from safetensors.torch import load_file, save_file

from plmtune.errors import UserError
from plmtune.models.hf import load_model, save_model

IDS = torch.randint(3, 101, (1, 12), generator=torch.Generator().manual_seed(1))
FAMILIES = ("llama", "qwen2", "qwen3", "smollm3", "mistral", "gemma3", "phi3", "granite", "glm", "deepseek_v3")


def edit(directory: Path, **keys: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_key_value_heads_of_null_are_as_many_as_query_heads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "num_key_value_heads", SIZES["num_attention_heads"])
    theirs = make(name, tmp_path)
    edit(tmp_path, num_key_value_heads=None)
    ours = load_model(tmp_path).eval()
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)
    save_model(ours, None, tmp_path / "again")
    assert load_model(tmp_path / "again").computation() == ours.computation()


@pytest.mark.parametrize("name", FAMILIES)
def test_nulls_other_names_and_factors_of_1_change_nothing(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    before, keys = load_model(tmp_path), json.loads((tmp_path / "config.json").read_text())
    tables = keys.pop("rope_parameters")
    if name == "gemma3":
        keys["rope_local_base_freq"] = tables["sliding_attention"]["rope_theta"]
        tables = tables["full_attention"]
    else:
        keys["hidden_act"] = "swish"
    if not keys.get("attention_bias"):
        keys["attention_bias"] = None
    keys |= {"rope_theta": tables["rope_theta"], "rope_scaling": {"type": "linear", "factor": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert load_model(tmp_path).computation() == before.computation()
    # null is transformers' default, as if the key were missing
    edit(tmp_path, rope_theta=None, rope_scaling=None)
    without = load_model(tmp_path).config
    del keys["rope_theta"], keys["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert load_model(tmp_path).config == without


@pytest.mark.parametrize("name", [*FAMILIES, "gpt2"])
@torch.no_grad()
def test_of_a_tied_pair_either_may_be_stored_and_two_must_be_equal(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    edit(tmp_path, tie_word_embeddings=True)
    state = load_file(tmp_path / "model.safetensors")
    embedding = next(key for key in state if "embed_tokens" in key or "wte" in key)
    state.pop("lm_head.weight", None)
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    expected = load_model(tmp_path).eval()(IDS)
    save_file(state | {"lm_head.weight": state[embedding].clone()}, file)
    assert torch.equal(load_model(tmp_path).eval()(IDS), expected)
    save_file(state | {"lm_head.weight": state[embedding] + 1}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight is another matrix than .*Set tie_word_embeddings to false"):
        load_model(tmp_path)
    # safetensors keeps one of two names of a tensor, and the header names the other.
    save_file({("lm_head.weight" if key == embedding else key): tensor for key, tensor in state.items()}, file,
              {"format": "pt", embedding: "lm_head.weight"})  # fmt: skip
    assert torch.equal(load_model(tmp_path).eval()(IDS), expected)
