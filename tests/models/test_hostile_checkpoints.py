"""Checkpoints that are damaged, or made to do harm: one sentence, nothing run, nothing opened outside."""

import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from plmtune.errors import UserError
from plmtune.models.hf import load_model, load_state, save_model
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component


def tiny() -> Decoder:
    torch.manual_seed(0)
    return plm(
        50,
        attention=component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        ffn=component("ffn", "squared_relu", hidden_dim=32),
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=32,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    save_model(tiny(), None, directory)
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    save_model(tiny(), None, directory, max_shard_bytes=5000)
    return directory


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refused(directory: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        load_model(directory)


class TestWeights:
    def test_a_directory_that_is_none(self, tmp_path: Path) -> None:
        refused(tmp_path / "nothing", "nothing is not a directory")

    def test_an_empty_directory(self, tmp_path: Path) -> None:
        refused(tmp_path, "holds neither model.safetensors nor")

    def test_a_pickle_is_not_read(self, tmp_path: Path) -> None:
        class Boom:
            def __reduce__(self) -> tuple:
                return (Path.touch, (tmp_path / "ran",))

        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
        (tmp_path / "config.json").write_text("{}")
        refused(tmp_path, "pytorch_model.bin, a pickle")
        (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Boom()))
        refused(tmp_path, "model.safetensors is damaged or not a safetensors file")
        assert not (tmp_path / "ran").exists()

    def test_a_tensor_without_a_place_is_named(self, checkpoint: Path) -> None:
        state = load_file(checkpoint / "model.safetensors")
        save_file(state | {"model.layers.0.extra": torch.ones(1)}, checkpoint / "model.safetensors")
        refused(checkpoint, "holds the tensor model.layers.0.extra that config.json lacks")

    def test_whole_numbers_are_no_weights(self, checkpoint: Path) -> None:
        state = load_file(checkpoint / "model.safetensors")
        state["model.norm.weight"] = torch.ones(16, dtype=torch.int8)
        save_file(state, checkpoint / "model.safetensors")
        refused(checkpoint, "model.norm.weight is of type I8; known are")

    def test_a_truncated_file(self, checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        refused(checkpoint, "is damaged or not a safetensors file")

    @pytest.mark.parametrize("length", [2**63, 2**40, 200 * 2**20])
    def test_a_header_of_absurd_size(self, checkpoint: Path, length: int) -> None:
        (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        refused(checkpoint, "is damaged or not a safetensors file")

    def test_a_header_that_tells_of_terabytes_allocates_nothing(self, checkpoint: Path) -> None:
        size = 2**44
        header = {"model.norm.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
        text = json.dumps(header).encode()
        (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        refused(checkpoint, "is damaged or not a safetensors file")

    def test_a_model_keeps_its_weights_when_a_file_does_not_fit(self, checkpoint: Path) -> None:
        model = tiny()
        before = model.head_weight.clone()
        state = load_file(checkpoint / "model.safetensors")
        state["model.embed_tokens.weight"] += 1
        state["model.norm.weight"] = torch.ones(17)
        save_file(state, checkpoint / "model.safetensors")
        with pytest.raises(UserError):
            load_state(model, checkpoint)
        assert torch.equal(model.head_weight, before)


class TestIndex:
    @pytest.mark.parametrize("way", ["../stolen.safetensors", "/etc/stolen.safetensors", "a/../../stolen.safetensors"])
    def test_that_leads_out_is_refused(self, sharded: Path, way: str) -> None:
        save_file({"x": torch.ones(1)}, sharded.parent / "stolen.safetensors")
        index = sharded / "model.safetensors.index.json"
        edit(index, lambda data: data["weight_map"].update({"model.norm.weight": way}))
        refused(sharded, "lies outside of it")

    def test_a_symlink_out_of_the_directory_is_refused(self, checkpoint: Path) -> None:
        outside = checkpoint.parent / "outside.safetensors"
        (checkpoint / "model.safetensors").rename(outside)
        (checkpoint / "model.safetensors").symlink_to(outside)
        refused(checkpoint, "lies outside of it")

    def test_a_config_that_is_a_symlink_out_is_refused(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").rename(checkpoint.parent / "outside.json")
        (checkpoint / "config.json").symlink_to("../outside.json")
        refused(checkpoint, "lies outside of it")

    def test_a_tensor_that_its_shard_does_not_hold(self, sharded: Path) -> None:
        first = next(path.name for path in sorted(sharded.glob("*.safetensors")))
        edit(
            sharded / "model.safetensors.index.json",
            lambda data: data["weight_map"].update({"model.norm.weight": first}),
        )
        refused(sharded, f"{first} misses the tensor model.norm.weight")

    @pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[1]", "{", "[" * 10**5])
    def test_that_is_none(self, sharded: Path, text: str) -> None:
        (sharded / "model.safetensors.index.json").write_text(text)
        refused(sharded, "model.safetensors.index.json")

    def test_a_shard_that_is_not_safetensors(self, sharded: Path) -> None:
        (sharded / "weights.bin").write_bytes(b"x")
        edit(
            sharded / "model.safetensors.index.json",
            lambda data: data["weight_map"].update({"model.norm.weight": "weights.bin"}),
        )
        refused(sharded, "names 'weights.bin', which is not a safetensors file")


class TestConfig:
    @pytest.mark.parametrize(
        ("keys", "value", "pattern"),
        [
            (["component"], "os.system", "model has no component os.system"),
            (["attention", "component"], "subprocess", "attention has no component subprocess"),
            (["attention"], {"_target_": "os.system", "command": "true"}, "component names the attention"),
            (["attention", "_target_"], "os.system", "_target_: attention mla has no such setting"),
            (["attention", "kv_lora_rnk"], 1, "no such setting. Did you mean kv_lora_rank?"),
            (["attention", "kv_lora_rank"], "16", "kv_lora_rank: '16' is not of type int"),
            (["tie_embeddings"], 1, "tie_embeddings: 1 is not of type bool"),
            (["embed_dim"], None, "embed_dim: None is not of type int"),
            (["embed_dim"], True, "embed_dim: True is not of type int"),
            (["vocab_size"], "50", "vocab_size: must be a whole number"),
            (["num_layers"], 10**9, "names 1000000000 layers, but the weights hold"),
            (["max_seq_len"], 10**15, "positions; at most"),
            (["embed_dim"], 10**30, "describes no possible model"),
            (["embed_dim"], -1, r"embed_dim \(-1\) must be at least 1"),
            (["attention", "qk_rope_head_dim"], 0, r"qk_rope_head_dim \(0\) must be at least 1"),
            (
                ["vocab_size"],
                10**11,
                r"vocab_size \(100000000000\) must be at least 1 and at most 16,777,216",
            ),
        ],
    )
    def test_that_lies_is_refused_with_its_key(
        self, checkpoint: Path, keys: list[str], value: object, pattern: str
    ) -> None:
        def change(data: dict[str, Any]) -> None:
            table = data["plmtune"]
            for key in keys[:-1]:
                table = table[key]
            table[keys[-1]] = value

        edit(checkpoint / "config.json", change)
        before = set(sys.modules)
        refused(checkpoint, pattern)
        assert not {name for name in set(sys.modules) - before if not name.startswith("plmtune.")}

    @pytest.mark.parametrize("text", ["", "nul", "[]", '{"plmtune": 1}', "{", '"plm"', "[" * 10**5])
    def test_that_is_none(self, checkpoint: Path, text: str) -> None:
        (checkpoint / "config.json").write_text(text)
        refused(checkpoint, "config.json")

    def test_that_is_missing(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").unlink()
        refused(checkpoint, "has no config.json")

    def test_bytes_that_are_no_text(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").write_bytes(b"\xff\xfe{}")
        refused(checkpoint, "config.json is not valid JSON")

    def test_of_a_published_model_that_lacks_a_key(self, checkpoint: Path) -> None:
        edit(checkpoint / "config.json", lambda data: (data.pop("plmtune"), data.pop("kv_lora_rank")))
        refused(checkpoint, "key kv_lora_rank is missing")

    def test_of_a_plm_with_compressed_queries(self, checkpoint: Path) -> None:
        edit(checkpoint / "config.json", lambda data: (data.pop("plmtune"), data.update(q_lora_rank=64)))
        refused(checkpoint, "q_lora_rank is 64; only None is supported")
