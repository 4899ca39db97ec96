"""Pruning: cut a trained model to a smaller shape, keeping the layers and units that matter most on text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plmtune import dtypes
from plmtune.config.compose import build
from plmtune.config.schema import PruneConfig as Config
from plmtune.data.sources import Source
from plmtune.data.text_rows import read_rows, text_sources
from plmtune.errors import UserError
from plmtune.io import hub, manifest
from plmtune.io.interruptible import Interruptible
from plmtune.io.run_directory import read_record, refuse_unusable
from plmtune.io.run_summary import already_finished
from plmtune.io.tables import show
from plmtune.io.terminal import Progress, echo
from plmtune.models import text_loss
from plmtune.models.adapters import load_model_tokenizer
from plmtune.models.checkpoint_files import CONFIG as MODEL_CONFIG
from plmtune.models.checkpoint_files import checkpoint_directory, read_json
from plmtune.models.hf import num_bytes, save_model
from plmtune.models.unquantized import build_on_meta, load_finite
from plmtune.modules.decoder import Decoder
from plmtune.pruning.cut import Cut, apply_cut, build_cut
from plmtune.pruning.depth import block_influence, layers_by_importance, layers_by_rises, rises_without
from plmtune.pruning.depth_plot import draw_influence, draw_rises
from plmtune.pruning.groups import groups_of
from plmtune.pruning.hard_concrete import HardConcrete, Multipliers, refuse_unreachable
from plmtune.pruning.masked import LAYERS, masked
from plmtune.pruning.report import FILE, Report
from plmtune.pruning.sizes import Sizes, refuse_too_much, resolve, sizes_of
from plmtune.pruning.width import choose_units, importance, mean_loss, shares_that_stay
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training.run_setup import find_run, open_run
from plmtune.training.runtime import Runtime

CONFIG = "prune"  # conf/prune.yaml
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", MODEL_CONFIG, "tokenizer.json", "tokenizer_config.json")

_BATCH = 4  # rows of text in a forward, and in a backward of Taylor's importance
_MISSED = 0.05  # share of the units by which a mask misses its size


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
    after = resolve(before, _asked(cfg, before))
    depth, width = _methods(cfg, before, after)
    if shares := _mask_shares(model, depth, width, before, after):
        refuse_unreachable(shares, steps=cfg.mask.steps, lr=cfg.mask.lr)
    layers = tuple(cfg.depth.layers or range(after.num_layers))
    smaller = build_cut(model, Cut(layers, choose_units(groups_of(model), {}, after)))
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


def _asked(cfg: Config, before: Sizes) -> dict[str, int | None]:
    """The sizes that the config asks for, by setting; layers that are named count."""
    asked = cfg.model.sizes()
    if kept := cfg.depth.layers:
        if asked["num_layers"] not in (None, len(kept)):
            raise UserError(
                f"key depth.layers: names {len(kept)} layers, and model.num_layers is {cfg.model.num_layers}. "
                "Leave one out."
            )
        if kept[-1] >= before.num_layers:
            raise UserError(
                f"key depth.layers: there is no layer {kept[-1]}: the checkpoint has layers 0 to "
                f"{before.num_layers - 1}."
            )
        asked["num_layers"] = len(kept)
    return asked


def _methods(cfg: Config, before: Sizes, after: Sizes) -> tuple[str | None, str | None]:
    """How layers and units are chosen; None: all stay."""
    depth = "hand" if cfg.depth.layers else cfg.depth.importance or ("mask" if cfg.importance == "mask" else "skip")
    goes = after.num_layers < before.num_layers
    shrinks = replace(after, num_layers=before.num_layers) != before
    return depth if goes else None, cfg.importance if shrinks else None


def _mask_shares(model: Decoder, depth: str | None, width: str | None, before: Sizes, after: Sizes) -> dict[str, float]:
    """The share that stays under each mask that is learned with others: of layers, and of units of groups."""
    layers = {LAYERS: after.num_layers / before.num_layers} if depth == "mask" else {}
    return layers | (shares_that_stay(groups_of(model), after) if width == "mask" else {})


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

    def prune(self) -> Report:
        """Choose layers and units, cut, measure, save; return the report. A resumed run starts over."""
        inputs, text = self.inputs, self.text
        if text.description:
            counts = {"choose by": text.calibration.numel(), "measure on": text.num_test_predictions}
            used = ", ".join(f"{count:,} tokens to {what}" for what, count in counts.items() if count)
            echo(f"text: {text.description}; {used}")
        before = self.mean_loss(self.model, "before pruning")
        small, cut = self.choose()
        after = self.mean_loss(small.to(self.dtype), "after pruning")
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
        manifest.write(self.run.path, 0, {}, only=MODEL_FILES)
        self.run.update(parameters=small.num_parameters)
        return report

    def choose(self) -> tuple[Decoder, Cut]:
        """The model that stays, and its cut: of layers first, then of the units of the model without the others."""
        inputs, scores = self.inputs, {}
        if inputs.depth == inputs.width == "mask":
            scores = self.learn_masks(self.model, _mask_shares(self.model, "mask", "mask", inputs.before, inputs.after))
        first = Cut(self.choose_layers(scores))
        model = apply_cut(self.model, first) if inputs.depth is not None else self.model
        if inputs.width is None:
            return model, first
        groups = groups_of(model)
        if scores:  # of the units of all layers
            scores = first.renumbered(scores)
        elif inputs.width == "mask":
            scores = self.learn_masks(model, shares_that_stay(groups, inputs.after))
        else:
            batches = self.batches(self.some(self.cfg.calibration_tokens), "read for importances")
            scores = importance(model, groups, inputs.width, batches)  # type: ignore[arg-type]
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
            longest = self.cfg.depth.adjacent
            rises = rises_without(
                self.model, ids, longest, progress=lambda runs: self.signals.progress(runs, "runs of layers skipped")
            )
            self.measured["rises"] = [
                {"first": first, "layers": n, "nats": nats} for (first, n), nats in sorted(rises.items())
            ]
            kept = layers_by_rises(rises, count, keep)
            draw_rises(rises, kept, path, tokens=tokens)
        echo(f"importance of layers: {path}")
        return kept

    def learn_masks(self, model: Decoder, shares: Mapping[str, float]) -> dict[str, Tensor]:
        """Train a gate for each layer or unit of some groups, by the loss of the masked model, whose weights stay.

        Args:
            shares: of the units of each group, or of the layers, that stay.

        Returns:
            A number for each unit, larger for those that stay.
        """
        cfg, device = self.cfg.mask, model.device
        units = {name: group.units for name, group in groups_of(model).items()} | {LAYERS: len(model.layers)}
        gates = HardConcrete({name: units[name] for name in shares}).to(device)
        multipliers = Multipliers(shares, warmup=int(cfg.warmup * cfg.steps)).to(device)
        ascent: dict[str, Any] = {"params": [*multipliers.parameters()], "maximize": True}
        optimizer = torch.optim.Adam([{"params": [*gates.parameters()]}, ascent], lr=cfg.lr)
        generator = torch.Generator().manual_seed(cfg.seed)
        rows = self.batches_without_end(self.some(cfg.tokens), generator)
        now: dict[str, Tensor] = {}
        model.requires_grad_(False)
        with masked(model, lambda: now), Progress() as progress:
            for step in range(cfg.steps):
                self.signals.stop_if_asked()
                now = gates.sample(generator)
                loss = mean_loss(model, next(rows).to(device))
                kept = gates.kept()
                (loss + multipliers(kept, step)).backward()
                optimizer.step()
                gates.clip()
                optimizer.zero_grad()
                gaps = [float(kept[name].detach().mean()) - multipliers.target(name, step) for name in shares]
                progress.update(
                    f"mask step {step + 1:,}/{cfg.steps:,}",
                    f"loss {float(loss.detach()):.4f}",
                    f"largest gap to the target {max(gaps, key=abs):+.1%}",
                )
        model.requires_grad_(True)
        reached = {name: float(values.detach().mean()) for name, values in gates.kept().items()}
        self.measured["masks"] = {name: {"target": shares[name], "reached": reached[name]} for name in shares}
        missed = [name for name in shares if abs(reached[name] - shares[name]) > _MISSED]
        if missed:
            worst = max(missed, key=lambda name: abs(reached[name] - shares[name]))
            echo(
                f"{len(missed)} of {len(shares)} masks have not reached their size: {worst} keeps {reached[worst]:.1%} "
                f"of its units, and {shares[worst]:.1%} were asked for. More mask.steps choose better."
            )
        return gates.scores()

    def batches_without_end(self, rows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield rows of a step, in a new order after all were seen."""
        order = torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < self.cfg.mask.batch_size:
                order = torch.cat((order, torch.randperm(len(rows), generator=generator)))
            now, order = order.split((self.cfg.mask.batch_size, len(order) - self.cfg.mask.batch_size))
            yield rows[now]

    def some(self, tokens: int) -> Tensor:
        """Rows of the text to choose by, at even distances."""
        rows = self.text.calibration
        count = min(len(rows), -(-tokens // self.inputs.seq_len))
        return rows[torch.arange(count) * len(rows) // max(1, count)]

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
