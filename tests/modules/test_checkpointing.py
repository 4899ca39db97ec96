"""What each form of activation checkpointing keeps and computes again; the numbers are those without it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from live_tensors import LiveTensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plmtune.modules.checkpointing import Checkpointing, is_kept, of_layer
from plmtune.modules.decoder import Decoder
from plmtune.registry import component

FORMS: list[Checkpointing] = ["none", "full", "selective", 2]
_GQA = {"num_kv_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "plm": {
        "attention": component(
            "attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        "ffn": component("ffn", "squared_relu", hidden_dim=64),
    },
    "llama": {"attention": component("attention", "gqa", **_GQA), "ffn": component("ffn", "swiglu", hidden_dim=64)},
    "pangu_alpha": {
        "attention": component("attention", "gqa", num_kv_heads=4, rope=False, bias=True),
        "ffn": component("ffn", "gelu", hidden_dim=64),
    },
}
TOKENS = torch.arange(32).view(2, 16)


def build(name: str, how: Checkpointing, **settings: Any) -> Decoder:
    sizes = {"embed_dim": 32, "num_layers": 4, "num_heads": 4, "max_seq_len": 16}
    built: Decoder = component("model", name, **sizes | MODELS[name] | settings)(vocab_size=64)
    built.init_weights(torch.Generator().manual_seed(1))
    built.activation_checkpointing = how
    return built.train()


def learn(model: Decoder) -> list[Tensor]:
    """The loss of a forward, and every gradient."""
    loss = model(TOKENS).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


class Ops(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().partition(".")[0].removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(self.counts[name] for name in ("mm", "addmm", "bmm"))

    @property
    def attentions(self) -> int:
        forward = [name for name in self.counts if name.startswith("_scaled_dot") and "backward" not in name]
        return sum(self.counts[name] for name in forward)


def operations(how: Checkpointing, name: str) -> Ops:
    """Of a forward and its backward."""
    with Ops() as ops:
        learn(build(name, how))
    return ops


def kept_bytes(how: Checkpointing, name: str) -> int:
    """Bytes that are there between the forward and the backward."""
    model = build(name, how)
    learn(model)  # tables of RoPE are made once
    with LiveTensors() as live:
        output = model(TOKENS, hidden=True)
        found = live.nbytes
    assert output.requires_grad
    return found


class TestOfLayer:
    def test_a_number_is_full_for_every_so_many_layers(self) -> None:
        assert [of_layer(3, index) for index in range(7)] == ["full", "none", "none"] * 2 + ["full"]

    def test_a_word_is_that_of_every_layer(self) -> None:
        assert {of_layer("selective", index) for index in range(4)} == {"selective"}


@pytest.mark.parametrize("name", MODELS)
class TestForms:
    @pytest.mark.parametrize("how", FORMS[1:])
    def test_loss_and_gradients_have_the_bits_of_none(self, name: str, how: Checkpointing) -> None:
        one, other = learn(build(name, "none")), learn(build(name, how))
        assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def test_and_under_autocast(self, name: str) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            found = [learn(build(name, how)) for how in FORMS]
        for others in zip(*found, strict=True):
            assert all(torch.equal(others[0], other) for other in others)

    def test_selective_computes_no_product_and_no_attention_again(self, name: str) -> None:
        none, full, selective = (operations(how, name) for how in ("none", "full", "selective"))
        assert selective.products == none.products < full.products
        assert selective.attentions == none.attentions == 4
        assert full.attentions == 8

    def test_selective_computes_norms_and_activations_again(self, name: str) -> None:
        none, selective = (operations(how, name).counts for how in ("none", "selective"))
        again = {"plm": "relu", "llama": "silu", "pangu_alpha": "gelu"}[name]
        assert (none[again], selective[again]) == (4, 8)

    def test_bytes_between_forward_and_backward_fall_from_none_to_full(self, name: str) -> None:
        none, full, selective, second = (kept_bytes(how, name) for how in FORMS)
        assert full < selective < none
        assert full < second < none

    def test_nothing_is_checkpointed_where_nothing_trains(self, name: str) -> None:
        model = build(name, "selective").eval()
        with torch.no_grad():
            expected = model(TOKENS)
            cache = model.new_cache(2, 16)
            assert torch.equal(model.train()(TOKENS), expected)
            torch.testing.assert_close(model(TOKENS, cache=cache), expected)


class TestKept:
    def test_scores_without_a_fused_kernel_are_computed_again(self) -> None:
        queries, keys, values = torch.ones(2, 16, 4), torch.ones(2, 4, 16), torch.ones(2, 16, 4)
        scores = queries @ keys
        product = torch.ops.aten.bmm.default
        assert not is_kept(product, (queries, keys), scores)
        assert is_kept(product, (scores, values), scores @ values)

    def test_every_fused_attention_is_kept_and_no_backward(self) -> None:
        names = [name for name in dir(torch.ops.aten) if name.startswith("_scaled_dot_product")]
        ops = {name: getattr(getattr(torch.ops.aten, name), "default") for name in names}  # noqa: B009
        assert len(ops) > 5
        assert {name for name, op in ops.items() if is_kept(op, (), None)} == {
            name for name in ops if not name.endswith("_backward")
        }


class TestCompiled:
    @pytest.mark.parametrize("how", ["full", "selective", 2])
    def test_layers_compute_the_same(self, how: Checkpointing) -> None:
        torch._dynamo.reset()
        expected, model = learn(build("llama", "none")), build("llama", how)
        for layer in model.layers:
            layer.compile(backend="aot_eager_decomp_partition")
        for one, other in zip(expected, learn(model), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)

    def test_a_compiled_layer_keeps_products(self) -> None:
        torch._dynamo.reset()
        none, full, selective = (build("llama", how) for how in ("none", "full", "selective"))
        counts = []
        for model in (none, full, selective):
            for layer in model.layers:
                layer.compile(backend="aot_eager_decomp_partition")
            learn(model)  # compiles
            with Ops() as ops:
                learn(model)
            counts.append(ops.products)
        assert counts[0] == counts[2] < counts[1]
