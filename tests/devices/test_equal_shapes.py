"""Shapes at equal parameters: counted exactly for every family, with whole heads."""

from functools import cache
from typing import Any

import pytest

from plmtune.config import compose
from plmtune.devices.equal_shapes import EqualShapes, equal_shapes
from plmtune.devices.sweep import put
from plmtune.errors import UserError
from plmtune.registry import Component, describe_components, keys_of
from plmtune.training.estimate import attention_flops

ROWS = 512
SMALL = {"num_layers": 3, "embed_dim": 96, "num_heads": 6, "max_seq_len": 64}


def full(part: Component) -> Component:
    """A component with its defaults written out, as a config has them."""
    settings = {name: key.default for name, key in keys_of(part.group, part.name).items()} | part.settings
    made = {name: full(value) if isinstance(value, Component) else value for name, value in settings.items()}
    return Component(part.group, part.name, made)


@cache
def model_of(family: str) -> Component:
    """A family's model with 6 heads of 16, and a latent or 2 KV heads."""
    attention = keys_of("model", family)["attention"].default
    more = {"attention.num_kv_heads": 2} if "num_kv_heads" in keys_of("attention", attention.name) else {}
    if attention.name == "mla":
        ranks = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
        ranks |= {"q_lora_rank": 24} if attention.settings.get("q_lora_rank") else {}
        more |= {f"attention.{key}": value for key, value in ranks.items()}
    if attention.settings.get("head_dim"):
        more["attention.head_dim"] = 16
    if attention.settings.get("rope_dim"):
        more["attention.rope_dim"] = 8
    model = full(Component("model", family))
    for key, value in {**SMALL, **more, "ffn.hidden_dim": 256}.items():
        model = put(model, key.split("."), value)
    return model


def find(model: Component, **more: Any) -> EqualShapes:
    return equal_shapes(model, ROWS, **{"tolerance": 0.05, **more})


class TestEveryFamily:
    @pytest.mark.parametrize("family", sorted(describe_components()["model"]))
    def test_a_shape_has_the_parameters_of_a_built_model_and_whole_heads(self, family: str) -> None:
        found = find(model_of(family), multiple=16, given={"embed_dim": [48, 144]})
        shapes = found.spread(3)
        assert found.base in shapes and len(shapes) == 3
        for shape in shapes:
            built = compose.build("model", shape.model, vocab_size=ROWS)
            counted = sum(parameter.numel() for parameter in built.parameters())
            assert shape.parameters == counted == shape.costs.parameters
            assert abs(counted / found.base.parameters - 1) <= 0.05
            assert shape.settings["embed_dim"] % 16 == shape.settings["ffn.hidden_dim"] % 16 == 0
            (heads, width), (kv_heads, _), _ = built.layers[0].attention.head_shapes()
            assert width == found.head_dim and heads == shape.settings["num_heads"]
            if "attention.num_kv_heads" in shape.settings:
                assert (heads, kv_heads) == (3 * kv_heads, shape.settings["attention.num_kv_heads"])
            flops = 6 * sum(m.numel for m in shape.costs.multiplied) + attention_flops(built, 32)
            assert shape.training_flops(32) == flops

    @pytest.mark.parametrize("every", [1, 3])
    def test_value_embeddings_of_some_layers_are_counted(self, every: int) -> None:
        settings = model_of("llama").settings
        attention = settings["attention"]
        given = Component("attention", "gqa", attention.settings | {"value_embed": every})
        model = Component("model", "llama", settings | {"attention": given})
        found = find(model, multiple=16, given={"embed_dim": [48], "num_layers": [2, 3, 4, 5, 7, 8, 12]}, tolerance=0.3)
        assert found.shapes and all(shape.parameters == shape.costs.parameters for shape in found.shapes)


class TestSearch:
    def test_values_that_are_given_are_the_only_ones(self) -> None:
        given = {"num_layers": [2, 5], "embed_dim": [48, 96, 144]}
        found = find(model_of("llama"), given=given, tolerance=0.1, multiple=16)
        assert found.shapes
        assert {s.settings["num_layers"] for s in found.shapes} <= {2, 5}
        assert {s.settings["embed_dim"] for s in found.shapes} <= {48, 96, 144}

    def test_depths_and_widths_lie_on_both_sides_of_the_base(self) -> None:
        settings = [shape.settings for shape in find(model_of("plm"), multiple=16).spread(8)]
        for key, base in (("num_layers", 3), ("embed_dim", 96)):
            assert min(one[key] for one in settings) < base < max(one[key] for one in settings)

    def test_where_none_is_found_the_nearest_is_known(self) -> None:
        found = find(model_of("plm"), tolerance=1e-9)
        assert not found.shapes
        assert found.nearest is not None and found.nearest.parameters != found.base.parameters

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            ({"given": {"embed_dim": [50]}}, r"embed_dim=50 is no multiple of 96, which heads of 16"),
            ({"given": {"num_layers": [0]}}, "num_layers=0 must be at least 1"),
        ],
    )
    def test_values_that_no_shape_can_have_are_refused(self, more: dict[str, Any], says: str) -> None:
        with pytest.raises(UserError, match=says):
            find(model_of("llama"), **more)

    def test_an_attention_of_types_of_layers_keeps_them(self) -> None:
        found = find(model_of("gemma3"), multiple=16, given={"embed_dim": [48]})
        deep = max(found.shapes, key=lambda shape: shape.settings["num_layers"])
        windows = [layer.window for layer in deep.costs.attention]
        assert windows[5] is None and windows.count(None) == len(windows) // 6
