"""What a config asks for, found out before a weight is allocated or a text is read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from plmtune.config import build
from plmtune.data.order import Phase
from plmtune.data.tokenizers import QWEN2_ROWS
from plmtune.errors import UserError, did_you_mean
from plmtune.registry import Component
from plmtune.runs import resolve_phase
from plmtune.training.estimate import Estimate, estimate
from plmtune.training.guard import Guard
from plmtune.training.runtime import Runtime
from plmtune.training.without_dynamo import without_dynamo
from plmtune.units import show_count

if TYPE_CHECKING:
    from plmtune.evaluation.during import Evaluations

# What the validation of each recipe measures; pretraining also sparsity/0, sparsity/1, ...
MEASURED = {
    "pretrain": ("validation_loss", "bits_per_byte"),
    "sft": ("validation_loss",),
    "preference": ("validation_loss", "validation/accuracy", "validation/margin"),
}


# Passes over the data of an SFT that says neither epochs nor phases.
DEFAULT_EPOCHS = 3.0


@dataclass
class Plan:
    """What a config asks for, known before a weight is allocated or a text is read."""

    tokenizer: Any
    model: Any  # on the meta device
    phases: list[Phase]
    tokens_per_step: int
    guard: Guard
    estimate: Estimate
    evaluations: Evaluations | None  # None: there are no tasks to measure
    epochs: float | None = None  # passes over the data, which says how many steps they are

    @property
    def num_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def lines(self) -> list[str]:
        rows = [
            f"phase {p.name}: {show_count(p.steps * self.tokens_per_step)} tokens, {p.steps:,} steps of "
            f"{show_count(self.tokens_per_step)} tokens"
            for p in self.phases
        ]
        if self.epochs is not None:
            rows.append(f"{show_epochs(self.epochs)}: the number of steps follows from the data")
        return [*self.estimate.lines(), *rows]


def show_epochs(epochs: float) -> str:
    return f"{epochs:g} epoch" + ("" if epochs == 1 else "s")


def check_numbers(cfg: Any, runtime: Runtime) -> None:
    """Check what can be checked without model and tokenizer.

    Raises:
        UserError: naming the key, for impossible numbers.
    """
    best, measured = cfg.checkpoint.best, MEASURED[cfg.recipe]
    if best not in (None, *measured) and not (cfg.recipe == "pretrain" and re.fullmatch(r"sparsity/\d+", str(best))):
        near = did_you_mean(str(best), measured)
        raise UserError(f"key checkpoint.best: a validation does not measure {best}.{near}")
    if cfg.recipe == "pretrain" and not cfg.phases:
        raise UserError(
            "key phases: is empty, so nothing says how long to train. Give it, as in: "
            "plmtune run pretrain data.paths=[my_text/] phases='[{name: main, tokens: 2B}]'. "
            "(plmtune run demo is a small run with all that it needs.)"
        )
    if cfg.recipe == "sft" and cfg.epochs is not None:
        if not 0 < cfg.epochs < math.inf:
            raise UserError(f"key epochs: must be above 0 and finite, not {cfg.epochs}.")
        if cfg.phases:
            raise UserError(
                f"key epochs: is {cfg.epochs:g}, and phases says how long to train as well. Give one of them: "
                "epochs=null, or phases=[]."
            )
    if cfg.global_batch_size % runtime.data_world_size:
        what = "pairs" if cfg.recipe == "preference" else "sequences"
        raise UserError(
            f"key global_batch_size: {cfg.global_batch_size} {what} do not divide among {runtime.data_world_size} "
            "processes."
        )


@without_dynamo()
def plan(cfg: Any, runtime: Runtime, *, dry: bool = False) -> Plan:
    """Check every number that can be checked without memory or data.

    Args:
        dry: nothing will be trained, so Qwen2's tokenizer, whose size is known, need not be at hand.

    Raises:
        UserError: naming the key, for impossible numbers.
    """
    check_numbers(cfg, runtime)
    dry = dry and cfg.tokenizer == Component("tokenizer", "qwen2", {"path": None})
    tokenizer = None if dry else build("tokenizer", cfg.tokenizer)
    with torch.device("meta"):
        model = build("model", cfg.model, vocab_size=tokenizer.vocab_size if tokenizer else QWEN2_ROWS)
    if cfg.seq_len > model.max_seq_len:
        raise UserError(
            f"key seq_len: {cfg.seq_len} exceeds the model's max_seq_len ({model.max_seq_len}). "
            f"Give seq_len={model.max_seq_len} or less."
        )
    tokens_per_step = cfg.global_batch_size * cfg.seq_len
    check_loss(cfg)
    try:
        watchman = Guard(**vars(cfg.guard))
    except ValueError as error:
        raise UserError(f"key guard: {error}") from error
    estimated = model
    if cfg.recipe != "pretrain" and cfg.peft:  # which changes a model in place, once its weights are there
        with torch.device("meta"):
            estimated = build("model", cfg.model, vocab_size=model.vocab_size)
        build("peft", cfg.peft, model=estimated)
    optimizer = build("optimizer", cfg.optimizer, model=estimated)
    phases: list[Phase] = []
    epochs = None
    if cfg.recipe == "preference" or (cfg.recipe == "sft" and not cfg.phases):
        epochs = DEFAULT_EPOCHS if cfg.epochs is None else cfg.epochs
    if epochs is None:  # else how many steps there are is known when the data is
        phases = [resolve_phase(index, phase, tokens_per_step) for index, phase in enumerate(cfg.phases)]
        build_scheduler(cfg, optimizer, sum(phase.steps for phase in phases), tokens_per_step)
    rows = cfg.global_batch_size // runtime.data_world_size
    # A row of preferences holds a prompt with two answers, and as many tokens as two of seq_len.
    sequences = (2 if cfg.recipe == "preference" else 1) * cfg.micro_batch_size
    return Plan(
        tokenizer,
        model,
        phases,
        tokens_per_step,
        watchman,
        estimate(
            estimated,
            optimizer=cfg.optimizer.name,
            seq_len=cfg.seq_len,
            micro_batch_size=sequences if cfg.recipe == "preference" else min(sequences, rows),
            micro_batches=-(-rows // cfg.micro_batch_size),
            world_size=runtime.world_size,
            strategy=runtime.strategy,
            shard_size=runtime.shard_size,
            background_saves=cfg.checkpoint.background,
            compute_dtype=runtime.compute_dtype,
            activation_checkpointing=cfg.runtime.activation_checkpointing,
            loss_chunk_rows=cfg.loss.settings.get("chunk_rows", 0),
            device=runtime.device,
        ),
        _evaluations(cfg, tokenizer, model.max_seq_len, runtime),
        epochs,
    )


def _evaluations(cfg: Any, tokenizer: Any, max_seq_len: int, runtime: Runtime) -> Evaluations | None:
    """Find the tasks of `eval.tasks`, before a run begins that would want them after hours."""
    if not cfg.eval.tasks:
        return None
    if runtime.strategy in ("fsdp", "hsdp"):
        raise UserError(
            f"key eval.tasks: tasks are measured on whole models, not under {runtime.strategy}: strategy=ddp, or "
            "plmtune eval afterwards."
        )
    most = cfg.eval.max_new_tokens
    if most is not None and most >= max_seq_len:
        raise UserError(
            f"key eval.max_new_tokens: {most} must be below the model's max_seq_len ({max_seq_len}), which holds the "
            "question, too."
        )
    from plmtune.evaluation.during import Evaluations  # lm-eval takes seconds to import

    return Evaluations(cfg.eval, tokenizer, template=None if cfg.recipe == "pretrain" else cfg.chat.template)


# What the losses of each recipe are of: all tokens, answers of pairs, or pairs compared.
_LOSSES = {"pretrain": ("tokens",), "sft": ("tokens", "refinements"), "preference": ("comparisons",)}


def check_loss(cfg: Any) -> None:
    """Refuse a loss that belongs to another recipe.

    Raises:
        UserError: naming it.
    """
    of = getattr(build("loss", cfg.loss), "of", "tokens")
    if of not in _LOSSES[cfg.recipe]:
        fitting = next(recipe for recipe, kinds in _LOSSES.items() if of in kinds)
        raise UserError(f"key loss: {cfg.loss.name} belongs to the recipe {fitting}, not {cfg.recipe}.")


def build_scheduler(cfg: Any, optimizer: Any, num_steps: int, tokens_per_step: int) -> Any:
    return build("scheduler", cfg.scheduler, optimizer=optimizer, num_steps=num_steps, tokens_per_step=tokens_per_step)


def check_schedule(cfg: Any, num_steps: int, tokens_per_step: int) -> None:
    """Refuse a schedule that does not fit into as many steps as the data has, before anything is made.

    Raises:
        UserError: naming the setting.
    """
    build_scheduler(cfg, torch.optim.SGD([torch.zeros(1)]), num_steps, tokens_per_step)
