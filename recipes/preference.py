"""Preference training: on pairs as they are, or in rounds that write, judge and choose their own (ARIES)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plmtune import launch, plans
from plmtune.config import build
from plmtune.data.comparisons import ComparisonBatch, PreferenceBatches, make_comparisons
from plmtune.data.conversations import Conversations
from plmtune.data.examples import open_pairs
from plmtune.data.preferences import Pair, Preferences
from plmtune.data.ticker import ticking
from plmtune.errors import UserError
from plmtune.identity import config_digest
from plmtune.origins import start_from
from plmtune.plans import Plan, build_scheduler, check_schedule
from plmtune.rounds.rounds import Write, check_rounds, open_rounds
from plmtune.rounds.writer import writer
from plmtune.runs import open_run
from plmtune.schema import Preference as Config
from plmtune.student import Student, first_model, wake
from plmtune.terminal import echo
from plmtune.training import loop, metrics
from plmtune.training.checkpoint import newest_whole, read_document
from plmtune.training.compare import Tally, answers, comparisons
from plmtune.training.plot import draw_curves
from plmtune.training.progress import Watch
from plmtune.training.reference import model_digest, reference_log_probs
from plmtune.training.runtime import Runtime

CONFIG = "dpo"  # conf/dpo.yaml
KIND = plans.Kind(
    losses={"comparisons": (Preferences,)},
    measures=(
        "validation_loss",
        "validation/accuracy",
        "validation/margin",
        r"validation/(given_(rejected|chosen)/)?(h|accuracy|margin|(rewards|log_probs)/(chosen|rejected))",
    ),
    sequences=2,  # a prompt with two answers
    epochs=1.0,
    rows="pairs",
)


def preflight(cfg: Config, runtime: Runtime, *, fetch: bool) -> Plan:
    """Check the config and find what it names: all that a run would refuse before it begins."""
    planned = plans.plan(cfg, runtime, KIND, fetch=fetch)
    kinds = (Conversations, Preferences) if cfg.rounds else KIND.losses[plans.loss_kind(planned.loss)]
    plans.open_data(planned, cfg.data, kinds)
    plans.open_templates(planned, cfg.chat.template, cfg.refinement.template)
    check_rounds(cfg.rounds, cfg.reward, cfg.selection, runtime.strategy)
    plans.open_evaluations(planned, cfg.eval, runtime, template=cfg.chat.template)
    return planned


class Preference:
    """One run: a stage on the pairs of the data, or one for each round, with optimizer and schedule of its own."""

    def __init__(self, cfg: Config, plan: Plan, runtime: Runtime) -> None:
        self.cfg, self.plan, self.runtime, self.tokenizer = cfg, plan, runtime, plan.tokenizer
        self.whole = newest_whole(Path(str(cfg.run_dir)) / "checkpoints") if cfg.resume else None
        document = read_document(self.whole) if self.whole else {}
        saved: dict[str, Any] = document.get("state", {})
        # A run with a checkpoint of its own no longer needs its origin, unless it holds adapters alone.
        origin = start_from(cfg, plan.model, plan.tokenizer) if cfg.peft or not saved else None
        assert plan.template is not None and plan.refinement is not None
        self.loss, self.template, self.refinement = plan.loss, plan.template, plan.refinement
        self.tokenizer.chat_template = self.template.source  # what the model learns is saved with it
        sources = plan.sources
        self.notes: list[str] = []  # on the pairs of a stage
        self.unread: list[str] = []  # on the columns of the data
        if cfg.rounds:
            self.rounds = open_rounds(cfg, sources)
            unused = {name: source.unused for name, source in sources.items() if source.unused}
            self.unread = [
                f"{name}: {found.describe()}; rules and the reward see them" for name, found in unused.items()
            ]
        else:
            pairs, self.unread = open_pairs(sources, skip_bad=cfg.chat.skip_bad)
            self.data = self._batches(pairs)
            check_schedule(cfg, self.data.num_steps, plan.tokens_per_step)
        self.student: Student = wake(
            cfg, plan.model, self.tokenizer, runtime, origin, self.whole, score_head=self.loss.scalar_head
        )
        # From here on the directory exists; what a person can get wrong has been found by now.
        self.fingerprints = {name: source.fingerprint() for name, source in sources.items()}
        self.fingerprints["the chat template"] = self.template.fingerprint
        self.fingerprints["the refinement template"] = self.refinement.fingerprint
        self.run = open_run(cfg, runtime, self.fingerprints, saved)
        self.model, self.trained = self.student.model, self.student.trained
        self.checkpoints = self.student.checkpoints(self.run.checkpoints)
        self.step: int = document.get("step", 0)
        self.first: int = saved.get("first", 0)  # the step before this stage's first
        self.round: int = saved.get("round", min(cfg.rounds, 1))
        self.order: str = saved.get("order", "")  # a running hash of what was drawn, in which order
        self.reference_digest: str = saved.get("reference", "")  # of the weights that this stage is measured against
        self.first_digest: str = saved.get("first_reference", "")  # of those that the run began with
        self.guard = plan.guard
        if "guard" in saved:
            self.guard.load_state_dict(saved["guard"])
        self.losses: list[Tensor] = []  # of the latest step's micro-batches
        self.score: float = document.get("metrics", {}).get("validation_loss", float("nan"))

    def train(self) -> float | None:
        """Train to the end; returns the last validation loss, or None if it was stopped."""
        with launch.watch(self, self.first + (0 if self.cfg.rounds else self.data.num_steps)) as watch:
            self._introduce(watch)
            if not self.cfg.rounds:
                return self._stage(watch)
            score: float | None = None
            for number in range(self.round, self.cfg.rounds + 1):
                # Where nothing of this round is trained yet, the policy is still the last round's.
                fresh = self.step == self.first
                if fresh and not (self._measure(watch, number - 1) and self._choose(watch, number)):
                    return None
                self.round, self.data = number, self._batches(self.rounds.pairs(self.run.path, number))
                watch.message(f"round {number} of {self.cfg.rounds}")
                score = self._stage(watch)
                if score is None:
                    return None
                self.first = self.step
            return score if self._measure(watch, self.cfg.rounds) else None

    # --- a stage: one set of pairs, one reference ----------------------------------------------------------------

    def _batches(self, pairs: Sequence[Pair]) -> PreferenceBatches:
        cfg = self.cfg
        compared, refused, notes = make_comparisons(
            ticking(pairs, "pairs encoded", shown=self.runtime.is_main),
            self.template,
            self.refinement,
            self.plan.seq_len,
            contexts=self.loss.contexts,
            mismatched=self.loss.mismatched,
        )
        self.notes = [*notes, *([f"{len(refused):,} left out:\n{refused.describe()}"] if refused else [])]
        if not compared:
            raise UserError("None of the pairs can be trained on.\n" + "\n".join(self.notes))
        try:
            return PreferenceBatches(
                compared,
                seq_len=self.plan.seq_len,
                global_batch_size=cfg.global_batch_size,
                micro_batch_size=cfg.micro_batch_size,
                seed=cfg.seed,
                rank=self.runtime.data_rank,
                world_size=self.runtime.data_world_size,
                epochs=cfg.epochs,
                holdout=cfg.chat.holdout,
                as_trained=self.runtime.compute_dtype != torch.float32,
            )
        except ValueError as error:  # names its setting
            raise UserError(str(error)) from error

    def _stage(self, watch: Watch) -> float | None:
        """Train on `data` from `step`; its last validation loss, or None if stopped."""
        last = self.first + self.data.num_steps
        watch.num_steps = last
        for line in (*self.notes, self.data.describe()):
            watch.message(line)
        self.optimizer = build("optimizer", self.cfg.optimizer, model=self.model)
        self.scheduler = build_scheduler(self.cfg, self.optimizer, self.data.num_steps, self.plan.tokens_per_step)
        fresh = self.step == self.first
        # What a later round is measured against, should its log-probabilities be lost from the cache.
        of_last = self.round > 1 and self.cfg.reference == "previous" and self.loss.needs_reference
        self.checkpoints.pinned = self.first if of_last else None
        if fresh:
            self.guard.forget()
            self.whole = None
        with watch.paused():
            done = self.step == last  # resumed at its end
            zeros = torch.zeros(len(self.data.comparisons), 2)
            self.reference = (zeros if done else self._find_reference(fresh, watch)).to(self.runtime.device)
            if fresh and self.loss.needs_reference and (self.round <= 1 or self.cfg.reference == "previous"):
                watch.message(f"reference: log-probabilities of the first step differ by at most {self._apart():.2g}")
        if self.whole:
            self.checkpoints.restore(self.whole, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler)
            self.whole = None
        launch.warm_up(self.runtime, self._trial)
        return loop.train(self, watch, last, value=self.score)

    def _find_reference(self, fresh: bool, watch: Watch) -> Tensor:
        """Log-probabilities of every answer under this stage's reference, [comparisons, 2]; zeros without one.

        Computed by the model itself, which at the start of a stage still is the reference; with adapters, by what
        they stand beside; with quantization-aware training, by its weights as they are. Later they come from the disk,
        or from the same weights, which a checkpoint has.
        """
        cfg, student = self.cfg, self.student
        num = len(self.data.comparisons)
        if not self.loss.needs_reference:
            return torch.zeros(num, 2)
        of_first = self.round <= 1 or cfg.reference == "first"
        if fresh:
            if of_first and (self.round <= 1 or student.adapters):
                self.first_digest = model_digest(self.model, without=student.adapter_names)
            self.reference_digest = self.first_digest if of_first else model_digest(self.model)
        other: list[Any] = []  # a second model, loaded only if something is to be computed

        def log_probs(batch: ComparisonBatch) -> Tensor:
            if of_first and student.adapters:
                with student.base():
                    return self._answers(batch)
            if not of_first or (fresh and self.round <= 1):
                return self._answers(batch)
            if not other:
                origin = start_from(cfg, self.plan.model, self.tokenizer)
                assert origin is not None
                model = first_model(self.runtime, origin)
                model.config = self.model.config  # its context may differ; the weights count
                if model_digest(model) != self.first_digest:
                    raise UserError(
                        f"init_from={cfg.init_from} no longer holds the weights that {self.run.path} began with, which "
                        "it is measured against. Put them back."
                    )
                other.append(model)
            return self._answers(batch, other[0])

        done, in_place = 0, fresh or of_first

        def compute(batch: ComparisonBatch) -> Tensor:
            nonlocal done, in_place
            if not in_place:  # by every rank at its first batch, which may be an empty one
                self._load_last_round()
                in_place = True
            with torch.no_grad(), student.unrounded():
                result = log_probs(batch)
            done += len(batch.index)
            watch.working(f"reference: log-probabilities of {done:,} comparisons")
            return result

        self.model.eval()
        found = reference_log_probs(
            self.reference_digest,
            self.data.all,
            compute,
            cfg.reference_cache,
            num,
            arithmetic=f"{self.runtime.device.type} {self.runtime.compute_dtype}",
            tell=watch.message,
        )
        self.model.train()
        how = "computed, and kept in" if done else "read from"
        watch.message(f"reference: log-probabilities {how} {cfg.reference_cache}")
        return found

    @torch.no_grad()
    def _apart(self) -> float:
        """How far this rank's first log-probabilities are from the reference's, which the model still is."""
        batch = self.data.step(0)[0]
        with self.student.unrounded():
            found = self._answers(batch)
        apart = (found.view(-1, 2) - self.reference[batch.index.to(self.runtime.device)]).abs()
        return float(apart.max()) if apart.numel() else 0.0

    def _load_last_round(self) -> None:
        """Let the model be that of the last round's end until the checkpoint that the run goes on from is restored."""
        try:
            self.checkpoints.load_weights(self.first, self.model)
        except UserError as error:
            raise UserError(
                f"{self.run.path}: the log-probabilities of round {self.round}'s reference are no longer in "
                f"{self.cfg.reference_cache}, and cannot be computed again: {error} Put them back, or start a new run."
            ) from error
        if model_digest(self.model) != self.reference_digest:
            raise UserError(
                f"{self.run.path}: the checkpoint of step {self.first} is not that of round {self.round - 1}'s end, "
                f"which round {self.round} is measured against. Put it back, or start a new run."
            )

    def _answers(self, batch: ComparisonBatch, model: Any = None) -> Tensor:
        """What the loss compares of each answer, [2n]: its log-probability, or its score."""
        batch = batch.to(self.runtime.device)
        dtype = self.runtime.compute_dtype
        # A second model is not FSDP2's, which casts by itself.
        casts = torch.autocast(batch.tokens.device.type, dtype, enabled=dtype != torch.float32)
        with casts if model else self.runtime.autocast():
            return answers(model or self.trained, model or self.model, batch, scores=self.loss.scalar_head)

    def update(self, index: int, batches: list[ComparisonBatch]) -> dict[str, Any]:
        """One optimizer step on this rank's comparisons of a global batch: the mean over its pairs."""
        main = [batch for batch in batches if not batch.aside]
        self.tally = Tally(self.runtime.device)
        with self.student.rounded_once():
            self.baseline = self._baseline([batch for batch in batches if batch.aside])
            values = loop.update(self, main, float(sum(batch.num_pairs for batch in main)), self._loss)
        self.order = self.data.order_digest(self.order, index)
        pairs = (self.first + index + 1) * self.cfg.global_batch_size
        stage = {"round": self.round} if self.cfg.rounds else {}
        return {**values, **self._means(), "pairs": pairs, **stage}

    @torch.no_grad()
    def _baseline(self, batches: list[ComparisonBatch]) -> Tensor:
        """KTO's: the mean log-ratio of the step's mismatched answers, over all ranks."""
        if not self.loss.mismatched:
            return torch.zeros((), device=self.runtime.device)
        total, count = torch.zeros((), device=self.runtime.device), 0
        for batch in batches:
            ratios = self._answers(batch)[::2] - self.reference[batch.index, 0]
            total, count = total + ratios.sum(), count + len(ratios)
        ratio, number = self.runtime.sum(total, float(count))
        return torch.tensor(ratio / max(number, 1.0), device=self.runtime.device)

    def _loss(self, batch: ComparisonBatch) -> Tensor:
        """Summed loss of a micro-batch's comparisons."""
        compared = comparisons(batch, self._answers(batch), self.reference, self.baseline)
        self.tally.add(compared, self.loss)
        summed: Tensor = self.loss(compared).sum()
        return summed

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss a held-out pair; how often, and by how much, its chosen answer is preferred."""
        self.model.eval()
        batches = list(self.data.validation())
        self.baseline = self._baseline([batch for batch in batches if batch.aside])
        self.tally, nats, pairs = Tally(self.runtime.device), torch.zeros((), device=self.runtime.device), 0
        for batch in (batch for batch in batches if not batch.aside):
            nats, pairs = nats + self._loss(batch.to(self.runtime.device)), pairs + batch.num_pairs
        self.model.train()
        total, count = self.runtime.sum(nats, float(pairs))
        if not count:
            return {}
        means = {f"validation/{name}": value for name, value in self._means().items()}
        return {"validation_loss": total / count, **means}

    def _means(self) -> dict[str, float]:
        return self.tally.means(self.runtime, scores=self.loss.scalar_head)

    # --- a round: write, judge, choose ---------------------------------------------------------------------------

    def _choose(self, watch: Watch, number: int) -> bool:
        """Make the pairs of a round; False if the run is to stop."""
        with watch.paused():
            done = self.rounds.make_pairs(self.run.path, number, self._writer(watch), watch.message)
        return done or self._stopped(watch)

    def _measure(self, watch: Watch, number: int) -> bool:
        """Measure the model as it stands after a round, direct and refined answers apart; False to stop."""
        with watch.paused():
            measured = self.rounds.evaluate(self.run.path, number, self._writer(watch), watch.message)
        if measured is None:
            return self._stopped(watch)
        if measured:
            watch.log(self.step, {metrics.BETWEEN: number, **measured})
            watch.message(
                f"after round {number}: reward of direct answers {measured['direct']:.4f}, "
                f"of refined {measured['refined']:.4f}"
            )
        return True

    def _stopped(self, watch: Watch) -> bool:
        watch.message(f"stopped; resume with: plmtune resume {self.run.path}")
        return False

    def _writer(self, watch: Watch) -> Write:
        """Let the model as it stands answer prompts."""
        return writer(
            self.model,
            self.tokenizer,
            self.template,
            self.refinement,
            self.cfg.generation,
            seed=self.cfg.seed,
            progress=watch.answers,
            stop=watch.should_stop,
        )

    # --- what every recipe has -----------------------------------------------------------------------------------

    def save_checkpoint(self, metrics: dict[str, float], *, wait: bool) -> None:
        self.checkpoints.save(
            self.step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state={
                "round": self.round,
                "first": self.first,
                "reference": self.reference_digest,
                "first_reference": self.first_digest,
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
        for line in (*self.runtime.reasons, *self.student.notes, *self.plan.estimate.lines(), *self.unread):
            watch.message(line)

    def _trial(self) -> None:
        """A forward and a backward that change nothing."""
        self.baseline, self.tally = torch.zeros((), device=self.runtime.device), Tally(self.runtime.device)
        batch = next(batch for batch in self.data.step(0) if not batch.aside)
        self._loss(batch.to(self.runtime.device)).backward()
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
    """Run the recipe; returns the validation loss, which a sweeper can minimise.

    Raises:
        SystemExit: with EXIT_STOPPED if a signal stopped it; it can be resumed.
    """
    return launch.launch(cfg, preflight, Preference, report, dry_run=dry_run)
