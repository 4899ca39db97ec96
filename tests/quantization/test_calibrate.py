"""Second moments are those of what each matrix is really multiplied by."""

from typing import Any

import pytest
import torch
from small import IDS, MODELS, small_llama, small_plm

from plmtune.quantization.calibrate import second_moments
from plmtune.quantization.quantize import quantize
from plmtune.quantization.schemes import candidates, int4


class TestSecondMoments:
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_do_not_depend_on_how_the_text_is_cut_into_batches(self, make: Any) -> None:
        model = make()
        whole = second_moments(model, [IDS], candidates(model))
        for name, moments in second_moments(model, IDS.split(1), candidates(model)).items():
            torch.testing.assert_close(moments, whole[name])

    @torch.no_grad()
    def test_equal_the_inputs_written_down_naively(self) -> None:
        model = small_plm()
        found = second_moments(model, [IDS], candidates(model))
        x = model.tok_embeddings(IDS)
        layer: Any = model.layers[0]
        normed = layer.attention_norm(x)
        torch.testing.assert_close(found["layers.0.attention.q_proj"], normed.square().mean((0, 1)))
        x = x + layer.attention(normed)
        hidden = layer.ffn.up_proj(layer.ffn_norm(x)).relu().square()
        torch.testing.assert_close(found["layers.0.ffn.down_proj"], hidden.square().mean((0, 1)))

    @torch.no_grad()
    @pytest.mark.parametrize(("tied", "head"), [(True, "tok_embeddings"), (False, "output")])
    def test_a_head_is_multiplied_by_the_last_hidden_states(self, tied: bool, head: str) -> None:
        model = small_llama(tie_embeddings=tied)
        found = second_moments(model, [IDS], candidates(model))
        torch.testing.assert_close(found[head], model(IDS, hidden=True).square().mean((0, 1)))
        assert ("tok_embeddings" in found) is tied  # rows that are only looked up are multiplied by nothing

    def test_have_a_number_a_column_of_each_matrix_of_the_plan(self) -> None:
        model = small_plm()
        plan = int4(model, rules={"layers.1.*": "keep"})
        found = second_moments(model, [IDS], plan)
        assert {name: len(moments) for name, moments in found.items()} == {
            name: candidates(model)[name][1] for name in plan
        }
        quantize(model, plan, second_moments=found)

    def test_leave_no_hooks(self) -> None:
        model = small_plm()
        second_moments(model, IDS.split(1), candidates(model))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_no_text_and_inputs_that_are_no_numbers_are_refused(self) -> None:
        model = small_plm()
        with pytest.raises(ValueError, match="at least one row"):
            second_moments(model, [], candidates(model))
        model.get_parameter("layers.1.ffn_norm.weight").data[0] = float("inf")
        with pytest.raises(ValueError, match=r"inputs of layers\.1\.ffn\.up_proj are not finite"):
            second_moments(model, [IDS], ["layers.1.ffn.up_proj"])
