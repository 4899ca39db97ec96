"""Supervised fine-tuning: teach a model to answer, on phases of mixed conversations, packed and masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import plmtune
from plmtune import launch, plans
from plmtune.config import build
from plmtune.data.batches import Batch, Batches
from plmtune.data.chat_template import find_template
from plmtune.data.conversations import Conversations
from plmtune.data.examples import open_examples
from plmtune.data.order import Phase
from plmtune.data.preferences import Preferences
from plmtune.data.rows import Message
from plmtune.errors import UserError
from plmtune.generation import complete
from plmtune.identity import config_digest
from plmtune.origins import start_from
from plmtune.plans import Plan, build_scheduler, check_schedule, show_epochs
from plmtune.runs import open_run
from plmtune.schema import Sft as Config
from plmtune.student import Student, wake
from plmtune.terminal import echo
from plmtune.training import loop
from plmtune.training.checkpoint import newest_whole, read_document
from plmtune.training.plot import draw_curves
from plmtune.training.progress import Watch
from plmtune.training.runtime import Runtime

CONFIG = "sft"  # conf/sft.yaml
KIND = plans.Kind(
    losses={"tokens": (Conversations,), "refinements": (Preferences,)},
    measures=("validation_loss",),
    epochs=3.0,
    rows="rows",
)


def preflight(cfg: Config, runtime: Runtime, *, fetch: bool) -> Plan:
    """Check the config and find what it names: all that a run would refuse before it begins."""
    planned = plans.plan(cfg, runtime, KIND, fetch=fetch)
    plans.open_data(planned, cfg.data, KIND.losses[plans.loss_kind(planned.loss)])
    plans.open_templates(planned, cfg.chat.template, cfg.refinement.template)
    plans.open_evaluations(planned, cfg.eval, runtime, template=cfg.chat.template)
    return planned


class Sft:
    """One run. Rows, their order and the schedule are pure functions of the data and the step, as in pretraining."""

    def __init__(self, cfg: Config, plan: Plan, runtime: Runtime) -> None:
        self.cfg, self.plan, self.runtime, self.tokenizer = cfg, plan, runtime, plan.tokenizer
        whole = newest_whole(Path(str(cfg.run_dir)) / "checkpoints") if cfg.resume else None
        document = read_document(whole) if whole else {}
        saved = document.get("state", {})
        # A run with a checkpoint of its own no longer needs its origin, unless it holds adapters alone.
        origin = start_from(cfg, plan.model, plan.tokenizer) if cfg.peft or not saved else None
        assert plan.template is not None
        self.loss, self.template = plan.loss, plan.template
        self.tokenizer.chat_template = self.template.source  # what the model learns is saved with it
        refines = plans.loss_kind(self.loss) == "refinements"
        examples = open_examples(
            plan.sources,
            self.template,
            seq_len=plan.seq_len,
            train_on=cfg.chat.train_on,
            too_long=cfg.chat.too_long,
            skip_bad=cfg.chat.skip_bad,
            holdout=cfg.chat.holdout,
            seed=cfg.seed,
            refinement=plan.refinement if refines else None,
            shown=runtime.is_main,
        )
        self.notes, self.fingerprints = examples.notes, examples.fingerprints
        phases = plan.phases
        if plan.epochs is not None:
            num_rows = sum(rows.num_rows for rows in examples.train.values())
            phases = [Phase.over(plan.epochs, num_rows, cfg.global_batch_size)]
            why = "" if cfg.epochs else " (the default; epochs=N or phases=[...] give another budget)"
            self.notes.append(f"{show_epochs(plan.epochs)}{why} of {num_rows:,} rows: {phases[0].steps:,} steps")
        self.num_steps = sum(phase.steps for phase in phases)
        check_schedule(cfg, self.num_steps, plan.tokens_per_step)
        try:
            self.data = Batches(
                examples.train,
                phases,
                validation=examples.held_out,
                global_batch_size=cfg.global_batch_size,
                micro_batch_size=cfg.micro_batch_size,
                seed=cfg.seed,
                rank=runtime.data_rank,
                world_size=runtime.data_world_size,
                num_workers=cfg.num_workers,
            )
        except ValueError as error:  # names its setting
            raise UserError(str(error)) from error
        self.student: Student = wake(cfg, plan.model, self.tokenizer, runtime, origin, whole)
        # From here on the directory exists; what a person can get wrong has been found by now.
        self.run = open_run(cfg, runtime, self.fingerprints, saved)
        self.model, self.trained = self.student.model, self.student.trained
        self.optimizer = build("optimizer", cfg.optimizer, model=self.model)
        self.scheduler = build_scheduler(cfg, self.optimizer, self.num_steps, plan.tokens_per_step)
        self.checkpoints = self.student.checkpoints(self.run.checkpoints)
        self.step = self.first = 0
        self.losses: list[Tensor] = []  # of the latest step's micro-batches
        self.score: float = document.get("metrics", {}).get("validation_loss", float("nan"))
        if whole:
            self.checkpoints.restore(whole, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)
            self.step = document["step"]
        self.order: str = saved.get("order", "")  # a running hash of what was drawn, in which order
        self.guard = plan.guard
        if "guard" in saved:
            self.guard.load_state_dict(saved["guard"])

    def train(self) -> float | None:
        """Train to the last step; returns the last validation loss in nats a token, or None if it was stopped."""
        plan = self.plan
        # No FLOPs a token: how many of them meet the vocabulary depends on the data.
        with launch.watch(self, self.num_steps, tokens_per_step=plan.tokens_per_step) as watch:
            self._introduce(watch)
            launch.warm_up(self.runtime, self._trial)
            return loop.train(self, watch, self.num_steps, value=self.score)

    def update(self, index: int, batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step on this rank's micro-batches: the mean over all trained tokens of the global batch."""
        phase = self.data.phase(index)
        if index and phase is not self.data.phase(index - 1):
            self.guard.forget()  # other text, other norms
        with self.student.rounded_once():
            values = loop.update(self, batches, float(sum(batch.num_valid for batch in batches)), self._loss)
        self.order = self.data.order_digest(self.order, index)
        return {**values, "tokens": self._tokens(index + 1), "phase": phase.name}

    def _tokens(self, steps: int) -> int:
        """Tokens of the first steps' rows; the last step of epochs may have fewer rows."""
        return self.data.order.num_drawn_before(steps) * self.plan.seq_len

    def _loss(self, batch: Batch) -> Tensor:
        """Summed loss of a micro-batch. Only what is trained on meets the vocabulary."""
        with self.runtime.autocast():
            hidden = self.trained(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)  # [b, s, d]
            states, targets = batch.counted(hidden)
            summed: Tensor = self.loss(states, self.model.head_weight, targets)
        return summed

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out loss in nats a trained token."""
        self.model.eval()
        nats, count = torch.zeros((), dtype=torch.float64, device=self.runtime.device), 0
        for batch in self.data.validation(self.cfg.validation.tokens):
            nats += self._loss(batch.to(self.runtime.device))
            count += batch.num_valid
        self.model.train()
        total, tokens = self.runtime.sum(nats, float(count))
        return {"validation_loss": total / tokens} if tokens else {}

    def save_checkpoint(self, metrics: dict[str, float], *, wait: bool) -> None:
        self.checkpoints.save(
            self.step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state={
                "phase": self.data.phase(self.step - 1).name,
                "tokens": self._tokens(self.step),
                "order": self.order,
                "guard": self.guard.state_dict(),
                "config": config_digest(self.cfg),
                "data": self.fingerprints,
            },
            metrics=metrics,
            wait=wait,
        )

    def _introduce(self, watch: Watch) -> None:
        watch.message(f"run: {self.run.path}" + (f", resuming after step {self.step}" if self.step else ""))
        kernels = self.runtime.attention_kernels(self.model, seq_len=self.plan.seq_len, segments=True)
        reasons = [*self.runtime.reasons, f"attention: {kernels}"]
        for line in (*reasons, *self.student.notes, *self.plan.estimate.lines(), *self.notes, self.data.describe()):
            watch.message(line)

    def _trial(self) -> None:
        """A forward and a backward that change nothing."""
        batch = self.data.step(min(self.step, self.num_steps - 1))[0]
        self._loss(batch.to(self.runtime.device)).backward()
        self.optimizer.zero_grad(set_to_none=True)


def report(run: Path, cfg: Config) -> None:
    """Draw the curves, and let the finished checkpoint answer something, for a person to judge."""
    torch.use_deterministic_algorithms(False)  # sampling has no deterministic kernel on a GPU, and trains nothing
    draw_curves(run / "metrics.jsonl", run / "curves.png")
    if cfg.sample.max_new_tokens:
        model, tokenizer = plmtune.load(run)
        template = find_template(cfg.chat.template, tokenizer)
        text = complete(
            model,
            tokenizer,
            template.encode_prompt((Message("user", cfg.sample.prompt),)).tolist(),
            end_ids={template.end_id},
            max_new_tokens=cfg.sample.max_new_tokens,
            temperature=cfg.sample.temperature,
            top_p=cfg.sample.top_p,
            seed=cfg.seed,
        )
        echo(f"\nuser: {cfg.sample.prompt}\nassistant: {''.join(text)}\n")
    echo(f"curves: {run / 'curves.png'}")
    echo(f'try it: plmtune generate {run} --chat --prompt "{cfg.sample.prompt or "Hello"}"')


def main(cfg: Config, *, dry_run: bool = False) -> float | None:
    """Run the recipe; returns the validation loss, which a sweeper can minimise.

    Raises:
        SystemExit: with EXIT_STOPPED if a signal stopped it; it can be resumed.
    """
    return launch.launch(cfg, preflight, Sft, report, dry_run=dry_run)
