"""Quantization after training: a checkpoint's matrices as integers, their ranges fitted to text, the loss told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plmtune.config.compose import build
from plmtune.config.schema import QuantizeConfig as Config
from plmtune.data.examples import refuse_other_kinds
from plmtune.data.sources import Prepared, Source, named_sources
from plmtune.errors import UserError
from plmtune.io import hub, manifest
from plmtune.io.atomic import atomic_write
from plmtune.io.progress import ticking
from plmtune.io.run_directory import read_record, refuse_unusable
from plmtune.io.run_summary import already_finished, finished_runs
from plmtune.io.safetensors_writer import listed, not_finite
from plmtune.io.signals import EXIT_STOPPED, StopSignals
from plmtune.io.terminal import echo
from plmtune.io.untrusted import load_json
from plmtune.models.adapters import holds_adapters, load_model, load_model_tokenizer, read_model_config
from plmtune.models.assemble import component_config, component_from_config
from plmtune.models.checkpoint_files import CONFIG as MODEL_CONFIG
from plmtune.models.checkpoint_files import checkpoint_directory, read_json
from plmtune.models.hf import save_model
from plmtune.quantization import qat, sensitivity
from plmtune.quantization.calibrate import second_moments
from plmtune.quantization.quantize import file_bytes, quantize
from plmtune.quantization.sensitivity import Found, Measured
from plmtune.registry import Component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training.run_setup import find_run, open_run
from plmtune.training.runtime import Runtime
from plmtune.units import show_bytes

CONFIG = "quantize"  # conf/quantize.yaml
REPORT = "quantize.json"
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", MODEL_CONFIG, "tokenizer.json", "tokenizer_config.json")

_BATCH = 4  # rows of text that are read together
_POOL = 1_000_000  # tokens of the data that rows are spread over
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Text:
    """Rows of ids, [n, s]: to fit ranges by, to choose a mix by, and to measure on; no row is in two of them."""

    calibration: Tensor
    choice: Tensor
    test: Tensor
    fingerprints: dict[str, str]
    described: str  # where it comes from, for a person

    @property
    def predicted(self) -> int:
        """Tokens that the loss is measured on: of `test`, but for the first of each row, which has none before it."""
        return self.test.numel() - len(self.test)


@dataclass
class Job:
    """What is quantized, how, and by which text: known before weights or text are read."""

    source: Path
    tokenizer: Tokenizer
    plan: Any
    bytes_before: int
    bytes_after: int
    seq_len: int
    calibration_tokens: int
    budget: int | None
    sources: dict[str, Source]

    def size(self) -> str:
        """What the scheme makes of the model, for a person; a mix for a budget begins with it."""
        share = _percent(self.bytes_after, self.bytes_before)
        return f"{len(self.plan)} matrices in integers, {show_bytes(self.bytes_after)} of weights ({share} of before)"


def preflight(cfg: Config) -> Job:
    """Check the config and find what it names: all that a run would refuse before it begins.

    Raises:
        UserError: naming the key.
    """
    echo(choose(cfg))
    if cfg.run_dir and not cfg.resume:
        refuse_unusable(Path(cfg.run_dir))
    source, dtype = checkpoint_directory(str(cfg.checkpoint), weights=False), _DTYPES[cfg.dtype]
    meta = on_meta(source)
    plan = plan_of(cfg, meta)
    before, after = file_bytes(meta, {}, dtype), file_bytes(meta, plan, dtype)
    seq_len = cfg.seq_len or min(512, meta.max_seq_len)
    if seq_len > meta.max_seq_len:
        raise UserError(f"key seq_len: {seq_len:,} exceeds the model's max_seq_len ({meta.max_seq_len:,}).")
    asked = cfg.sensitivity
    if measures(cfg) and not cfg.test_tokens:
        raise UserError("key sensitivity: needs text to measure on, and test_tokens is 0.")
    budget = asked.budget_bytes(before) if asked.budget is not None else None
    if budget is not None and after > budget:
        raise UserError(
            f"key sensitivity.budget: {asked.budget} is {show_bytes(budget)}, and the scheme "
            f"{cfg_scheme(cfg)['component']} takes {show_bytes(after)} ({_percent(after, before)}) without a mix. Give "
            "at least that, or a smaller scheme"
            + (" (quantization.embedding=int4_g32)." if cfg_scheme(cfg).get("embedding") == "int8" else ".")
        )
    # A model that was trained for the scheme has learned the ranges that its weights have.
    calibration = 0 if is_trained_for(cfg, source) else cfg.calibration_tokens
    sources = named_sources(build("data", cfg.data))
    for name, each in sources.items():
        refuse_other_kinds(name, each, (Source,))
        if isinstance(each, Prepared):
            raise UserError(f"key data: source {name} holds tokens; this run takes text (data=files, hub, stdlib).")
    return Job(source, load_model_tokenizer(source), plan, before, after, seq_len, calibration, budget, sources)


class Quantize:
    """One model, from its checkpoint to a directory that loads like any other."""

    def __init__(self, cfg: Config, job: Job, runtime: Runtime) -> None:
        self.cfg, self.dtype = cfg, _DTYPES[cfg.dtype]
        self.source = checkpoint_directory(str(cfg.checkpoint))  # with its weights
        self.tokenizer, self.plan = job.tokenizer, job.plan
        self.bytes_before, self.bytes_after, self.budget = job.bytes_before, job.bytes_after, job.budget
        self.text = read_text(cfg, job.seq_len, job.calibration_tokens, job.sources, self.tokenizer)
        self.model = load_model(self.source, runtime.device, torch.float32).eval()
        if names := not_finite(dict(self.model.named_parameters())):
            raise UserError(
                f"{self.source}: its weights are not finite ({listed(names)}): its training diverged, or it is "
                "damaged. Quantize an earlier checkpoint or another model."
            )
        self.run = open_run(cfg, runtime, self.text.fingerprints)
        self.signals = StopSignals("stopping; a second one ends it at once.")

    def quantize(self) -> None:
        """Measure, choose, round, measure again, write. Resumed, it starts over with the sensitivities it has."""
        cfg, scheme, model = self.cfg, cfg_scheme(self.cfg), self.model
        modules = "choose the mix" if self.budget is not None else "measure modules"
        choice = self.text.choice.numel() - len(self.text.choice)
        counts = {"calibrate": self.text.calibration.numel(), modules: choice, "measure": self.text.predicted}
        if used := ", ".join(f"{count:,} tokens to {what} on" for what, count in counts.items() if count):
            echo(f"text: {self.text.described}; {used}")
        before = self.loss("before")
        moments = None
        if len(self.text.calibration):
            try:
                moments = second_moments(model, self.batches(self.text.calibration, "read to calibrate"), self.plan)
            except ValueError as error:
                raise UserError(f"{self.source}: {error}. calibration_tokens=0 rounds without them.") from error
        found = rules = None
        if measures(cfg):
            found, rules = self.mix(moments)
        if rules is not None:
            scheme = {"component": "mixed", "rules": rules, "qat": False}
        quantize(model, self.plan, second_moments=moments, scheme=scheme, progress=self.teller("quantized"))
        model.to(self.dtype)
        after = self.loss("after")
        self.tokenizer.save(self.run.path)
        save_model(model, None, self.run.path)
        size = sum(path.stat().st_size for path in self.run.path.glob("*.safetensors"))
        report = {
            "checkpoint": str(self.source),
            "scheme": scheme,
            "dtype": cfg.dtype,
            "calibration_tokens": self.text.calibration.numel(),
            "bytes": size,
            "bytes_before": self.bytes_before,
            "sensitivity_tokens": choice,
            "test_tokens": self.text.predicted,
            "loss_before": before,
            "loss": after,
            "formats": {name: format.name for name, format in self.plan.items()},
        }
        with atomic_write(self.run.path / REPORT) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        manifest.write(self.run.path, 0, {}, only=MODEL_FILES)
        self.run.update(parameters=sum(p.numel() for p in on_meta(self.source).parameters()))
        drawn = []
        if found is not None and before is not None and after is not None:
            picture = self.run.path / "sensitivity.png"
            measured = (Measured(self.bytes_before, before), Measured(size, after))
            sensitivity.draw(found, picture, *measured, tokens=self.text.predicted, rules=rules)
            drawn = [f"what each module loses: {picture}"]
        echo("\n".join([*getattr(self.plan, "notes", ()), *drawn, *lines(report, self.run.path)]))

    def loss(self, when: str) -> float | None:
        """Nats a token of the text to measure on; None where there is none."""
        test = self.text.test
        return sensitivity.loss(self.model, self.batches(test, f"measured {when} quantizing")) if len(test) else None

    def batches(self, rows: Tensor, what: str) -> Iterator[Tensor]:
        """Rows a few at a time, on the model's device."""
        batches = rows.split(_BATCH)
        for batch in ticking(batches, f"of {len(batches)} batches of text {what}", shown=True):
            self.stop_if_asked()
            yield batch.to(self.model.device)

    def stop_if_asked(self) -> None:
        """End the process where a signal came.

        Raises:
            SystemExit: with EXIT_STOPPED.
        """
        if self.signals.heard:
            echo(f"stopped; resume it with: plmtune resume {self.run.path}", err=True)
            raise SystemExit(EXIT_STOPPED)

    def teller(self, what: str) -> Callable[[str, int, int], None]:
        """Say on standard error, every few seconds, how many modules are done; stop there if asked to."""
        said, told = time.monotonic(), False

        def tell(name: str, done: int, total: int) -> None:
            nonlocal said, told
            self.stop_if_asked()
            # The last line tells that it is done, where an earlier one told that it was not.
            if time.monotonic() - said >= 5 or (done == total and told):
                said, told = time.monotonic(), True
                echo(f"{done} of {total} modules {what}", err=True)

        return tell

    def mix(self, moments: dict[str, Tensor] | None) -> tuple[Found, dict[str, str] | None]:
        """Measure what each module loses; returns that and the rules that the budget allows, None without one.

        The plan is theirs then. The rows are others than those that the loss is measured on: a mix loses least on those
        that it was chosen by.
        """
        asked, path = self.cfg.sensitivity, self.run.path
        found = sensitivity.measure(
            self.model,
            self.plan,
            self.text.choice.to(self.model.device),
            path / "sensitivity.json",
            dtype=self.dtype,
            second_moments=moments,
            progress=self.teller("measured"),
        )
        if self.budget is None:
            return found, None
        least = sum(one.bytes for one in found)  # of what is measured; the rest of the file is the same in any mix
        left = self.budget - (self.bytes_after - least)
        while True:  # the header of a file depends on the mix, by some bytes
            rules = sensitivity.propose(found, left)
            self.plan = build("quantization", Component("quantization", "mixed", {"rules": rules}), model=self.model)
            size = file_bytes(on_meta(self.source), self.plan, self.dtype)
            if size <= self.budget:
                break
            if left == least:
                raise UserError(
                    f"key sensitivity.budget: {asked.budget} is {self.budget:,} bytes, and the smallest mix takes "
                    f"{size:,}. Give at least that."
                )
            left = max(left - (size - self.budget), least)
        listed = "".join(f"    {json.dumps(pattern)}: {name}\n" for pattern, name in rules.items())
        mix = f"defaults:\n  - override /quantization: mixed\nquantization:\n  rules:\n{listed}"
        use = f"# Use: plmtune run quantize {path / 'mix.yaml'} checkpoint={self.source}\n"
        (path / "mix.yaml").write_text(use + mix, encoding="utf-8")
        more = ""
        if sensitivity.predict(found, rules) < sensitivity.NEGLIGIBLE:
            more = f"; more bytes would gain less than {sensitivity.NEGLIGIBLE:g} nats a token"
        before = self.bytes_before
        wanted, taken = (f"{show_bytes(n, before)} ({_percent(n, before)})" for n in (self.budget, size))
        echo(f"the mix for {wanted} takes {taken}{more}: {path / 'mix.yaml'}")
        return found, rules


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def cfg_scheme(cfg: Config) -> dict[str, Any]:
    """The scheme of a config as plain data."""
    assert cfg.quantization is not None
    return component_config(cfg.quantization)


def choose(cfg: Config) -> str:
    """Fill in `checkpoint` and `quantization` where they are left out; returns what was chosen.

    Raises:
        UserError: if there is nothing to quantize.
    """
    said = f"quantizing {cfg.checkpoint}"
    if cfg.checkpoint is None:
        newest = next(finished_runs(), None)
        if newest is None:
            raise UserError(
                "there is no finished run under runs/ to quantize. Train one (plmtune run demo), or name a run or "
                "a model directory with checkpoint=DIR."
            )
        cfg.checkpoint, said = str(newest), f"quantizing {newest}, the newest finished run (checkpoint=DIR for another)"
    cfg.checkpoint = hub.pin(cfg.checkpoint)
    directory = checkpoint_directory(cfg.checkpoint, weights=False)
    trained_for = qat.read_scheme(directory)
    if cfg.quantization is None and trained_for is not None:
        cfg.quantization = component_from_config("quantization", trained_for, f"{directory}, key qat")
    cfg.quantization = cfg.quantization or Component("quantization", "int4", {})
    rules = cfg.quantization.settings.get("rules")
    said += f" as {cfg.quantization.name}" + (f" with {len(rules)} rules" if rules else "")
    return said + (", which it was trained for" if is_trained_for(cfg, directory) else "")


def is_trained_for(cfg: Config, directory: Path) -> bool:
    """Whether the model in `directory` was trained for the scheme of the config."""
    trained_for = qat.read_scheme(directory)
    assert cfg.quantization is not None
    return trained_for is not None and qat.scheme_settings(cfg.quantization) == trained_for


def measures(cfg: Config) -> bool:
    """Whether sensitivities are measured: a budget cannot be spent without them."""
    return cfg.sensitivity.measure or cfg.sensitivity.budget is not None


def on_meta(source: Path) -> Any:
    """The model of a checkpoint without its weights.

    Raises:
        UserError: if it is quantized already.
    """
    if not holds_adapters(source) and "quantization_config" in read_json(source, MODEL_CONFIG):
        raise UserError(f"{source} is quantized already. Quantize what it was made from (quantize.json names it).")
    description = read_model_config(source)
    with torch.device("meta"):
        return component_from_config("model", description, str(source))(vocab_size=description["vocab_size"])


def plan_of(cfg: Config, model: Any) -> Any:
    """Which matrix is stored how, by the scheme of the config.

    Raises:
        UserError: naming the key.
    """
    return build("quantization", cfg.quantization, model=model)


def read_text(
    cfg: Config, seq_len: int, calibration_tokens: int, sources: Mapping[str, Source], tokenizer: Tokenizer
) -> Text:
    """Rows of the data, as many as are asked for, spread over its first million tokens.

    Raises:
        UserError: if there are fewer.
    """
    calibration, test = (-(-n // seq_len) for n in (calibration_tokens, cfg.test_tokens))
    choice = max(1, cfg.sensitivity.tokens // seq_len) if measures(cfg) else 0
    sources = sources if calibration + test else {}
    pool = max(_POOL, 4 * seq_len * max(calibration, test + choice))
    ids: list[Any] = []
    for left, source in zip(range(len(sources), 0, -1), sources.values(), strict=True):
        have = sum(map(len, ids))
        share = have + -(-(pool - have) // left)  # of each source alike; what one lacks the later ones give
        for text in source.documents():
            if have >= share:
                break
            ids.append(np.asarray([*tokenizer.with_bos(tokenizer.encode(text)), tokenizer.eos_id], dtype=np.int64))
            have += len(ids[-1])
    joined = torch.from_numpy(np.concatenate(ids)) if ids else torch.empty(0, dtype=torch.long)
    rows = joined[: len(joined) // seq_len * seq_len].view(-1, seq_len)
    # Every other row is for measuring, whatever is calibrated on: so losses of several schemes are of one text.
    held_out = rows[1::2]
    places = spread(torch.arange(len(held_out)), test)
    others = torch.ones(len(held_out), dtype=torch.bool).index_fill(0, places, False)
    found = Text(
        spread(rows[0::2], calibration),
        spread(held_out[others], choice),
        held_out[places],
        {name: source.fingerprint() for name, source in sources.items()},
        "; ".join(source.describe() for source in sources.values()),
    )
    if len(found.calibration) < calibration or len(found.test) < test or len(found.choice) < choice:
        more = f" with sensitivity.tokens ({cfg.sensitivity.tokens:,})" if choice else ""
        raise UserError(
            f"key data: the text has {len(joined):,} tokens, and calibration_tokens ({calibration_tokens:,}) and "
            f"test_tokens ({cfg.test_tokens:,}){more} are taken of one half of it each, in rows of {seq_len}. Give "
            "more text, or ask for fewer."
        )
    return found


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` of rows, evenly spread over them; all, where they are fewer."""
    return rows[torch.arange(count) * len(rows) // max(1, count)] if count <= len(rows) else rows


def lines(report: dict[str, Any], path: Path) -> list[str]:
    """What to say at the end."""
    size, before = report["bytes"], report["bytes_before"]
    share = _percent(size, before)
    said = [f"{path}: {show_bytes(size, before)}, {share} of the {show_bytes(before)} in {report['dtype']}"]
    if report["loss"] is not None:
        lost = report["loss"] - report["loss_before"]
        perplexities = np.exp([report["loss_before"], report["loss"]])
        said.append(
            f"loss {report['loss_before']:.4f} -> {report['loss']:.4f} nats a token ({lost:+.4f}), perplexity "
            f"{perplexities[0]:.2f} -> {perplexities[1]:.2f} on {report['test_tokens']:,} tokens of the data"
        )
    return [*said, f"try it: plmtune generate {path} --prompt 'Hello'", f"how fast it is: plmtune bench {path}"]


def check(cfg: Config) -> str:
    """What ``plmtune validate`` says of a config that is right."""
    Runtime.choose(device=cfg.device, strategy="none")
    find_run(cfg)
    if cfg.checkpoint is None and next(finished_runs(), None) is None:
        return "There is no finished run to quantize; what follows from its model is not checked."
    job = preflight(cfg)
    return f"{job.size()}."


def main(cfg: Config, *, dry_run: bool = False) -> float | None:
    """Run the recipe; returns the loss in nats a token, which a sweeper can minimise."""
    if dry_run:
        Runtime.choose(device=cfg.device, strategy="none")
        find_run(cfg)
        job = preflight(cfg)
        echo(job.size())
        return None
    with Runtime.choose(device=cfg.device, seed=0, strategy="none").start() as runtime:
        find_run(cfg)
        if cfg.resume and read_record(Path(str(cfg.run_dir))).get("status") == "finished":
            echo(already_finished(Path(str(cfg.run_dir))))
            return load_json((Path(str(cfg.run_dir)) / REPORT).read_text(encoding="utf-8"))["loss"]
        recipe = Quantize(cfg, preflight(cfg), runtime)
        with recipe.run, recipe.signals:
            recipe.quantize()
        report = load_json((recipe.run.path / REPORT).read_text(encoding="utf-8"))
    return report["loss"]
