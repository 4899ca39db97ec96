"""Quantization after training: fit the ranges of a checkpoint's matrices to text, round them, and measure the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from plmtune import dtypes
from plmtune.config.compose import build
from plmtune.config.schema import QuantizeConfig as Config
from plmtune.data.sources import Source
from plmtune.data.text_rows import read_rows, text_sources
from plmtune.errors import UserError
from plmtune.io import hub, manifest
from plmtune.io.interruptible import Interruptible
from plmtune.io.run_directory import read_record, refuse_unusable
from plmtune.io.run_summary import already_finished, finished_runs
from plmtune.io.terminal import echo
from plmtune.models import text_loss
from plmtune.models.adapters import load_model_tokenizer
from plmtune.models.assemble import component_config, component_from_config
from plmtune.models.checkpoint_files import WEIGHT_FILES, checkpoint_directory, read_json
from plmtune.models.hf import save_model
from plmtune.models.unquantized import build_on_meta, load_finite
from plmtune.quantization import mixes, qat, sensitivity
from plmtune.quantization.calibrate import second_moments
from plmtune.quantization.quantize import file_bytes, quantize
from plmtune.quantization.report import FILE, Report
from plmtune.quantization.schemes import LayerFormats
from plmtune.quantization.sensitivity import Sensitivities
from plmtune.quantization.sensitivity_plot import Measured, draw
from plmtune.registry import Component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import TOKENIZER_FILES
from plmtune.training.run_setup import find_run, open_run
from plmtune.training.runtime import Runtime
from plmtune.units import show_bytes

CONFIG = "quantize"  # conf/quantize.yaml
MODEL_FILES = (*WEIGHT_FILES, *TOKENIZER_FILES)

_BATCH = 4  # rows of text in a forward


@dataclass(frozen=True)
class Inputs:
    """What is quantized, how, and on which text: checked before weights or text are read."""

    checkpoint: Path
    tokenizer: Tokenizer
    scheme: Component
    formats: LayerFormats
    bytes_before: int
    bytes_after: int
    seq_len: int
    calibration_tokens: int
    mix_tokens: int  # 0: no sensitivities are measured
    budget: int | None  # bytes
    sources: dict[str, Source]

    def size(self) -> str:
        """The size that the scheme gives, for a person; a mix for a budget begins with it."""
        share = f"{self.bytes_after / self.bytes_before:.1%}"
        count = len(self.formats)
        return f"{count} matrices in integers, {show_bytes(self.bytes_after)} of weights ({share} of before)"


def preflight(cfg: Config) -> Inputs:
    """Check the config and find what it names: all that a run would refuse before it begins."""
    checkpoint, source = choose_checkpoint(cfg)
    scheme, trained_for = choose_scheme(cfg, checkpoint)
    rules = f" with {len(scheme.settings['rules'])} rules" if scheme.settings.get("rules") else ""
    echo(f"{source} as {scheme.name}{rules}" + (", which it was trained for" if trained_for else ""))
    if cfg.run_dir and not cfg.resume:
        refuse_unusable(Path(cfg.run_dir))
    dtype, model = dtypes.from_name(cfg.dtype), build_on_meta(checkpoint)
    formats = build("quantization", scheme, model=model)
    before, after = file_bytes(model, {}, dtype), file_bytes(model, formats, dtype)
    seq_len = cfg.seq_len or min(512, model.max_seq_len)
    if seq_len > model.max_seq_len:
        raise UserError(f"key seq_len: {seq_len:,} exceeds the model's max_seq_len ({model.max_seq_len:,}).")
    asked = cfg.sensitivity
    measured = asked.measure or asked.budget is not None
    if measured and not cfg.test_tokens:
        raise UserError("key sensitivity: needs text to measure on, and test_tokens is 0.")
    budget = asked.budget_bytes(before) if asked.budget is not None else None
    if budget is not None and after > budget:
        smaller = component_config(scheme).get("embedding") == "int8"
        raise UserError(
            f"key sensitivity.budget: {asked.budget} is {show_bytes(budget)}, and the scheme {scheme.name} takes "
            f"{show_bytes(after)} ({after / before:.1%}) without a mix. Give at least that, or a smaller scheme"
            + (" (quantization.embedding=int4_g32)." if smaller else ".")
        )
    return Inputs(
        checkpoint,
        load_model_tokenizer(checkpoint),
        scheme,
        formats,
        before,
        after,
        seq_len,
        calibration_tokens=0 if trained_for else cfg.calibration_tokens,  # training has fitted weights to ranges
        mix_tokens=asked.tokens if measured else 0,
        budget=budget,
        sources=text_sources(build("data", cfg.data)),
    )


def choose_checkpoint(cfg: Config) -> tuple[Path, str]:
    """The checkpoint to quantize, by default that of the newest finished run, and a phrase that names it."""
    phrase = f"quantizing {cfg.checkpoint}"
    if cfg.checkpoint is None:
        newest = next(finished_runs(), None)
        if newest is None:
            raise UserError(
                "there is no finished run under runs/ to quantize. Train one (plmtune run demo), or name a run or "
                "a model directory with checkpoint=DIR."
            )
        cfg.checkpoint = str(newest)
        phrase = f"quantizing {newest}, the newest finished run (checkpoint=DIR for another)"
    cfg.checkpoint = hub.pin(cfg.checkpoint)
    return checkpoint_directory(cfg.checkpoint, weights=False), phrase


def choose_scheme(cfg: Config, checkpoint: Path) -> tuple[Component, bool]:
    """The scheme, by default that of the model's quantization-aware training or int4; whether it was trained for it."""
    trained_for = qat.read_scheme(checkpoint)
    if cfg.quantization is None and trained_for is not None:
        cfg.quantization = component_from_config("quantization", trained_for, f"{checkpoint}, key qat")
    cfg.quantization = cfg.quantization or Component("quantization", "int4", {})
    return cfg.quantization, trained_for is not None and qat.scheme_settings(cfg.quantization) == trained_for


class Quantize:
    """One model, from its checkpoint to a directory that loads like any other."""

    def __init__(self, cfg: Config, inputs: Inputs, runtime: Runtime) -> None:
        self.cfg, self.inputs, self.dtype = cfg, inputs, dtypes.from_name(cfg.dtype)
        self.checkpoint = checkpoint_directory(str(cfg.checkpoint))  # with its weights
        self.text = read_rows(
            inputs.sources,
            inputs.tokenizer,
            inputs.seq_len,
            calibration_tokens=inputs.calibration_tokens,
            mix_tokens=inputs.mix_tokens,
            test_tokens=cfg.test_tokens,
        )
        self.model = load_finite(self.checkpoint, runtime.device)
        self.run = open_run(cfg, runtime, self.text.fingerprints)
        self.signals = Interruptible(self.run.path)

    def quantize(self) -> Report:
        """Measure, choose the formats, round, measure again, save; return the report.

        A resumed run starts over with the sensitivities that it has.
        """
        inputs, text, model = self.inputs, self.text, self.model
        formats, scheme = inputs.formats, component_config(inputs.scheme)
        counts = {
            "calibrate": text.calibration.numel(),
            "measure modules" if inputs.budget is None else "choose the mix": text.mix.numel() - len(text.mix),
            "measure": text.num_test_predictions,
        }
        if used := ", ".join(f"{count:,} tokens to {what} on" for what, count in counts.items() if count):
            echo(f"text: {text.description}; {used}")
        before = self.mean_loss("before")
        moments = self.second_moments() if len(text.calibration) else None
        found = rules = None
        if inputs.mix_tokens:
            found = sensitivity.measure(
                model,
                formats,
                text.mix.to(model.device),
                self.run.path / "sensitivity.json",
                dtype=self.dtype,
                second_moments=moments,
                progress=lambda names: self.signals.progress(names, "modules measured"),
            )
        if found is not None and inputs.budget is not None:
            rules = self.choose_mix(found, inputs.budget)
            formats, scheme = self.formats_of(rules), {"component": "mixed", "rules": rules, "qat": False}
        quantize(
            model,
            formats,
            second_moments=moments,
            scheme=scheme,
            progress=lambda names: self.signals.progress(names, "modules quantized"),
        )
        model.to(self.dtype)
        after = self.mean_loss("after")
        inputs.tokenizer.save(self.run.path)
        save_model(model, None, self.run.path)
        report = Report(
            str(self.checkpoint),
            scheme,
            self.cfg.dtype,
            calibration_tokens=text.calibration.numel(),
            bytes=sum(path.stat().st_size for path in self.run.path.glob("*.safetensors")),
            bytes_before=inputs.bytes_before,
            sensitivity_tokens=text.mix.numel() - len(text.mix),
            test_tokens=text.num_test_predictions,
            loss_before=before,
            loss=after,
            formats={name: format.name for name, format in formats.items()},
        )
        report.write(self.run.path)
        manifest.write(self.run.path, 0, {}, only=MODEL_FILES)
        self.run.update(parameters=sum(p.numel() for p in build_on_meta(self.checkpoint).parameters()))
        for note in getattr(formats, "notes", ()):
            echo(note)
        if found is not None and before is not None and after is not None:
            picture = self.run.path / "sensitivity.png"
            models = (Measured(report.bytes_before, before), Measured(report.bytes, after))
            draw(found, picture, *models, tokens=report.test_tokens, rules=rules)
            echo(f"loss of each module: {picture}")
        return report

    def mean_loss(self, when: str) -> float | None:
        """Nats a token of the text to measure on; None where there is none."""
        batches = self.batches(self.text.test, f"measured {when} quantizing")
        return text_loss.mean_loss(self.model, batches) if len(self.text.test) else None

    def second_moments(self) -> dict[str, Tensor]:
        batches = self.batches(self.text.calibration, "read to calibrate")
        try:
            return second_moments(self.model, batches, self.inputs.formats)
        except ValueError as error:
            raise UserError(f"{self.checkpoint}: {error}. calibration_tokens=0 rounds without them.") from error

    def choose_mix(self, found: Sensitivities, budget: int) -> dict[str, str]:
        """The rules of the mix for a budget; written as mix.yaml, a config that can be run again.

        The rows that it is chosen by are not those that the loss is measured on: on its own rows a mix loses least.
        """
        inputs, path = self.inputs, self.run.path / "mix.yaml"
        asked = self.cfg.sensitivity.budget

        def bytes_of(rules: dict[str, str]) -> int:
            return file_bytes(build_on_meta(self.checkpoint), self.formats_of(rules), self.dtype)

        try:
            rules, size = mixes.fit_budget(found, budget, file_bytes=bytes_of, smallest_file=inputs.bytes_after)
        except ValueError as error:
            message = f"key sensitivity.budget: {asked} is {budget:,} bytes, and {error}. Give at least that."
            raise UserError(message) from error
        mixes.write_config(path, rules, self.checkpoint)
        enough = mixes.predict(found, rules) < mixes.NEGLIGIBLE
        more = f"; more bytes would gain less than {mixes.NEGLIGIBLE:g} nats a token" if enough else ""
        whole = inputs.bytes_before
        wanted, taken = (f"{show_bytes(n, whole)} ({n / whole:.1%})" for n in (budget, size))
        echo(f"the mix for {wanted} takes {taken}{more}: {path}")
        return rules

    def formats_of(self, rules: dict[str, str]) -> LayerFormats:
        mixed = Component("quantization", "mixed", {"rules": rules})
        return cast(LayerFormats, build("quantization", mixed, model=self.model))

    def batches(self, rows: Tensor, what: str) -> Iterator[Tensor]:
        """Yield a few rows at a time, on the model's device."""
        for batch in self.signals.progress(rows.split(_BATCH), f"batches of text {what}"):
            yield batch.to(self.model.device)


def check(cfg: Config) -> str:
    """The line that ``plmtune validate`` prints for a valid config."""
    Runtime.choose(device=cfg.device, strategy="none")
    find_run(cfg)
    if cfg.checkpoint is None and next(finished_runs(), None) is None:
        return "There is no finished run to quantize; what follows from its model is not checked."
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
        recipe = Quantize(cfg, preflight(cfg), runtime)
        with recipe.run, recipe.signals:
            report = recipe.quantize()
            echo("\n".join(report.lines(recipe.run.path)))
        return report.loss
