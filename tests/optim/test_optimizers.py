from __future__ import annotations

import copy
import functools
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from plmtune.models.plm import plm
from plmtune.modules.peft import lora
from plmtune.modules.sharding import full_tensor
from plmtune.optim.optimizers import BatchedMuon, adamw, adamw_8bit, muon, optimizer_bytes, orthogonalize
from plmtune.optim.schedules import wsdc
from plmtune.registry import component
from plmtune.training.state import load_optimizer_state_dict, optimizer_state_dict

WIDTH, VOCAB = 16, 40


class Tiny(nn.Module):
    """An embedding tied to the head, two matrices that are not square, a norm and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = VOCAB
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(3 * WIDTH, bias=False)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.tok_embeddings(tokens)
        return self.head(x + self.down(self.norm(self.up(x)).relu()))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> list[float]:
    """Losses of fitting a fixed map of tokens, one batch a step."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(VOCAB, (64,), generator=generator)
        loss = F.cross_entropy(model(tokens), (tokens * 7 + 3) % VOCAB)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved_whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds of an optimizer."""
    tensors, rest = optimizer_state_dict(model, optimizer)
    return {name: full_tensor(tensor).clone() for name, tensor in tensors.items()}, rest


@pytest.fixture
def one_process(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestAdamw:
    def test_matrices_decay_and_vectors_do_not(self) -> None:
        model = tiny()
        decay, still = adamw(model, weight_decay=0.3).param_groups
        assert {id(p) for p in decay["params"]} == {
            id(model.tok_embeddings.weight),
            id(model.up.weight),
            id(model.down.weight),
        }
        assert {id(p) for p in still["params"]} == {id(model.norm.weight), id(model.up.bias)}
        assert (decay["weight_decay"], still["weight_decay"]) == (0.3, 0.0)

    def test_is_fused_and_equals_the_formula_written_naively(self) -> None:
        model = tiny()
        optimizer = adamw(model, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
        assert optimizer.param_groups[0]["fused"]
        p = model.up.weight
        expected, m, v = p.detach().double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
        generator = torch.Generator().manual_seed(0)
        for t in range(1, 4):
            grad = torch.randn(p.shape, generator=generator)
            p.grad = grad.clone()
            optimizer.step()
            m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad**2
            update = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
            expected = expected * (1 - 0.01 * 0.5) - 0.01 * update
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)

    def test_frozen_parameters_are_left_out(self) -> None:
        model = tiny()
        model.up.requires_grad_(False)
        assert sum(len(group["params"]) for group in adamw(model).param_groups) == 3

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"lr": -1.0}, r"lr \(-1.0\)"),
            ({"betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\)"),
            ({"weight_decay": -0.1}, r"weight_decay \(-0.1\)"),
            ({"eps": -1.0}, r"eps \(-1.0\)"),
        ],
    )
    def test_impossible_numbers_are_refused(self, settings: dict[str, Any], message: str) -> None:
        for optimizer in (adamw, adamw_8bit):
            with pytest.raises(ValueError, match=message):
                optimizer(tiny(), **settings)

    def test_trains_under_fsdp(self, one_process: None) -> None:
        plain, sharded = tiny(), tiny()
        fully_shard(sharded)
        theirs = train(sharded, adamw(sharded, lr=0.01), 5)
        assert theirs == pytest.approx(train(plain, adamw(plain, lr=0.01), 5), rel=1e-6)


class TestAdamw8bit:
    def test_keeps_the_groups_and_the_betas_of_adamw(self) -> None:
        groups = adamw_8bit(tiny(), betas=(0.8, 0.9), weight_decay=0.3).param_groups
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
        assert groups[0]["betas"] == (0.8, 0.9)


class TestNoDecay:
    @pytest.mark.parametrize("make", [adamw, adamw_8bit, muon])
    def test_what_it_names_does_not_decay_and_all_else_does_as_before(self, make: Any) -> None:
        model = tiny()
        groups = make(model, weight_decay=0.3, no_decay=("tok_embeddings", "down")).param_groups
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        by_name = {name: decay[id(p)] for name, p in model.named_parameters()}
        assert by_name.pop("up.weight") == 0.3 and not any(by_name.values()) and len(by_name) == 4

    def test_names_match_by_whole_parts_and_several_at_once(self) -> None:
        model = plm(64, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=8)
        still = adamw(model, no_decay=("attention.o_proj", "layers.1.ffn")).param_groups[1]["params"]
        names = {name for name, p in model.named_parameters() if any(p is q for q in still) and p.ndim == 2}
        kept = {"layers.0.attention.o_proj.weight", "layers.1.attention.o_proj.weight"}
        assert names == kept | {"layers.1.ffn.up_proj.weight", "layers.1.ffn.down_proj.weight"}

    def test_a_name_that_the_model_lacks_is_refused_with_those_it_has(self) -> None:
        for make in (adamw, adamw_8bit, muon):
            with pytest.raises(ValueError, match=r"no_decay: the model has no 'embed'; it has tok_embeddings, weight"):
                make(tiny(), no_decay=("embed",))


@pytest.mark.parametrize(
    "make", [adamw, adamw_8bit, muon, functools.partial(muon, adamw_lr_factor=2.0)], ids=["adamw", "8bit", "muon", "2"]
)
def test_lr_scales_every_group(make: Any) -> None:
    before, after = ([float(group["lr"]) for group in make(tiny(), lr=lr).param_groups] for lr in (0.01, 0.04))
    assert len(before) > 1 and after == pytest.approx([4 * lr for lr in before])


OPTIONS: dict[str, Any] = {"normuon_beta2": 0.95, "cautious": True, "no_decay": ("down",)}
SHAPES = [(8, 8), (16, 8), (8, 16), (8, 16)]


class TestMuon:
    def test_hidden_matrices_go_through_muon_and_the_rest_through_adamw(self) -> None:
        model = tiny()
        optimizer = muon(model, lr=0.02, adamw_lr_factor=0.5)
        hidden, decay, still = optimizer.param_groups
        assert {id(p) for p in hidden["params"]} == {id(model.up.weight), id(model.down.weight)}
        assert [id(p) for p in decay["params"]] == [id(model.tok_embeddings.weight)]
        assert len(still["params"]) == 2 and still["weight_decay"] == 0.0
        assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01, 0.01]

    def test_first_update_is_the_orthogonal_factor_of_the_gradient(self) -> None:
        model = tiny()
        before = model.up.weight.detach().clone()
        optimizer = muon(model, lr=0.1, weight_decay=0.0)
        train(model, optimizer, 1)
        update = (before - model.up.weight.detach()) / (0.1 * 0.2 * (3 * WIDTH) ** 0.5)
        singular = torch.linalg.svdvals(update)
        # Newton-Schulz with Muon's coefficients lands singular values in about [0.5, 1.5], not exactly at 1.
        assert singular.min() > 0.4 and singular.max() < 1.6

    def test_an_update_has_the_size_that_adamw_gives(self) -> None:
        model = tiny()
        before = model.down.weight.detach().clone()
        train(model, muon(model, lr=0.1, weight_decay=0.0), 1)
        rms = ((before - model.down.weight.detach()) / 0.1).square().mean().sqrt()
        assert 0.1 < rms < 0.3  # AdamW's updates have an RMS of about 0.2 to 0.4 times the rate

    def test_learns(self) -> None:
        model = tiny()
        losses = train(model, muon(model, lr=0.02), 60)
        assert losses[-1] < losses[0] / 3

    def test_a_scheduler_scales_both_rates(self) -> None:
        optimizer = muon(tiny(), lr=0.02, adamw_lr_factor=0.5)
        wsdc(optimizer, 100, 1, warmup=10)
        assert [group["lr"] for group in optimizer.muon.param_groups] == pytest.approx([0.002])  # type: ignore[attr-defined]
        assert [group["lr"] for group in optimizer.adamw.param_groups] == pytest.approx([0.001] * 2)  # type: ignore[attr-defined]

    def test_normuon_with_cautious_decay_equals_the_formulas_written_naively(self) -> None:
        model = tiny()
        with torch.no_grad():
            model.up.weight[:8] *= 3  # rows whose sizes differ
        beta2, lr, decay = 0.9, 0.1, 0.5
        optimizer = muon(model, lr=lr, weight_decay=decay, normuon_beta2=beta2, cautious=True)
        p, (rows, columns) = model.up.weight, model.up.weight.shape
        expected, m, v = p.detach().clone(), torch.zeros_like(p), [0.0] * rows
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            g = torch.randn(p.shape, generator=generator) * torch.linspace(0.1, 5, rows)[:, None]
            p.grad = g.clone()
            optimizer.step()
            m = 0.95 * m + 0.05 * g
            o = orthogonalize((0.05 * g + 0.95 * m)[None], (3.4445, -4.775, 2.0315), 5, 1e-7)[0]
            for i in range(rows):
                v[i] = beta2 * v[i] + (1 - beta2) * float((o[i] ** 2).mean())
                o[i] = o[i] / (v[i] ** 0.5 + 1e-7)
            u = 0.2 * (rows * columns) ** 0.5 / o.norm() * o
            for i in range(rows):
                for j in range(columns):
                    w = float(expected[i, j])
                    expected[i, j] = w - lr * (float(u[i, j]) + decay * (w if u[i, j] * w >= 0 else 0.0))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)

    def test_normuon_moves_all_rows_equally_far_at_the_first_step(self) -> None:
        model = tiny()
        before = model.up.weight.detach().clone()
        train(model, muon(model, lr=0.1, weight_decay=0.0, normuon_beta2=0.95), 1)
        moved = (before - model.up.weight.detach()).norm(dim=1)
        assert moved.max() < 1.001 * moved.min()
        assert moved.square().sum().sqrt() == pytest.approx(0.1 * 0.2 * moved.numel() ** 0.5 * WIDTH**0.5, rel=1e-4)

    def test_options_that_are_off_leave_no_trace_in_a_checkpoint(self) -> None:
        model = tiny()
        optimizer = muon(model, lr=0.01)
        train(model, optimizer, 1)
        assert not {"normuon_beta2", "cautious"} & set(optimizer.param_groups[0])
        assert set(optimizer.state[model.up.weight]) == {"momentum_buffer"}

    @pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
    def test_a_saved_state_resumes_to_the_same_weights(self, options: dict[str, Any]) -> None:
        model = tiny()
        optimizer = muon(model, lr=0.02, **options)
        train(model, optimizer, 3)
        other = copy.deepcopy(model)
        resumed = muon(other, lr=0.5, **options)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, 3, seed=2)
        train(other, resumed, 3, seed=2)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
    def test_trains_under_fsdp_and_resumes_without(self, one_process: None, options: dict[str, Any]) -> None:
        plain, sharded = tiny(), tiny()
        fully_shard(sharded)
        theirs, ours = muon(sharded, lr=0.01, **options), muon(plain, lr=0.01, **options)
        assert train(sharded, theirs, 5) == pytest.approx(train(plain, ours, 5), rel=1e-6)
        resumed = muon(plain, lr=0.01, **options)
        load_optimizer_state_dict(plain, resumed, *saved_whole(sharded, theirs))
        for parameter, state in resumed.state.items():
            for key, value in state.items():
                torch.testing.assert_close(value, ours.state[parameter][key])
        again = muon(sharded, lr=0.01, **options)
        load_optimizer_state_dict(sharded, again, *saved_whole(plain, ours))
        assert train(sharded, again, 2, seed=2) == pytest.approx(train(plain, resumed, 2, seed=2), rel=1e-6)

    def test_step_on_a_cpu_is_torchs_but_for_rounding(self) -> None:
        ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES] for _ in range(2))
        settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        pair = BatchedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for a, b in zip(ours, theirs, strict=True):
                a.grad = torch.randn(a.shape, generator=generator)
                b.grad = a.grad.clone()
            for optimizer in pair:
                optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            moved = (b.detach() - 1).norm()
            assert (a - b).norm() < 0.02 * moved

    def test_only_what_maps_to_the_vocabulary_is_left_to_adamw(self) -> None:
        model = plm(
            64,
            embed_dim=32,
            num_layers=1,
            num_heads=2,
            max_seq_len=8,
            tie_embeddings=False,
            ffn=component("ffn", "squared_relu", hidden_dim=64),
        )
        matrices = {id(p) for p in muon(model).muon.param_groups[0]["params"]}
        assert id(model.layers[0].ffn.up_proj.weight) in matrices
        assert id(model.output.weight) not in matrices and id(model.tok_embeddings.weight) not in matrices
        model.add_score_head(torch.Generator())
        assert id(model.score.weight) not in {id(p) for p in muon(model).muon.param_groups[0]["params"]}

    def test_a_model_with_adapters_is_refused_with_the_optimizer_to_use(self) -> None:
        model = plm(64, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=8)
        lora(model)
        with pytest.raises(ValueError, match=r"adapters \(peft\) train with optimizer=adamw"):
            muon(model)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"lr": -1.0}, r"lr \(-1.0\)"),
            ({"momentum": 1.0}, r"momentum \(1.0\)"),
            ({"ns_steps": 0}, r"ns_steps \(0\)"),
            ({"normuon_beta2": 1.0}, r"normuon_beta2 \(1.0\)"),
        ],
    )
    def test_impossible_numbers_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            muon(tiny(), **settings)


def _two_process_losses(rank: int, store: str, queue: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    losses = []
    for options in ({}, OPTIONS):
        model = tiny()
        fully_shard(model)
        losses += train(model, muon(model, lr=0.01, **options), 5)
    if rank == 0:
        queue.put(losses)
    dist.barrier()
    dist.destroy_process_group()


class TestMuonOnTwoProcesses:
    def test_sharded_losses_equal_one_process(self, tmp_path: Any) -> None:
        context = torch.multiprocessing.get_context("forkserver")
        queue = context.Queue()
        processes = [
            context.Process(target=_two_process_losses, args=(rank, str(tmp_path / "store"), queue))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        losses = queue.get(timeout=120)
        for process in processes:
            process.join(60)
        plain, options = tiny(), tiny()
        alone = train(plain, muon(plain, lr=0.01), 5) + train(options, muon(options, lr=0.01, **OPTIONS), 5)
        assert losses == pytest.approx(alone, rel=1e-6)


class TestOptimizerBytes:
    @pytest.mark.parametrize(("name", "build"), [("adamw", adamw), ("muon", muon)])
    def test_equals_what_the_state_holds_after_a_step(self, name: str, build: Any) -> None:
        model = tiny()
        optimizer = build(model)
        train(model, optimizer, 1)
        moments = sum(
            tensor.numel() * tensor.element_size()
            for state in optimizer.state.values()
            for key, tensor in state.items()
            if key != "step"
        )
        assert optimizer_bytes(name, model) == moments

    def test_an_optimizer_of_ones_own_counts_as_adamw(self) -> None:
        assert optimizer_bytes("mine", tiny()) == optimizer_bytes("adamw", tiny())
