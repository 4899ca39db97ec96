"""Each key of config.json, changed or left out: the logits are transformers' of the same file, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import make
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from plmtune.errors import UserError
from plmtune.models.family import HARMLESS
from plmtune.models.hf import load_model

MISSING = object()
NAMES = [
    "llama-yarn",
    "smollm3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi4-mini",
    "granite",
    "stablelm",
    "glm",
    "deepseek_v3",
]
IDS = torch.randint(3, 101, (1, 24), generator=torch.Generator().manual_seed(1))
# Keys that files of other families or of old versions have.
MORE = {
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 8,
    "layer_types": ["full_attention"],
    "sliding_window": 3,
    "sliding_window_pattern": 3,
    "head_dim": 4,
    "rope_theta": 77.0,
}


def changed(value: Any) -> Iterator[Any]:
    """Other values of the type of one, then null and none at all."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value * 2
    elif isinstance(value, list) and value:
        yield value[::-1]
        if isinstance(value[0], str):
            yield ["full_attention"] * len(value)
    elif isinstance(value, str):
        yield "relu"
    elif isinstance(value, dict):
        for key, held in value.items():
            for other in changed(held):
                rest = {name: kept for name, kept in value.items() if name != key}
                yield rest if other is MISSING else rest | {key: other}
    else:
        yield 1
        yield True
    yield None
    yield MISSING


def in_transformers(directory: Path, state: dict[str, Tensor]) -> Tensor | None:
    """Its logits, or None where it refuses the file."""
    try:
        config = AutoConfig.from_pretrained(directory)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) > ({"lm_head.weight"} if config.tie_word_embeddings else set()):
            return None
        model.tie_weights()
        found: Tensor = model(IDS).logits
    except Exception:  # of many kinds, from deep within
        return None
    return found


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    model, file = make(name, tmp_path), tmp_path / "config.json"
    state, written = load_file(tmp_path / "model.safetensors"), json.loads(file.read_text())
    keys = json.loads(model.config.to_json_string(use_diff=False))
    cases = [(key, other) for key in keys.keys() - HARMLESS for other in changed(keys[key])]
    before, used = model(IDS).logits, set()
    for key, other in cases + [(key, other) for key, other in MORE.items() if key not in keys]:
        rest = {name: value for name, value in written.items() if name != key}
        file.write_text(json.dumps(rest if other is MISSING else rest | {key: other}))
        try:
            ours = load_model(tmp_path).eval()
        except UserError:
            continue
        expected = in_transformers(tmp_path, state)
        if expected is None or ours.max_seq_len < IDS.shape[1]:
            continue
        case = f"{key}={other if other is not MISSING else 'missing'}"
        torch.testing.assert_close(ours(IDS), expected, atol=2e-4, rtol=1e-4, msg=lambda m, case=case: f"{case}: {m}")
        if not torch.equal(expected, before):
            used.add(key)
    assert len(used) >= 2  # or the numbers of the test show nothing
