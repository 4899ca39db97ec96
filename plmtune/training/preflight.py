"""What a config asks for, checked before a weight is allocated: by ``plmtune validate``, ``--dry-run`` and ``run``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from plmtune.config.compose import build
from plmtune.config.renamed import RENAMED_METRICS
from plmtune.config.schema import FinetuningConfig, PhaseConfig, TrainingConfig
from plmtune.data.examples import refuse_other_kinds
from plmtune.data.order import Phase, check_mix, show_mix
from plmtune.data.shards import Shards
from plmtune.data.sources import Prepared, named_sources
from plmtune.errors import UserError, did_you_mean
from plmtune.io import terminal
from plmtune.optim.optimizers import COMPILED
from plmtune.registry import Component, describe_components, load
from plmtune.tokenizers.chat_template import ChatTemplate, find_template, template_source
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import QWEN2_ROWS
from plmtune.training.compilers import check_compiler
from plmtune.training.estimate import Estimate, estimate
from plmtune.training.finetune_model import check_finetuning
from plmtune.training.init_from import find_init_checkpoint
from plmtune.training.loggers import check_installed
from plmtune.training.runtime import Runtime
from plmtune.training.without_dynamo import without_dynamo
from plmtune.units import parse_count, show_bytes, show_count

SEQ_LEN = 2048  # of fine-tuning, where neither the config nor the model's context gives fewer tokens
_MANY_STEPS = 10**9  # in place of a number of steps that only the data gives: shares of it are checked exactly


@dataclass
class TrainingPlan:
    """A run before a weight is allocated or a text is read.

    Attributes:
        tokenizer: None where only its size is known, or not even that.
        model: on the meta device; None where a run that does not exist yet determines it.
        phases: empty where `epochs` determines the steps.
        estimated: None where the model is.
        epochs: passes over the data.
    """

    tokenizer: Any
    model: Any
    loss: Any
    phases: list[Phase]
    tokens_per_step: int
    seq_len: int
    estimated: Estimate | None
    epochs: float | None = None

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
            mix = show_mix(phase.mix, self.num_sequences(phase))
            rows.append(
                f"phase {phase.name}: {show_count(phase.steps * self.tokens_per_step)} tokens, {phase.steps:,} steps "
                f"of {show_count(self.tokens_per_step)} tokens" + (f" ({mix})" if mix else "")
            )
        if self.epochs is not None:
            rows.append(f"{show_epochs(self.epochs)}: the number of steps follows from the data")
        return [*(self.estimated.lines() if self.estimated else ()), *rows]


def show_epochs(epochs: float) -> str:
    return f"{epochs:g} epoch" + ("" if epochs == 1 else "s")


# --- components --------------------------------------------------------------------------------------------------


def build_loss(chosen: Component | None, data_kinds: Collection[str]) -> Any:
    """Build the loss, and check that it is of the recipe's data.

    Args:
        data_kinds: what the recipe's losses may be of, see `data_kind`.

    Raises:
        UserError: naming the losses that the recipe takes.
    """
    loss = build("loss", chosen)
    if data_kind(loss) not in data_kinds:
        assert chosen is not None
        fitting = [name for name in describe_components()["loss"] if data_kind(load("loss", name)) in data_kinds]
        raise UserError(f"key loss: {chosen.name} is not for this recipe, which takes {', '.join(fitting)}.")
    return loss


def data_kind(loss: Any) -> str:
    """What a loss is of: tokens, refinements or comparisons."""
    return str(getattr(loss, "data_kind", "tokens"))


def find_tokenizer(chosen: Component | None, *, fetch: bool) -> Tokenizer | None:
    """Build the tokenizer; None for Qwen2's, whose size is known, until a run begins.

    Args:
        fetch: the run begins now.
    """
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

    Raises:
        UserError: naming the key.
    """
    tokenizer = find_tokenizer(cfg.tokenizer, fetch=fetch) if cfg.tokenizer else None
    model = build_on_meta(cfg.model, tokenizer) if cfg.model else None
    cfg.seq_len = choose_seq_len(cfg.seq_len, model, shown=runtime.is_main)
    if model is not None and not cfg.resume:  # an init_from with another model or tokenizer explains what follows
        find_init_checkpoint(cfg.init_from, model, tokenizer, cfg.scheduler, weights=False)
    refused: UserError | None = None
    for chosen in (
        [cfg.model] if cfg.model else [Component("model", name, {}) for name in sorted(describe_components()["model"])]
    ):
        try:
            finetuned = build_on_meta(chosen, tokenizer)
            check_finetuning(finetuned, cfg.peft, cfg.quantization, runtime.strategy)
            if cfg.peft:
                build("peft", cfg.peft, model=finetuned)
            check_optimizer(cfg.optimizer, finetuned)
        except UserError as error:
            refused = refused or error
        else:
            return tokenizer, model, finetuned
    assert refused is not None
    raise refused


def check_optimizer(chosen: Component | None, model: nn.Module) -> None:
    """Refuse an optimizer with impossible settings, or one that does not fit the model."""
    with without_dynamo():
        build("optimizer", chosen, model=model)


# --- numbers -----------------------------------------------------------------------------------------------------


def check_best_metric(best: str | None, metrics: Sequence[str]) -> None:
    """Refuse a `checkpoint.best` that no validation measures.

    Args:
        metrics: patterns of the metrics that it measures.
    """
    if best is not None and not any(re.fullmatch(pattern, best) for pattern in metrics):
        renamed = RENAMED_METRICS.get(best)
        near = (
            f" Did you mean {renamed}?"
            if renamed
            else did_you_mean(best, [pattern for pattern in metrics if re.fullmatch(r"[\w/]+", pattern)])
        )
        raise UserError(f"key checkpoint.best: a validation does not measure {best}.{near}")


def rows_per_process(global_batch_size: int, processes: int, unit: str) -> int:
    """The rows of a step on one process.

    Args:
        unit: what the rows are, for the message.

    Raises:
        UserError: if the processes would have different numbers of them.
    """
    if global_batch_size % processes:
        raise UserError(f"key global_batch_size: {global_batch_size} {unit} do not divide among {processes} processes.")
    return global_batch_size // processes


def check_seq_len(seq_len: int, model: Any) -> None:
    """Refuse rows that are longer than the model's context, where the model is known."""
    if model is not None and seq_len > model.max_seq_len:
        raise UserError(
            f"key seq_len: {seq_len} exceeds the model's max_seq_len ({model.max_seq_len}). "
            f"Give seq_len={model.max_seq_len} or less."
        )


def choose_seq_len(seq_len: int | None, model: Any, *, shown: bool) -> int:
    """The checked `seq_len`; where it is left out `SEQ_LEN`, or the model's context where that is shorter.

    Args:
        model: None where it is not known yet.
        shown: print why it is shorter.
    """
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


def build_scheduler(chosen: Component | None, optimizer: Optimizer, num_steps: int, tokens_per_step: int) -> Any:
    return build("scheduler", chosen, optimizer=optimizer, num_steps=num_steps, tokens_per_step=tokens_per_step)


def check_schedule(chosen: Component | None, num_steps: int, tokens_per_step: int) -> None:
    """Refuse a schedule that does not fit into the run's steps.

    Args:
        num_steps: 0: only the data says how many.

    Raises:
        UserError: naming the setting.
    """
    with without_dynamo():
        optimizer = torch.optim.SGD([torch.zeros(1)])
    build_scheduler(chosen, optimizer, num_steps or _MANY_STEPS, tokens_per_step)


def check_packages(cfg: TrainingConfig, device: torch.device) -> None:
    """Refuse a logger without its package, and compilation without a compiler."""
    check_installed(cfg.logger)
    if cfg.runtime.compile:
        check_compiler(device, "key runtime.compile", "runtime.compile=false")
    if cfg.optimizer is not None and cfg.optimizer.name in COMPILED:
        check_compiler(device, f"key optimizer: {cfg.optimizer.name} compiles its step", "optimizer=adamw")


def estimate_run(
    cfg: TrainingConfig, model: nn.Module, runtime: Runtime, *, rows: int, seq_len: int, masked: bool = False
) -> Estimate:
    """Estimate a run's memory and FLOPs, see `estimate`.

    Args:
        rows: of a step on one process.
        seq_len: tokens of a row.
    """
    assert cfg.loss is not None and cfg.optimizer is not None
    with without_dynamo():
        return estimate(
            model,
            optimizer=cfg.optimizer.name,
            seq_len=seq_len,
            micro_batch_size=min(cfg.micro_batch_size, rows),
            masked=masked,
            micro_batches=-(-rows // cfg.micro_batch_size),
            world_size=runtime.world_size,
            strategy=runtime.strategy,
            shard_size=runtime.shard_size,
            background_saves=cfg.checkpoint.background,
            compute_dtype=runtime.compute_dtype,
            activation_checkpointing=cfg.runtime.activation_checkpointing,
            loss_chunk_rows=cfg.loss.settings.get("chunk_rows", 0),
            device=runtime.device,
        )


def does_not_fit(estimated: Estimate | None) -> str:
    """A sentence if a run needs more memory than there is, else empty."""
    if estimated is None or estimated.fits:
        return ""
    return (
        f"this run does not fit here: it needs {show_bytes(estimated.total)}, and {show_bytes(estimated.available)} "
        "are free. To start it anyway: --force"
    )


# --- data --------------------------------------------------------------------------------------------------------


def find_sources(data: Component | None) -> dict[str, Any]:
    """Find the sources of the data by name; nothing of them is read.

    Raises:
        UserError: for none, or a path that does not exist.
    """
    return named_sources(build("data", data))


def check_sources(sources: Mapping[str, Any], kinds: tuple[type, ...], plan: TrainingPlan) -> None:
    """Check that the sources hold what the recipe trains on, and that the phases' mixes name them.

    Args:
        kinds: classes of data, see `refuse_other_kinds`.

    Raises:
        UserError: for data of another kind or another tokenizer, or a mix of unknown sources.
    """
    for name, source in sources.items():
        refuse_other_kinds(name, source, kinds)
        if isinstance(source, Prepared) and plan.tokenizer is not None:
            Shards.open(
                source.directory,
                tokenizer_fingerprint=plan.tokenizer.fingerprint,
                vocab_size=plan.tokenizer.vocab_size,
                verify=False,
            )
    try:
        for phase in plan.phases:
            check_mix(phase, sorted(sources), plan.num_sequences(phase))
    except ValueError as error:
        raise UserError(f"key phases: {str(error).rstrip('.')}.") from error


def find_chat_template(name: str | None, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """Find the chat template, and try it with the tokenizer; without one, check that the template exists.

    Raises:
        UserError: if there is none, or it cannot be used.
    """
    if tokenizer is not None:
        return find_template(name, tokenizer)
    if name is not None:
        template_source(name)
    return None
