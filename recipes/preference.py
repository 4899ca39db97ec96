"""Preference training: on the pairs of the data, or in rounds that generate, score and select their own (ARIES)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plmtune.config.compose import build
from plmtune.config.schema import PreferenceConfig as Config
from plmtune.data.conversations import Conversations
from plmtune.data.examples import open_pairs
from plmtune.data.preferences import Preferences
from plmtune.evaluation.training_tasks import open_evaluations
from plmtune.io.terminal import echo
from plmtune.preference.batches import open_batches
from plmtune.preference.comparisons import ComparisonBatch
from plmtune.preference.reference import ReferenceModel
from plmtune.preference.refinement import find_refinement
from plmtune.preference.rounds.rollout import policy_rollout
from plmtune.preference.rounds.rounds import check_rounds, open_rounds
from plmtune.preference.scorer import AnswerScorer, PreferenceMetrics
from plmtune.training import launcher
from plmtune.training import preflight as checks
from plmtune.training.finetune_model import load_init_model, setup_model
from plmtune.training.guard import Guard, handle_skip
from plmtune.training.init_from import find_init_checkpoint
from plmtune.training.monitor import RunMonitor, is_due, learning_rates
from plmtune.training.plot import draw_curves
from plmtune.training.preflight import TrainingPlan
from plmtune.training.resume_checks import config_digest
from plmtune.training.run_setup import open_run
from plmtune.training.runtime import Runtime
from plmtune.training.trainer_state import TrainerState

CONFIG = "dpo"  # conf/dpo.yaml
METRICS = (  # of a validation, as patterns
    "validation_loss",
    "validation/accuracy",
    "validation/margin",
    r"validation/(given_(rejected|chosen)/)?(logratio_margin|accuracy|margin)",
    r"validation/(given_(rejected|chosen)/)?(rewards|log_probs)/(chosen|rejected)",
)


def plan(cfg: Config, runtime: Runtime, *, fetch: bool = False) -> TrainingPlan:
    """Check components and numbers of a config, and plan its steps and memory; look at no file of its data."""
    loss = checks.build_loss(cfg.loss, ["comparisons"])
    models = checks.build_finetuned(cfg, runtime, fetch=fetch)
    return checks.plan_training(
        cfg,
        runtime,
        loss,
        *models,
        metrics=METRICS,
        unit="pairs",
        epochs=cfg.epochs,
        contexts=3 if loss.contexts else 1,  # a pair that is compared in three contexts (ARIES)
        row_length=2,  # a prompt with two answers
    )


def preflight(cfg: Config, runtime: Runtime, *, fetch: bool) -> TrainingPlan:
    """Check all that a run would refuse before it begins."""
    planned = plan(cfg, runtime, fetch=fetch)
    checks.check_sources(cfg.data, (Conversations, Preferences) if cfg.rounds else (Preferences,), planned)
    planned.template = checks.find_chat_template(cfg.chat.template, planned.tokenizer)
    planned.refinement = find_refinement(cfg.refinement.template)
    check_rounds(cfg.rounds, build_reward(cfg), cfg.selection, runtime.strategy)
    planned.evaluations = open_evaluations(cfg.eval, planned, runtime.strategy, template=cfg.chat.template)
    return planned


def build_reward(cfg: Config) -> Any:
    """The reward of the rounds; None: pairs are selected by rules alone."""
    return build("reward", cfg.reward) if cfg.reward else None


class Preference:
    """One run: a stage on the pairs of the data, or one for each round, with optimizer and schedule of its own."""

    def __init__(self, cfg: Config, plan: TrainingPlan, runtime: Runtime) -> None:
        self.cfg, self.plan, self.tasks, self.runtime = cfg, plan, plan.evaluations, runtime
        self.tokenizer, saved = plan.tokenizer, TrainerState.of(cfg)
        # A run with a checkpoint of its own needs no other one, unless it holds adapters alone.
        init_from = cfg.init_from if cfg.peft or not saved.checkpoint else None
        init = find_init_checkpoint(init_from, plan.model, plan.tokenizer, cfg.scheduler)
        assert plan.template is not None
        self.loss, self.template, self.refinement = plan.loss, plan.template, plan.refinement
        self.tokenizer.chat_template = self.template.source  # what the model learns is saved with it
        sources = plan.sources
        self.open_batches = partial(
            open_batches,
            template=self.template,
            refinement=self.refinement,
            loss=self.loss,
            runtime=runtime,
            seq_len=plan.seq_len,
            rope_key=plan.model.rope_key,
            global_batch_size=cfg.global_batch_size,
            micro_batch_size=cfg.micro_batch_size,
            seed=cfg.seed,
            epochs=cfg.epochs,
            holdout=cfg.chat.holdout,
        )
        if cfg.rounds:
            self.rounds, self.notes = open_rounds(
                sources, cfg.chat, cfg.selection, build_reward(cfg), per_round=cfg.prompts_per_round, seed=cfg.seed
            )
        else:
            pairs, self.notes = open_pairs(sources, skip_bad=cfg.chat.skip_bad)
            self.data, self.stage_notes = self.open_batches(pairs)
            checks.check_schedule(cfg.scheduler, self.data.num_steps, plan.tokens_per_step)
        self.finetune_model = setup_model(
            plan.model, cfg, runtime, self.tokenizer, init, saved.checkpoint, score_head=self.loss.scalar_head
        )
        # From here on the directory exists; what a person can get wrong has been found by now.
        self.fingerprints = {name: source.fingerprint() for name, source in sources.items()}
        self.fingerprints["the chat template"] = self.template.fingerprint
        self.fingerprints["the refinement template"] = self.refinement.fingerprint
        self.run = open_run(cfg, runtime, self.fingerprints, saved.state)
        self.model, self.trained = self.finetune_model.model, self.finetune_model.trained
        self.checkpoints = self.finetune_model.open_checkpoints(self.run.checkpoints, cfg.checkpoint)
        self.restore_from = saved.checkpoint  # until the stage has its optimizer
        self.step = saved.step
        self.first: int = saved.state.get("first", 0)  # step at which the stage begins
        self.round: int = saved.state.get("round", min(cfg.rounds, 1))
        self.validation_loss: float = saved.metrics.get("validation_loss", float("nan"))
        self.order: str = saved.state.get("order", "")  # a running hash of the comparisons, in their order
        self.scorer = AnswerScorer(self.model, self.trained, self.loss, runtime)
        self.reference = ReferenceModel(
            self.finetune_model,
            cfg.reference,
            self.scorer,
            partial(load_init_model, cfg, plan.model, self.tokenizer, runtime),
            self.checkpoints,
            self.run.path,
            digest=saved.state.get("reference", ""),
            first_digest=saved.state.get("first_reference", ""),
        )
        self.guard = Guard(**vars(cfg.guard))
        self.guard.load_state_dict(saved.state.get("guard", {}))

    def train(self) -> float | None:
        """Train to the end; return the last validation loss, or None if a signal stopped it."""
        cfg = self.cfg
        steps = self.first + (0 if cfg.rounds else self.data.num_steps)
        with launcher.open_monitor(cfg, self.run, self.runtime, steps, self.step) as monitor:
            notes = (*self.finetune_model.notes, *self.plan.estimate.lines(), *self.notes)
            monitor.start(*self.runtime.reasons, *notes)
            if not cfg.rounds:
                return self.train_stage(monitor)
            for number in range(self.round, cfg.rounds + 1):
                if self.step == self.first and not self.begin_round(monitor, number):
                    return None
                self.round = number
                self.data, self.stage_notes = self.open_batches(self.rounds.pairs(self.run.path, number))
                monitor.message(f"round {number} of {cfg.rounds}")
                if self.train_stage(monitor) is None:
                    return None
                self.first = self.step
            return self.validation_loss if self.begin_round(monitor, cfg.rounds + 1) else None

    def begin_round(self, monitor: RunMonitor, number: int) -> bool:
        """Evaluate the policy, then make the pairs of the round, if there is another one; False if a signal came."""
        rollout = policy_rollout(
            self.model,
            self.tokenizer,
            self.template,
            self.refinement,
            self.cfg.generation,
            seed=self.cfg.seed,
            progress=monitor.answers,
            stop=monitor.should_stop,
        )
        last = number > self.cfg.rounds
        return self.rounds.begin(self.run.path, number, rollout, monitor, step=self.step, make_pairs=not last)

    def train_stage(self, monitor: RunMonitor) -> float | None:
        """Train on the pairs of `data` from `step`; return the last validation loss, or None if a signal stopped it."""
        cfg, plan, runtime, run, data, tasks = (
            self.cfg, self.plan, self.runtime, self.run, self.data, self.tasks
        )  # fmt: skip
        monitor.num_steps = num_steps = self.first + data.num_steps
        run.update(num_steps=num_steps, parameters=plan.estimate.parameters)
        for line in (*self.stage_notes, data.describe()):
            monitor.message(line)
        self.optimizer = build("optimizer", cfg.optimizer, model=self.model)
        self.scheduler = checks.build_scheduler(cfg.scheduler, self.optimizer, data.num_steps, plan.tokens_per_step)
        self.trained_parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        if self.step == self.first:
            self.guard.reset()
            self.restore_from = None
        with monitor.paused():
            reference = self.reference.log_probs(
                data, self.round, first_step=self.first, step=self.step, cache=cfg.reference_cache, monitor=monitor
            )
        if self.restore_from:
            self.checkpoints.restore(self.restore_from, **self.trained_parts)
            self.restore_from = None
        launcher.warm_up(runtime, lambda: self._warmup_step(reference))
        # A run that was stopped while it measured its tasks measures them first.
        if tasks and not tasks.catch_up(self.model, runtime, run.path, self.step, num_steps, monitor):
            monitor.stopped(self.step)
            return None
        for index, batches in data.iterate(self.step - self.first):
            values = self.train_step(index, batches, reference)
            self.step = self.first + index + 1
            last = self.step == num_steps
            if last or is_due(self.step, cfg.log_every) or self.guard.reason:
                monitor.log(self.step, values)
            if last or self.guard.reason:
                self.checkpoints.check_weights(self.model, self.step, since=self.step - bool(self.guard.reason))
            if self.guard.reason:
                locate = partial(data.locate, index)
                handle_skip(self.guard, run, self.step, monitor.message, locate, self.save_checkpoint)
            metrics: dict[str, float] = {}
            if last or is_due(self.step, cfg.validation.every):
                metrics = monitor.measure(self.step, partial(self.validate, reference))
                self.validation_loss = metrics.get("validation_loss", self.validation_loss)
            measured = True
            if tasks and tasks.due(self.step, num_steps):
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

    def train_step(self, index: int, batches: list[ComparisonBatch], reference: Tensor) -> dict[str, Any]:
        """Make one optimizer step on this rank's comparisons of a global batch; return what is logged of it.

        Args:
            reference (Tensor): log-probabilities of every answer of the stage under the reference, [comparisons, 2].
        """
        runtime, metrics = self.runtime, PreferenceMetrics(self.runtime.device)
        pairs = [batch for batch in batches if not batch.kl_only]
        rates = learning_rates(self.optimizer)
        with self.finetune_model.fake_quant_frozen():
            kl = self.scorer.mean_kl(batches, reference)
            # The mean over pairs, not over micro-batches: packed rows differ in what they hold.
            (num_pairs,) = runtime.sum(float(sum(batch.num_pairs for batch in pairs)))
            losses: list[Tensor] = []
            for number, batch in enumerate(pairs):
                with runtime.accumulate(self.trained, first=number == 0, last=number == len(pairs) - 1):
                    compared = self.scorer.compare(batch, reference, kl)
                    loss = self.loss(compared).sum()
                    (loss * (runtime.gradient_scale / num_pairs)).backward()
                metrics.add(compared, self.loss)
                losses.append(loss.detach())
        norm = runtime.clip_grad_norm(self.model, self.cfg.max_grad_norm)
        # The only wait for the device. All ranks get equal numbers, so their guards reach equal decisions.
        total, norms = runtime.sum(torch.stack(losses).sum(), norm)
        values = {"loss": total / num_pairs, "grad_norm": norms / runtime.gradient_scale}
        if self.guard.accepts(values["loss"], values["grad_norm"], losses):
            self.optimizer.step()
        else:
            values["skipped"] = self.guard.skipped
        self.scheduler.step()  # also after a skipped update: the schedule is a function of the step
        self.optimizer.zero_grad(set_to_none=True)
        self.order = self.data.order_digest(self.order, index)
        seen = (self.first + index + 1) * self.cfg.global_batch_size
        stage = {"round": self.round} if self.cfg.rounds else {}
        means = metrics.means(runtime, scores=self.loss.scalar_head)
        return {**values, **rates, **means, "pairs": seen, **stage}

    @torch.no_grad()
    def validate(self, reference: Tensor) -> dict[str, float]:
        """Loss a held-out pair; how often, and by how much, its chosen answer is preferred."""
        self.model.eval()
        batches, metrics = list(self.data.validation()), PreferenceMetrics(self.runtime.device)
        kl, nats, pairs = self.scorer.mean_kl(batches, reference), torch.zeros((), device=self.runtime.device), 0
        for batch in (batch for batch in batches if not batch.kl_only):
            compared = self.scorer.compare(batch, reference, kl)
            metrics.add(compared, self.loss)
            nats, pairs = nats + self.loss(compared).sum(), pairs + batch.num_pairs
        self.model.train()
        total, count = self.runtime.sum(nats, float(pairs))
        if not count:
            return {}
        means = metrics.means(self.runtime, scores=self.loss.scalar_head)
        return {"validation_loss": total / count, **{f"validation/{name}": value for name, value in means.items()}}

    def save_checkpoint(self, metrics: dict[str, float], *, wait: bool) -> None:
        self.checkpoints.save(
            self.step,
            **self.trained_parts,
            state={
                "round": self.round,
                "first": self.first,
                "reference": self.reference.digest,
                "first_reference": self.reference.first_digest,
                "order": self.order,
                "guard": self.guard.state_dict(),
                "config": config_digest(self.cfg),
                "data": self.fingerprints,
            },
            metrics=metrics,
            wait=wait,
        )

    def _warmup_step(self, reference: Tensor) -> None:
        """A forward and a backward that change nothing."""
        batch = next(batch for batch in self.data.step(0) if not batch.kl_only)
        kl = torch.zeros((), device=self.runtime.device)
        self.loss(self.scorer.compare(batch, reference, kl)).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)


def report(run: Path, cfg: Config) -> None:
    """Draw the curves, and say how to use the model."""
    draw_curves(run / "metrics.jsonl", run / "curves.png")
    echo(f"curves: {run / 'curves.png'}")
    if build("loss", cfg.loss).scalar_head:
        echo(f"let it judge: plmtune run aries rounds=2 reward=reward_model reward.path={run}")
        return
    if cfg.rounds:
        echo(f"answers and pairs: plmtune data inspect {run / 'rounds' / '01' / 'chains.jsonl'}")
    echo(f'try it: plmtune generate {run} --chat --prompt "{cfg.sample.prompt or "Hello"}"')


def main(cfg: Config, *, dry_run: bool = False) -> float | None:
    """Run the recipe; returns the validation loss, which a sweeper can minimise. See `launcher.launch`."""
    return launcher.launch(cfg, preflight, Preference, report, dry_run=dry_run)
