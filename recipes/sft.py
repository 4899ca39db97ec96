"""Supervised fine-tuning: teach a model to answer, on phases of mixed conversations, packed and masked."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import plmtune
from plmtune.config.compose import build
from plmtune.config.schema import SftConfig as Config
from plmtune.data.batches import Batch
from plmtune.data.conversations import Conversations
from plmtune.data.examples import open_examples
from plmtune.data.order import Phase
from plmtune.data.preferences import Preferences
from plmtune.evaluation.training_tasks import open_evaluations
from plmtune.inference.sampling import complete
from plmtune.io.terminal import echo
from plmtune.preference.refinement import encode_pairs, find_refinement
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.message import Message
from plmtune.training import launcher
from plmtune.training import preflight as checks
from plmtune.training.ema import Ema
from plmtune.training.finetune_model import setup_model
from plmtune.training.guard import Guard, handle_skip
from plmtune.training.init_from import find_init_checkpoint
from plmtune.training.monitor import is_due, learning_rates
from plmtune.training.plot import draw_curves
from plmtune.training.preflight import TrainingPlan
from plmtune.training.resume_checks import config_digest
from plmtune.training.run_setup import open_batches, open_run
from plmtune.training.runtime import Runtime
from plmtune.training.teacher import TERMS
from plmtune.training.trainer_state import TrainerState

CONFIG = "sft"  # conf/sft.yaml
DATA: dict[str, tuple[type, ...]] = {"tokens": (Conversations,), "refinements": (Preferences,)}  # by kind of loss
METRICS = ("validation_loss", "ema_validation_loss")  # of a validation
EPOCHS = 3.0  # where the config gives neither epochs nor phases


def plan(cfg: Config, runtime: Runtime, *, fetch: bool = False) -> TrainingPlan:
    """Check components and numbers of a config, and plan its steps and memory; look at no file of its data."""
    loss = checks.build_loss(cfg.loss, DATA)
    models = checks.build_finetuned(cfg, runtime, fetch=fetch)
    epochs = None if cfg.phases else cfg.epochs or EPOCHS
    return checks.plan_training(cfg, runtime, loss, *models, metrics=METRICS, unit="rows", epochs=epochs)


def preflight(cfg: Config, runtime: Runtime, *, fetch: bool) -> TrainingPlan:
    """Check all that a run would refuse before it begins."""
    planned = plan(cfg, runtime, fetch=fetch)
    checks.check_sources(cfg.data, DATA[checks.data_kind(planned.loss)], planned)
    planned.template = checks.find_chat_template(cfg.chat.template, planned.tokenizer)
    planned.refinement = find_refinement(cfg.refinement.template)
    planned.evaluations = open_evaluations(cfg.eval, planned, runtime.strategy, template=cfg.chat.template)
    return planned


class Sft:
    """One run. Rows, their order and the schedule are pure functions of the data and the step, as in pretraining."""

    def __init__(self, cfg: Config, plan: TrainingPlan, runtime: Runtime) -> None:
        self.cfg, self.plan, self.tasks, self.runtime = cfg, plan, plan.evaluations, runtime
        self.tokenizer, saved = plan.tokenizer, TrainerState.of(cfg)
        # A run with a checkpoint of its own needs no other one, unless it holds adapters alone.
        init_from = cfg.init_from if cfg.peft or not saved.checkpoint else None
        init = find_init_checkpoint(init_from, plan.model, plan.tokenizer, cfg.scheduler)
        assert plan.template is not None
        self.loss, self.template = plan.loss, plan.template
        self.tokenizer.chat_template = self.template.source  # saved with the model, which learns it
        chat = {key: value for key, value in vars(cfg.chat).items() if key != "template"}
        refines = checks.data_kind(self.loss) == "refinements"
        examples = open_examples(
            plan.sources,
            self.template,
            seq_len=plan.seq_len,
            **chat,
            seed=cfg.seed,
            encode=partial(encode_pairs, refinement=plan.refinement) if refines else None,
            shown=runtime.is_main,
        )
        self.notes, self.fingerprints = examples.notes, examples.fingerprints
        if plan.epochs is not None:
            num_rows = sum(rows.num_rows for rows in examples.train.values())
            plan.phases = [Phase.over(plan.epochs, num_rows, cfg.global_batch_size)]
            why = "" if cfg.epochs else " (the default; epochs=N or phases=[...] give another budget)"
            self.notes.append(f"{checks.show_epochs(plan.epochs)}{why} of {num_rows:,} rows: {plan.num_steps:,} steps")
        checks.check_schedule(cfg.scheduler, plan.num_steps, plan.tokens_per_step)
        self.data = open_batches(cfg, runtime, examples.train, plan.phases, examples.held_out)
        self.finetune_model = setup_model(plan.model, cfg, runtime, self.tokenizer, init, saved.checkpoint)
        # From here on the directory exists; a user's mistakes have been found by now.
        self.run = open_run(cfg, runtime, self.fingerprints, saved.state)
        self.model, self.trained = self.finetune_model.model, self.finetune_model.trained
        self.optimizer = build("optimizer", cfg.optimizer, model=self.model)
        self.scheduler = checks.build_scheduler(cfg.scheduler, self.optimizer, plan.num_steps, plan.tokens_per_step)
        self.checkpoints = self.finetune_model.open_checkpoints(self.run.checkpoints, cfg.checkpoint)
        self.ema = Ema.of(self.model, cfg.ema.decay) if cfg.ema.decay is not None else None
        self.trained_parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        self.trained_parts |= {"ema": self.ema} if self.ema else {}
        if saved.checkpoint:
            self.checkpoints.restore(saved.checkpoint, **self.trained_parts)
        self.step = saved.step
        self.validation_loss: float = saved.metrics.get("validation_loss", float("nan"))
        self.order: str = saved.state.get("order", "")  # a running hash of the samples, in their order
        self.guard = Guard(**vars(cfg.guard))
        self.guard.load_state_dict(saved.state.get("guard", {}))
        self.teacher = plan.teacher
        if self.teacher:
            self.teacher.digest = saved.state.get("teacher", "")

    def train(self) -> float | None:
        """Train to the last step; return the last validation loss in nats a token, or None if a signal stopped it."""
        cfg, plan, runtime, run, tasks = self.cfg, self.plan, self.runtime, self.run, self.tasks
        # No FLOPs a token: how many tokens meet the vocabulary depends on the data.
        with launcher.open_monitor(
            cfg, run, runtime, plan.num_steps, self.step, tokens_per_step=plan.tokens_per_step
        ) as monitor:
            run.update(num_steps=plan.num_steps, parameters=plan.estimate.parameters)
            if self.teacher and not self.teacher.prepare(self.model, self.data, self.step, runtime, monitor):
                monitor.stopped(self.step)
                return None
            kernels = f"attention: {runtime.attention_kernels(self.model, seq_len=plan.seq_len, segments=True)}"
            notes = (*self.finetune_model.notes, *plan.estimate.lines(), *self.notes, self.data.describe())
            monitor.start(*runtime.reasons, kernels, *notes)
            launcher.warm_up(runtime, self._warmup_step)
            # A run that was stopped while it measured its tasks measures them first.
            if tasks and not tasks.catch_up(self.model, runtime, run.path, self.step, plan.num_steps, monitor):
                monitor.stopped(self.step)
                return None
            for index, batches in self.data.iterate(self.step):
                values = self.train_step(index, batches)
                self.step = index + 1
                last = self.step == plan.num_steps
                if last or is_due(self.step, cfg.log_every) or self.guard.reason:
                    monitor.log(self.step, values)
                if last or self.guard.reason:
                    self.checkpoints.check_weights(self.model, self.step, since=self.step - bool(self.guard.reason))
                if self.guard.reason:
                    locate = partial(self.data.locate, index)
                    handle_skip(self.guard, run, self.step, monitor.message, locate, self.save_checkpoint)
                metrics: dict[str, float] = {}
                if last or is_due(self.step, cfg.validation.every):
                    metrics = monitor.measure(self.step, self.validate_all)
                    self.validation_loss = metrics.get("validation_loss", self.validation_loss)
                measured = True
                if tasks and tasks.due(self.step, plan.num_steps):
                    measured = tasks.measure(self.model, runtime, run.path, self.step, monitor)
                stop = monitor.should_stop()
                if last or stop or is_due(self.step, cfg.checkpoint.every):
                    with monitor.paused():
                        self.save_checkpoint(metrics, wait=last or stop)
                elif self.checkpoints.has_failed(monitor.message):
                    self.save_checkpoint({}, wait=True)
                stop = stop and not (last and measured)
                if monitor.ends_after(self.step, saved=self.checkpoints.saved, stop=stop):
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
        losses: list[Tensor] = []
        with self.finetune_model.fake_quant_frozen():
            for number, batch in enumerate(batches):
                with runtime.accumulate(self.trained, first=number == 0, last=number == len(batches) - 1):
                    loss = self._loss(batch.to(runtime.device))
                    (loss * (runtime.gradient_scale / num_tokens)).backward()
                losses.append(loss.detach())
        norm = runtime.clip_grad_norm(self.model, self.cfg.max_grad_norm)
        # The only wait for the device. All ranks get equal numbers, so their guards reach equal decisions.
        distilled = self.teacher.take_terms() if self.teacher else ()
        total, norms, *terms = runtime.sum(torch.stack(losses).sum(), norm, *distilled)
        values = {"loss": total / num_tokens, "grad_norm": norms / runtime.gradient_scale}
        values |= {name: term / num_tokens for name, term in zip(TERMS, terms, strict=False)}
        if self.guard.accepts(values["loss"], values["grad_norm"], losses):
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model)
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
            if self.teacher and torch.is_grad_enabled():
                return self.teacher.loss(batch, states, targets, self.model)
            summed: Tensor = self.loss(states, self.model.head_weight, targets, **self.model.loss_settings)
        return summed

    def validate_all(self) -> dict[str, float]:
        """What `validate` measures, and the held-out loss of the averaged weights."""
        metrics = self.validate()
        if self.ema and metrics:
            with self.ema.applied(self.model):
                metrics["ema_validation_loss"] = self.validate()["validation_loss"]
        return metrics

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
            **self.trained_parts,
            state={
                "phase": self.data.phase(self.step - 1).name,
                "tokens": self._tokens(self.step),
                "order": self.order,
                "guard": self.guard.state_dict(),
                "config": config_digest(self.cfg),
                "data": self.fingerprints,
                **(self.teacher.state_dict() if self.teacher else {}),
            },
            metrics=metrics,
            wait=wait,
        )

    def _warmup_step(self) -> None:
        """A forward and a backward that change nothing."""
        batch = self.data.step(min(self.step, self.plan.num_steps - 1))[0]
        self._loss(batch.to(self.runtime.device)).backward()
        if self.teacher:
            self.teacher.take_terms()
        self.optimizer.zero_grad(set_to_none=True)


def report(run: Path, cfg: Config) -> None:
    """Draw the curves, and generate an answer with the finished checkpoint."""
    torch.use_deterministic_algorithms(False)  # sampling has no deterministic kernel on a GPU, and trains nothing
    draw_curves(run / "metrics.jsonl", run / "curves.png")
    if cfg.sample.max_new_tokens:
        model, tokenizer = plmtune.load(run)
        template = find_template(cfg.chat.template, tokenizer)
        ids = template.encode_prompt((Message("user", cfg.sample.prompt),)).tolist()
        text = complete(
            model,
            tokenizer,
            end_ids={template.end_id},
            seed=cfg.seed,
            **{**vars(cfg.sample), "prompt": ids},
        )
        echo(f"\nuser: {cfg.sample.prompt}\nassistant: {''.join(text)}\n")
    echo(f"curves: {run / 'curves.png'}")
    echo(f'try it: plmtune generate {run} --chat --prompt "{cfg.sample.prompt or "Hello"}"')


def main(cfg: Config, *, dry_run: bool = False) -> float | None:
    """Run the recipe; returns the validation loss, which a sweeper can minimise. See `launcher.launch`."""
    return launcher.launch(cfg, preflight, Sft, report, dry_run=dry_run)
