"""What is timed as sparse must be sparse when it is timed."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import tiny_plm

from plmtune.devices.sparse_decode import squared_relus
from plmtune.modules.decoder import Decoder


@pytest.fixture
def edge_decode(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("edge_decode", "side_by_side"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("edge_decode")


def small() -> Decoder:
    model: Decoder = tiny_plm(
        500, mla={"v_head_dim": 16}, hidden_dim=768, embed_dim=192, num_layers=4, max_seq_len=1024, init_std=0.02
    )
    return model.eval().requires_grad_(False)


def test_zeros_of_other_tokens_and_of_timed_steps_are_as_many_as_asked_for(edge_decode: ModuleType) -> None:
    model = small()
    assert edge_decode.make_sparse(model, 0.9) == pytest.approx(0.9, abs=0.02)
    ours = edge_decode.Ours(model, 600)
    for context in (16, 128, 560):
        assert ours.zeros(context, 12) == pytest.approx(0.9, abs=0.02)
    assert not any(ffn.record_sparsity for ffn in squared_relus(model).values())


def test_counted_steps_read_the_tokens_of_timed_ones(edge_decode: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = small(), []
    ours = edge_decode.Ours(model, 300)
    model.register_forward_pre_hook(lambda module, inputs: read.append(int(inputs[0])))
    ours.start(128)
    for _ in range(5):
        ours.step()
    ours.zeros(128, 5)
    assert read[:5] == read[5:] and len(set(read)) > 1
