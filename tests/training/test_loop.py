"""What the loop logs of an optimizer."""

from __future__ import annotations

import torch
from torch import nn

from plmtune.optim.optimizers import adamw, muon
from plmtune.training.loop import rates


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.norm = nn.Embedding(4, 8), nn.Linear(8, 8), nn.LayerNorm(8)


class TestRates:
    def test_groups_of_one_rate_are_logged_once(self) -> None:
        assert rates(adamw(Small(), lr=0.1)) == {"lr": 0.1}

    def test_muon_and_its_adamw_are_logged_by_name_equal_or_not(self) -> None:
        assert rates(muon(Small(), lr=0.1)) == {"lr": 0.1, "lr/adamw": 0.1}
        assert rates(muon(Small(), lr=0.1, adamw_lr_factor=2.0)) == {"lr": 0.1, "lr/adamw": 0.2}

    def test_a_group_without_a_name_is_logged_by_its_index_where_it_differs(self) -> None:
        model = Small()
        groups = [{"params": [model.norm.weight]}, {"params": [model.norm.bias], "lr": torch.tensor(0.5)}]
        assert rates(torch.optim.SGD(groups, lr=0.1)) == {"lr": 0.1, "lr/1": 0.5}
