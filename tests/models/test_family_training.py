"""Every family is trained, adapted and quantized: two steps each, on tiny checkpoints that transformers made.

Two more have parts that no family has: value embeddings, and a series activation with augmented shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_families import FAMILIES, make
from own_models import OWN_PARTS, own_model
from torch import Tensor

from plmtune.losses.cross_entropy import cross_entropy
from plmtune.losses.log_probs import log_probs
from plmtune.models import adapters
from plmtune.models.hf import load_model, save_model
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import adapter_parameters, init_adapters, merge
from plmtune.quantization import qat
from plmtune.quantization.quantize import quantize
from plmtune.registry import component

# One of each model_type: what they train does not depend on RoPE's scaling.
ONE_EACH = {model_type: name for name, (model_type, _) in reversed(FAMILIES.items())}.values()


@pytest.fixture(params=[*sorted(ONE_EACH), *OWN_PARTS])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param in FAMILIES:
        make(request.param, tmp_path / "made")
    else:
        save_model(own_model(request.param), None, tmp_path / "made")
    return tmp_path / "made"


def some_ids() -> Tensor:
    return torch.randint(3, 101, (2, 16), generator=torch.Generator().manual_seed(1))


def next_token_loss(model: Decoder) -> Tensor:
    ids = some_ids()
    hidden = model(ids[:, :-1], hidden=True).flatten(0, 1)
    return cross_entropy()(hidden, model.head_weight, ids[:, 1:].flatten(), **model.loss_settings)


def two_steps(model: Decoder, loss: Callable[[Decoder], Tensor]) -> list[float]:
    """The losses before each of two steps, and after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        found.append(float(value.detach()))
    with torch.no_grad():
        return [*found, float(loss(model))]


def test_all_weights(family: Path, tmp_path: Path) -> None:
    model = load_model(family).train()
    losses = two_steps(model, next_token_loss)
    assert losses[2] < losses[1] < losses[0]
    save_model(model, None, tmp_path / "trained")
    with torch.no_grad():
        assert float(next_token_loss(load_model(tmp_path / "trained"))) == losses[2]


def test_adapters(family: Path, tmp_path: Path) -> None:
    model = load_model(family).train()
    component("peft", "lora", rank=2)(model=model)
    init_adapters(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = float(next_token_loss(load_model(family)))
    losses = two_steps(model, next_token_loss)
    assert losses[0] == pytest.approx(before) and losses[2] < losses[0]
    state = {name: tensor.clone() for name, tensor in adapter_parameters(model).items()}
    assert len(state) == 2 * sum(name.endswith("lora_a.weight") for name in state) > 0
    config = adapters.adapter_config(model, family)
    assert config["target_modules"]
    merge(model)
    with torch.no_grad():
        assert float(next_token_loss(model)) == pytest.approx(losses[2], rel=1e-4)


def test_preferences(family: Path) -> None:
    model, reference = load_model(family).train(), load_model(family)
    ids = some_ids()
    rows = torch.arange(2).repeat_interleave(15)

    def scores(of: Decoder) -> Tensor:
        hidden = of(ids[:, :-1], hidden=True).flatten(0, 1)
        return log_probs(hidden, of.head_weight, ids[:, 1:].flatten(), rows, 2, **of.loss_settings)

    with torch.no_grad():
        expected = scores(reference)

    def loss(of: Decoder) -> Tensor:
        margin = scores(of) - expected
        return -torch.nn.functional.logsigmoid(0.1 * (margin[0] - margin[1]))

    losses = two_steps(model, loss)
    assert losses[0] == pytest.approx(0.6931472, abs=1e-5) and losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8_dynamic"])
def test_quantized_numbers_are_those_of_their_integers(family: Path, tmp_path: Path, scheme: str) -> None:
    model = load_model(family).eval()
    quantize(model, component("quantization", scheme)(model=model))
    save_model(model, None, tmp_path / "quantized")
    again = load_model(tmp_path / "quantized").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(some_ids()), model(some_ids()), atol=1e-4, rtol=1e-3)
        cache = again.new_cache(2, 16)
        steps = [again(ids, cache=cache) for ids in some_ids().split(1, dim=1)]
        if scheme != "int8_dynamic":  # whose activations are rounded a call at a time
            torch.testing.assert_close(torch.cat(steps, 1), again(some_ids()), atol=1e-2, rtol=1e-2)


def test_quantization_aware(family: Path) -> None:
    model = load_model(family).train()
    qat.insert_fake_quantize(model, component("quantization", "int4", qat=True)(model=model))
    losses = two_steps(model, next_token_loss)
    assert losses[2] < losses[0]
