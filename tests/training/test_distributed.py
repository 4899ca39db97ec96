"""Two processes compute what one does. All cases share one pair, as starting a process takes seconds."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from group import in_group
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from toy import Toy, global_batch, train_step

from plmtune.errors import UserError
from plmtune.modules.sharding import full_tensor
from plmtune.training import distributed
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.runtime import Runtime
from plmtune.training.trainer_state import latest_valid

CASES = ("ddp", "fsdp", "fsdp tied", "fsdp bf16", "fsdp 8bit")
SPREAD = ("ddp", "fsdp")


def make(variant: str) -> tuple[Toy, Callable[[Toy], torch.optim.Optimizer]]:
    if variant == "8bit":
        from torchao.optim import AdamW8bit

        # Wide enough that each half of a matrix is quantized.
        return Toy(width=64), lambda model: AdamW8bit(model.parameters(), lr=0.01)
    return Toy(tied=variant == "tied"), lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def run(runtime: Runtime, directory: Path | None, variant: str = "", *, steps: int = 4) -> dict[str, object]:
    """Train a toy; with a directory, save after two steps."""
    torch.manual_seed(5 + runtime.rank)  # rank 0 counts
    model, build_optimizer = make(variant)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = runtime.distribute(model)
    same_start = all(torch.equal(initial[n], t) for n, t in whole(model).items())
    optimizer = build_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    losses, norms = [], []
    for step in range(steps):
        loss, norm = train_step(runtime, model, trained, optimizer, step)
        scheduler.step()
        losses.append(loss)
        norms.append(norm)
        if directory is not None and step == 1:
            with torch.no_grad():
                trained(global_batch(0)[0])  # a validation
            Checkpoints(directory).save(2, model=model, optimizer=optimizer, scheduler=scheduler, wait=True)
    return {
        "losses": losses,
        "norms": norms,
        "dropout": dropout_mask(),
        "sharded": any(isinstance(p, DTensor) for p in model.parameters()),
        "same_start": same_start,
        "digest": digest(whole(model)),
    }


def go_on(runtime: Runtime, directory: Path, variant: str = "") -> dict[str, object]:
    """Restore step 2, which another strategy may have written, and train the two steps that are left."""
    torch.manual_seed(99)
    model, build_optimizer = make(variant)
    trained = runtime.distribute(model)
    optimizer = build_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    path = latest_valid(directory)
    assert path is not None
    state = Checkpoints(directory).restore(path, model=model, optimizer=optimizer, scheduler=scheduler)
    restored = digest(whole(model))
    losses = []
    for step in range(state["step"], 4):
        losses.append(train_step(runtime, model, trained, optimizer, step)[0])
        scheduler.step()
    return {"losses": losses, "restored": restored, "digest": digest(whole(model)), "dropout": dropout_mask()}


def dropout_mask() -> list[float]:
    return torch.nn.functional.dropout(torch.ones(64), 0.5).tolist()


def whole(model: Toy) -> dict[str, torch.Tensor]:
    return {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}


def digest(state: dict[str, torch.Tensor]) -> str:
    return str([(n, t.double().sum().item(), t.double().square().sum().item()) for n, t in state.items()])


def files(directory: Path) -> dict[str, str]:
    manifest = json.loads((directory / "step-00000002" / "manifest.json").read_text())
    return {name: entry["xxh3_128"] for name, entry in manifest["files"].items() if name != "state.json"}


def start(strategy: str, precision: str = "fp32") -> Runtime:
    return Runtime.choose(device="cpu", strategy=strategy, precision=precision, timeout_minutes=0.5).start()  # type: ignore[arg-type]


def fetch(file: Path, rank: int) -> str:
    """The ranks that have fetched a file when this one has."""

    def write() -> str:
        with file.open("a") as opened:
            opened.write(str(rank))
        return file.read_text()

    return distributed.once_per_machine(write)


def refuse_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise UserError("no room on rank 1")


def two(directory: Path) -> dict[str, object]:
    torch.compile = lambda function, **_: function  # 8-bit AdamW compiles each step, for seconds
    results: dict[str, object] = {}
    for case in CASES:
        strategy, _, variant = case.partition(" ")
        runtime = start(strategy, "bf16" if variant == "bf16" else "fp32")
        saves = directory / (strategy + variant) if variant in ("", "8bit") else None
        results[case] = run(runtime, saves, variant)
    for writer in ("one", *SPREAD):
        for reader in SPREAD:
            results[f"{writer} to {reader}"] = go_on(start(reader), directory / writer)
    results["8bit again"] = go_on(start("fsdp"), directory / "fsdp8bit", "8bit")
    with start("fsdp") as runtime:  # the end of the process group
        results["texts"] = distributed.gather_texts("é" * (runtime.rank + 1))
        results["broadcast"] = distributed.broadcast_from_rank0(lambda: f"rank {runtime.rank}")
        results["stop"] = [distributed.any_rank(runtime.rank == 1), distributed.any_rank(False)]
        results["fetched"], results["refused"] = fetch(directory / "fetched", runtime.rank), ""
        try:
            distributed.once_per_machine(lambda: refuse_on_rank_1(runtime.rank))
        except UserError as error:
            results["refused"] = str(error)
        results["sum"] = runtime.sum(runtime.rank + 1, torch.tensor(0.5))
        torch.manual_seed(runtime.rank)
        model = runtime.distribute(Toy())
        try:
            Checkpoints(Path("/proc/nowhere")).save(
                1,
                model=model,
                optimizer=(optimizer := torch.optim.SGD(model.parameters(), lr=0.1)),
                scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
                wait=True,
            )
        except UserError as error:
            results["unwritable"] = str(error)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    directory = tmp_path_factory.mktemp("two")
    with Runtime.choose(device="cpu", precision="fp32").start() as runtime:
        one = {
            "one": run(runtime, directory / "one"),
            "one tied": run(runtime, None, "tied"),
        }
    ranks = in_group(two, 2, directory)
    with Runtime.choose(device="cpu", precision="fp32").start() as runtime:
        for writer in ("one", *SPREAD):
            one[f"{writer} to one"] = go_on(runtime, directory / writer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", lambda function, **_: function)
            one["8bit to one"] = go_on(runtime, directory / "fsdp8bit", "8bit")
    return {**one, **ranks[0], "rank 1": ranks[1], "directory": directory}


class TestTwoProcesses:
    @pytest.mark.parametrize("case", ["ddp", "fsdp", "fsdp tied"])
    def test_losses_and_norms_equal_those_of_one_process(self, results, case):
        one = results["one tied" if "tied" in case else "one"]
        assert results[case]["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert results[case]["norms"] == pytest.approx(one["norms"], rel=1e-5)

    def test_bf16_under_fsdp_stays_near_fp32(self, results):
        assert results["fsdp bf16"]["losses"] == pytest.approx(results["one"]["losses"], rel=0.02)

    @pytest.mark.parametrize("case", CASES)
    def test_both_ranks_report_the_same(self, results, case):
        assert results[case]["losses"] == results["rank 1"][case]["losses"]
        assert results[case]["norms"] == results["rank 1"][case]["norms"]

    def test_fsdp_shards_and_ddp_does_not(self, results):
        assert results["fsdp"]["sharded"]
        assert not results["ddp"]["sharded"]

    @pytest.mark.parametrize("case", CASES)
    def test_weights_start_as_in_one_process(self, results, case):
        assert results[case]["same_start"]

    def test_texts_of_different_lengths_arrive_in_order(self, results):
        assert results["texts"] == ["é", "éé"]
        assert results["rank 1"]["broadcast"] == "rank 0"

    def test_one_rank_is_enough_to_stop_all(self, results):
        assert results["stop"] == results["rank 1"]["stop"] == [True, False]

    def test_one_process_of_a_machine_fetches_before_the_other_looks(self, results):
        assert (results["fetched"], results["rank 1"]["fetched"]) == ("0", "01")

    def test_what_one_cannot_fetch_is_refused_on_both(self, results):
        assert results["refused"] == results["rank 1"]["refused"] == "no room on rank 1"

    def test_sums_are_over_ranks(self, results):
        assert results["sum"] == [3.0, 1.0]


class TestDropout:
    @pytest.mark.parametrize("case", SPREAD)
    def test_masks_differ_between_ranks(self, results, case):
        assert results[case]["dropout"] != results["rank 1"][case]["dropout"]

    @pytest.mark.parametrize("writer", ["one", *SPREAD])
    def test_masks_differ_between_ranks_that_resume_whatever_wrote_the_checkpoint(self, results, writer):
        resumed = f"{writer} to ddp"
        assert results[resumed]["dropout"] != results["rank 1"][resumed]["dropout"]

    def test_masks_of_a_resumed_rank_are_those_of_one_that_never_stopped(self, results):
        for rank in (results, results["rank 1"]):
            assert rank["ddp to ddp"]["dropout"] == rank["ddp"]["dropout"]


class TestCheckpointsAcrossStrategies:
    @pytest.mark.parametrize("strategy", SPREAD)
    def test_resuming_with_the_same_strategy_is_byte_exact(self, results, strategy):
        assert results[f"{strategy} to {strategy}"]["digest"] == results[strategy]["digest"]
        assert results[f"{strategy} to {strategy}"]["losses"] == results[strategy]["losses"][2:]

    @pytest.mark.parametrize("writer", ["one", *SPREAD])
    @pytest.mark.parametrize("reader", ["one", *SPREAD])
    def test_each_reads_what_each_wrote(self, results, writer, reader):
        resumed = results[f"{writer} to {reader}"]
        assert resumed["restored"] == results[f"{writer} to one"]["restored"]
        assert resumed["losses"] == pytest.approx(results["one"]["losses"][2:], rel=1e-6)

    def test_sharded_eight_bit_moments_are_kept_as_codes_and_resume_bit_by_bit(self, results):
        assert results["8bit again"]["digest"] == results["fsdp 8bit"]["digest"]
        stored = load_file(results["directory"] / "fsdp8bit" / "step-00000002" / "optimizer.safetensors")
        assert stored["layers.0.up.weight/exp_avg/codes"].shape == (256, 64)
        assert stored["layers.0.up.weight/exp_avg/scale"].shape == (64,)

    def test_one_process_resumes_with_sharded_eight_bit_moments(self, results):
        assert results["8bit to one"]["losses"] == pytest.approx(results["fsdp 8bit"]["losses"][2:], rel=1e-4)

    def test_ddp_and_fsdp_write_files_of_the_same_names(self, results):
        assert files(results["directory"] / "ddp").keys() == files(results["directory"] / "fsdp").keys()

    def test_every_rank_hears_that_rank_0_could_not_write(self, results):
        assert "/proc/nowhere" in results["unwritable"]
        assert results["unwritable"] == results["rank 1"]["unwritable"]


class TestStart:
    def refusal(self, timeout: float) -> str:
        with pytest.raises(UserError) as caught:
            distributed.start_process_group(torch.device("cpu"), timedelta(seconds=timeout))
        assert not distributed.is_distributed()
        return str(caught.value)

    @pytest.fixture
    def place(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def put(**variables: object) -> None:
            for name, value in {"RANK": 0, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", **variables}.items():
                monkeypatch.setenv(name, str(value))

        return put

    @pytest.fixture
    def store(self, place: Callable[..., None]) -> dist.Store:
        """As torchrun keeps it, for workers that it may start again and again."""
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place(MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RUN_ID="job")
        return store

    def test_those_who_did_not_come_are_named(self, store):
        def come() -> None:
            while not store.check([distributed.RENDEZVOUS_KEY]):
                time.sleep(0.01)
            store.set(store.get(distributed.RENDEZVOUS_KEY).decode() + "/here/2", "")

        other = threading.Thread(target=come)
        other.start()
        said = self.refusal(0.5)
        other.join()
        assert "The 4 processes did not find each other within 0.5 seconds (runtime.timeout_minutes)" in said
        assert "ranks 1 and 3 did not join" in said

    @pytest.mark.parametrize("left_over", [False, True])
    def test_who_waits_for_rank_0_is_not_misled_by_what_dead_processes_left(self, store, place, left_over):
        if left_over:
            store.set(distributed.RENDEZVOUS_KEY, "earlier")
            for rank in range(4):
                store.set(f"earlier/here/{rank}", "dead")
            store.set("earlier/all", "dead dead dead dead")
        place(RANK=1, MASTER_PORT=store.port)
        assert ": rank 0 did not join" in self.refusal(0.5)

    def test_one_round_after_another_meets_in_the_same_store(self, store, place):
        found = []
        for _ in range(2):
            place(MASTER_PORT=store.port, WORLD_SIZE=1)
            distributed.start_process_group(torch.device("cpu"), timedelta(seconds=5))
            found.append(distributed.restarted())
            dist.destroy_process_group()
        assert found == [False, True]

    def test_a_place_to_meet_that_is_not_there_is_named(self, place):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
            place(RANK=1, MASTER_PORT=port)
            assert f"at 127.0.0.1:{port}" in self.refusal(0.5)

    def test_without_torchrun_the_missing_variable_is_named(self, monkeypatch, place):
        place(MASTER_PORT=1)
        monkeypatch.delenv("MASTER_ADDR")
        assert "MASTER_ADDR expected, but not set. Start all of them with torchrun" in self.refusal(0.5)

    @pytest.mark.parametrize(("device", "backend"), [("cuda:0", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")])
    def test_what_is_on_the_host_travels_over_gloo_beside_nccl(self, monkeypatch, place, device, backend):
        asked: list[tuple[object, object]] = []
        monkeypatch.setattr(dist, "init_process_group", lambda name, **keys: asked.append((name, keys["device_id"])))
        monkeypatch.setattr(distributed, "rendezvous", lambda url, timeout: iter([(dist.HashStore(), 0, 1)]))
        place(WORLD_SIZE=1)
        distributed.start_process_group(torch.device(device), timedelta(seconds=1))
        assert asked == [(backend, torch.device(device) if device != "cpu" else None)]


TIMED_OUT = "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"
CLOSED = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:53641."


class TestExplain:
    """The errors that gloo gives are written as it words them; tests/recipes/test_processes.py sees the real ones."""

    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
        store = dist.HashStore()
        for name, value in {
            "_store": store,
            "PEER_REPORT_SECONDS": 0.2,
            "rank": lambda: 0,
            "world_size": lambda: 3,
        }.items():
            monkeypatch.setattr(distributed, name, value)
        return store

    def explained(self, error: BaseException) -> str:
        def exchange() -> None:
            raise error

        try:
            exchange()
        except RuntimeError as raised:
            distributed.explain(raised, timedelta(seconds=4))
            return "\n".join(getattr(raised, "__notes__", []))
        raise AssertionError

    def test_after_a_timeout_the_one_that_did_not_time_out_is_named(self, store):
        store.set("failed/1", "any_rank (distributed.py:7)")
        said = self.explained(RuntimeError(TIMED_OUT))
        assert "Rank 0 waited 4 seconds (runtime.timeout_minutes) in exchange (test_distributed.py:" in said
        assert "for rank 2, which did not answer" in said
        assert "Others waited too: rank 1 in any_rank (distributed.py:7)." in said

    def test_the_others_learn_where_this_one_was(self, store):
        self.explained(RuntimeError(TIMED_OUT))
        assert store.get("failed/0").startswith(b"exchange (test_distributed.py:")

    def test_ranks_that_all_waited_were_in_different_places(self, store):
        store.set("failed/1", "any_rank")
        store.set("failed/2", "broadcast_text")
        said = self.explained(RuntimeError(TIMED_OUT))
        assert "for ranks elsewhere." in said
        assert "rank 1 in any_rank, rank 2 in broadcast_text" in said

    def test_a_broken_connection_is_a_sentence_as_the_other_rank_has_the_cause(self, store):
        store.set("failed/1", "any_rank")
        with pytest.raises(UserError, match=r"Rank 0 lost rank 2 in exchange \(test_distributed.py:\d+\)"):
            self.explained(RuntimeError(CLOSED))

    def test_errors_of_other_kinds_are_left_alone(self, store):
        assert self.explained(RuntimeError("shapes do not match")) == ""
        assert not store.check(["failed/0"])
