"""Training of masks: its state, and the weights."""

from typing import Any

import pytest
import torch
from small import IDS, small_llama

from plmtune.pruning.mask_training import MaskTraining
from plmtune.pruning.masked import masked
from plmtune.pruning.width import mean_loss


def training(weights_lr: float) -> MaskTraining:
    settings: dict[str, Any] = {"steps": 8, "batch_size": 3, "warmup": 0.5, "lr": 0.5, "seed": 1}
    rows = torch.cat((IDS, IDS.flip(0), IDS.flip(1)))
    return MaskTraining(small_llama(), {"channels": 0.5, "layers": 0.5}, rows, weights_lr=weights_lr, **settings)


def step(trained: MaskTraining) -> float:
    now = trained.draw()
    with masked(trained.model, lambda: now):
        loss = mean_loss(trained.model, trained.next_rows())
        (loss + trained.penalty()).backward()
    trained.update()
    return float(loss.detach())


@pytest.mark.parametrize("weights_lr", [0, 1e-2])
def test_a_state_resumes_with_equal_steps(weights_lr: float) -> None:
    whole, other = training(weights_lr), training(weights_lr)
    for _ in range(3):
        step(whole)
    other.load(whole.state())
    assert [step(whole) for _ in range(3)] == [step(other) for _ in range(3)]
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in whole.state().items())


def test_weights_move_only_with_a_rate_of_their_own() -> None:
    before = small_llama().state_dict()
    for rate in (0, 1e-2):
        trained = training(rate)
        step(trained)
        after = trained.model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()) == (rate == 0)
        # The warmup is of 4 steps, and Adam's first step moves by the rate.
        largest = max(float((tensor - after[name]).abs().max()) for name, tensor in before.items())
        assert largest == pytest.approx(rate / 4, rel=1e-3)
