"""Supervised fine-tuning: teach a model to answer, on phases of mixed conversations, packed and masked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import plmtune
from plmtune.config.compose import build
from plmtune.config.schema import SftConfig as Config
from plmtune.data.batches import Batch, Batches
from plmtune.data.conversations import Conversations
from plmtune.data.examples import open_examples
from plmtune.data.order import Phase
from plmtune.data.preferences import Preferences
from plmtune.errors import UserError
from plmtune.evaluation.training_tasks import open_evaluations
from plmtune.inference.sampling import complete
from plmtune.io.terminal import echo
from plmtune.preference.refinement import Refinement, encode_pairs, find_refinement
from plmtune.tokenizers.chat_template import ChatTemplate, find_template
from plmtune.tokenizers.message import Message
from plmtune.training import launcher
from plmtune.training import preflight as checks
from plmtune.training.finetune_model import FinetuneModel, setup_model
from plmtune.training.guard import Guard, handle_skip, sample_locations
from plmtune.training.init_from import find_init_checkpoint
from plmtune.training.monitor import RunMonitor, is_due, learning_rates
from plmtune.training.plot import draw_curves
from plmtune.training.preflight import TrainingPlan
from plmtune.training.resume_checks import config_digest
from plmtune.training.run_setup import open_run
from plmtune.training.runtime import Runtime
from plmtune.training.trainer_state import TrainerState

if TYPE_CHECKING:
    from plmtune.evaluation.during import Evaluations

CONFIG = "sft"  # conf/sft.yaml
DATA: dict[str, tuple[type, ...]] = {"tokens": (Conversations,), "refinements": (Preferences,)}  # by kind of loss
METRICS = ("validation_loss",)  # of a validation
EPOCHS = 3.0  # where the config gives neither epochs nor phases


def plan(cfg: Config, runtime: Runtime, *, fetch: bool = False) -> TrainingPlan:
    """Check components and numbers of a config, and plan its steps and memory; look at no file of its data."""
    checks.check_best_metric(cfg.checkpoint.best, METRICS)
    rows = checks.rows_per_process(cfg.global_batch_size, runtime.data_world_size, "rows")
    loss = checks.build_loss(cfg.loss, DATA)
    tokenizer, model, finetuned = checks.build_finetuned(cfg, runtime, fetch=fetch)
    assert cfg.seq_len is not None
    tokens_per_step = cfg.global_batch_size * cfg.seq_len
    phases = checks.resolve_phases(cfg.phases, tokens_per_step)
    checks.check_schedule(cfg.scheduler, sum(phase.steps for phase in phases), tokens_per_step)
    checks.check_packages(cfg, runtime.device)
    estimated = None
    if model is not None:
        estimated = checks.estimate_run(cfg, finetuned, runtime, rows=rows, seq_len=cfg.seq_len)
    epochs = None if phases else cfg.epochs or EPOCHS
    return TrainingPlan(tokenizer, model, loss, phases, tokens_per_step, cfg.seq_len, estimated, epochs)


@dataclass
class Inputs:
    """What a config names, found and checked before a weight is allocated or a text is read."""

    plan: TrainingPlan
    sources: dict[str, Any]
    template: ChatTemplate | None  # None: the tokenizer is not there yet
    refinement: Refinement
    evaluations: Evaluations | None  # None: there are no tasks to measure


def preflight(cfg: Config, runtime: Runtime, *, fetch: bool) -> Inputs:
    """Check all that a run would refuse before it begins."""
    planned = plan(cfg, runtime, fetch=fetch)
    sources = checks.find_sources(cfg.data)
    checks.check_sources(sources, DATA[checks.data_kind(planned.loss)], planned)
    return Inputs(
        planned,
        sources,
        checks.find_chat_template(cfg.chat.template, planned.tokenizer),
        find_refinement(cfg.refinement.template),
        open_evaluations(cfg.eval, planned.model, planned.tokenizer, runtime.strategy, template=cfg.chat.template),
    )


class Sft:
    """One run. Rows, their order and the schedule are pure functions of the data and the step, as in pretraining."""

    def __init__(self, cfg: Config, inputs: Inputs, runtime: Runtime) -> None:
        self.cfg, self.plan, self.tasks, self.runtime = cfg, inputs.plan, inputs.evaluations, runtime
        plan, self.tokenizer = inputs.plan, inputs.plan.tokenizer
        saved = TrainerState.latest(str(cfg.run_dir)) if cfg.resume else TrainerState()
        # A run with a checkpoint of its own needs no other one, unless it holds adapters alone.
        init_from = cfg.init_from if cfg.peft or not saved.checkpoint else None
        init = find_init_checkpoint(init_from, plan.model, plan.tokenizer, cfg.scheduler)
        assert inputs.template is not None
        self.loss, self.template = plan.loss, inputs.template
        self.tokenizer.chat_template = self.template.source  # saved with the model, which learns it
        refines = checks.data_kind(self.loss) == "refinements"
        examples = open_examples(
            inputs.sources,
            self.template,
            seq_len=plan.seq_len,
            train_on=cfg.chat.train_on,
            truncation=cfg.chat.truncation,
            skip_bad=cfg.chat.skip_bad,
            holdout=cfg.chat.holdout,
            seed=cfg.seed,
            encode=partial(encode_pairs, refinement=inputs.refinement) if refines else None,
            shown=runtime.is_main,
        )
        self.notes, self.fingerprints = examples.notes, examples.fingerprints
        phases = plan.phases
        if plan.epochs is not None:
            num_rows = sum(rows.num_rows for rows in examples.train.values())
            phases = [Phase.over(plan.epochs, num_rows, cfg.global_batch_size)]
            why = "" if cfg.epochs else " (the default; epochs=N or phases=[...] give another budget)"
            self.notes.append(f"{checks.show_epochs(plan.epochs)}{why} of {num_rows:,} rows: {phases[0].steps:,} steps")
        self.num_steps = sum(phase.steps for phase in phases)
        checks.check_schedule(cfg.scheduler, self.num_steps, plan.tokens_per_step)
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
        self.finetune_model: FinetuneModel = setup_model(
            plan.model,
            self.tokenizer,
            runtime,
            cfg.runtime,
            init=init,
            resumed=saved.checkpoint,
            seed=cfg.seed,
            peft=cfg.peft,
            quantization=cfg.quantization,
        )
        # From here on the directory exists; a user's mistakes have been found by now.
        self.run = open_run(cfg, runtime, self.fingerprints, saved.state)
        self.model, self.trained = self.finetune_model.model, self.finetune_model.trained
        self.optimizer = build("optimizer", cfg.optimizer, model=self.model)
        self.scheduler = checks.build_scheduler(cfg.scheduler, self.optimizer, self.num_steps, plan.tokens_per_step)
        self.checkpoints = self.finetune_model.open_checkpoints(self.run.checkpoints, cfg.checkpoint)
        if saved.checkpoint:
            self.checkpoints.restore(
                saved.checkpoint, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler
            )
        self.step = saved.step
        self.validation_loss: float = saved.metrics.get("validation_loss", float("nan"))
        self.order: str = saved.state.get("order", "")  # a running hash of the samples, in their order
        self.guard = Guard(**vars(cfg.guard))
        self.guard.load_state_dict(saved.state.get("guard", {}))
        self.losses: list[Tensor] = []  # of the latest step's micro-batches

    def train(self) -> float | None:
        """Train to the last step; return the last validation loss in nats a token, or None if a signal stopped it."""
        cfg, plan, runtime, run, tasks = self.cfg, self.plan, self.runtime, self.run, self.tasks
        # No FLOPs a token: how many tokens meet the vocabulary depends on the data.
        with launcher.open_monitor(
            cfg, run, runtime, self.num_steps, self.step, tokens_per_step=plan.tokens_per_step
        ) as monitor:
            run.update(num_steps=self.num_steps, parameters=plan.estimate.parameters)
            self._log_startup(monitor)
            launcher.warm_up(runtime, self._warmup_step)
            # A run that was stopped while it measured its tasks measures them first.
            if tasks and not tasks.catch_up(self.model, runtime, run.path, self.step, self.num_steps, monitor):
                monitor.stopped(self.step)
                return None
            for index, batches in self.data.iterate(self.step):
                values = self.train_step(index, batches)
                self.step = index + 1
                last = self.step == self.num_steps
                if last or is_due(self.step, cfg.log_every) or self.guard.reason:
                    monitor.log(self.step, values)
                if last or self.guard.reason:
                    self.checkpoints.check_weights(self.model, self.step, since=self.step - bool(self.guard.reason))
                if self.guard.reason:
                    handle_skip(
                        self.guard,
                        run,
                        self.step,
                        message=monitor.message,
                        locations=lambda: sample_locations(self.losses, partial(self.data.locate, self.step - 1)),
                        save=lambda: self.save_checkpoint({}, wait=True),
                    )
                metrics: dict[str, float] = {}
                if last or is_due(self.step, cfg.validation.every):
                    with monitor.paused():
                        metrics = self.validate()
                    if metrics:
                        monitor.log(self.step, metrics)
                    self.validation_loss = metrics.get("validation_loss", self.validation_loss)
                measured = True
                if tasks and tasks.due(self.step, self.num_steps):
                    measured = tasks.measure(self.model, runtime, run.path, self.step, monitor)
                stop = monitor.should_stop()
                if last or stop or is_due(self.step, cfg.checkpoint.every):
                    with monitor.paused():
                        self.save_checkpoint(metrics, wait=last or stop)
                elif failure := self.checkpoints.poll_save():
                    monitor.message(f"{failure}\nTrying once more, with the present state.")
                    self.save_checkpoint({}, wait=True)
                run.note_saved(self.checkpoints.saved)
                monitor.raise_failure()
                if stop and not (last and measured):
                    monitor.stopped(self.step)
                    return None
        return self.validation_loss

    def train_step(self, index: int, batches: list[Batch]) -> dict[str, Any]:
        """Make one optimizer step on this rank's micro-batches of a global batch; return its metrics."""
        runtime, phase = self.runtime, self.data.phase(index)
        if index and phase is not self.data.phase(index - 1):
            self.guard.reset()  # other text, other norms
        rates = learning_rates(self.optimizer)
        # The mean over trained tokens, not over micro-batches: packed rows differ in what they hold.
        (num_tokens,) = runtime.sum(float(sum(batch.num_valid for batch in batches)))
        self.losses = []
        with self.finetune_model.fake_quant_frozen():
            for number, batch in enumerate(batches):
                with runtime.accumulate(self.trained, first=number == 0, last=number == len(batches) - 1):
                    loss = self._loss(batch.to(runtime.device))
                    (loss * (runtime.gradient_scale / num_tokens)).backward()
                self.losses.append(loss.detach())
        norm = runtime.clip_grad_norm(self.model, self.cfg.max_grad_norm)
        # The only wait for the device. All ranks get equal numbers, so their guards reach equal decisions.
        total, norms = runtime.sum(torch.stack(self.losses).sum(), norm)
        values = {"loss": total / num_tokens, "grad_norm": norms / runtime.world_size}
        if self.guard.accepts(values["loss"], values["grad_norm"]):
            self.optimizer.step()
        else:
            values["skipped"] = self.guard.skipped
        self.scheduler.step()  # also after a skipped update: the schedule is a function of the step
        self.optimizer.zero_grad(set_to_none=True)
        self.order = self.data.order_digest(self.order, index)
        return {**values, **rates, "tokens": self._tokens(index + 1), "phase": phase.name}

    def _tokens(self, steps: int) -> int:
        """Tokens of the first steps' rows; the last step of epochs may have fewer rows."""
        return self.data.order.num_samples_seen(steps) * self.plan.seq_len

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

    def _log_startup(self, monitor: RunMonitor) -> None:
        monitor.message(f"run: {self.run.path}" + (f", resuming after step {self.step}" if self.step else ""))
        kernels = self.runtime.attention_kernels(self.model, seq_len=self.plan.seq_len, segments=True)
        reasons = [*self.runtime.reasons, f"attention: {kernels}"]
        for line in (
            *reasons,
            *self.finetune_model.notes,
            *self.plan.estimate.lines(),
            *self.notes,
            self.data.describe(),
        ):
            monitor.message(line)

    def _warmup_step(self) -> None:
        """A forward and a backward that change nothing."""
        batch = self.data.step(min(self.step, self.num_steps - 1))[0]
        self._loss(batch.to(self.runtime.device)).backward()
        self.optimizer.zero_grad(set_to_none=True)


def report(run: Path, cfg: Config) -> None:
    """Draw the curves, and generate an answer with the finished checkpoint."""
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
    return launcher.launch(cfg, preflight, Sft, report, dry_run=dry_run)
