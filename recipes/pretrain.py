"""Pretrain a model from scratch, or from `init_from`, on phases of mixed token shards."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import plmtune
from plmtune.config.compose import build
from plmtune.config.schema import PretrainConfig as Config
from plmtune.data.batches import Batch
from plmtune.data.prepare import open_sources
from plmtune.data.shards import open_windows
from plmtune.data.sources import Source
from plmtune.errors import UserError
from plmtune.evaluation.training_tasks import open_evaluations
from plmtune.inference.sampling import complete
from plmtune.io.terminal import echo
from plmtune.models.hf import run_state
from plmtune.models.hf_config import write_config
from plmtune.training import launcher
from plmtune.training import preflight as checks
from plmtune.training.checkpoint import Checkpoints
from plmtune.training.determinism import measure_cost
from plmtune.training.effective_dimension import EffectiveDimension
from plmtune.training.ema import Ema
from plmtune.training.guard import Guard, handle_skip
from plmtune.training.init_from import find_init_checkpoint
from plmtune.training.monitor import is_due, learning_rates
from plmtune.training.plot import draw_curves
from plmtune.training.preflight import TrainingPlan
from plmtune.training.resume_checks import config_digest, refuse_other_order
from plmtune.training.rounds import Rounds
from plmtune.training.run_setup import open_batches, open_run
from plmtune.training.runtime import Runtime
from plmtune.training.teacher import TERMS
from plmtune.training.trainer_state import TrainerState, best_checkpoint_notes, load_optimizer_state

CONFIG = "pretrain"  # conf/pretrain.yaml
METRICS = ("validation_loss", "ema_validation_loss", "bits_per_byte", r"(sparsity|effective_dimension)/\d+")  # patterns


def plan(cfg: Config, runtime: Runtime, *, fetch: bool = False) -> TrainingPlan:
    """Check components and numbers of a config, and plan its steps and memory; look at no file of its data."""
    if cfg.init and cfg.init_from:
        raise UserError(f"key init: the weights are those of init_from={cfg.init_from}. Leave one of the two out.")
    loss = checks.build_loss(cfg.loss, ["tokens"])
    tokenizer = checks.find_tokenizer(cfg.tokenizer, fetch=fetch)
    model = checks.build_on_meta(cfg.model, tokenizer)
    checks.check_seq_len(cfg.seq_len, model)
    if not cfg.resume:  # an init_from with another model or tokenizer explains what follows
        find_init_checkpoint(cfg.init_from, model, tokenizer, cfg.scheduler, weights=False)
    checks.check_optimizer(cfg.optimizer, model)
    if not cfg.phases:
        raise UserError(
            "key phases: is empty, so nothing says how long to train. Give it, as in: "
            "plmtune run pretrain data.paths=my_text/ phases='[{name: main, tokens: 2B}]'. "
            "(plmtune run demo is a small run with all that it needs.)"
        )
    return checks.plan_training(cfg, runtime, loss, tokenizer, model, model, metrics=METRICS, unit="sequences")


def preflight(cfg: Config, runtime: Runtime, *, fetch: bool) -> TrainingPlan:
    """Check all that a run would refuse before it begins."""
    planned = plan(cfg, runtime, fetch=fetch)
    checks.check_sources(cfg.data, (Source,), planned)
    planned.evaluations = open_evaluations(cfg.eval, planned, runtime.strategy)
    return planned


class Pretrain:
    """One run. The order of the data and the schedule are pure functions of the step, so any step can be resumed."""

    def __init__(self, cfg: Config, plan: TrainingPlan, runtime: Runtime) -> None:
        self.cfg, self.plan, self.tasks, self.runtime = cfg, plan, plan.evaluations, runtime
        self.tokenizer, saved = plan.tokenizer, TrainerState.of(cfg)
        init_from = None if saved.checkpoint else cfg.init_from  # a resumed run needs no other checkpoint
        init = find_init_checkpoint(init_from, plan.model, plan.tokenizer, cfg.scheduler)
        self.skip: dict[str, int] = saved.state.get("skip", init.samples_seen if init else {})
        shards = open_sources(plan.sources, self.tokenizer, **vars(cfg.preparation))
        self.notes = [f"{name}{left}" for name, shard in shards.items() if (left := shard.manifest.left_out())]
        train, held_out = open_windows(shards, cfg.seq_len, document_mask=cfg.document_mask)
        self.data = open_batches(cfg, runtime, train, plan.phases, held_out, self.skip)
        self.model = runtime.allocate(plan.model)
        self.model.activation_checkpointing = cfg.runtime.activation_checkpointing
        drawn = build("init", cfg.init) if cfg.init else None
        self.model.init_weights(torch.Generator().manual_seed(cfg.seed), drawn)
        if init:
            init.load(self.model)
            self.notes += init.notes
        # From here on the directory exists; a user's mistakes have been found by now.
        self.fingerprints = {name: shard.fingerprint for name, shard in shards.items()}
        self.run = open_run(cfg, runtime, self.fingerprints, saved.state)
        if saved.checkpoint and not cfg.allow_data_change:
            seen = saved.state.get("samples_seen", saved.state.get("drawn"))
            refuse_other_order(saved.checkpoint, seen, self.data.order.samples_seen(saved.step))
        shards_directory = Path(cfg.preparation.directory)
        self.rounds = Rounds(cfg.multi_round, self.data, runtime, self.run.path, shards_directory, self.fingerprints)
        self.rounds.restore(saved.state, saved.step)
        self.trained: Any = runtime.distribute(self.model, compile=cfg.runtime.compile)
        self.loss, self.dtype = plan.loss, self.model.dtype  # the dtype to save; in a step FSDP2 shows another
        self.optimizer = build("optimizer", cfg.optimizer, model=self.model)
        self.scheduler = checks.build_scheduler(cfg.scheduler, self.optimizer, plan.num_steps, plan.tokens_per_step)
        if init and init.continue_schedule:
            load_optimizer_state(init.directory, model=self.model, optimizer=self.optimizer)
        self.checkpoints = Checkpoints(
            self.run.checkpoints, **vars(cfg.checkpoint), state_dict=run_state, write_metadata=self._write_metadata
        )
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
        # For bits per byte: the length of each token's text, which special tokens do not have.
        self.token_bytes = torch.from_numpy(self.tokenizer.token_bytes).to(runtime.device)

    def train(self) -> float | None:
        """Train to the last step; return the last validation loss in nats a token, or None if a signal stopped it."""
        cfg, plan, runtime, run, tasks = self.cfg, self.plan, self.runtime, self.run, self.tasks
        rates = {"tokens_per_step": plan.tokens_per_step, "flops_per_token": plan.estimate.flops_per_token}
        with launcher.open_monitor(cfg, run, runtime, plan.num_steps, self.step, **rates) as monitor:
            run.update(num_steps=plan.num_steps, parameters=plan.estimate.parameters)
            if not self.rounds.begin(self.model, self.step, monitor):
                monitor.stopped(self.step)
                return None
            if self.teacher and not self.teacher.prepare(self.model, self.data, self.step, runtime, monitor):
                monitor.stopped(self.step)
                return None
            kernels = runtime.attention_kernels(self.model, seq_len=cfg.seq_len, segments=cfg.document_mask)
            reasons = [*runtime.reasons, f"attention: {kernels}"]
            if cfg.runtime.deterministic:
                cost = measure_cost(self._warmup_step, runtime.device)
                reasons.append(
                    f"deterministic algorithms: {cost:.2f}x the time of a forward and backward, measured now"
                )
            reasons += best_checkpoint_notes(cfg.checkpoint, cfg.validation)
            monitor.start(*reasons, *plan.estimate.lines(), *self.notes, self.data.describe())
            launcher.warm_up(runtime, self._warmup_step)
            # A run that was stopped while it measured its tasks measures them first.
            if tasks and not tasks.catch_up(self.model, runtime, run.path, self.step, plan.num_steps, monitor):
                monitor.stopped(self.step)
                return None
            for index, batches in self.data.iterate(self.step):
                values = self.train_step(index, batches)
                self.step = index + 1
                last = self.step == plan.num_steps
                round_ends = self.step == self.data.order.known_steps
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
                if round_ends or stop or is_due(self.step, cfg.checkpoint.every):
                    with monitor.paused():
                        self.save_checkpoint(metrics, wait=round_ends or stop)
                elif self.checkpoints.has_failed(monitor.message):
                    self.save_checkpoint({}, wait=True)
                stop = stop and not (last and measured)
                if monitor.ends_after(self.step, saved=self.checkpoints.saved, stop=stop):
                    return None
                if round_ends and not self.rounds.begin(self.model, self.step, monitor):
                    monitor.stopped(self.step)
                    return None
        return self.validation_loss

    def train_step(self, index: int, batches: list[Batch]) -> dict[str, Any]:
        """Make one optimizer step on this rank's micro-batches of a global batch; return its metrics."""
        runtime, phase = self.runtime, self.data.phase(index)
        if index and phase is not self.data.phase(index - 1):
            self.guard.reset()  # other text, other norms
        rates = learning_rates(self.optimizer)
        # The mean over tokens, not over micro-batches: packed rows differ in what they hold.
        (num_tokens,) = runtime.sum(float(sum(batch.num_valid for batch in batches)))
        scale = runtime.gradient_scale / num_tokens
        if runtime.layout.pp > 1:  # stages on other processes: the pipeline's schedule orders the micro-batches
            losses = self.trained.backward([batch.to(runtime.device) for batch in batches], self._loss_of, scale)
        else:
            losses = []
            for number, batch in enumerate(batches):
                with runtime.accumulate(self.trained, first=number == 0, last=number == len(batches) - 1):
                    loss = self._loss(batch.to(runtime.device))
                    (loss * scale).backward()
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
        values |= {"round": phase.round} if self.cfg.multi_round.rounds > 1 else {}
        return {**values, **rates, "tokens": (index + 1) * self.plan.tokens_per_step, "phase": phase.name}

    def _loss(self, batch: Batch) -> Tensor:
        """Summed loss of a micro-batch."""
        if self.runtime.layout.pp > 1:
            loss: Tensor = self.trained.evaluate([batch], self._loss_of)[0]
            return loss
        with self.runtime.autocast():
            hidden = self.trained(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)  # [b, s, d]
        return self._loss_of(batch, hidden)

    def _loss_of(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Summed loss of normed hidden states, [b, s, d]; the vocabulary projection happens inside it, in chunks."""
        states, targets = batch.counted(hidden)
        with self.runtime.autocast():
            if self.teacher and torch.is_grad_enabled():
                return self.teacher.loss(batch, states, targets, self.model)
            summed: Tensor = self.loss(states, self.model.head_weight, targets, **self.model.loss_settings)
        return summed

    def validate_all(self) -> dict[str, float]:
        """What `validate` measures, and the held-out loss of the averaged weights."""
        metrics = self.validate()
        if self.ema and metrics:
            with self.ema.applied(self.model):
                metrics["ema_validation_loss"] = self.validate(effective_dimension=False)["validation_loss"]
        return metrics

    @torch.no_grad()
    def validate(self, *, effective_dimension: bool = True) -> dict[str, float]:
        """Held-out loss in nats a token, bits a byte, and the share of exact zeros of each squared ReLU.

        With validation.effective_dimension also how many principal components each layer's output has, unless the
        caller does not want them.
        """
        self.model.eval()
        layers = self.model.numbered_layers.items()
        ffns = {number: layer.ffn for number, layer in layers if hasattr(layer.ffn, "record_sparsity")}
        for ffn in ffns.values():
            ffn.record_sparsity = True
        device = self.runtime.device
        nats, count, num_bytes = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
        zeros = torch.zeros(self.model.num_layers if ffns else 0, dtype=torch.float64, device=device)
        wanted = effective_dimension and self.cfg.validation.effective_dimension
        dimensions = EffectiveDimension(self.model, wanted=wanted)
        for batch in self.data.validation(self.cfg.validation.tokens):
            batch = batch.to(device)
            with dimensions.of(batch.targets >= 0):
                nats += self._loss(batch)
            valid = batch.targets[batch.targets >= 0]
            count += valid.numel()
            num_bytes += self.token_bytes[valid].sum()
            for number, ffn in ffns.items():
                zeros[number] += ffn.sparsity[batch.targets >= 0].sum()
        for ffn in ffns.values():
            ffn.record_sparsity = False
        self.model.train()
        total, tokens, length, *shares = self.runtime.sum(nats, count, num_bytes, *self.runtime.over_model(zeros))
        if not tokens:  # preparation.holdout=0 keeps nothing back
            return {}
        return {
            "validation_loss": total / tokens,
            "bits_per_byte": total / math.log(2) / length,
            **{f"sparsity/{index}": share / tokens for index, share in enumerate(shares)},
            **dimensions.metrics(),
        }

    def save_checkpoint(self, metrics: dict[str, float], *, wait: bool) -> None:
        self.checkpoints.save(
            self.step,
            **self.trained_parts,
            state={
                "phase": self.data.phase(self.step - 1).name,
                "tokens": self.step * self.plan.tokens_per_step,
                "samples_seen": self.data.order.samples_seen(self.step),  # where a branched decay resumes reading
                "skip": self.skip,
                "order": self.order,
                "guard": self.guard.state_dict(),
                "config": config_digest(self.cfg),
                "data": self.fingerprints,
                **(self.teacher.state_dict() if self.teacher else {}),
                **self.rounds.state_dict(),
            },
            metrics=metrics,
            wait=wait,
        )

    def _write_metadata(self, directory: Path) -> None:
        write_config(self.model.config, self.dtype, directory, tokenizer=self.tokenizer)
        self.tokenizer.save(directory)

    def _warmup_step(self) -> None:
        """A forward and a backward that change nothing."""
        batch = self.data.step(min(self.step, self.plan.num_steps - 1))[0]
        if self.runtime.layout.pp > 1:
            self.trained.backward([batch.to(self.runtime.device)] * self.runtime.layout.pp, self._loss_of, 1.0)
        else:
            self._loss(batch.to(self.runtime.device)).backward()
        if self.teacher:
            self.teacher.take_terms()
        self.optimizer.zero_grad(set_to_none=True)


def report(run: Path, cfg: Config) -> None:
    """Draw the curves, and generate a sample with the finished checkpoint."""
    torch.use_deterministic_algorithms(False)  # sampling has no deterministic kernel on a GPU, and trains nothing
    draw_curves(run / "metrics.jsonl", run / "curves.png")
    if cfg.sample.max_new_tokens:
        model, tokenizer = plmtune.load(run)
        text = complete(model, tokenizer, **vars(cfg.sample), seed=cfg.seed)
        echo(f"\n{cfg.sample.prompt}{''.join(text)}\n")
    echo(f"curves: {run / 'curves.png'}")
    echo(f'try it: plmtune generate {run} --prompt "{cfg.sample.prompt or "The"}"')


def main(cfg: Config, *, dry_run: bool = False) -> float | None:
    """Run the recipe; returns the validation loss, which a sweeper can minimise. See `launcher.launch`."""
    return launcher.launch(cfg, preflight, Pretrain, report, dry_run=dry_run)
