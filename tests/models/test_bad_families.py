"""Checkpoints of every kind of family that cannot be loaded are refused in one sentence, before memory is taken."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import make
from safetensors.torch import load_file, save_file
from torch import Tensor

from plmtune.errors import UserError
from plmtune.inference.sampling import complete
from plmtune.models.checkpoint_files import _conversion
from plmtune.models.gguf import convert
from plmtune.models.hf import load_model
from plmtune.tokenizers.tokenizer_files import bundled, load_tokenizer

# A family, and the part of a tensor's name that it alone has.
FAMILIES = {
    "llama": "o_proj",
    "gpt2": "c_attn.weight",
    "phi3": "qkv_proj",
    "deepseek_v3": "q_b_proj",
    "gemma3": "q_norm",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    for name in FAMILIES:
        make(name, root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, made: dict[str, Path], tmp_path: Path) -> tuple[Path, str]:
    return shutil.copytree(made[request.param], tmp_path / "copy"), FAMILIES[request.param]


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "config.json"
    keys = json.loads(path.read_text())
    change(keys)
    path.write_text(json.dumps(keys))


def tensors(directory: Path, part: str) -> tuple[dict[str, Tensor], str]:
    state = load_file(directory / "model.safetensors")
    return state, next(name for name in state if part in name)


def test_a_tensor_of_another_shape(family: tuple[Path, str]) -> None:
    directory, part = family
    state, name = tensors(directory, part)
    state[name] = state[name][:-1].contiguous()
    save_file(state, directory / "model.safetensors")
    with pytest.raises(UserError, match=rf"model.safetensors: {name} has shape .*, the model needs \["):
        load_model(directory)


def test_a_missing_tensor(family: tuple[Path, str]) -> None:
    directory, part = family
    state, name = tensors(directory, part)
    del state[name]
    save_file(state, directory / "model.safetensors")
    with pytest.raises(UserError, match=rf"model.safetensors misses the tensor {name} that config.json describes\."):
        load_model(directory)


def test_a_head_that_config_describes_and_the_file_lacks(family: tuple[Path, str]) -> None:
    directory, _ = family
    edit(directory, lambda keys: keys.update(tie_word_embeddings=False))
    state = load_file(directory / "model.safetensors")
    state.pop("lm_head.weight", None)
    save_file(state, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"misses the tensor lm_head.weight that .* set tie_word_embeddings to true"):
        load_model(directory)


def test_an_index_that_names_a_missing_file(family: tuple[Path, str]) -> None:
    directory, part = family
    state, name = tensors(directory, part)
    (directory / "model.safetensors").rename(directory / "model-1-of-2.safetensors")
    files = {held: f"model-{1 + (held == name)}-of-2.safetensors" for held in state}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    named = rf"index.json, key weight_map: {name} is in model-2-of-2.safetensors, which is missing"
    with pytest.raises(UserError, match=named):
        load_model(directory)


def test_weights_of_another_family(family: tuple[Path, str], made: dict[str, Path]) -> None:
    directory, _ = family
    other = made["gpt2" if "h.0" not in str(load_file(directory / "model.safetensors").keys()) else "llama"]
    shutil.copy(other / "model.safetensors", directory)
    # Each is named as its own file has it.
    held = r"transformer\.h" if other.name == "gpt2" else r"model\.(layers|embed)"
    named = rf"misses the tensor .* and holds {held}\S+ .* instead. The two are of different models"
    with pytest.raises(UserError, match=named):
        load_model(directory)


def test_a_value_of_another_type(family: tuple[Path, str]) -> None:
    directory, _ = family
    edit(directory, lambda keys: keys.update(tie_word_embeddings="yes"))
    with pytest.raises(UserError, match=r"config.json, read as model \w+.tie_embeddings: 'yes' is not of type bool"):
        load_model(directory)


def test_heads_that_mla_cannot_share(made: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(made["deepseek_v3"], tmp_path / "copy")
    edit(directory, lambda keys: keys.update(num_key_value_heads=4))
    with pytest.raises(UserError, match="num_key_value_heads: differs from num_attention_heads"):
        load_model(directory)


def test_a_pickle_is_refused_with_a_command_that_converts_it(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(made["gemma3"], tmp_path / "a copy")
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    tied = {"lm_head.weight": state["model.embed_tokens.weight"]}
    torch.save(state | tied, directory / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"pytorch_model.bin, a pickle.*convert it:\ncd '.*a copy' && python -c"
    ) as error:
        load_model(directory)
    command = _conversion(directory)
    assert command in str(error.value)
    monkeypatch.chdir(directory)
    exec(shlex.split(command)[-1], {})
    assert torch.equal(load_model(directory).tok_embeddings.weight, state["model.embed_tokens.weight"])  # type: ignore[arg-type]


def test_a_token_without_a_row(made: dict[str, Path]) -> None:
    model, tokenizer = load_model(made["llama"]), bundled()
    with pytest.raises(UserError, match=r"token 'hello' \(id \d+\).* 101 rows, none for it"):
        list(complete(model, tokenizer, "hello", max_new_tokens=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": None}, r"config.json has no model_type. Add the model's, one of plm, llama, "),
        ({"model_type": "llamoe", "num_experts": 8}, r"Models with experts \(MoE\) do not load. The nearest is"),
        ({"model_type": "seeing", "vision_config": {}}, r"Models with a vision tower do not load."),
        ({"model_type": "llama5", "new": 1}, r"The nearest is \w+, which lacks the key new."),
        ({"model_type": "llama5", "new": 1, "other": 1}, r"The nearest is \w+, which lacks the keys new, other."),
    ],
)
def test_an_unknown_model_type_says_what_is_new(
    change: dict[str, Any], said: str, made: dict[str, Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(made["llama"], tmp_path / "copy")
    edit(directory, lambda keys: keys.update(change))
    with pytest.raises(UserError, match=said):
        load_model(directory)


def test_shards_without_their_index(family: tuple[Path, str]) -> None:
    directory, _ = family
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"holds model-00001-of-00002.safetensors and no model.safetensors.index.json"):
        load_model(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer.model", "model.gguf"])
def test_a_pointer_of_git_lfs_is_named(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(made["llama"], tmp_path / "copy")
    path = directory / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n")
    read = {"model.safetensors": load_model, "model.gguf": lambda _: convert(path, tmp_path / "out")}
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS, .*: git lfs pull"):
        read.get(name, load_tokenizer)(directory)
