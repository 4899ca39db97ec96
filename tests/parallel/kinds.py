"""Small models of every kind that layouts divide, and the training loop that recipes write, for any layout."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from plmtune.config.sections import ParallelConfig
from plmtune.data.batches import Batch
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.models.hf import run_state
from plmtune.modules.checkpointing import Checkpointing
from plmtune.modules.segments import Segments
from plmtune.modules.sharding import full_tensor, is_sharded
from plmtune.parallel.checks import refusals
from plmtune.parallel.elements import held_elements
from plmtune.parallel.layout import Layout
from plmtune.registry import component
from plmtune.training import state as training_state
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.ema import Ema
from plmtune.training.runtime import Runtime
from plmtune.training.trainer_state import latest_valid

VOCABULARY, ROWS, SEQ_LEN = 64, 8, 32
MICRO_BATCHES = 4  # of a process that has all rows
STEPS = 3

Table = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A model and how it is trained.

    Attributes:
        model: the name of its component.
        settings: what it has besides the sizes that all have.
        loss: settings of the cross entropy.
        optimizer: its component's name, or sgd: AdamW makes steps of its rate out of the rounding noise of a gradient
            that is 0 in exact arithmetic, as those of key biases are.
        documents: rows hold several texts, with attention and positions of their own.
        checkpointing: of activations.
    """

    model: str
    settings: Table
    loss: Table
    optimizer: str = "adamw"
    documents: bool = False
    checkpointing: Checkpointing = "none"


def _gqa(**settings: Any) -> Any:
    return component("attention", "gqa", **{"num_kv_heads": 2, **settings})


_MLA = {
    "attention": component(
        "attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    ),
    "ffn": component("ffn", "squared_relu", hidden_dim=64),
}  # fmt: skip
_SWIGLU = component("ffn", "swiglu", hidden_dim=64)

KINDS = {
    "mla": Kind("plm", _MLA, {}),
    "mla, checkpointed": Kind("plm", _MLA, {}, checkpointing="full"),
    "mla, selective": Kind("plm", _MLA, {}, checkpointing="selective"),
    "gqa": Kind(
        "llama",
        {"attention": _gqa(bias=True, qk_norm=True), "ffn": _SWIGLU, "tie_embeddings": False},
        {"z_loss": 1e-3},
        optimizer="sgd",
    ),
    "pangu_alpha": Kind(
        "pangu_alpha",
        {"attention": _gqa(num_kv_heads=4, rope=False, bias=True), "ffn": component("ffn", "gelu", hidden_dim=64)},
        {},
        optimizer="sgd",
        documents=True,
    ),
    "values, siaf": Kind(
        "llama",
        {
            "attention": _gqa(value_embed=2),
            "ffn": component("ffn", "siaf", hidden_dim=64),
            "tie_embeddings": False,
        },
        {},
    ),
    "gemma2": Kind(
        "gemma2",
        {
            "attention": _gqa(head_dim=8, window=8, soft_cap=20.0, scale=0.25),
            "ffn": component("ffn", "geglu", hidden_dim=64),
            "logit_soft_cap": 10.0,
        },
        {},
        optimizer="sgd",
    ),
    "minicpm": Kind("minicpm", {"attention": _gqa(), "ffn": _SWIGLU, "embed_scale": 3.0, "base_dim": 16}, {}),
}

# By name: what processes are started with. Their product is the number of processes.
LAYOUTS: dict[str, ParallelConfig] = {
    "tp2": ParallelConfig(tp=2),
    "pp2 1f1b": ParallelConfig(pp=2),
    "pp2 interleaved_1f1b": ParallelConfig(pp=2, schedule="interleaved_1f1b"),
    "pp2 zbv": ParallelConfig(pp=2, schedule="zbv"),
    "fsdp2": ParallelConfig(dp_shard=2),
    "cp2": ParallelConfig(cp=2),
    "tp4": ParallelConfig(tp=4),
    "pp4 1f1b": ParallelConfig(pp=4),
    "fsdp2 x tp2": ParallelConfig(dp_shard=2, tp=2),
    "fsdp2 x tp2, kept": ParallelConfig(dp_shard=2, tp=2, reshard_after_forward=False),
    "ddp2 x tp2": ParallelConfig(dp_replicate=2, tp=2),
    "pp2 x tp2": ParallelConfig(pp=2, tp=2),
    "pp2 x tp2 zbv": ParallelConfig(pp=2, tp=2, schedule="zbv"),
    "pp2 x fsdp2": ParallelConfig(pp=2, dp_shard=2),
    "pp2 x ddp2": ParallelConfig(pp=2, dp_replicate=2),
    "pp2 x ddp2 interleaved_1f1b": ParallelConfig(pp=2, dp_replicate=2, schedule="interleaved_1f1b"),
    "fsdp2 x cp2": ParallelConfig(dp_shard=2, cp=2),
    "cp2 x tp2": ParallelConfig(cp=2, tp=2),
    "pp2 x cp2": ParallelConfig(pp=2, cp=2),
    "pp2 x fsdp2 x tp2": ParallelConfig(pp=2, dp_shard=2, tp=2),
    "pp2 x fsdp2 x tp2 interleaved_1f1b": ParallelConfig(pp=2, dp_shard=2, tp=2, schedule="interleaved_1f1b"),
    "pp2 x fsdp2 x tp2 zbv": ParallelConfig(pp=2, dp_shard=2, tp=2, schedule="zbv"),
    "hsdp2x2 x tp2": ParallelConfig(dp_replicate=2, dp_shard=2, tp=2),
    "pp2 x hsdp2x2": ParallelConfig(pp=2, dp_replicate=2, dp_shard=2),
}


def layouts_of(processes: int) -> list[str]:
    return [name for name, sizes in LAYOUTS.items() if sizes.asked == processes]


def start(layout: str | ParallelConfig | None, *, precision: Any = "fp32", minutes: float = 1) -> Runtime:
    """A runtime of a layout, by name; None: of one process."""
    sizes = LAYOUTS[layout] if isinstance(layout, str) else layout
    return Runtime.choose(device="cpu", precision=precision, parallel=sizes, timeout_minutes=minutes).start()


def on_meta(kind: Kind) -> Any:
    sizes = {"embed_dim": 32, "num_layers": 4, "num_heads": 4, "max_seq_len": SEQ_LEN, "init_std": 0.15}
    with torch.device("meta"):
        return component("model", kind.model, **sizes, **kind.settings)(vocab_size=VOCABULARY)


def build_optimizer(name: str, model: Any, **settings: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer: torch.optim.Optimizer = component("optimizer", name, **{"lr": 0.01, **settings})(model=model)
    return optimizer


def micro_batches(kind: Kind, runtime: Runtime, step: int) -> list[Batch]:
    """This process's rows of a step, a pure function of it; rows differ in their valid targets."""
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randint(VOCABULARY, (ROWS, SEQ_LEN + 1), generator=generator)
    tokens, targets = rows[:, :-1], rows[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < torch.linspace(0, 0.6, ROWS)[:, None]] = -100
    cuts = torch.randint(2, SEQ_LEN - 2, (ROWS,), generator=generator).tolist()
    mine = ROWS // runtime.data_world_size
    first, size = runtime.data_rank * mine, max(1, mine // MICRO_BATCHES)
    found = []
    for row in range(first, first + mine, size):
        part = slice(row, row + size)
        masks: Table = {"mask": None, "input_pos": None}
        if kind.documents:
            lengths = [[cut, SEQ_LEN - cut] for cut in cuts[part]]
            positions = [[*range(one), *range(other)] for one, other in lengths]
            masks = {"mask": Segments.of(lengths), "input_pos": torch.tensor(positions)}
        counted = (targets[part].flatten() != -100).nonzero().flatten()
        batch = Batch(tokens[part], targets[part], num_valid=len(counted), positions=counted, **masks)
        found.append(batch if runtime.context is None else batch.part(runtime.context))
    return found


@dataclass
class Learner:
    """What trains one kind under the layout of a runtime."""

    kind: Kind
    runtime: Runtime
    whole: Any
    model: Any
    trained: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: Ema | None

    @classmethod
    def of(
        cls, kind: Kind, runtime: Runtime, *, optimizer: str = "", averaged: bool = False, **settings: Any
    ) -> Learner:
        whole = on_meta(kind)
        model = runtime.allocate(on_meta(kind))
        model.activation_checkpointing = kind.checkpointing
        model.init_weights(torch.Generator().manual_seed(1))
        trained = runtime.distribute(model)
        built = build_optimizer(optimizer or kind.optimizer, model, **settings)
        scheduler = torch.optim.lr_scheduler.LambdaLR(built, lambda step: 1 / (1 + step))
        ema = Ema.of(model, 0.9) if averaged else None
        return cls(kind, runtime, whole, model, trained, built, scheduler, ema)

    def loss_of(self, batch: Batch, hidden: Tensor) -> Tensor:
        states, targets = batch.counted(hidden)
        loss = cross_entropy(chunk_rows=16, **self.kind.loss)
        return loss(states, self.model.head_weight, targets, **self.model.loss_settings)

    def step(self, number: int) -> tuple[float, float, dict[str, float]]:
        """One optimizer step; (mean loss, gradient norm, norm of each clipped gradient of this process)."""
        runtime = self.runtime
        batches = micro_batches(self.kind, runtime, number)
        (count,) = runtime.sum(float(sum(batch.num_valid for batch in batches)))
        scale = runtime.gradient_scale / count
        if runtime.layout.pp > 1:
            losses = self.trained.backward(batches, self.loss_of, scale)
        else:
            losses = []
            for index, batch in enumerate(batches):
                with runtime.accumulate(self.trained, first=index == 0, last=index == len(batches) - 1):
                    with runtime.autocast():
                        hidden = self.trained(
                            batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True
                        )  # fmt: skip
                        loss = self.loss_of(batch, hidden)
                    (loss * scale).backward()
                losses.append(loss.detach())
        norm = runtime.clip_grad_norm(self.model, 1.0)
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norms = {name: full_tensor(gradient).double().norm().item() for name, gradient in gradients.items()}
        (total,) = runtime.sum(torch.stack(losses).sum())
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model)
        return total / count, float(norm), norms

    @torch.no_grad()
    def measure(self) -> float:
        """The loss of a step's rows, without a backward."""
        batches = micro_batches(self.kind, self.runtime, 99)
        if self.runtime.layout.pp > 1:
            losses = [self.trained.evaluate([batch], self.loss_of)[0] for batch in batches]
        else:
            losses = [
                self.loss_of(b, self.trained(b.tokens, mask=b.mask, input_pos=b.input_pos, hidden=True))
                for b in batches
            ]
        total, count = self.runtime.sum(torch.stack(losses).sum(), float(sum(batch.num_valid for batch in batches)))
        return total / count

    def steps(self, first: int = 0, last: int = STEPS) -> list[float]:
        return [self.step(number)[0] for number in range(first, last)]

    def held(self) -> tuple[int, int]:
        """(numbers of parameters in this process, numbers that `parallel.elements` predicts)."""
        # Without the copy of a tied embedding on a process that has both ends of a pipeline.
        held = sum((p.to_local() if is_sharded(p) else p).numel() for p in self.model.parameters())
        return held, sum(held_elements(self.whole, self.runtime.layout, self.runtime.rank).values())

    def checkpoints(self, directory: Path, **settings: Any) -> Checkpoints:
        return Checkpoints(directory, state_dict=run_state, background=False, **settings)

    @property
    def parts(self) -> Table:
        found = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return found | ({"ema": self.ema} if self.ema else {})

    def save(self, directory: Path, step: int, **settings: Any) -> None:
        self.checkpoints(directory, **settings).save(step, **self.parts, wait=True)

    def restore(self, directory: Path) -> int:
        path = latest_valid(directory)
        assert path is not None, f"no checkpoint in {directory}"
        return int(self.checkpoints(directory).restore(path, **self.parts)["step"])

    def digests(self) -> dict[str, str]:
        """A hash of each whole weight, moment and average that this process has a part of."""
        moments, _ = training_state.optimizer_state_dict(self.model, self.optimizer)
        averages = {f"average of {name}": tensor for name, tensor in self.ema.tensors.items()} if self.ema else {}
        found = {}
        for name, tensor in {**run_state(self.model), **moments, **averages}.items():
            found[name] = xxhash.xxh3_64_hexdigest(full_tensor(tensor).detach().contiguous().numpy().tobytes())
        return found


def learn(kind: str, runtime: Runtime) -> Table:
    """Three steps, and a measurement after the first: losses, norms, and the numbers that this process holds."""
    learner = Learner.of(KINDS[kind], runtime)
    found: Table = {"losses": [], "norms": [], "held": learner.held()}
    for number in range(STEPS):
        loss, norm, gradients = learner.step(number)
        found["losses"].append(loss)
        found["norms"].append(norm)
        if number == 0:
            found["gradients"] = gradients
            found["measured"] = learner.measure()
    return found


def fits(kind: str, layout: Layout) -> bool:
    """Whether a layout may train a kind: heads of some kinds are fewer than processes, and ZBV runs two backwards."""
    if layout.schedule == "zbv" and KINDS[kind].checkpointing == "selective":
        return False
    rows = max(1, ROWS // layout.data_size // MICRO_BATCHES)
    return not refusals(
        layout, on_meta(KINDS[kind]), seq_len=SEQ_LEN, global_batch_size=ROWS, micro_batch_size=rows
    )  # fmt: skip


def differences(of_ranks: list[Table], one: Table) -> dict[str, float]:
    """The largest relative differences from one process: of losses, of norms, and of the first step's gradients.

    A gradient's difference is that of its norm, relative to the largest norm of a gradient.
    """
    pairs = {
        "losses": [(r[key][i], one[key][i]) for r in of_ranks for key in ("losses",) for i in range(STEPS)],
        "norms": [(r["norms"][i], one["norms"][i]) for r in of_ranks for i in range(STEPS)],
    }
    pairs["losses"] += [(r["measured"], one["measured"]) for r in of_ranks]
    found = {name: max(abs(a / b - 1) for a, b in both) for name, both in pairs.items()}
    largest = max(one["gradients"].values())
    gradients = [(r["gradients"][name], one["gradients"][name]) for r in of_ranks for name in r["gradients"]]
    return found | {"gradients": max(abs(a - b) for a, b in gradients) / largest}


@dataclass(frozen=True)
class Case:
    """How a checkpoint is written: by which optimizer, in files of which size."""

    optimizer: str
    settings: Table
    file_bytes: float = 2e9
    averaged: bool = False

    def visit(self, kind: str, layout: str | None, reads: Path | None, writes: Path) -> Table:
        """Restore step 2, or train to it, save it unchanged, and train two steps more."""
        learner = Learner.of(
            KINDS[kind], start(layout), optimizer=self.optimizer, averaged=self.averaged, **self.settings
        )
        if reads is None:
            learner.steps(0, 2)
        else:
            learner.restore(reads)
        digests = learner.digests()
        learner.save(writes, 2, file_bytes=self.file_bytes)
        return {"digests": digests, "losses": learner.steps(2, 4)}


CASES = {
    "mla": Case("adamw", {}),
    "gqa": Case("adamw", {"weight_decay": 0.0}),  # two groups of equal settings
    "pangu_alpha": Case("muon", {}),
    "values, siaf": Case("muon", {"weight_decay": 0.0}, file_bytes=9000, averaged=True),
}


def chain(kinds: list[str], layouts: list[str], directory: Path) -> dict[str, Table]:
    """Each layout's visit of the checkpoint that the first one wrote, by "layout / kind"."""
    found = {}
    for kind in kinds:
        first = directory / f"{kind} of {layouts[0]}"
        for layout in layouts:
            reads = None if layout == layouts[0] else first
            found[f"{layout} / {kind}"] = CASES[kind].visit(kind, layout, reads, directory / f"{kind} of {layout}")
    return found


def merged(digests: list[dict[str, str]]) -> dict[str, str]:
    """The digests of all processes; those of one tensor are equal."""
    found: dict[str, str] = {}
    for of_rank in digests:
        for name, digest in of_rank.items():
            assert found.setdefault(name, digest) == digest, name
    return found


def files(directory: Path) -> dict[str, str]:
    """The hashes of a checkpoint's files of tensors."""
    listed = json.loads((directory / "step-00000002" / "manifest.json").read_text())["files"]
    return {name: entry["xxh3_128"] for name, entry in listed.items() if name != "state.json"}


def matrix(directory: Path) -> dict[str, Table]:
    """Every kind under every layout of as many processes as run, in a group that ends with it."""
    found, runtime = {}, None
    for layout in layouts_of(int(os.environ["WORLD_SIZE"])):
        runtime = start(layout)
        for kind in KINDS:
            if fits(kind, runtime.layout):
                found[f"{layout} / {kind}"] = learn(kind, runtime)
    if runtime:
        runtime.close()
    return found
