"""Importance of layers against models that skip them, and the choice of layers against all choices."""

import copy
from itertools import combinations

import pytest
import torch
from made_pruning import gemma_like
from small import IDS, small_llama

from plmtune.models.text_loss import mean_loss
from plmtune.pruning.depth import block_influence, layers_by_importance, layers_by_rises, rises_without


@pytest.mark.parametrize("make", [lambda: small_llama(num_layers=4), gemma_like])
def test_the_rise_is_that_of_a_model_without_the_layers(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    rises = rises_without(model, IDS.split(2), 3)
    assert set(rises) == {(first, n) for n in (1, 2, 3) for first in range(5 - n)}
    for (first, n), rise in rises.items():
        shorter = copy.deepcopy(model)
        del shorter.layers[first : first + n]
        assert rise == pytest.approx(mean_loss(shorter, [IDS]) - mean_loss(model, [IDS]), abs=1e-5)


def test_a_layer_that_turns_nothing_has_no_influence() -> None:
    model = small_llama(num_layers=3)
    for name in ("attention.o_proj", "ffn.down_proj"):
        projection = model.layers[1].get_submodule(name)
        for parameter in projection.parameters():
            parameter.data.zero_()
    values = block_influence(model, [IDS])
    assert values[1] == pytest.approx(0, abs=1e-6) and min(values[0], values[2]) > 0.01
    assert layers_by_importance(values, 2) == (0, 2)
    x = model.tok_embeddings(IDS)
    with torch.no_grad():
        naive = 1 - torch.nn.functional.cosine_similarity(x, model.layers[0](x), dim=-1).mean()
    assert values[0] == pytest.approx(float(naive), abs=1e-6)


@pytest.mark.parametrize("keep", [1, 3, 4, 5])
def test_the_runs_that_go_have_the_least_sum(keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    rises = {(first, n): float(torch.rand((), generator=generator)) * n for n in (1, 2) for first in range(7 - n)}

    def cost(gone: tuple[int, ...], touching: bool) -> float:
        """The least sum over divisions of the layers that go into runs of one and two."""
        if not gone:
            return 0.0
        found = []
        for n in (1, 2):
            run, rest = gone[:n], gone[n:]
            if len(run) == n and run[-1] - run[0] == n - 1 and (touching or not rest or rest[0] > run[-1] + 1):
                found.append(rises[run[0], n] + cost(rest, touching))
        return min(found, default=float("inf"))

    kept = layers_by_rises(rises, 6, keep)
    gone = [tuple(sorted(set(range(6)) - set(kept))), *combinations(range(6), 6 - keep)]
    costs = [cost(each, False) for each in gone]
    if min(costs) == float("inf"):  # so many go that runs touch
        costs = [cost(each, True) for each in gone]
    assert len(kept) == keep and costs[0] == pytest.approx(min(costs))
