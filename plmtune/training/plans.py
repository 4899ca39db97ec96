"""What a config asks for, and whether it can be done: known before a weight is allocated or a text is read.

`plmtune validate`, `run --dry-run` and `run` all make a recipe's plan, so they refuse the same configs in the same
words. A section's own numbers were checked when the config was composed (`plmtune.config.schema`); here is what
takes the model, the machine, or a look at the files that the config names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plmtune.config.compose import build
from plmtune.data.examples import refuse_other_kinds
from plmtune.data.order import Phase, check_mix, show_mix
from plmtune.data.shards import Shards
from plmtune.data.sources import Prepared, named_sources
from plmtune.errors import UserError, did_you_mean
from plmtune.io import terminal
from plmtune.optim.optimizers import COMPILED
from plmtune.preference.refinement import Refinement, find_refinement
from plmtune.registry import Component, describe, load
from plmtune.tokenizers.chat_template import ChatTemplate, find_template, template_source
from plmtune.tokenizers.tokenizer_files import QWEN2_ROWS
from plmtune.training.compilers import check_compiler
from plmtune.training.estimate import Estimate, estimate
from plmtune.training.finetune_model import check_finetuning
from plmtune.training.guard import Guard
from plmtune.training.init_from import DEFAULT_INIT_RECIPES, find_init_checkpoint
from plmtune.training.loggers import check_installed
from plmtune.training.run_setup import resolve_phase
from plmtune.training.runtime import Runtime
from plmtune.training.without_dynamo import without_dynamo
from plmtune.units import show_bytes, show_count

if TYPE_CHECKING:
    from plmtune.evaluation.during import Evaluations

SEQ_LEN = 2048  # tokens of a conversation, or of a prompt with an answer, where neither config nor model says fewer
# Steps of a run whose data says how many there are: a schedule's shares of them are checked, its steps as well as can.
_MANY_STEPS = 10**9


@dataclass(frozen=True)
class Kind:
    """What a recipe trains on, stated by the recipe.

    Attributes:
        losses: what its losses are of, see `losses`, and which classes of data serve each.
        measures: what its validation measures, as patterns.
        sequences: of seq_len tokens that a row holds at most.
        epochs: passes over the data where the config says neither epochs nor phases; None: it must say phases.
        rows: what a step's rows are, for messages.
    """

    losses: Mapping[str, tuple[type, ...]]
    measures: tuple[str, ...]
    sequences: int = 1
    epochs: float | None = None
    rows: str = "sequences"


@dataclass
class Plan:
    """What a config asks for, known before a weight is allocated or a text is read.

    Attributes:
        model: on the meta device; None where the config leaves it to a run that is not there yet.
        tokenizer: None where only its size is known, or not even that.
        sources: of the data, by name, not read yet.
    """

    tokenizer: Any
    model: Any
    loss: Any
    phases: list[Phase]
    tokens_per_step: int
    guard: Guard
    estimated: Estimate | None  # None where the model is
    seq_len: int
    epochs: float | None = None  # passes over the data, which says how many steps they are
    sources: dict[str, Any] = field(default_factory=dict)
    template: ChatTemplate | None = None
    refinement: Refinement | None = None
    evaluations: Evaluations | None = None  # None: there are no tasks to measure

    @property
    def estimate(self) -> Estimate:
        assert self.estimated is not None
        return self.estimated

    @property
    def num_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def num_sequences(self, phase: Phase) -> int:
        """Sequences of a phase."""
        return phase.steps * self.tokens_per_step // self.seq_len

    def lines(self) -> list[str]:
        rows = []
        for p in self.phases:
            mix = show_mix(p.mix, self.num_sequences(p))
            rows.append(
                f"phase {p.name}: {show_count(p.steps * self.tokens_per_step)} tokens, {p.steps:,} steps of "
                f"{show_count(self.tokens_per_step)} tokens" + (f" ({mix})" if mix else "")
            )
        if self.epochs is not None:
            rows.append(f"{show_epochs(self.epochs)}: the number of steps follows from the data")
        return [*(self.estimated.lines() if self.estimated else ()), *rows]


def show_epochs(epochs: float) -> str:
    return f"{epochs:g} epoch" + ("" if epochs == 1 else "s")


def plan(cfg: Any, runtime: Runtime, kind: Kind, *, fetch: bool = False) -> Plan:
    """Check a config's components, and its numbers against its model and machine; look at no file of data.

    Args:
        kind: what the recipe trains on.
        fetch: the run begins now, so Qwen2's tokenizer, whose size is known, must be there.

    Raises:
        UserError: naming the key.
    """
    _check_best(cfg.checkpoint.best, kind.measures)
    if cfg.global_batch_size % runtime.data_world_size:
        raise UserError(
            f"key global_batch_size: {cfg.global_batch_size} {kind.rows} do not divide among "
            f"{runtime.data_world_size} processes."
        )
    loss = _build_loss(cfg.loss, kind)
    if cfg.recipe not in DEFAULT_INIT_RECIPES:  # there is no origin whose they could be
        for key in ("model", "tokenizer"):
            if getattr(cfg, key) is None:
                raise UserError(f"key {key}: no component chosen. See: plmtune ls {key}")
    tokenizer = _find_tokenizer(cfg.tokenizer, fetch=fetch)
    vocab_size = tokenizer.vocab_size if tokenizer else QWEN2_ROWS
    model = _on_meta(cfg.model, vocab_size) if cfg.model else None
    _settle_seq_len(cfg, model, runtime)
    if model is not None and cfg.seq_len > model.max_seq_len:
        raise UserError(
            f"key seq_len: {cfg.seq_len} exceeds the model's max_seq_len ({model.max_seq_len}). "
            f"Give seq_len={model.max_seq_len} or less."
        )
    if model is not None and not cfg.resume:  # a model or tokenizer that is not init_from's explains what follows
        find_init_checkpoint(cfg, model, tokenizer, weights=False)
    tokens_per_step = cfg.global_batch_size * cfg.seq_len
    trained, optimizer = _trained(cfg, model, vocab_size, runtime.strategy)
    phases = [resolve_phase(index, phase, tokens_per_step) for index, phase in enumerate(getattr(cfg, "phases", ()))]
    epochs = None
    if not phases:
        if kind.epochs is None:
            raise UserError(
                "key phases: is empty, so nothing says how long to train. Give it, as in: "
                "plmtune run pretrain data.paths=my_text/ phases='[{name: main, tokens: 2B}]'. "
                "(plmtune run demo is a small run with all that it needs.)"
            )
        epochs = kind.epochs if cfg.epochs is None else cfg.epochs
    num_steps = sum(phase.steps for phase in phases) or _MANY_STEPS
    build_scheduler(cfg, optimizer, num_steps, tokens_per_step)
    check_installed(cfg.logger)
    if cfg.runtime.compile:
        check_compiler(runtime.device, "key runtime.compile", "runtime.compile=false")
    if cfg.optimizer.name in COMPILED:
        check_compiler(runtime.device, f"key optimizer: {cfg.optimizer.name} compiles its step", "optimizer=adamw")
    # A pair whose answers are compared in three contexts (ARIES) may fill three rows.
    rows = cfg.global_batch_size // runtime.data_world_size * (3 if getattr(loss, "contexts", False) else 1)
    estimated = None
    if model is not None:
        with without_dynamo():
            estimated = estimate(
                trained,
                optimizer=cfg.optimizer.name,
                seq_len=kind.sequences * cfg.seq_len,
                micro_batch_size=min(cfg.micro_batch_size, rows),
                masked=kind.sequences > 1,
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
    guard = Guard(**vars(cfg.guard))
    return Plan(tokenizer, model, loss, phases, tokens_per_step, guard, estimated, cfg.seq_len, epochs)


def _settle_seq_len(cfg: Any, model: Any, runtime: Runtime) -> None:
    """Fill in `seq_len` where it is left out."""
    if cfg.seq_len is not None:
        return
    cfg.seq_len = SEQ_LEN
    if model is not None and model.max_seq_len < SEQ_LEN:
        cfg.seq_len = model.max_seq_len
        if runtime.is_main:
            terminal.echo(f"seq_len={cfg.seq_len}, as the model reads no more tokens at once", err=True)


def _check_best(best: str | None, measures: Sequence[str]) -> None:
    if best is not None and not any(re.fullmatch(pattern, best) for pattern in measures):
        near = did_you_mean(best, [pattern for pattern in measures if re.fullmatch(r"[\w/]+", pattern)])
        raise UserError(f"key checkpoint.best: a validation does not measure {best}.{near}")


def _build_loss(chosen: Component | None, kind: Kind) -> Any:
    loss = build("loss", chosen)
    assert chosen is not None
    if loss_kind(loss) not in kind.losses:
        fitting = [n for n in describe()["loss"] if getattr(load("loss", n), "data_kind", "tokens") in kind.losses]
        raise UserError(f"key loss: {chosen.name} is not for this recipe, which takes {', '.join(fitting)}.")
    return loss


def loss_kind(loss: Any) -> str:
    """What a loss is of: tokens, refinements or comparisons."""
    return str(getattr(loss, "data_kind", "tokens"))


def _find_tokenizer(chosen: Component | None, *, fetch: bool) -> Any:
    if chosen is None or (not fetch and chosen == Component("tokenizer", "qwen2", {"path": None})):
        return None
    return build("tokenizer", chosen)


def _on_meta(chosen: Component | None, vocab_size: int) -> Any:
    with torch.device("meta"):
        return build("model", chosen, vocab_size=vocab_size)


def _trained(cfg: Any, model: Any, vocab_size: int, strategy: str) -> tuple[nn.Module, Any]:
    """The model as it will be trained, with adapters or rounding, on the meta device, and its optimizer.

    Where the config leaves the model to a run that is not there yet, its numbers are right if they are for any model.
    """
    names = [cfg.model] if cfg.model else [Component("model", name, {}) for name in sorted(describe()["model"])]
    refused: UserError | None = None
    for chosen in names:
        try:
            # What adapters and rounding change is a model of its own: the run changes the plan's later.
            trained = model if model is not None and not hasattr(cfg, "peft") else _on_meta(chosen, vocab_size)
            if hasattr(cfg, "peft"):
                check_finetuning(cfg, trained, strategy)
                if cfg.peft:
                    build("peft", cfg.peft, model=trained)
            with without_dynamo():
                return trained, build("optimizer", cfg.optimizer, model=trained)
        except UserError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def build_scheduler(cfg: Any, optimizer: Any, num_steps: int, tokens_per_step: int) -> Any:
    return build("scheduler", cfg.scheduler, optimizer=optimizer, num_steps=num_steps, tokens_per_step=tokens_per_step)


def check_schedule(cfg: Any, num_steps: int, tokens_per_step: int) -> None:
    """Refuse a schedule that does not fit into as many steps as the data has, before anything is made.

    Raises:
        UserError: naming the setting.
    """
    build_scheduler(cfg, torch.optim.SGD([torch.zeros(1)]), num_steps, tokens_per_step)


# --- what the config names: data, templates, tasks ---------------------------------------------------------------


def find_sources(data: Component | None) -> dict[str, Any]:
    """Find the sources of the data by name; nothing of them is read.

    Raises:
        UserError: for none, or a path that is not there.
    """
    return named_sources(build("data", data))


def open_data(planned: Plan, data: Component | None, kinds: tuple[type, ...]) -> None:
    """Find the sources of the data, of the kind that the recipe trains on, and check the phases' mixes against them.

    Raises:
        UserError: for a path that is not there, data of another kind, or a mix of sources that are not there.
    """
    planned.sources = find_sources(data)
    for name, source in planned.sources.items():
        refuse_other_kinds(name, source, kinds)
        if isinstance(source, Prepared) and planned.tokenizer is not None:
            Shards.open(
                source.directory,
                tokenizer_fingerprint=planned.tokenizer.fingerprint,
                vocab_size=planned.tokenizer.vocab_size,
                verify=False,
            )
    try:
        for phase in planned.phases:
            check_mix(phase, sorted(planned.sources), planned.num_sequences(phase))
    except ValueError as error:
        raise UserError(f"key phases: {str(error).rstrip('.')}.") from error


def open_templates(planned: Plan, name: str | None, refinement: str | None) -> None:
    """Find the chat template and that of refinements, and try the first with the tokenizer where there is one.

    Raises:
        UserError: if there is none, or it cannot be used.
    """
    if planned.tokenizer is not None:
        planned.template = find_template(name, planned.tokenizer)
    elif name is not None:
        template_source(name)
    planned.refinement = find_refinement(refinement)


def open_evaluations(planned: Plan, tasks: Any, runtime: Runtime, *, template: str | None = None) -> None:
    """Find the tasks of `eval.tasks`, before a run begins that would want them after hours.

    Raises:
        UserError: for tasks that there are not, or a model that no process holds whole.
    """
    if not tasks.tasks:
        return
    if runtime.strategy in ("fsdp", "hsdp"):
        raise UserError(
            f"key eval.tasks: tasks are measured on whole models, not under {runtime.strategy}: strategy=ddp, or "
            "plmtune eval afterwards."
        )
    most = tasks.max_new_tokens
    if most is not None and planned.model is not None and most >= planned.model.max_seq_len:
        raise UserError(
            f"key eval.max_new_tokens: {most} must be below the model's max_seq_len ({planned.model.max_seq_len}), "
            "which holds the question, too."
        )
    from plmtune.evaluation.during import Evaluations  # lm-eval takes seconds to import

    planned.evaluations = Evaluations(tasks, planned.tokenizer, template=template)


def does_not_fit(estimated: Estimate | None) -> str:
    """A sentence if there is less memory than a run needs, else empty."""
    if estimated is None or estimated.fits:
        return ""
    return (
        f"this run does not fit here: it needs {show_bytes(estimated.total)}, and {show_bytes(estimated.available)} "
        "are free. To start it anyway: --force"
    )
