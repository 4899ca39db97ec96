"""The typed keys that recipes read. A component's own keys come from its signature, see `plmtune.registry`.

What keys of a section ask of each other is in its ``check``, which raises a ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from plmtune.config.sections import (
    ChatConfig,
    CheckpointConfig,
    Count,
    DepthConfig,
    DistillationConfig,
    EmaConfig,
    Epochs,
    EvaluationConfig,
    GenerationConfig,
    GuardConfig,
    Length,
    MaskConfig,
    MultiRoundConfig,
    Number,
    ParallelConfig,
    PhaseConfig,
    PreparationConfig,
    PretrainValidationConfig,
    PrunedModelConfig,
    RefinementConfig,
    RuntimeConfig,
    SampleConfig,
    SelectionConfig,
    SensitivityConfig,
    Size,
    Text,
    ValidationConfig,
)
from plmtune.ranges import PathPart, Range
from plmtune.registry import Component


@dataclass
class RunConfig:
    """Keys of every recipe whose runs have a directory."""

    recipe: str = ""
    name: Annotated[str, PathPart()] = ""
    run_dir: Text | None = None  # default: runs/NAME/DATE-TIME
    resume: bool = False
    allow_data_change: bool = False  # resume although the data is not what the run began with
    force: bool = False  # start although the estimate says it does not fit
    data: Component | None = None


@dataclass
class TrainingConfig(RunConfig):
    """Keys of every recipe that trains. A schema of a user's own has them too."""

    init_from: Text | None = None  # weights to start from: a run or a checkpoint directory
    init_changes: dict[str, Any] = field(default_factory=dict)  # settings of its model to change, as {ffn: siaf}
    seed: Count = 1
    micro_batch_size: Length = 8
    max_grad_norm: Number = 1.0
    log_every: Size = 10
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    eval: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    model: Component | None = None  # null: that of init_from
    tokenizer: Component | None = None  # null: that of init_from
    loss: Component | None = None
    optimizer: Component | None = None
    scheduler: Component | None = None
    logger: Component | None = None


@dataclass
class PretrainConfig(TrainingConfig):
    """Keys of the `pretrain` recipe."""

    recipe: str = "pretrain"
    name: Annotated[str, PathPart()] = "pretrain"
    seq_len: Length = 256
    global_batch_size: Length = 32  # sequences an optimizer step, over all processes
    micro_batch_size: Length = 8  # sequences a forward pass, on one process
    document_mask: bool = False  # attention stays inside a document
    phases: list[PhaseConfig] = field(default_factory=list)
    multi_round: MultiRoundConfig = field(default_factory=MultiRoundConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    validation: PretrainValidationConfig = field(default_factory=PretrainValidationConfig)
    init: Component | None = None  # standard deviations of a model from scratch; null: the model's init_std for all
    num_workers: Annotated[int, Range(0, most=256)] = 0  # threads that make steps ahead; 0: none
    preparation: PreparationConfig = field(default_factory=PreparationConfig)


@dataclass
class FinetuningConfig(TrainingConfig):
    """Keys of every recipe that trains a given model further."""

    seq_len: Length | None = None
    chat: ChatConfig = field(default_factory=ChatConfig)
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    peft: Component | None = None  # null: all weights are trained
    quantization: Component | None = None  # with qat=true weights are fake-quantized in training


@dataclass
class SftConfig(FinetuningConfig):
    """Keys of the `sft` recipe."""

    recipe: str = "sft"
    name: Annotated[str, PathPart()] = "sft"
    init_from: Text | None = None  # default: the newest finished pretraining with this model
    seq_len: Length | None = None  # tokens a packed row; null: 2,048, or the model's context where that is shorter
    global_batch_size: Length = 16  # rows an optimizer step, over all processes
    micro_batch_size: Length = 4  # rows a forward pass, on one process
    epochs: Epochs | None = None  # passes over all packed rows of all sources; default, where there are no phases: 3
    phases: list[PhaseConfig] = field(default_factory=list)  # instead of epochs
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    num_workers: Annotated[int, Range(0, most=256)] = 0  # threads that make steps ahead; 0: none

    def check(self) -> None:
        """Refuse two budgets, and an average of adapters."""
        if self.ema.decay is not None and self.peft is not None:
            raise ValueError("ema.decay averages whole models, not adapters: leave out ema.decay or peft")
        if self.epochs is not None and self.phases:
            raise ValueError(
                f"epochs: is {self.epochs:g}, and phases says how long to train as well. Give one of them: 'phases=[]' "
                "to see every row of every source so often, or epochs=null to draw the sources in the shares of a "
                "phase's mix"
            )


@dataclass
class PreferenceConfig(FinetuningConfig):
    """Keys of the `preference` recipe."""

    recipe: str = "preference"
    name: Annotated[str, PathPart()] = "preference"
    init_from: Text | None = None  # default: the newest finished SFT, else pretraining, with this model
    seq_len: Length | None = None  # longest prompt with one answer; null: as in SftConfig
    global_batch_size: Length = 16  # pairs an optimizer step, over all processes
    micro_batch_size: Length = 2  # rows of up to 2 x seq_len tokens a forward pass, on one process
    epochs: Epochs = 1.0  # times each pair is seen, in each round
    rounds: Count = 0  # 0: train once on the pairs of `data`; else so often generate, choose, train
    prompts_per_round: Count = 0  # prompts a round takes from `data`; 0: all
    reference: Literal["previous", "first"] = "previous"  # model that a round's answers are measured against
    reference_cache: Text = "runs/reference"
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    reward: Component | None = None  # judges a round's answers


@dataclass
class QuantizeConfig(RunConfig):
    """Keys of the `quantize` recipe."""

    recipe: str = "quantize"
    name: Annotated[str, PathPart()] = "quantize"
    checkpoint: Text | None = None  # a run, a checkpoint or a model directory; default: the newest finished run
    device: Text = "auto"
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the computation and of the unquantized tensors
    seq_len: Annotated[int, Range(least=2)] | None = None  # tokens a row of text; null: 512, or what the model reads
    calibration_tokens: Count = 16_384  # 0: every range is that of the weights alone
    test_tokens: Count = 16_384  # of text that the loss is measured on before and after; 0: it is not
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    quantization: Component | None = None  # null: what the model was trained for, else int4
    data: Component | None = None  # text to calibrate and measure on


@dataclass
class PruneConfig(RunConfig):
    """Keys of the `prune` recipe. `force` here allows a cut of more than a third of the parameters."""

    recipe: str = "prune"
    name: Annotated[str, PathPart()] = "prune"
    checkpoint: Text | None = None  # a run, a checkpoint or a model directory
    device: Text = "auto"
    dtype: Literal["bf16", "fp32"] | None = None  # of the written weights; null: of the checkpoint's
    seq_len: Annotated[int, Range(least=2)] | None = None  # tokens a row of text; null: 512, or what the model reads
    calibration_tokens: Count = 32_768  # of text that importances are measured on
    test_tokens: Count = 16_384  # of text that the loss is measured on before and after; 0: it is not
    importance: Literal["l1", "l2", "taylor", "activation", "mask"] = "taylor"  # of neurons, heads, channels, ranks
    depth: DepthConfig = field(default_factory=DepthConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: PrunedModelConfig = field(default_factory=PrunedModelConfig)
    data: Component | None = None  # text to calibrate and measure on


# recipe -> schema; the first field names the recipe.
SCHEMAS: dict[str, type[Any]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "preference": PreferenceConfig,
    "quantize": QuantizeConfig,
    "prune": PruneConfig,
}


def component_keys() -> set[str]:
    """Top-level keys that hold a component, which are also Hydra's groups."""
    return {item.name for schema in SCHEMAS.values() for item in fields(schema) if "Component" in str(item.type)}
