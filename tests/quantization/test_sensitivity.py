"""What modules lose alone, and the mix that a budget is best spent on."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IDS, MODELS, small_plm

from plmtune.modules.decoder import Decoder
from plmtune.quantization import sensitivity
from plmtune.quantization.quantize import quantize
from plmtune.quantization.schemes import candidates, int4, mixed
from plmtune.quantization.sensitivity import NEGLIGIBLE, Found, Sensitivity, loss, measure, predict, propose


def made_up(*modules: tuple[str, int, float, int, float, int], others: tuple[str, ...] = ()) -> Found:
    """Found of (name, bytes and divergence of 4 bits, of 8 bits, bytes of all)."""
    rows = [
        Sensitivity(name, "int4_g32", small, kept, 0.0, divergence, "int8", wide, wide_divergence)
        for name, small, divergence, wide, wide_divergence, kept in modules
    ]
    return Found(rows, loss=3.0, tokens=100, others=others)


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
        assert loss(model, IDS.split(1)) == pytest.approx(float(wanted), rel=1e-5)


class TestMeasure:
    @pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
    def test_equals_quantizing_each_module_alone(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sensitivity, "_TOP", 101)  # all predictions, so that no tail is put together
        model = make()
        plan = int4(model, embedding="int4_g32")
        found = measure(model, plan, IDS)
        assert {row.module for row in found} == set(plan)
        assert found.loss == pytest.approx(loss(make(), [IDS]))
        for row in found:
            alone = make()
            quantize(alone, {row.module: plan[row.module]})
            assert row.nats == pytest.approx(loss(alone, [IDS]) - found.loss, abs=1e-6)
            assert row.divergence == pytest.approx(divergence(make(), alone), abs=1e-6)
            assert row.bytes == plan[row.module].num_bytes(candidates(model)[row.module])

    def test_the_likeliest_predictions_tell_nearly_all_of_the_divergence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = {}
        for top in (101, 32):
            monkeypatch.setattr(sensitivity, "_TOP", top)
            found[top] = measure(small_plm(), {"tok_embeddings": int4(small_plm())["layers.0.ffn.up_proj"]}, IDS)[0]
        assert 0.7 * found[101].divergence < found[32].divergence <= found[101].divergence

    def test_8_bits_are_told_within_a_factor_of_two_without_being_run(self) -> None:
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

    def test_goes_on_where_it_was_interrupted(self, tmp_path: Path) -> None:
        path, model = tmp_path / "found.json", small_plm()
        plan = int4(model, rules={"layers.1.*": "keep"})
        whole = measure(model, plan, IDS)

        def stop(_: str, done: int, __: int) -> None:
            if done == 5:
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


class TestPropose:
    A = ("layers.0.ffn.up_proj", 100, 0.5, 200, 0.01, 400)
    B = ("layers.1.ffn.up_proj", 100, 0.1, 200, 0.002, 400)
    C = ("tok_embeddings", 1000, 0.2, 2000, 0.001, 4000)

    def test_the_smallest_budget_buys_the_smallest_formats_and_a_smaller_one_is_refused(self) -> None:
        assert propose(made_up(self.A, self.B, self.C), 1200) == {"*": "int4_g32"}
        with pytest.raises(ValueError, match=r"take 1,200 bytes, more than the budget of 1,199"):
            propose(made_up(self.A, self.B, self.C), 1199)

    def test_bytes_go_where_they_save_most(self) -> None:
        rules = propose(made_up(self.A, self.B, self.C), 1300)
        assert rules == {"*": "int4_g32", "layers.0.ffn.up_proj": "int8"}

    def test_all_is_kept_where_there_is_room(self) -> None:
        assert propose(made_up(self.A, self.B, self.C), 4800) == {"*": "keep"}

    @pytest.mark.parametrize("budget", range(700, 2800, 150))
    def test_is_within_one_step_of_the_best_of_all_mixes(self, budget: int) -> None:
        generator = torch.Generator().manual_seed(budget)
        drawn = (10 ** (-3 * torch.rand(7, generator=generator))).tolist()
        found = made_up(*((f"layers.{i}.ffn.up_proj", 100, d, 190, d / 200, 400) for i, d in enumerate(drawn)))
        options = [((100, d), (190, d / 200), (400, 0.0)) for d in drawn]
        best = min(
            sum(divergence for _, divergence in mix)
            for mix in itertools.product(*options)
            if sum(size for size, _ in mix) <= budget
        )
        rules = propose(found, budget)
        names = {"int4_g32": 0, "int8": 1, "keep": 2}
        chosen = [options[i][names[rules.get(row.module, rules["*"])]] for i, row in enumerate(found)]
        assert sum(size for size, _ in chosen) <= budget
        largest = max(a[1] - b[1] for held in options for a, b in itertools.pairwise(held))
        assert sum(divergence for _, divergence in chosen) <= best + largest

    def test_what_the_plan_keeps_is_kept_by_the_rules(self) -> None:
        model = small_plm()
        plan = int4(model, embedding="keep", rules={"layers.1.ffn.*": "keep"})
        found = measure(model, plan, IDS)
        assert mixed(model, rules=propose(found, sum(row.bytes for row in found))) == plan

    def test_rules_give_back_the_plan_that_was_chosen(self) -> None:
        model = small_plm()
        found = measure(model, int4(model), IDS)
        sizes = {row.module: {row.format: row.bytes, row.wide_format: row.wide_bytes} for row in found}
        least, most = sum(row.bytes for row in found), sum(row.kept_bytes for row in found)
        spent, left = [], []
        for budget in range(least, most, (most - least) // 6):
            rules = propose(found, budget)
            plan = mixed(model, rules=rules)
            left.append(predict(found, rules))
            used = sum(
                sizes[row.module][plan[row.module].name] if row.module in plan else row.kept_bytes for row in found
            )
            assert used <= budget
            spent.append(used)
        # More bytes are spent for less divergence, and none where hardly any is left.
        enough = next(index for index, divergence in enumerate(left) if divergence < NEGLIGIBLE)
        assert spent[: enough + 1] == sorted(set(spent)) and left[: enough + 1] == sorted(set(left), reverse=True)
