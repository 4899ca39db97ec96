"""Pretrain a model from scratch, or from `init_from`, on phases of mixed token shards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import plmtune
from plmtune import launch, plans
from plmtune.config import build
from plmtune.data.batches import Batch, Batches
from plmtune.data.shards import Shards
from plmtune.data.sources import Source
from plmtune.data.windows import open_windows
from plmtune.errors import UserError
from plmtune.generation import complete
from plmtune.identity import config_digest
from plmtune.models.hf import hf_state, load_state, write_config
from plmtune.origins import check_finite, start_from
from plmtune.plans import Plan, build_scheduler
from plmtune.runs import open_run, open_sources
from plmtune.schema import Pretrain as Config
from plmtune.terminal import echo
from plmtune.training import loop
from plmtune.training.checkpoint import Checkpoints, load_moments, newest_whole, read_document
from plmtune.training.determinism import measure_cost
from plmtune.training.plot import draw_curves
from plmtune.training.progress import Watch
from plmtune.training.runtime import Runtime

CONFIG = "pretrain"  # conf/pretrain.yaml
KIND = plans.Kind(losses={"tokens": (Source,)}, measures=("validation_loss", "bits_per_byte", r"sparsity/\d+"))


def preflight(cfg: Config, runtime: Runtime, *, fetch: bool) -> Plan:
    """Check the config and find what it names: all that a run would refuse before it begins."""
    planned = plans.plan(cfg, runtime, KIND, fetch=fetch)
    plans.open_data(planned, cfg.data, KIND.losses[plans.loss_kind(planned.loss)])
    plans.open_evaluations(planned, cfg.eval, runtime)
    return planned


class Pretrain:
    """One run. Data order and schedule are pure functions of the step, so that any step can be gone on from."""

    def __init__(self, cfg: Config, plan: Plan, runtime: Runtime) -> None:
        self.cfg, self.plan, self.runtime, self.tokenizer = cfg, plan, runtime, plan.tokenizer
        # A run with a checkpoint of its own no longer needs the one that it started from.
        whole = newest_whole(Path(str(cfg.run_dir)) / "checkpoints") if cfg.resume else None
        document = read_document(whole) if whole else {}
        saved = document.get("state", {})
        origin = None if saved else start_from(cfg, plan.model, plan.tokenizer)
        self.skip: dict[str, int] = saved.get("skip", {}) if saved else origin.drawn if origin else {}
        shards = open_sources(plan.sources, cfg.preparation, self.tokenizer)
        self.notes = [f"{name}{left}" for name, shard in shards.items() if (left := shard.manifest.left_out())]
        self.data = self._batches(shards)
        self.model = plan.model.to_empty(device=runtime.device)
        self.model.activation_checkpointing = cfg.runtime.activation_checkpointing
        self.model.init_weights(torch.Generator().manual_seed(cfg.seed))
        if origin:
            load_state(self.model, origin.directory)
            check_finite(self.model, str(cfg.init_from))
        # From here on the directory exists; what a person can get wrong has been found by now.
        self.fingerprints = {name: shard.fingerprint for name, shard in shards.items()}
        self.run = open_run(cfg, runtime, self.fingerprints, saved)
        if whole and not cfg.other_data:
            self._check_drawn(whole, saved.get("drawn"), self.data.drawn_before(document["step"]))
        self.trained = runtime.distribute(self.model, compile=cfg.runtime.compile)
        self.dtype = self.model.dtype  # of what is saved; in a step FSDP2 shows another
        self.loss = plan.loss
        self.optimizer = build("optimizer", cfg.optimizer, model=self.model)
        self.scheduler = build_scheduler(cfg, self.optimizer, plan.num_steps, plan.tokens_per_step)
        if origin and origin.goes_on:
            load_moments(origin.directory, model=self.model, optimizer=self.optimizer)
        self.checkpoints = Checkpoints(
            self.run.checkpoints,
            keep=cfg.checkpoint.keep,
            best=cfg.checkpoint.best,
            best_is=cfg.checkpoint.best_is,
            background=cfg.checkpoint.background,
            named=hf_state,
            describe=self._describe,
        )
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
        # Bits per byte need the length of each token's text; special tokens have none.
        self.token_bytes = torch.from_numpy(self.tokenizer.token_bytes).to(runtime.device)

    def _batches(self, shards: dict[str, Shards]) -> Batches:
        try:
            train, held_out = open_windows(shards, self.cfg.seq_len, document_mask=self.cfg.document_mask)
            return Batches(
                train,
                self.plan.phases,
                validation=held_out,
                global_batch_size=self.cfg.global_batch_size,
                micro_batch_size=self.cfg.micro_batch_size,
                seed=self.cfg.seed,
                rank=self.runtime.data_rank,
                world_size=self.runtime.data_world_size,
                num_workers=self.cfg.num_workers,
                skip=self.skip,
            )
        except ValueError as error:  # names its setting
            raise UserError(str(error)) from error

    @staticmethod
    def _check_drawn(checkpoint: Path, drawn: dict[str, int] | None, expected: dict[str, int]) -> None:
        """Refuse a checkpoint of a version that mixed sources in another order."""
        if drawn is not None and drawn != expected:
            saw, would = (", ".join(f"{name} {count:,}" for name, count in one.items()) for one in (drawn, expected))
            raise UserError(
                f"{checkpoint} has drawn other sequences ({saw}) than this version of plmtune draws up to its step "
                f"({would}): resumed, it would see some twice and others never. Resume it with the version that began "
                f"it, or start a new run from its weights: init_from={checkpoint}"
            )

    def train(self) -> float | None:
        """Train to the last step; returns the last validation loss in nats a token, or None if it was stopped."""
        plan = self.plan
        with launch.watch(
            self, plan.num_steps, tokens_per_step=plan.tokens_per_step, flops_per_token=plan.estimate.flops_per_token
        ) as watch:
            self._introduce(watch)
            launch.warm_up(self.runtime, self._trial)
            return loop.train(self, watch, plan.num_steps, value=self.score)

    def update(self, index: int, batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step on this rank's micro-batches of a global batch."""
        phase = self.data.phase(index)
        if index and phase is not self.data.phase(index - 1):
            self.guard.forget()  # other text, other norms
        values = loop.update(self, batches, float(sum(batch.num_valid for batch in batches)), self._loss)
        self.order = self.data.order_digest(self.order, index)
        return {**values, "tokens": (index + 1) * self.plan.tokens_per_step, "phase": phase.name}

    def _loss(self, batch: Batch) -> Tensor:
        """Summed loss of a micro-batch; the vocabulary projection happens inside the loss, in chunks."""
        with self.runtime.autocast():
            hidden = self.trained(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)  # [b, s, d]
            states, targets = batch.counted(hidden)
            summed: Tensor = self.loss(states, self.model.head_weight, targets)
        return summed

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out loss in nats a token, bits a byte, and the share of exact zeros of each squared ReLU."""
        self.model.eval()
        layers = [layer.ffn for layer in self.model.layers if hasattr(layer.ffn, "record_sparsity")]
        for ffn in layers:
            ffn.record_sparsity = True
        device = self.runtime.device
        nats, count, num_bytes = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
        zeros = torch.zeros(len(layers), dtype=torch.float64, device=device)
        for batch in self.data.validation(self.cfg.validation.tokens):
            batch = batch.to(device)
            nats += self._loss(batch)
            valid = batch.targets[batch.targets >= 0]
            count += valid.numel()
            num_bytes += self.token_bytes[valid].sum()
            if layers:
                zeros += torch.stack([ffn.sparsity[batch.targets >= 0].sum() for ffn in layers])
        for ffn in layers:
            ffn.record_sparsity = False
        self.model.train()
        total, tokens, length, *shares = self.runtime.sum(nats, count, num_bytes, *zeros)
        if not tokens:  # preparation.holdout=0 keeps nothing back
            return {}
        return {
            "validation_loss": total / tokens,
            "bits_per_byte": total / math.log(2) / length,
            **{f"sparsity/{index}": share / tokens for index, share in enumerate(shares)},
        }

    def save_checkpoint(self, metrics: dict[str, float], *, wait: bool) -> None:
        self.checkpoints.save(
            self.step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state={
                "phase": self.data.phase(self.step - 1).name,
                "tokens": self.step * self.plan.tokens_per_step,
                "drawn": self.data.drawn_before(self.step),  # where a branched decay reads on
                "skip": self.skip,
                "order": self.order,
                "guard": self.guard.state_dict(),
                "config": config_digest(self.cfg),
                "data": self.fingerprints,
            },
            metrics=metrics,
            wait=wait,
        )

    def _describe(self, directory: Path) -> None:
        write_config(self.model.config, self.dtype, directory)
        self.tokenizer.save(directory)

    def _introduce(self, watch: Watch) -> None:
        cfg, runtime = self.cfg, self.runtime
        watch.message(f"run: {self.run.path}" + (f", resuming after step {self.step}" if self.step else ""))
        kernels = runtime.attention_kernels(self.model, seq_len=cfg.seq_len, segments=cfg.document_mask)
        reasons = [*runtime.reasons, f"attention: {kernels}"]
        if cfg.runtime.deterministic:
            cost = measure_cost(self._trial, runtime.device)
            reasons.append(f"deterministic algorithms: {cost:.2f}x the time of a forward and backward, measured now")
        between, every = cfg.checkpoint.every, cfg.validation.every
        if cfg.checkpoint.best and between and every and between % every:
            reasons.append(
                f"best checkpoint: only steps that are measured and saved count, each {math.lcm(between, every)}th; "
                "let checkpoint.every be a multiple of validation.every"
            )
        for line in (*reasons, *self.plan.estimate.lines(), *self.notes, self.data.describe()):
            watch.message(line)

    def _trial(self) -> None:
        """A forward and a backward that change nothing."""
        batch = self.data.step(min(self.step, self.plan.num_steps - 1))[0]
        self._loss(batch.to(self.runtime.device)).backward()
        self.optimizer.zero_grad(set_to_none=True)


def report(run: Path, cfg: Config) -> None:
    """Draw the curves, and let the finished checkpoint write something, for a person to judge."""
    torch.use_deterministic_algorithms(False)  # sampling has no deterministic kernel on a GPU, and trains nothing
    curves = run / "curves.png"
    draw_curves(run / "metrics.jsonl", curves)
    if cfg.sample.max_new_tokens:
        model, tokenizer = plmtune.load(run)
        text = complete(
            model,
            tokenizer,
            cfg.sample.prompt,
            max_new_tokens=cfg.sample.max_new_tokens,
            temperature=cfg.sample.temperature,
            top_p=cfg.sample.top_p,
            seed=cfg.seed,
        )
        echo(f"\n{cfg.sample.prompt}{''.join(text)}\n")
    echo(f"curves: {curves}")
    echo(f'try it: plmtune generate {run} --prompt "{cfg.sample.prompt or "The"}"')


def main(cfg: Config, *, dry_run: bool = False) -> float | None:
    """Run the recipe; returns the validation loss, which a sweeper can minimise.

    Raises:
        SystemExit: with EXIT_STOPPED if a signal stopped it; it can be resumed.
    """
    return launch.launch(cfg, preflight, Pretrain, report, dry_run=dry_run)
