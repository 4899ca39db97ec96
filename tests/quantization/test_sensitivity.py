"""Sensitivities equal quantizing each module alone, and are resumed from a file of the same inputs."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IDS, MODELS, small_gpt2, small_minicpm, small_plm, small_valued

from plmtune.models.text_loss import mean_loss
from plmtune.modules.decoder import Decoder
from plmtune.quantization import sensitivity
from plmtune.quantization.quantize import quantize
from plmtune.quantization.schemes import candidates, int4, mixed
from plmtune.quantization.sensitivity import measure


def divergence(model: Decoder, other: Decoder) -> float:
    """KL of all predictions, written down naively."""
    with torch.no_grad():
        log_p, log_q = (m(IDS)[:, :-1].double().log_softmax(-1) for m in (model, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


class TestLoss:
    def test_is_the_mean_of_all_predictions(self) -> None:
        model = small_plm()
        with torch.no_grad():
            wanted = torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        assert mean_loss(model, IDS.split(1)) == pytest.approx(float(wanted), rel=1e-5)


class TestMeasure:
    @pytest.mark.parametrize("make", [*MODELS.values(), small_valued, small_gpt2, small_minicpm])
    def test_equals_quantizing_each_module_alone(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sensitivity, "_TOP", 101)  # all predictions, so that no tail is put together
        model = make()
        plan = int4(model, embedding="int4_g32")
        found = measure(model, plan, IDS)
        assert {row.module for row in found} == set(plan)
        assert found.loss == pytest.approx(mean_loss(make(), [IDS]))
        for row in found:
            alone = make()
            quantize(alone, {row.module: plan[row.module]})
            assert row.nats == pytest.approx(mean_loss(alone, [IDS]) - found.loss, abs=1e-6)
            assert row.divergence == pytest.approx(divergence(make(), alone), abs=1e-6)
            assert row.bytes == plan[row.module].num_bytes(candidates(model)[row.module])

    def test_the_top_predictions_give_nearly_all_of_the_divergence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = {}
        for top in (101, 32):
            monkeypatch.setattr(sensitivity, "_TOP", top)
            found[top] = measure(small_plm(), {"tok_embeddings": int4(small_plm())["layers.0.ffn.up_proj"]}, IDS)[0]
        assert 0.7 * found[101].divergence < found[32].divergence <= found[101].divergence

    def test_8_bits_are_estimated_within_a_factor_of_two_without_a_run(self) -> None:
        model = small_plm()
        plan = int4(model, rules={"layers.1.*": "keep"})
        eight = {row.module: row for row in measure(model, mixed(model, rules=dict.fromkeys(plan, "int8")), IDS)}
        for row in measure(model, plan, IDS):
            assert 0.5 < row.wide_divergence / eight[row.module].divergence < 2
            assert (row.wide_format, row.wide_bytes) == ("int8", eight[row.module].bytes)

    def test_leaves_the_model_as_it_was(self) -> None:
        model, twin = small_plm(), small_plm()
        measure(model, int4(model), IDS)
        after = model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in twin.state_dict().items())
        assert {type(m) for m in model.modules()} == {type(m) for m in twin.modules()}

    def test_resumes_after_an_interrupt(self, tmp_path: Path) -> None:
        path, model = tmp_path / "found.json", small_plm()
        plan = int4(model, rules={"layers.1.*": "keep"})
        whole = measure(model, plan, IDS)

        def stop(names: Sequence[str]) -> Iterator[str]:
            yield from names[:5]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure(model, plan, IDS, path, progress=stop)
        content = json.loads(path.read_text())
        assert len(content["modules"]) == 5
        content["modules"][2]["nats"] = 77.0  # so that one sees that it is taken from the file
        path.write_text(json.dumps(content))
        again = measure(model, plan, IDS, path)
        assert again[2].nats == 77.0
        assert [row for i, row in enumerate(again) if i != 2] == [row for i, row in enumerate(whole) if i != 2]
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("change", ["model", "rows", "plan", "damage"])
    def test_takes_nothing_from_a_file_of_another_model_text_or_plan(self, change: str, tmp_path: Path) -> None:
        path, model, rows = tmp_path / "found.json", small_plm(), IDS
        kept = {"*": "keep", "layers.1.ffn.*": "int4_g32"}
        plan = int4(model, rules=kept)
        measure(model, plan, rows, path)
        if change == "model":
            model.get_parameter("layers.1.ffn.up_proj.weight").data[0, 0] += 1
        elif change == "rows":
            rows = IDS.flip(0)
        elif change == "plan":
            plan = int4(model, rules=kept | {"*.up_proj": "int4_g16"})
        else:
            path.write_text(path.read_text()[:-40])
        assert list(measure(model, plan, rows, path)) == list(measure(model, plan, rows))
