"""Four processes compute what one does, spread in every way; and what they send each other for it.

All cases share one start, as starting a process takes seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from group import in_group
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from toy import Toy, global_batch, train_step

from plmtune.modules.sharding import full_tensor
from plmtune.training import distributed
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.runtime import Runtime
from plmtune.training.state import optimizer_state_dict
from plmtune.training.trainer_state import latest_valid

WAYS = {"ddp": {}, "fsdp": {}, "hsdp": {"shard_size": 2}}
GROUPS = 3  # of the toy's parameters: two layers, and the root with what is left


def start(way: str, **keys: Any) -> Runtime:
    settings = {"device": "cpu", "precision": "fp32", "timeout_minutes": 0.5, **WAYS.get(way, {}), **keys}
    return Runtime.choose(strategy=way, **settings).start()  # type: ignore[arg-type]


def learn(runtime: Runtime, *, tied: bool = False) -> dict[str, Any]:
    """Four steps of a toy."""
    torch.manual_seed(5 + runtime.rank)  # rank 0 counts
    model = Toy(tied=tied)
    trained = runtime.distribute(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses, norms = zip(*(train_step(runtime, model, trained, optimizer, step) for step in range(4)), strict=True)
    return {"losses": losses, "norms": norms, "placements": placements(model)}


def placements(model: torch.nn.Module) -> str:
    parameter = next(model.parameters())
    return str(parameter.placements) if isinstance(parameter, DTensor) else "whole"


@contextmanager
def listening() -> Iterator[list[tuple[str, str]]]:
    """Every collective of FSDP2 in here, with the dtype that travels."""
    heard: list[tuple[str, str]] = []

    def listen(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **keys: Any) -> Any:
            tensor = next(v for v in (*args, *keys.values()) if isinstance(v, Tensor))
            heard.append((name, str(tensor.dtype).removeprefix("torch.")))
            return original(*args, **keys)

        return collective

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_single", "reduce_scatter_single", "all_reduce"):
            patch.setattr(dist, name, listen(name, getattr(dist, name)))
        yield heard


def one_step(runtime: Runtime, micro_batches: int) -> dict[str, Any]:
    """Gradients of `micro_batches` rows a rank, a validation before and after, and what was sent for the step."""
    torch.manual_seed(5)
    model = Toy()
    trained = runtime.distribute(model)
    rows = [part.split(1) for part in global_batch(0, rows=runtime.world_size * micro_batches)]
    mine = range(runtime.rank * micro_batches, (runtime.rank + 1) * micro_batches)

    def validate() -> float:
        with torch.no_grad(), runtime.autocast():
            return F.cross_entropy(trained(rows[0][0]).float().flatten(0, 1), rows[1][0].flatten()).item()

    before = validate()
    distributed.parameter_names(model)
    with listening() as heard:
        for i in mine:
            with runtime.accumulate(trained, first=i == mine[0], last=i == mine[-1]), runtime.autocast():
                logits = trained(rows[0][i], hidden=True).flatten(0, 1) @ model.head_weight.T
                loss = F.cross_entropy(logits.float(), rows[1][i].flatten(), reduction="sum")
            (loss * runtime.gradient_scale).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    whole = {name: full_tensor(g).double() for name, g in gradients.items() if g is not None}
    after = validate()
    return {
        "heard": Counter(" ".join(entry) for entry in heard),
        "dtypes": sorted({str(g.dtype) for g in gradients.values() if g is not None}),
        "count": len(whole),
        "norm": torch.stack([g.norm() for g in whole.values()]).norm().item(),
        "validations": [before, after],
        "layers sharded": all(isinstance(p, DTensor) for p in model.layers.parameters()),
        "all sharded": all(isinstance(p, DTensor) for p in distributed.parameter_names(model)),
    }


def carry(runtime: Runtime) -> list[bool]:
    """Whether whole tensors come and go unchanged, those that do not divide by four among them."""
    model = Toy(width=6)
    runtime.distribute(model)
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}
    distributed.load_full_tensors(model.state_dict(), state)
    parameter = model.layers[0].up.weight
    placed = distributed.like(state["layers.0.up.weight"], parameter)
    index, count = runtime.rank % runtime.layout.shard_size, runtime.layout.shard_size
    mine = state["layers.0.up.weight"].chunk(count)[index]
    local = placed.to_local() if isinstance(placed, DTensor) else placed
    return [
        all(torch.equal(full_tensor(t), state[name]) for name, t in model.state_dict().items()),
        torch.equal(full_tensor(placed), state["layers.0.up.weight"]),
        torch.equal(local, mine),
    ]


def go_on(runtime: Runtime, reads: Path | None, writes: Path | None) -> dict[str, Any]:
    """Steps 2 and 3, from the checkpoint in `reads` or by way of steps 0 and 1; saved into `writes` before."""
    torch.manual_seed(5)
    model = Toy()
    trained = runtime.distribute(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def steps(*numbers: int) -> list[float]:
        losses = []
        for step in numbers:
            losses.append(train_step(runtime, model, trained, optimizer, step)[0])
            scheduler.step()
        return losses

    if reads is None:
        steps(0, 1)
    else:
        path = latest_valid(reads)
        assert path is not None
        Checkpoints(reads).restore(path, **state)
    moments, _ = optimizer_state_dict(model, optimizer)
    digest = xxhash.xxh3_128()
    for name, tensor in sorted({**model.state_dict(), **moments}.items()):
        digest.update(name.encode())
        digest.update(full_tensor(tensor).contiguous().numpy().tobytes())
    if writes is not None:
        Checkpoints(writes).save(2, **state, wait=True)
    return {"digest": digest.hexdigest(), "losses": steps(2, 3)}


def four(directory: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for way in WAYS:
        results[way] = learn(start(way))
        results[f"{way} tied"] = learn(start(way), tied=True)
        results[f"{way} bf16"] = one_step(start(way, precision="bf16"), 4)
        for count in (1, 4):
            results[f"{way} {count}"] = one_step(start(way), count)
        results[f"{way} carry"] = carry(start(way))
        results[f"{way} saved"] = go_on(start(way), None, directory / way)
    results["default"] = start("hsdp", shard_size=None).layout.shard_size
    with start("ddp") as runtime:  # the end of the process group
        results["texts"] = distributed.gather_texts("é" * runtime.rank)
    return results


def two(directory: Path) -> dict[str, Any]:
    """What four processes saved, in other ways."""
    results = {}
    for saved, way in (("fsdp", "ddp"), ("hsdp", "fsdp")):
        results[saved] = go_on(start(way), directory / saved, directory / f"{saved}-{way}")
    start("ddp").close()
    return results


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("four")


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[str, Any]]:
    return in_group(four, 4, directory)


@pytest.fixture(scope="module")
def fewer(ranks: list[dict[str, Any]], directory: Path) -> dict[str, dict[str, Any]]:
    """By the way in which four processes saved: what two found, and one after them."""
    found = in_group(two, 2, directory)
    with start("none") as runtime:
        one = {
            saved: go_on(runtime, directory / f"{saved}-{way}", None)
            for saved, way in (("fsdp", "ddp"), ("hsdp", "fsdp"))
        }
        return {"two": found[1], "one": one, "undisturbed": go_on(runtime, None, None)}


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    with start("none") as runtime:
        return {
            "": learn(runtime),
            " tied": learn(runtime, tied=True),
            " 1": one_step(runtime, 4)["norm"],
            " 4": one_step(runtime, 16)["norm"],
        }


class TestLearning:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("tied", ["", " tied"])
    def test_losses_and_norms_equal_those_of_one_process(self, ranks, one, way, tied):
        for rank in ranks:
            assert rank[way + tied]["losses"] == pytest.approx(one[tied]["losses"], rel=1e-6)
            assert rank[way + tied]["norms"] == pytest.approx(one[tied]["norms"], rel=1e-5)

    def test_the_model_is_whole_sharded_or_sharded_within_copies(self, ranks):
        found = [ranks[0][way]["placements"] for way in WAYS]
        assert found == ["whole", "(Shard(dim=0),)", "(Replicate(), Shard(dim=0))"]

    def test_a_copy_lies_on_one_machine_unless_asked_otherwise(self, ranks):
        assert ranks[0]["default"] == 2


class TestAccumulation:
    @pytest.mark.parametrize("count", [1, 4])
    @pytest.mark.parametrize("way", WAYS)
    def test_the_gradient_is_that_of_one_process(self, ranks, one, way, count):
        assert ranks[3][f"{way} {count}"]["norm"] == pytest.approx(one[f" {count}"], rel=1e-5)

    @pytest.mark.parametrize("way", ["fsdp", "hsdp"])
    def test_parameters_are_gathered_and_gradients_reduced_once_a_step(self, ranks, way):
        expected = {"all_gather_single float32": GROUPS, "reduce_scatter_single float32": GROUPS}
        if way == "hsdp":
            expected["all_reduce float32"] = GROUPS
        for rank in ranks:
            assert rank[f"{way} 4"]["heard"] == expected

    @pytest.mark.parametrize("way", ["fsdp", "hsdp"])
    def test_a_single_micro_batch_frees_layers_between_forward_and_backward(self, ranks, way):
        heard = ranks[0][f"{way} 1"]["heard"]
        assert heard["all_gather_single float32"] == GROUPS + 2  # the layers twice, the root once
        assert heard["reduce_scatter_single float32"] == GROUPS

    @pytest.mark.parametrize("count", [1, 4])
    @pytest.mark.parametrize("way", ["fsdp", "hsdp"])
    def test_a_validation_between_steps_sees_the_same_model_and_frees_its_layers(self, ranks, way, count):
        for rank in ranks:
            result = rank[f"{way} {count}"]
            assert result["validations"][0] == result["validations"][1]
            assert result["layers sharded"] and result["all sharded"]


class TestMixedPrecision:
    @pytest.mark.parametrize("way", WAYS)
    def test_gradients_arrive_in_fp32_and_near_those_of_fp32(self, ranks, way):
        result = ranks[0][f"{way} bf16"]
        assert result["dtypes"] == ["torch.float32"]
        assert result["count"] == 9
        assert result["norm"] == pytest.approx(ranks[0][f"{way} 4"]["norm"], rel=0.05)

    @pytest.mark.parametrize("way", ["fsdp", "hsdp"])
    def test_parameters_travel_in_bf16_and_gradients_in_fp32(self, ranks, way):
        heard = ranks[0][f"{way} bf16"]["heard"]
        assert heard.pop("all_gather_single bfloat16") == GROUPS
        assert set(heard) == {"reduce_scatter_single float32"} | ({"all_reduce float32"} if way == "hsdp" else set())


class TestWholeTensors:
    @pytest.mark.parametrize("way", WAYS)
    def test_they_come_and_go_unchanged(self, ranks, way):
        assert [rank[f"{way} carry"] for rank in ranks] == [[True, True, True]] * 4

    def test_texts_of_different_lengths_arrive_in_order_one_of_them_empty(self, ranks):
        assert ranks[2]["texts"] == ["", "é", "éé", "ééé"]


class TestCheckpoints:
    @pytest.mark.parametrize("saved", ["fsdp", "hsdp"])
    def test_fewer_processes_find_the_same_bits(self, ranks, fewer, saved):
        written = ranks[0][f"{saved} saved"]["digest"]
        assert [fewer["two"][saved]["digest"], fewer["one"][saved]["digest"]] == [written, written]

    @pytest.mark.parametrize("saved", ["fsdp", "hsdp"])
    def test_fewer_processes_resume_as_one_that_was_not_stopped(self, ranks, fewer, saved):
        wanted = pytest.approx(fewer["undisturbed"]["losses"], rel=1e-6)
        assert ranks[2][f"{saved} saved"]["losses"] == wanted
        assert fewer["two"][saved]["losses"] == wanted
        assert fewer["one"][saved]["losses"] == wanted
