"""Schemes: names and shapes of a model to formats."""

from typing import Any

import pytest
import torch
from small import MODELS, small_llama, small_plm

from plmtune.models.plm import plm
from plmtune.modules.quantized import Format
from plmtune.quantization.quantize import quantize
from plmtune.quantization.schemes import (
    LayerFormats,
    candidates,
    fit,
    int4,
    int8,
    int8_dynamic,
    int8_dynamic_int4,
    mixed,
)
from plmtune.registry import component, load


def formats(plan: dict[str, Format]) -> dict[str, str]:
    return {name: format.name for name, format in plan.items()}


class TestSchemes:
    @pytest.mark.parametrize("name", ["int8", "int8_dynamic", "int8_dynamic_int4", "int4"])
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_store_each_matrix_and_nothing_else(self, make: Any, name: str) -> None:
        model = make()
        plan = load("quantization", name)(model)
        matrices = {key.removesuffix(".weight") for key, p in model.named_parameters() if p.ndim == 2}
        assert set(plan) == matrices

    def test_the_head_is_stored_as_the_embedding(self) -> None:
        plan = formats(int4(small_llama(), embedding="int4_g16"))
        assert plan["output"] == plan["tok_embeddings"] == "int4_g16"
        assert plan["layers.0.ffn.up_proj"] == "int4_g32"
        assert not {"output", "tok_embeddings"} & int4(small_llama(), embedding="keep").keys()

    def test_a_score_head_is_left_as_it_is(self) -> None:
        model = small_plm()
        model.add_score_head()
        assert "score" not in int8(model)
        with pytest.raises(ValueError, match="no module's name matches 'score'"):
            int8(model, rules={"score": "int8"})

    def test_inputs_are_rounded_where_a_scheme_says_so(self) -> None:
        model = small_plm()
        assert formats(int8_dynamic(model))["layers.0.ffn.up_proj"] == "int8_dynamic_int8"
        assert formats(int8_dynamic_int4(model))["layers.0.ffn.up_proj"] == "int8_dynamic_int4_g32"

    def test_a_model_without_memory_has_the_same_plan(self) -> None:
        with torch.device("meta"):
            model = plm(
                32_000,
                attention=component("attention", "mla", kv_lora_rank=32),
                ffn=component("ffn", "squared_relu", hidden_dim=512),
                embed_dim=256,
                num_layers=1,
                num_heads=2,
                max_seq_len=64,
            )
        assert formats(int4(model, group_size=64))["layers.0.attention.q_proj"] == "int4_g64"

    def test_a_quantized_model_is_refused(self) -> None:
        model = small_plm()
        quantize(model, int8(model))
        with pytest.raises(ValueError, match="quantized already"):
            int4(model)


class TestRules:
    def test_later_rules_win(self) -> None:
        rules = {"*.ffn.*": "int8", "layers.1.*": "keep", "*.down_proj": "int4_g16"}
        plan = formats(int4(small_plm(), rules=rules))
        assert plan["layers.0.ffn.up_proj"] == "int8"
        assert plan["layers.0.ffn.down_proj"] == plan["layers.1.ffn.down_proj"] == "int4_g16"
        assert "layers.1.ffn.up_proj" not in plan

    def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(self) -> None:
        with pytest.raises(ValueError, match=r"layers\.0\.ffn\.down_porj'\. Did you mean layers\.0\.ffn\.down_proj or"):
            int8(small_plm(), rules={"layers.0.ffn.down_porj": "keep"})

    def test_a_format_that_is_none_is_refused_with_its_key(self) -> None:
        with pytest.raises(ValueError, match=r"rules, '\*': 'int5' is no format.*or keep"):
            mixed(small_plm(), rules={"*": "int5"})
        with pytest.raises(ValueError, match="embedding: 'int2' is no format"):
            int8(small_plm(), embedding="int2")

    def test_mixed_stores_what_rules_name_and_nothing_else(self) -> None:
        assert formats(mixed(small_plm(), rules={"layers.0.ffn.*": "int8"})) == {
            "layers.0.ffn.up_proj": "int8",
            "layers.0.ffn.down_proj": "int8",
        }
        with pytest.raises(ValueError, match="mixed stores nothing"):
            mixed(small_plm())


class TestGroups:
    def test_rows_that_a_group_does_not_divide_get_the_largest_that_does_and_it_is_said(self) -> None:
        plan = int4(small_plm())
        assert isinstance(plan, LayerFormats)
        assert formats(plan)["layers.1.attention.o_proj"] == "int4_g16"
        assert plan.notes == [
            "layers.0.attention.o_proj and 1 more: rows of 48 numbers do not divide as int4_g32 wants; stored as "
            "int4_g16"
        ]

    @pytest.mark.parametrize(
        ("wanted", "width", "given"),
        [
            ("int4_g128", 192, "int4_g96"),
            ("int4_g32", 40, "int8"),
            ("int8_dynamic_int4_g32", 40, "int8_dynamic_int8"),
            ("int8", 41, None),
        ],
    )
    def test_a_width_that_nothing_divides_has_a_scale_a_row(self, wanted: str, width: int, given: str | None) -> None:
        assert fit(Format.parse(wanted), width) == (Format.parse(given) if given else None)

    def test_an_impossible_group_is_refused(self) -> None:
        with pytest.raises(ValueError, match="multiple of 16, not 20"):
            int4(small_plm(), group_size=20)


def test_candidates_have_the_shapes_of_weights() -> None:
    model = small_llama()
    assert candidates(model) == {
        name: tuple(module.weight.shape) for name, module in model.named_modules() if name in int8(model)
    }
