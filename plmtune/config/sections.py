"""Typed sections of configs, which several recipes share, and the ranges of their values.

What keys of a section ask of each other is in its ``check``, which raises a ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from plmtune.ranges import AT_LEAST_1, NOT_NEGATIVE, SHARE, NotEmpty, Range
from plmtune.units import parse_count, unescape

# What `typed_config.from_plain` checks of a value, from wherever it comes: a file, an override, a saved config.
Count = Annotated[int, NOT_NEGATIVE]
Size = Annotated[int, AT_LEAST_1]
Number = Annotated[float, NOT_NEGATIVE]
Share = Annotated[float, SHARE]
TopP = Annotated[float, Range(above=0, most=1)]
MinP = Annotated[float, Range(least=0, most=1)]
Factor = Annotated[float, Range(above=0, most=100)]
Temperature = Annotated[float, Range(0, most=100)]
Length = Annotated[int, Range(1, most=2**24)]  # rows or tokens that are in memory at once
Text = Annotated[str, NotEmpty()]
Epochs = Annotated[float, Range(above=0, most=10_000)]
Minutes = Annotated[float, Range(above=0, below=1_000_000)]


@dataclass
class PhaseConfig:
    """One stretch of training with its own mix of sources; give `tokens` or `steps`."""

    name: Text = "main"
    tokens: int | str | None = None  # 5000000, "5M", "1650B"
    steps: Size | None = None
    mix: dict[str, Number] = field(default_factory=dict)  # source: weight; empty means by size

    def check(self) -> None:
        """Refuse a phase without an end, or with two."""
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("needs tokens or steps, one of the two")
        if self.tokens is not None:
            parse_count(self.tokens, "tokens")


@dataclass
class MultiRoundConfig:
    """Rounds of pretraining (PanGu-pi Pro): later ones draw a share of the first one's sequences by their losses."""

    rounds: Annotated[int, Range(least=1, most=100)] = 1  # 1: the phases alone
    keep: Annotated[float, Range(above=0, most=1)] = 0.5  # sequences of each later round, as a share of round 1's
    draw: Literal["loss", "uniform"] = "loss"  # p = softmax(loss / temperature), or all equally likely
    temperature: Annotated[float, Range(above=0, most=1000)] = 1.0

    def check(self) -> None:
        """Refuse settings that nothing reads."""
        given = [key for key in ("keep", "draw", "temperature") if getattr(self, key) != getattr(MultiRoundConfig, key)]
        if self.rounds == 1 and given:
            raise ValueError(f"{given[0]} says what later rounds draw, and there is one round: give rounds=2, or more")
        if self.draw == "uniform" and "temperature" in given:
            raise ValueError(f"temperature ({self.temperature:g}) divides losses, which draw=uniform does not read")


@dataclass
class RuntimeConfig:
    """Where and how to compute."""

    device: Text = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    shard_size: Size | None = None  # hsdp: processes that share one copy of the model; default: those of a machine
    deterministic: bool = False
    compile: bool = False
    # none, full, selective, or a number n: full for every n-th layer. Earlier versions had true and false.
    activation_checkpointing: bool | int | str = "none"
    timeout_minutes: Minutes = 10.0  # a silent process ends the job after this long

    def check(self) -> None:
        """Take true as full and false as none; refuse other words and numbers."""
        how = self.activation_checkpointing
        if isinstance(how, bool):
            self.activation_checkpointing = "full" if how else "none"
        elif how not in ("none", "full", "selective") and (isinstance(how, str) or how < 2):
            raise ValueError(
                f"activation_checkpointing: {how!r:.80} is none of none, full, selective, and a number n of at least 2 "
                "(full for every n-th layer)"
            )


@dataclass
class ParallelConfig:
    """How many processes each dimension has; their product is the number of processes."""

    dp_replicate: Size | None = None  # copies of the model; null: what dp_shard leaves
    dp_shard: Size | None = None  # processes that share a copy's weights and moments; null: what the others leave
    tp: Size = 1  # tensor and sequence parallelism
    pp: Size = 1  # pipeline stages
    cp: Size = 1  # context parallelism: parts of each sequence
    schedule: Literal["1f1b", "interleaved_1f1b", "zbv"] = "1f1b"  # of a pipeline's micro-batches
    reshard_after_forward: bool = True  # free gathered weights before the backward; a pipeline keeps them

    def check(self) -> None:
        """Refuse a schedule without a pipeline."""
        if self.schedule != "1f1b" and self.pp == 1:
            raise ValueError(f"schedule={self.schedule} orders the micro-batches of a pipeline: give pp=2, or more")


@dataclass
class PreparationConfig:
    """How text becomes token shards."""

    directory: Text = "runs/data"
    holdout: Share = 0.01  # share kept for validation
    holdout_by: Literal["documents", "tail"] = "documents"
    skip_bad: bool = False  # count broken lines instead of stopping


@dataclass
class ValidationConfig:
    """When to measure the held-out loss; 0 means only at the end."""

    every: Count = 0
    tokens: Size = 100_000


@dataclass
class PretrainValidationConfig(ValidationConfig):
    """What else pretraining measures."""

    effective_dimension: bool = False  # of each layer's output


@dataclass
class EvaluationConfig:
    """Tasks of lm-eval to measure while training; every=0 means only at the end."""

    tasks: list[Text] = field(default_factory=list)  # empty: none
    every: Count = 0  # steps
    limit: Count = 64  # documents a task; 0: all
    num_fewshot: Count | None = None  # null: each task's own
    batch_size: Size | None = None  # rows that are generated together; null: by memory
    max_new_tokens: Size | None = None  # longest answer; null: the task's own, at most half of the model's context
    chat: bool = False  # ask in the chat template
    data: Text | None = None  # a folder or map of local files, as --data of plmtune eval
    unsafe_code: bool = False  # let tasks run what the model wrote, in a sandbox


@dataclass
class CheckpointConfig:
    """When to save and how many to keep; every=0 means only at the end, keep=0 keeps all."""

    every: Count = 0
    keep: Count = 2
    best: Text | None = "validation_loss"  # the checkpoint with the best value of this metric is kept as well
    mode: Literal["min", "max"] = "min"
    background: bool = True  # write while training continues; takes a copy of the state in host memory


@dataclass
class GuardConfig:
    """Which updates to skip: a loss or gradient norm that is not finite, or a norm far beyond its history."""

    spike_factor: Number = 10.0  # times the median norm of the window; 0 asks only for finite numbers
    window: Size = 128  # accepted steps that make the history
    patience: Size = 3  # skipped steps in a row that stop the run

    def check(self) -> None:
        """Refuse a factor that would skip half of all updates."""
        if 0 < self.spike_factor <= 1:
            raise ValueError(f"spike_factor ({self.spike_factor:g}) must be above 1, or 0 for none")


@dataclass
class EmaConfig:
    """An exponential moving average of the weights, which checkpoints hold beside them."""

    decay: Annotated[float, SHARE] | None = (
        None  # share of the average that an update keeps, as 0.999; null: no average
    )


@dataclass
class DistillationConfig:
    """The model that the trained one learns from, with loss=forward_kl, reverse_kl or jsd."""

    teacher: Text | None = None  # a run, a checkpoint or a model directory, with the same tokenizer
    quantization: Literal["int8"] | None = None  # of the teacher's matrices in memory; null: as they are stored
    top_k: Annotated[int, Range(least=1, most=65_536)] | None = (
        None  # keep so many tokens' log-probabilities; null: none
    )
    cache: Text = "runs/teacher"  # where they are kept, for all runs
    layers: list[Count] = field(default_factory=list)  # of the model, from 0, whose hidden states imitate the teacher's
    teacher_layers: list[Count] = field(default_factory=list)  # those that they imitate, one for each
    layers_weight: Number = 1.0  # in the loss, of the mean squared difference of these hidden states

    def check(self) -> None:
        """Refuse layers that do not pair."""
        if len(self.layers) != len(self.teacher_layers) or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"layers ({self.layers}) and teacher_layers ({self.teacher_layers}) must be equally many, and no layer "
                "be named twice in layers"
            )
        if self.layers and self.top_k is not None:
            raise ValueError("top_k keeps no hidden states, which layers compares: leave one of them out")


@dataclass
class SampleConfig:
    """What to write at the end of a run, for a person to read."""

    prompt: str = ""
    max_new_tokens: Count = 0
    temperature: Temperature = 0.8
    top_p: TopP = 0.95


@dataclass
class ChatConfig:
    """How conversations become tokens."""

    template: Text | None = None  # null: the tokenizer's own; chatml; or a file: mine.jinja
    train_on: Literal["all", "last"] = "all"  # answers that count: every one, or each conversation's last
    truncation: Literal["drop", "right"] = "drop"  # a conversation longer than seq_len: left out, or cut at its end
    skip_bad: bool = False  # count rows that cannot be used instead of stopping
    holdout: Share = 0.02  # share of the conversations or pairs kept for validation


@dataclass
class RefinementConfig:
    """What asks for a better answer than the one at hand."""

    template: Text | None = None  # null: the built-in one; or a file: mine.jinja, which uses prompt and answer


@dataclass
class GenerationConfig:
    """How a round writes its answers."""

    mode: Literal["chain", "samples"] = "chain"  # each answer refines the one before, or all are first answers
    turns: Size = 3  # answers a prompt
    max_new_tokens: Size = 256
    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    min_p: MinP | None = None  # draw from tokens at least this share as likely as the likeliest
    repetition_penalty: Factor = 1.0  # above 1: tokens of prompt and answer become less likely; 1: none
    stop: list[str] = field(default_factory=list)  # texts that end an answer and are no part of it
    batch_size: Length = 16  # answers written at once

    def check(self) -> None:
        """Refuse a stop string that is empty or holds an unknown escape."""
        if "" in self.stop:
            raise ValueError("stop: one of its texts is empty, so an answer would end before it begins")
        self.stop_texts()

    def stop_texts(self) -> list[str]:
        """Return the stop strings with their escapes read: ``\\n`` is a line feed."""
        return [unescape(text, "stop") for text in self.stop]


@dataclass
class SelectionConfig:
    """How a round chooses its pairs: best and worst by `reward`, or without one last and first where rules pass."""

    rules: list[Text] = field(default_factory=lambda: ["not_empty", "not_truncated", "not_repeated"])
    margin: Number = 0.0  # least difference of rewards


@dataclass
class SensitivityConfig:
    """What each module loses by being quantized, and a mix of formats from that."""

    measure: bool = False
    budget: Text | None = None  # of the weights' file: 80M (bytes), or 60% (of it in dtype); null: measure only
    tokens: Size = 2048  # of text that each module's loss is measured on

    def check(self) -> None:
        """Refuse a budget that is no size."""
        if self.budget is not None:
            self.budget_bytes(1 << 40)

    def budget_bytes(self, whole: int) -> int:
        """The budget in bytes, of a model whose weights take `whole` bytes."""
        text = str(self.budget)
        try:
            if not text.endswith("%"):
                return parse_count(text, "budget")
            if 0 < (share := float(text[:-1])) <= 100:
                return int(share / 100 * whole)
        except ValueError:
            pass
        raise ValueError(f"budget ({text}) must be bytes (80M), or a share of the weights (60%)")


@dataclass
class PrunedAttentionConfig:
    """Sizes of attention after pruning; null: as before."""

    num_kv_heads: Size | None = None  # each goes with the query heads that it serves
    kv_lora_rank: Size | None = None
    q_lora_rank: Size | None = None


@dataclass
class PrunedFfnConfig:
    """Sizes of the FFN after pruning; null: as before."""

    hidden_dim: Size | None = None


@dataclass
class PrunedModelConfig:
    """Sizes of the model after pruning, by the names of its settings; null: as before."""

    num_layers: Size | None = None
    embed_dim: Size | None = None
    num_heads: Size | None = None
    attention: PrunedAttentionConfig = field(default_factory=PrunedAttentionConfig)
    ffn: PrunedFfnConfig = field(default_factory=PrunedFfnConfig)

    def sizes(self) -> dict[str, int | None]:
        """The sizes by setting: num_layers, attention.num_kv_heads, ..."""
        own: dict[str, int | None] = {key: getattr(self, key) for key in ("num_layers", "embed_dim", "num_heads")}
        own |= {f"attention.{key}": size for key, size in vars(self.attention).items()}
        return own | {f"ffn.{key}": size for key, size in vars(self.ffn).items()}


@dataclass
class DepthConfig:
    """Which layers stay."""

    importance: Literal["skip", "influence", "mask"] | None = None  # null: mask where importance=mask, else skip
    layers: list[Count] = field(default_factory=list)  # the numbers of those that stay, from 0; empty: by importance
    adjacent: Annotated[int, Range(1, most=8)] = 3  # skip: most layers that are skipped together
    tokens: Size = 4096  # of text that layers are measured on

    def check(self) -> None:
        """Refuse layers in another order, or twice."""
        if self.layers != sorted(set(self.layers)):
            raise ValueError(f"layers ({self.layers}) must be ascending and name each layer once")


@dataclass
class MaskConfig:
    """How a mask is learned."""

    steps: Size = 400
    batch_size: Length = 8  # rows a step
    tokens: Size = 262_144  # of text that it is learned on, seen again where the steps take more
    lr: Annotated[float, Range(above=0, most=100)] = 1.0  # of the gates and of the multipliers
    weights_lr: Number = 0.0  # of the weights, which train with the gates; 0: they stay as they are
    warmup: Annotated[float, Range(least=0, most=1)] = 0.2  # share of the steps in which the model shrinks to its size
    seed: Count = 1
