"""The typed keys that recipes read. A component's own keys come from its signature, see `plmtune.registry`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from plmtune.registry import Component


@dataclass
class Phase:
    """One stretch of training with its own mix of sources; give `tokens` or `steps`."""

    name: str = "main"
    tokens: int | str | None = None  # 5000000, "5M", "1650B"
    steps: int | None = None
    mix: dict[str, float] = field(default_factory=dict)  # source: weight; empty means by size


@dataclass
class Runtime:
    """Where and how to compute."""

    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    shard_size: int | None = None  # hsdp: processes that share one copy of the model; default: those of a machine
    deterministic: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    timeout_minutes: float = 10.0  # a silent process ends the job after this long


@dataclass
class Preparation:
    """How text becomes token shards."""

    directory: str = "runs/data"
    holdout: float = 0.01  # share kept for validation
    holdout_by: Literal["documents", "tail"] = "documents"
    skip_bad: bool = False  # count broken lines instead of stopping


@dataclass
class Validation:
    """When to measure the held-out loss; 0 means only at the end."""

    every: int = 0
    tokens: int = 100_000


@dataclass
class Checkpointing:
    """When to save and how many to keep; every=0 means only at the end, keep=0 keeps all."""

    every: int = 0
    keep: int = 2
    best: str | None = "validation_loss"  # the checkpoint with the best value of this metric is kept as well
    best_is: Literal["lowest", "highest"] = "lowest"
    background: bool = True  # write while training goes on; takes a copy of the state in host memory


@dataclass
class Guard:
    """Which updates to skip: a loss or gradient norm that is not finite, or a norm far beyond its history."""

    spike_factor: float = 10.0  # times the median norm of the window; 0 asks only for finite numbers
    window: int = 128  # accepted steps that make the history
    patience: int = 3  # skipped steps in a row that stop the run


@dataclass
class Sample:
    """What to write at the end of a run, for a person to read."""

    prompt: str = ""
    max_new_tokens: int = 0
    temperature: float = 0.8
    top_p: float = 0.95


@dataclass
class Pretrain:
    """Keys of the `pretrain` recipe."""

    recipe: str = "pretrain"
    name: str = "pretrain"
    run_dir: str | None = None  # default: runs/NAME/DATE-TIME
    resume: bool = False
    init_from: str | None = None  # weights to start from: a run or a checkpoint directory
    other_data: bool = False  # resume although the data is not what the run began with
    force: bool = False  # start although the estimate says it does not fit
    seed: int = 1
    seq_len: int = 256
    global_batch_size: int = 32  # sequences an optimizer step, over all processes
    micro_batch_size: int = 8  # sequences a forward pass, on one process
    document_mask: bool = False  # attention stays inside a document
    phases: list[Phase] = field(default_factory=list)
    max_grad_norm: float = 1.0
    log_every: int = 10
    num_workers: int = 0
    runtime: Runtime = field(default_factory=Runtime)
    preparation: Preparation = field(default_factory=Preparation)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    guard: Guard = field(default_factory=Guard)
    sample: Sample = field(default_factory=Sample)
    model: Component | None = None
    tokenizer: Component | None = None
    data: Component | None = None
    loss: Component | None = None
    optimizer: Component | None = None
    scheduler: Component | None = None
    logger: Component | None = None


# recipe -> schema; the first field names the recipe.
SCHEMAS: dict[str, type[Any]] = {"pretrain": Pretrain}
