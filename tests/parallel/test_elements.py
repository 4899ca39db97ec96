"""The numbers that processes hold are exact arithmetic, and together they are the model."""

from typing import Any

import pytest
import torch

from plmtune.parallel.elements import EMBEDDING, held_elements, parts
from plmtune.parallel.layout import Layout
from plmtune.parallel.plan import divided_dimension, full_plan
from plmtune.registry import component

LAYOUTS = [
    Layout(),
    Layout(dp_shard=3),
    Layout(dp_replicate=2, dp_shard=2, cp=2),
    Layout(tp=2),
    Layout(pp=2, tp=2, dp_shard=3),
    Layout(pp=2, schedule="interleaved_1f1b"),
    Layout(pp=2, dp_shard=2, schedule="zbv"),
]


def built(name: str, **settings: Any) -> Any:
    with torch.device("meta"):
        return component("model", name, **settings)(vocab_size=130)


MODELS: dict[str, Any] = {
    "mla": {"name": "plm", "embed_dim": 32, "num_layers": 5, "num_heads": 4},
    "query layer": {
        "name": "pangu_alpha",
        "embed_dim": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention": component("attention", "gqa", num_kv_heads=4, rope=False, bias=True),
    },
    "values, untied": {
        "name": "llama",
        "embed_dim": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention": component("attention", "gqa", num_kv_heads=2, value_embed=2),
        "tie_embeddings": False,
    },
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return built(**MODELS[request.param])


class TestHeldElements:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_shards_of_all_processes_are_the_whole_model(self, model: Any, layout: Layout) -> None:
        held: dict[str, int] = {}
        for rank in range(layout.num_processes):
            for name, number in held_elements(model, layout, rank).items():
                held[name] = held.get(name, 0) + number
        plan = full_plan(model)
        assert held.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            copies = layout.dp_replicate * (layout.tp if divided_dimension(plan, name) is None else 1)
            copies *= 2 if name == EMBEDDING and model.tied and layout.pp > 1 and layout.schedule != "zbv" else 1
            assert held[name] == copies * parameter.numel(), name

    def test_a_shard_is_what_torch_chunk_gives(self) -> None:
        whole = torch.empty(10, 3, device="meta")
        chunks = [part.numel() for part in whole.chunk(4)]
        model: Any = torch.nn.Module()
        model.layers, model.tied = torch.nn.ModuleList([torch.nn.Linear(3, 10, bias=False, device="meta")]), False
        held = [held_elements(model, Layout(dp_shard=4), rank)["layers.0.weight"] for rank in range(4)]
        assert held == chunks
        held = [held_elements(model, Layout(dp_shard=7), rank)["layers.0.weight"] for rank in range(7)]
        assert held == [6, 6, 6, 6, 6, 0, 0]

    def test_the_first_stage_has_the_embeddings_and_the_last_one_the_head(self) -> None:
        model = built(**MODELS["query layer"])
        layout = Layout(pp=2)
        first, last = (held_elements(model, layout, rank) for rank in range(2))
        assert {"tok_embeddings.weight", "pos_embeddings.weight"} <= first.keys()
        assert {"norm.weight", "norm.bias", "query_embeddings.weight", EMBEDDING} <= last.keys()
        assert first.keys() & last.keys() == {EMBEDDING}

    def test_both_ends_of_a_v_are_on_the_first_process(self) -> None:
        model = built(**MODELS["mla"])
        held = held_elements(model, Layout(pp=2, schedule="zbv"), 0)
        assert "norm.weight" in held
        assert held[EMBEDDING] == 130 * 32

    def test_value_embeddings_are_with_their_layers(self) -> None:
        model = built(**MODELS["values, untied"])
        layout = Layout(pp=2)
        assert "value_embeddings.1.weight" in held_elements(model, layout, 0)
        assert "value_embeddings.3.weight" in held_elements(model, layout, 1)

    def test_plm_is_its_published_size(self) -> None:
        with torch.device("meta"):
            model = component("model", "plm")(vocab_size=151936)
        for layout in (Layout(), Layout(dp_shard=8), Layout(pp=4, dp_shard=2)):
            held = sum(sum(held_elements(model, layout, rank).values()) for rank in range(layout.num_processes))
            copy = 151936 * 2048 if layout.pp > 1 else 0
            assert held - copy == 1_825_458_176


def test_parts_name_the_stage() -> None:
    model = built(**MODELS["mla"])
    found = {part.name: part.stage for part in parts(model, Layout(pp=2, schedule="interleaved_1f1b"))}
    assert found["layers.0.ffn.up_proj.weight"] == 0
    assert found["layers.4.ffn.up_proj.weight"] == found["norm.weight"] == 3
