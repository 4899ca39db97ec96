"""What a config asks for, checked before a weight is allocated: by ``plmtune validate``, ``--dry-run`` and ``run``."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from plmtune.config.compose import build
from plmtune.config.renamed import RENAMED_METRICS
from plmtune.config.schema import (
    FinetuningConfig,
    PreferenceConfig,
    PretrainConfig,
    SftConfig,
)
from plmtune.config.sections import MultiRoundConfig, PhaseConfig
from plmtune.data.examples import refuse_other_kinds
from plmtune.data.order import Phase, check_mix, show_mix
from plmtune.data.rounds import later_rounds
from plmtune.data.shards import Shards
from plmtune.data.sources import Prepared, named_sources
from plmtune.errors import UserError, did_you_mean
from plmtune.io import terminal
from plmtune.optim.optimizers import COMPILED
from plmtune.registry import Component, describe_components, load
from plmtune.tokenizers.chat_template import ChatTemplate, find_template, template_source
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import QWEN2_ROWS
from plmtune.training.estimate import Estimate, estimate
from plmtune.training.finetune_model import check_finetuning
from plmtune.training.init_from import find_init_checkpoint
from plmtune.training.layout_checks import check_layout
from plmtune.training.loggers import check_installed
from plmtune.training.machine import check_compiler
from plmtune.training.runtime import Runtime
from plmtune.training.teacher import Teacher, find_teacher
from plmtune.training.without_dynamo import without_dynamo
from plmtune.units import parse_count, show_count

SEQ_LEN = 2048  # of fine-tuning, where neither the config nor the model's context gives fewer tokens
_MANY_STEPS = 10**9  # in place of a number of steps that only the data gives: shares of it are checked exactly


@dataclass
class TrainingPlan:
    """What a config names, found and checked before a weight is allocated or a text is read.

    Attributes:
        tokenizer: None where only its size is known, or not even that.
        model: on the meta device; None where a run that does not exist yet determines it.
        phases: empty where `epochs` determines the steps.
        estimated: None where the model is.
        epochs: passes over the data.
        measured_tokens: of the sequences whose losses are measured between rounds, together.
        teacher: of a distillation; its weights are not loaded yet.
        sources: of the data, by name.
        template: the chat template; None where the tokenizer is not there yet.
        refinement: the refinement template.
        evaluations: None where there are no tasks to measure.
    """

    tokenizer: Any
    model: Any
    loss: Any
    phases: list[Phase]
    tokens_per_step: int
    seq_len: int
    estimated: Estimate | None
    epochs: float | None = None
    measured_tokens: int = 0
    teacher: Teacher | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    template: Any = None
    refinement: Any = None
    evaluations: Any = None

    @property
    def estimate(self) -> Estimate:
        assert self.estimated is not None
        return self.estimated

    @property
    def num_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def num_sequences(self, phase: Phase) -> int:
        return phase.steps * self.tokens_per_step // self.seq_len

    def lines(self) -> list[str]:
        """The estimate and the phases, to print."""
        rows = []
        for phase in self.phases:
            mix = show_mix(phase.mix, self.num_sequences(phase)) if phase.round == 1 else "of round 1, drawn again"
            rows.append(
                f"phase {phase.name}: {show_count(phase.steps * self.tokens_per_step)} tokens, {phase.steps:,} steps "
                f"of {show_count(self.tokens_per_step)} tokens" + (f" ({mix})" if mix else "")
            )
        if self.measured_tokens:
            rows.append(f"losses between rounds: forward passes over {show_count(self.measured_tokens)} tokens")
        if self.epochs is not None:
            rows.append(f"{show_epochs(self.epochs)}: the number of steps follows from the data")
        return [*(self.estimated.lines() if self.estimated else ()), *rows]


def show_epochs(epochs: float) -> str:
    return f"{epochs:g} epoch" + ("" if epochs == 1 else "s")


def build_loss(chosen: Component | None, data_kinds: Collection[str]) -> Any:
    """Build the loss; refuse one whose `data_kind` is not among those of the recipe."""
    loss = build("loss", chosen)
    if data_kind(loss) not in data_kinds:
        assert chosen is not None
        fitting = [name for name in describe_components()["loss"] if data_kind(load("loss", name)) in data_kinds]
        raise UserError(f"key loss: {chosen.name} is not for this recipe, which takes {', '.join(fitting)}.")
    return loss


def check_loss_settings(name: str, loss: Any, model: Any) -> None:
    """Refuse a loss over tokens without a keyword that the model's `loss_settings` give it."""
    needed = getattr(model, "loss_settings", {}) if data_kind(loss) != "comparisons" else {}
    taken = inspect.signature(loss).parameters.values() if needed else ()
    lacking = needed.keys() - {p.name for p in taken}
    if lacking and not any(p.kind is p.VAR_KEYWORD for p in taken):
        raise UserError(
            f"key loss: {name} has no keyword {', '.join(lacking)}, which this model's logits need. "
            "Add it to the loss, or choose cross_entropy."
        )


def data_kind(loss: Any) -> str:
    """What a loss is of: tokens, refinements or comparisons."""
    return str(getattr(loss, "data_kind", "tokens"))


def find_tokenizer(chosen: Component | None, *, fetch: bool) -> Tokenizer | None:
    """Build the tokenizer; None for Qwen2's, whose size is known, until a run begins (`fetch`)."""
    if not fetch and chosen == Component("tokenizer", "qwen2", {"path": None}):
        return None
    built: Tokenizer = build("tokenizer", chosen)
    return built


def build_on_meta(chosen: Component | None, tokenizer: Tokenizer | None) -> Any:
    """Build a model without weights."""
    with torch.device("meta"):
        return build("model", chosen, vocab_size=tokenizer.vocab_size if tokenizer else QWEN2_ROWS)


def build_finetuned(cfg: FinetuningConfig, runtime: Runtime, *, fetch: bool) -> tuple[Any, Any, nn.Module]:
    """Build the tokenizer, the model, and the model with adapters and fake quantization; fill in `seq_len`.

    Returns:
        (tokenizer, model, finetuned): the first two are None where a run that does not exist yet determines them, and
        the settings must then be right for at least one registered model.
    """
    tokenizer = find_tokenizer(cfg.tokenizer, fetch=fetch) if cfg.tokenizer else None
    model = build_on_meta(cfg.model, tokenizer) if cfg.model else None
    cfg.seq_len = choose_seq_len(cfg.seq_len, model, shown=runtime.is_main)
    if model is not None and not cfg.resume:  # an init_from with another model or tokenizer explains what follows
        init = find_init_checkpoint(cfg.init_from, model, tokenizer, cfg.scheduler, weights=False)
        if init is not None and init.added and cfg.peft:
            raise UserError(
                "key peft: adapters are all that is trained, so what the model adds to init_from would stay without an "
                "effect. Train all weights (peft=null), or leave the added parts out."
            )
    every = [Component("model", name, {}) for name in sorted(describe_components()["model"])]
    refused: list[UserError] = []
    for chosen in [cfg.model] if cfg.model else every:
        try:
            finetuned = build_on_meta(chosen, tokenizer)
            check_finetuning(finetuned, cfg.peft, cfg.quantization, runtime.strategy)
            if cfg.peft:
                build("peft", cfg.peft, model=finetuned)
            check_optimizer(cfg.optimizer, finetuned)
        except UserError as error:
            refused.append(error)
        else:
            return tokenizer, model, finetuned
    raise refused[0]


def check_optimizer(chosen: Component | None, model: nn.Module) -> None:
    """Refuse an optimizer with impossible settings, or one that does not fit the model."""
    with without_dynamo():
        build("optimizer", chosen, model=model)


def plan_training(
    cfg: PretrainConfig | SftConfig | PreferenceConfig,
    runtime: Runtime,
    loss: Any,
    tokenizer: Tokenizer | None,
    model: Any,
    finetuned: nn.Module,
    *,
    metrics: Sequence[str],
    unit: str,
    epochs: float | None = None,
    contexts: int = 1,
    row_length: int = 1,
) -> TrainingPlan:
    """Check the numbers and packages of a config, plan its steps, and estimate its memory and FLOPs.

    Args:
        finetuned: `model` with what is added to it for the training.
        metrics: patterns of the metrics that a validation measures.
        unit: what the global batch is made of, for messages.
        epochs: in place of phases.
        contexts: most rows that a unit fills.
        row_length: of a row, in seq_len; longer rows have a mask.
    """
    assert cfg.seq_len is not None and cfg.loss is not None and cfg.optimizer is not None
    check_best_metric(cfg.checkpoint.best, metrics)
    check_layout(cfg, runtime, model)
    check_loss_settings(cfg.loss.name, loss, model)
    size, processes = cfg.global_batch_size, runtime.data_world_size
    if size % processes:
        raise UserError(f"key global_batch_size: {size} {unit} do not divide among {processes} processes.")
    tokens_per_step = size * cfg.seq_len
    phases = resolve_phases(getattr(cfg, "phases", ()), tokens_per_step)
    first_round = sum(phase.steps for phase in phases) * tokens_per_step
    phases += resolve_rounds(getattr(cfg, "multi_round", None), phases)
    plan = TrainingPlan(tokenizer, model, loss, phases, tokens_per_step, cfg.seq_len, None, epochs)
    if isinstance(cfg, PretrainConfig) and cfg.multi_round.draw == "loss":
        plan.measured_tokens = (cfg.multi_round.rounds - 1) * first_round
    if not isinstance(cfg, PreferenceConfig):
        plan.teacher = find_teacher(cfg.distillation, cfg.loss, loss, tokenizer, model, cfg.seq_len)
    check_schedule(cfg.scheduler, plan.num_steps, tokens_per_step)
    check_installed(cfg.logger)
    if cfg.runtime.compile:
        check_compiler(runtime.device, "key runtime.compile", "runtime.compile=false")
    if cfg.optimizer.name in COMPILED:
        check_compiler(runtime.device, f"key optimizer: {cfg.optimizer.name} compiles its step", "optimizer=adamw")
    if model is not None:
        rows = contexts * size // processes
        with without_dynamo():
            plan.estimated = estimate(
                finetuned,
                runtime,
                optimizer=cfg.optimizer.name,
                seq_len=row_length * cfg.seq_len,
                micro_batch_size=min(cfg.micro_batch_size, rows),
                masked=row_length > 1,
                micro_batches=-(-rows // cfg.micro_batch_size),
                background_saves=cfg.checkpoint.background,
                activation_checkpointing=cfg.runtime.activation_checkpointing,
                loss_chunk_rows=cfg.loss.settings.get("chunk_rows", 0),
                teacher=plan.teacher.model if plan.teacher else None,
                ema=not isinstance(cfg, PreferenceConfig) and cfg.ema.decay is not None,
            )
    return plan


def check_best_metric(best: str | None, metrics: Sequence[str]) -> None:
    """Refuse a `checkpoint.best` that matches no pattern of the metrics that a validation measures."""
    if best is not None and not any(re.fullmatch(pattern, best) for pattern in metrics):
        renamed = RENAMED_METRICS.get(best)
        plain = [pattern for pattern in metrics if re.fullmatch(r"[\w/]+", pattern)]
        near = f" Did you mean {renamed}?" if renamed else did_you_mean(best, plain)
        raise UserError(f"key checkpoint.best: a validation does not measure {best}.{near}")


def check_seq_len(seq_len: int, model: Any) -> None:
    """Refuse rows that are longer than the model's context, where the model is known."""
    if model is not None and seq_len > model.max_seq_len:
        raise UserError(
            f"key seq_len: {seq_len} exceeds the model's max_seq_len ({model.max_seq_len}). "
            f"Give seq_len={model.max_seq_len} or less."
        )


def choose_seq_len(seq_len: int | None, model: Any, *, shown: bool) -> int:
    """The checked `seq_len`; where it is left out `SEQ_LEN`, or the model's context where that is known and shorter."""
    if seq_len is not None:
        check_seq_len(seq_len, model)
        return seq_len
    if model is None or model.max_seq_len >= SEQ_LEN:
        return SEQ_LEN
    if shown:
        terminal.echo(f"seq_len={model.max_seq_len}, as the model reads no more tokens at once", err=True)
    return int(model.max_seq_len)


def resolve_phases(phases: Sequence[PhaseConfig], tokens_per_step: int) -> list[Phase]:
    """Turn the phases of a config, in tokens or steps, into steps."""
    resolved = []
    for index, phase in enumerate(phases):
        steps = phase.steps
        if steps is None:
            assert phase.tokens is not None
            steps = math.ceil(parse_count(phase.tokens, f"phases[{index}].tokens") / tokens_per_step)
        resolved.append(Phase(phase.name, steps, dict(phase.mix)))
    return resolved


def resolve_rounds(settings: MultiRoundConfig | None, phases: Sequence[Phase]) -> list[Phase]:
    """Turn the later rounds of a config into phases."""
    try:
        steps = sum(phase.steps for phase in phases)
        return later_rounds(settings.rounds, settings.keep, steps) if settings and phases else []
    except ValueError as error:
        raise UserError(f"key multi_round: {error}.") from error


def build_scheduler(chosen: Component | None, optimizer: Optimizer, num_steps: int, tokens_per_step: int) -> Any:
    return build("scheduler", chosen, optimizer=optimizer, num_steps=num_steps, tokens_per_step=tokens_per_step)


def check_schedule(chosen: Component | None, num_steps: int, tokens_per_step: int) -> None:
    """Refuse a schedule that does not fit into the run's steps; with 0 steps only the data says how many."""
    with without_dynamo():
        optimizer = torch.optim.SGD([torch.zeros(1)])
    build_scheduler(chosen, optimizer, num_steps or _MANY_STEPS, tokens_per_step)


def find_sources(data: Component | None) -> dict[str, Any]:
    """Find the sources of the data by name; nothing of them is read."""
    return named_sources(build("data", data))


def check_sources(data: Component | None, kinds: tuple[type, ...], plan: TrainingPlan) -> None:
    """Find the `sources` of a plan, and check that they hold what it trains on and that its phases' mixes name them.

    Args:
        kinds: classes of data, see `refuse_other_kinds`.
    """
    plan.sources = find_sources(data)
    for name, source in plan.sources.items():
        refuse_other_kinds(name, source, kinds)
        if isinstance(source, Prepared) and plan.tokenizer is not None:
            own = {"tokenizer_fingerprint": plan.tokenizer.fingerprint, "vocab_size": plan.tokenizer.vocab_size}
            Shards.open(source.directory, **own, verify=False)
    try:
        for phase in plan.phases:
            check_mix(phase, sorted(plan.sources), plan.num_sequences(phase))
    except ValueError as error:
        raise UserError(f"key phases: {str(error).rstrip('.')}.") from error


def find_chat_template(name: str | None, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """Find the chat template, and try it with the tokenizer; without one, check that the template exists."""
    if tokenizer is not None:
        return find_template(name, tokenizer)
    if name is not None:
        template_source(name)
    return None
