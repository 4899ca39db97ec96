"""Pruning: cut a trained model to a smaller shape, keeping the layers and units that matter most on text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from plmtune import dtypes
from plmtune.config.compose import build
from plmtune.config.schema import PruneConfig as Config
from plmtune.data.sources import Source
from plmtune.data.text_rows import read_rows, spread, text_sources
from plmtune.errors import UserError
from plmtune.io import hub, manifest
from plmtune.io.interruptible import Interruptible
from plmtune.io.run_directory import read_record, refuse_unusable
from plmtune.io.run_summary import already_finished
from plmtune.io.tables import show
from plmtune.io.terminal import Progress, echo
from plmtune.models import text_loss
from plmtune.models.adapters import load_model_tokenizer
from plmtune.models.checkpoint_files import WEIGHT_FILES, checkpoint_directory, read_json
from plmtune.models.hf import num_bytes, save_model
from plmtune.models.unquantized import build_on_meta, load_finite
from plmtune.modules.decoder import Decoder
from plmtune.pruning.cut import Cut, apply_cut
from plmtune.pruning.depth import Run, block_influence, layers_by_importance, layers_by_rises, rises_without
from plmtune.pruning.depth_plot import draw_influence, draw_rises
from plmtune.pruning.groups import groups_of
from plmtune.pruning.hard_concrete import refuse_unreachable
from plmtune.pruning.kept import Kept, key_of, rises_of, tensors_of
from plmtune.pruning.mask_training import MaskTraining, mask_shares
from plmtune.pruning.masked import LAYERS, masked
from plmtune.pruning.report import FILE, Report
from plmtune.pruning.sizes import Sizes, asked_sizes, methods, refuse_too_much, resolve, sizes_of
from plmtune.pruning.width import choose_units, importance, mean_loss, shares_that_stay
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import TOKENIZER_FILES
from plmtune.training.run_setup import find_run, open_run
from plmtune.training.runtime import Runtime

CONFIG = "prune"  # conf/prune.yaml
MODEL_FILES = (*WEIGHT_FILES, *TOKENIZER_FILES)

_BATCH = 4  # rows of text in a forward, and in a backward of Taylor's importance


@dataclass(frozen=True)
class Inputs:
    """What is pruned, to which sizes, and by what text: checked before weights or text are read.

    Attributes:
        depth, width: how layers and units are chosen: a name of the config, or hand; None: none of them goes.
        parameters, parameters_after: of the model.
        forced: why the cut is larger than a step should be; empty: it is not.
        calibration: tokens to read for importances, and the key that asks for the most of them.
    """

    checkpoint: Path
    tokenizer: Tokenizer
    before: Sizes
    after: Sizes
    depth: str | None
    width: str | None
    parameters: int
    parameters_after: int
    forced: str
    seq_len: int
    calibration: tuple[int, str]
    sources: dict[str, Source]

    def size(self) -> str:
        """The sizes that change, for a person."""
        old, new = self.before.named(), self.after.named()
        changed = ", ".join(f"{name} {old[name]:,} -> {new[name]:,}" for name in old if old[name] != new[name])
        share = self.parameters_after / self.parameters
        return f"{changed}; {self.parameters:,} -> {self.parameters_after:,} parameters ({share:.1%} of before)"


def preflight(cfg: Config) -> Inputs:
    """Check the config and find what it names: all that a run would refuse before it begins."""
    if cfg.checkpoint is None:
        raise UserError("key checkpoint: nothing to prune. Name a run or a model directory with checkpoint=DIR.")
    cfg.checkpoint = hub.pin(cfg.checkpoint)
    checkpoint = checkpoint_directory(cfg.checkpoint, weights=False)
    if cfg.run_dir and not cfg.resume:
        refuse_unusable(Path(cfg.run_dir))
    model = build_on_meta(checkpoint, "prune")
    before = sizes_of(model)
    after = resolve(before, asked_sizes(cfg.model.sizes(), cfg.depth.layers, before))
    depth, width = methods(cfg.importance, cfg.depth.importance, cfg.depth.layers, before, after)
    if shares := mask_shares(model, depth, width, before, after):
        refuse_unreachable(shares, steps=cfg.mask.steps, lr=cfg.mask.lr)
    layers = tuple(cfg.depth.layers or range(after.num_layers))
    smaller = apply_cut(model, Cut(layers, choose_units(groups_of(model), {}, after)))  # refuses what it cannot cut
    parameters, parameters_after = (sum(p.numel() for p in each.parameters()) for each in (model, smaller))
    forced = refuse_too_much(parameters, parameters_after, force=cfg.force)
    seq_len = cfg.seq_len or min(512, model.max_seq_len)
    if seq_len > model.max_seq_len:
        raise UserError(f"key seq_len: {seq_len:,} exceeds the model's max_seq_len ({model.max_seq_len:,}).")
    wanted = {
        "calibration_tokens": cfg.calibration_tokens if width in ("taylor", "activation") else 0,
        "depth.tokens": cfg.depth.tokens if depth in ("skip", "influence") else 0,
        "mask.tokens": cfg.mask.tokens if "mask" in (depth, width) else 0,
    }
    if width in ("taylor", "activation") and not cfg.calibration_tokens:
        raise UserError(f"key calibration_tokens: importance={width} is measured on text, and this is 0.")
    key = max(wanted, key=lambda name: wanted[name])
    found = Inputs(
        checkpoint,
        load_model_tokenizer(checkpoint),
        before,
        after,
        depth,
        width,
        parameters,
        parameters_after,
        forced,
        seq_len,
        calibration=(wanted[key], key),
        sources=text_sources(build("data", cfg.data)),
    )
    echo(f"pruning {cfg.checkpoint}: {found.size()}")
    if forced:
        echo(forced)
    return found


class Prune:
    """One model, from its checkpoint to a smaller one that loads like any other."""

    def __init__(self, cfg: Config, inputs: Inputs, runtime: Runtime) -> None:
        self.cfg, self.inputs = cfg, inputs
        self.checkpoint = checkpoint_directory(str(cfg.checkpoint))  # with its weights
        tokens, key = inputs.calibration
        self.text = read_rows(
            inputs.sources,
            inputs.tokenizer,
            inputs.seq_len,
            calibration_tokens=tokens,
            mix_tokens=0,
            test_tokens=cfg.test_tokens,
            calibration_key=key,
        )
        self.model = load_finite(self.checkpoint, runtime.device, "prune", None)
        self.dtype = dtypes.from_name(cfg.dtype) if cfg.dtype else self.model.dtype
        self.bytes_before = num_bytes(self.model.to(self.dtype))
        self.model.float()
        self.measured: dict[str, Any] = {}
        self.run = open_run(cfg, runtime, self.text.fingerprints)
        self.signals = Interruptible(self.run.path)
        self.kept = Kept(self.run.path, key_of([self.text.calibration, *self.model.state_dict().values()]))

    def prune(self) -> Report:
        """Choose layers and units, cut, measure, save; return the report. A resumed run keeps what was measured."""
        inputs, text = self.inputs, self.text
        if text.description:
            counts = {"choose by": text.calibration.numel(), "measure on": text.num_test_predictions}
            used = ", ".join(f"{count:,} tokens to {what}" for what, count in counts.items() if count)
            echo(f"text: {text.description}; {used}")
        before = self.mean_loss(self.model, "before pruning")
        small, cut = self.choose()
        # The numbers that are saved, in the arithmetic of the loss before.
        after = self.mean_loss(small.to(self.dtype).float(), "after pruning")
        small.to(self.dtype)
        inputs.tokenizer.save(self.run.path)
        save_model(small, None, self.run.path)
        report = Report(
            str(self.checkpoint),
            inputs.width,
            inputs.depth,
            dtypes.dtype_name(self.dtype),
            calibration_tokens=text.calibration.numel(),
            test_tokens=text.num_test_predictions,
            sizes_before=inputs.before.named(),
            sizes=sizes_of(small).named(),
            layers=cut.layers,
            units=dict(cut.units),
            parameters_before=inputs.parameters,
            parameters=small.num_parameters,
            bytes_before=self.bytes_before,
            bytes=sum(path.stat().st_size for path in self.run.path.glob("*.safetensors")),
            loss_before=before,
            loss=after,
            forced=inputs.forced,
            measured=self.measured,
        )
        report.write(self.run.path)
        self.kept.remove()
        manifest.write(self.run.path, 0, {}, only=MODEL_FILES)
        self.run.update(parameters=small.num_parameters)
        return report

    def choose(self) -> tuple[Decoder, Cut]:
        """The model that stays, and its cut: of layers first, then of the units of the model without the others."""
        inputs, scores = self.inputs, {}
        if inputs.depth == inputs.width == "mask":
            scores = self.learn_masks(self.model, mask_shares(self.model, "mask", "mask", inputs.before, inputs.after))
        first = Cut(self.choose_layers(scores))
        model = apply_cut(self.model, first) if inputs.depth is not None else self.model
        if inputs.width is None:
            return model, first
        groups = groups_of(model)
        if scores:  # of the units of all layers
            scores = first.renumbered(scores)
        elif inputs.width == "mask":
            scores = self.learn_masks(model, shares_that_stay(groups, inputs.after))
        elif not (scores := self.kept.read("units")):
            batches = self.batches(self.some(self.cfg.calibration_tokens), "read for importances")
            scores = importance(model, groups, inputs.width, batches)  # type: ignore[arg-type]
            self.kept.save("units", scores)
        second = Cut(tuple(range(len(model.layers))), choose_units(groups, scores, inputs.after))
        return apply_cut(model, second), second.after(first)

    def choose_layers(self, scores: dict[str, Tensor]) -> tuple[int, ...]:
        """The layers that stay; `scores` are those of masks that were learned with the units'."""
        depth, count, keep = self.inputs.depth, len(self.model.layers), self.inputs.after.num_layers
        if depth is None:
            return tuple(range(count))
        if depth == "hand":
            return tuple(self.cfg.depth.layers)
        if depth == "mask":
            scores = scores or self.learn_masks(self.model, {LAYERS: keep / count})
            return layers_by_importance(scores[LAYERS].tolist(), keep)
        rows, path = self.some(self.cfg.depth.tokens), self.run.path / "depth.png"
        tokens = rows.numel() - len(rows)
        if depth == "influence":
            values = block_influence(self.model, self.batches(rows, "read for the influence of layers"))
            self.measured["influence"] = values
            kept = layers_by_importance(values, keep)
            draw_influence(values, kept, path, tokens=tokens)
        else:
            ids = [batch.to(self.model.device) for batch in rows.split(_BATCH)]
            rises = rises_of(self.kept.read("rises"))
            with self.kept.saving("rises", lambda: tensors_of(rises)) as due:

                def left(runs: Sequence[Run]) -> Iterator[Run]:
                    for run in self.signals.progress(runs, "runs of layers skipped"):
                        due()
                        yield run

                rises_without(self.model, ids, self.cfg.depth.adjacent, found=rises, progress=left)
            self.measured["rises"] = [
                {"first": first, "layers": n, "nats": nats} for (first, n), nats in sorted(rises.items())
            ]
            kept = layers_by_rises(rises, count, keep)
            draw_rises(rises, kept, path, tokens=tokens)
        echo(f"importance of layers: {path}")
        return kept

    def learn_masks(self, model: Decoder, shares: Mapping[str, float]) -> dict[str, Tensor]:
        """Train a gate for each layer or unit of some groups, by the loss of the masked model. Its weights train with
        them at mask.weights_lr; at 0 they stay.

        Args:
            shares: of the units of each group, or of the layers, that stay.

        Returns:
            A number for each unit, larger for those that stay.
        """
        cfg = self.cfg.mask
        training = MaskTraining(
            model,
            shares,
            self.some(cfg.tokens),
            steps=cfg.steps,
            batch_size=cfg.batch_size,
            warmup=cfg.warmup,
            lr=cfg.lr,
            weights_lr=cfg.weights_lr,
            seed=cfg.seed,
        )
        if state := self.kept.read("mask"):
            training.load(state)
            echo(f"mask: resumed at step {training.step:,}")
        now: dict[str, Tensor] = {}
        with self.kept.saving("mask", training.state) as due, masked(model, lambda: now), Progress() as progress:
            while training.step < cfg.steps:
                due()
                self.signals.stop_if_asked()
                now = training.draw()
                loss = mean_loss(model, training.next_rows().to(model.device))
                (loss + training.penalty()).backward()
                training.update()
                progress.update(
                    f"mask step {training.step:,}/{cfg.steps:,}",
                    f"loss {float(loss.detach()):.4f}",
                    f"largest gap to the target {training.largest_gap():+.1%}",
                )
        model.requires_grad_(True)
        reached = training.reached()
        self.measured["masks"] = {name: {"target": shares[name], "reached": reached[name]} for name in shares}
        if cfg.weights_lr:
            tokens = cfg.steps * cfg.batch_size * self.inputs.seq_len
            self.measured["weights"] = {"lr": cfg.weights_lr, "tokens": tokens}
            echo(f"the weights were trained with the masks, on {tokens:,} tokens")
        if missed := training.missed():
            echo(missed)
        return training.gates.scores()

    def some(self, tokens: int) -> Tensor:
        """Rows of the text to choose by, at even distances."""
        return spread(self.text.calibration, -(-tokens // self.inputs.seq_len))

    def mean_loss(self, model: Decoder, when: str) -> float | None:
        """Nats a token of the text to measure on; None where there is none."""
        rows = self.text.test
        return text_loss.mean_loss(model, self.batches(rows, f"measured {when}")) if len(rows) else None

    def batches(self, rows: Tensor, what: str) -> Iterator[Tensor]:
        """Yield a few rows at a time, on the model's device."""
        for batch in self.signals.progress(rows.split(_BATCH) if len(rows) else (), f"batches of text {what}"):
            yield batch.to(self.model.device)


def check(cfg: Config) -> str:
    """The line that ``plmtune validate`` prints for a valid config."""
    Runtime.choose(device=cfg.device, strategy="none")
    find_run(cfg)
    if cfg.checkpoint is None:
        return "It names no checkpoint (checkpoint=DIR); what follows from its model is not checked."
    return f"{preflight(cfg).size()}."


def main(cfg: Config, *, dry_run: bool = False) -> float | None:
    """Run the recipe; returns the loss in nats a token, which a sweeper can minimise."""
    if dry_run:
        Runtime.choose(device=cfg.device, strategy="none")
        find_run(cfg)
        echo(preflight(cfg).size())
        return None
    with Runtime.choose(device=cfg.device, seed=0, strategy="none").start() as runtime:
        find_run(cfg)
        if cfg.resume and read_record(Path(str(cfg.run_dir))).get("status") == "finished":
            echo(already_finished(Path(str(cfg.run_dir))))
            loss: float | None = read_json(Path(str(cfg.run_dir)), FILE)["loss"]
            return loss
        recipe = Prune(cfg, preflight(cfg), runtime)
        with recipe.run, recipe.signals:
            report = recipe.prune()
            show(report.table())
            echo("\n".join(report.lines(recipe.run.path)))
        return report.loss
