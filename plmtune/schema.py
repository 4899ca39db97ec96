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
class Evaluation:
    """Tasks of lm-eval to measure while training; every=0 means only at the end."""

    tasks: list[str] = field(default_factory=list)  # empty: none
    every: int = 0  # steps
    limit: int = 64  # documents a task; 0: all
    num_fewshot: int | None = None  # null: each task's own
    batch_size: int | None = None  # rows that are generated together; null: by memory
    chat: bool = False  # ask in the chat template
    data: str | None = None  # a folder or map of local files, as --data of plmtune eval
    unsafe_code: bool = False  # let tasks run what the model wrote, in a sandbox


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
    eval: Evaluation = field(default_factory=Evaluation)
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


@dataclass
class Chat:
    """How conversations become tokens."""

    template: str | None = None  # null: the tokenizer's own; chatml; or a file: mine.jinja
    train_on: Literal["all", "last"] = "all"  # answers that count: every one, or each conversation's last
    too_long: Literal["drop", "cut"] = "drop"  # a conversation longer than seq_len: left out, or cut at its end
    skip_bad: bool = False  # count rows that cannot be used instead of stopping
    holdout: float = 0.02  # share of the conversations or pairs kept for validation


@dataclass
class Refinement:
    """What asks for a better answer than the one at hand."""

    template: str | None = None  # null: the shipped one; or a file: mine.jinja, which uses prompt and answer


@dataclass
class Sft:
    """Keys of the `sft` recipe."""

    recipe: str = "sft"
    name: str = "sft"
    run_dir: str | None = None  # default: runs/NAME/DATE-TIME
    resume: bool = False
    init_from: str | None = None  # default: the newest finished pretraining with this model
    other_data: bool = False
    force: bool = False
    seed: int = 1
    seq_len: int = 512  # tokens a packed row
    global_batch_size: int = 16  # rows an optimizer step, over all processes
    micro_batch_size: int = 4  # rows a forward pass, on one process
    epochs: float | None = None  # passes over the packed rows; default, where there are no phases: 3
    phases: list[Phase] = field(default_factory=list)  # instead of epochs
    max_grad_norm: float = 1.0
    log_every: int = 10
    num_workers: int = 0
    chat: Chat = field(default_factory=Chat)
    refinement: Refinement = field(default_factory=Refinement)
    runtime: Runtime = field(default_factory=Runtime)
    validation: Validation = field(default_factory=Validation)
    eval: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    guard: Guard = field(default_factory=Guard)
    sample: Sample = field(default_factory=Sample)
    model: Component | None = None  # null: that of init_from
    tokenizer: Component | None = None  # null: that of init_from
    data: Component | None = None
    loss: Component | None = None
    optimizer: Component | None = None
    scheduler: Component | None = None
    peft: Component | None = None  # null: all weights are trained
    quantization: Component | None = None  # with qat=true the model learns to bear it
    logger: Component | None = None


@dataclass
class Generation:
    """How a round writes its answers."""

    strategy: Literal["chain", "samples"] = "chain"  # each answer refines the one before, or all are first answers
    turns: int = 3  # answers a prompt
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    batch_size: int = 16  # answers written at once


@dataclass
class Selection:
    """How a round chooses its pairs: best and worst by `reward`, or without one last and first where rules pass."""

    rules: list[str] = field(default_factory=lambda: ["not_empty", "not_truncated", "not_repeated"])
    margin: float = 0.0  # least difference of rewards


@dataclass
class Preference:
    """Keys of the `preference` recipe."""

    recipe: str = "preference"
    name: str = "preference"
    run_dir: str | None = None  # default: runs/NAME/DATE-TIME
    resume: bool = False
    init_from: str | None = None  # default: the newest finished SFT, else pretraining, with this model
    other_data: bool = False
    force: bool = False
    seed: int = 1
    seq_len: int = 512  # longest prompt with one answer
    global_batch_size: int = 16  # pairs an optimizer step, over all processes
    micro_batch_size: int = 2  # rows of up to 2 x seq_len tokens a forward pass, on one process
    epochs: float = 1.0  # times each pair is seen, in each round
    max_grad_norm: float = 1.0
    log_every: int = 10
    rounds: int = 0  # 0: train once on the pairs of `data`; else so often generate, choose, train
    prompts: int = 0  # prompts a round takes from `data`; 0: all
    reference: Literal["previous", "first"] = "previous"  # model that a round's answers are measured against
    reference_cache: str = "runs/reference"
    chat: Chat = field(default_factory=Chat)
    refinement: Refinement = field(default_factory=Refinement)
    generation: Generation = field(default_factory=Generation)
    selection: Selection = field(default_factory=Selection)
    runtime: Runtime = field(default_factory=Runtime)
    validation: Validation = field(default_factory=Validation)
    eval: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    guard: Guard = field(default_factory=Guard)
    sample: Sample = field(default_factory=Sample)
    model: Component | None = None  # null: that of init_from
    tokenizer: Component | None = None  # null: that of init_from
    data: Component | None = None
    loss: Component | None = None
    reward: Component | None = None  # judges a round's answers
    optimizer: Component | None = None
    scheduler: Component | None = None
    peft: Component | None = None  # null: all weights are trained
    quantization: Component | None = None  # with qat=true the model learns to bear it
    logger: Component | None = None


@dataclass
class Sensitivity:
    """What each module loses by being quantized, and a mix of formats from that."""

    measure: bool = False
    budget: str | None = None  # of the weights: 80M (bytes), or 30% (of what they take in dtype); null: measure only
    tokens: int = 2048  # of text that each module's loss is measured on


@dataclass
class Quantize:
    """Keys of the `quantize` recipe."""

    recipe: str = "quantize"
    name: str = "quantize"
    checkpoint: str | None = None  # a run, a checkpoint or a model directory; default: the newest finished run
    run_dir: str | None = None  # where the model goes; default: runs/NAME/DATE-TIME
    resume: bool = False
    other_data: bool = False
    force: bool = False
    device: str = "auto"
    dtype: Literal["bf16", "fp32"] = "bf16"  # of what is computed in, and of what stays as it is
    seq_len: int = 512  # tokens a row of text
    calibration_tokens: int = 16_384  # 0: every range is that of the weights alone
    test_tokens: int = 16_384  # of text that the loss is measured on before and after; 0: it is not
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    quantization: Component | None = None  # null: what the model was trained for, else int4
    data: Component | None = None  # text to calibrate and measure on


# recipe -> schema; the first field names the recipe.
SCHEMAS: dict[str, type[Any]] = {"pretrain": Pretrain, "sft": Sft, "preference": Preference, "quantize": Quantize}
