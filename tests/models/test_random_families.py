"""Random configs of every family: the logits are transformers', read at once, token by token and behind padding."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from random_families import LENGTH, MODEL_TYPES, keys_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from plmtune.models.hf import load_model, save_model

EXAMPLES = 3  # hundreds of each were compared before


def made(model_type: str, keys: dict[str, Any], directory: Path) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **json.loads(json.dumps(keys)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return model


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_random_configs_compute_what_transformers_computes(model_type: str) -> None:
    transformers.logging.set_verbosity_error()

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(keys_of(model_type))
    def compare(keys: dict[str, Any]) -> None:
        with TemporaryDirectory() as directory, torch.no_grad():
            check(model_type, keys, Path(directory))

    compare()


def check(model_type: str, keys: dict[str, Any], directory: Path) -> None:
    theirs = made(model_type, keys, directory / "theirs")
    ours = load_model(directory / "theirs").eval()
    length = min(LENGTH, ours.max_seq_len)
    ids = torch.randint(3, keys["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))
    assert_close(ours(ids), theirs(ids).logits)

    cache, past = ours.new_cache(2, length), None
    for at in range(length):
        found = theirs(ids[:, at : at + 1], past_key_values=past, use_cache=True)
        past = found.past_key_values
        assert_close(ours(ids[:, at : at + 1], cache=cache), found.logits)

    real = torch.arange(length) >= torch.tensor([[5], [0]])  # [2, s]: the first row is padded on the left
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = real[:, None] & causal | torch.eye(length, dtype=torch.bool)
    found = ours(ids, mask=mask, input_pos=(real.cumsum(1) - 1).clamp(min=0))
    for row in range(2):
        theirs(ids[:, :2])  # a dynamic scaling remembers the longest text until a short one
        assert_close(found[row][real[row]], theirs(ids[row][real[row]][None]).logits[0])

    save_model(ours, None, directory / "again")
    files = [directory / name / "model.safetensors" for name in ("theirs", "again")]
    before, after = map(load_file, files)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config, again = (json.loads((file.parent / "config.json").read_text()) for file in files)
    again.pop("plmtune")
    assert config == again
