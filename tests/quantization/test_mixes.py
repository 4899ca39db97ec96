"""Mixes of mix: bytes are spent where they save most, and rules give the mix back."""

import itertools

import pytest
import torch
from small import IDS, small_plm

from plmtune.quantization.mixes import NEGLIGIBLE, predict, propose
from plmtune.quantization.schemes import int4, mixed
from plmtune.quantization.sensitivity import Sensitivities, Sensitivity, measure


def made_up(*modules: tuple[str, int, float, int, float, int], others: tuple[str, ...] = ()) -> Sensitivities:
    """Sensitivities of (name, bytes and divergence of 4 bits, of 8 bits, bytes of all)."""
    rows = [
        Sensitivity(name, "int4_g32", small, kept, 0.0, divergence, "int8", wide, wide_divergence)
        for name, small, divergence, wide, wide_divergence, kept in modules
    ]
    return Sensitivities(rows, loss=3.0, tokens=100, others=others)


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
        mix = int4(model, embedding="keep", rules={"layers.1.ffn.*": "keep"})
        found = measure(model, mix, IDS)
        assert mixed(model, rules=propose(found, sum(row.bytes for row in found))) == mix

    def test_rules_give_back_the_plan_that_was_chosen(self) -> None:
        model = small_plm()
        found = measure(model, int4(model), IDS)
        sizes = {row.module: {row.format: row.bytes, row.wide_format: row.wide_bytes} for row in found}
        least, most = sum(row.bytes for row in found), sum(row.kept_bytes for row in found)
        spent, left = [], []
        for budget in range(least, most, (most - least) // 6):
            rules = propose(found, budget)
            mix = mixed(model, rules=rules)
            left.append(predict(found, rules))
            used = sum(
                sizes[row.module][mix[row.module].name] if row.module in mix else row.kept_bytes for row in found
            )
            assert used <= budget
            spent.append(used)
        # More bytes are spent for less divergence, and none where hardly any is left.
        enough = next(index for index, divergence in enumerate(left) if divergence < NEGLIGIBLE)
        assert spent[: enough + 1] == sorted(set(spent)) and left[: enough + 1] == sorted(set(left), reverse=True)
