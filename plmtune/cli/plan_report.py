"""What ``plmtune plan`` shows of a model: sizes, speeds and training."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plmtune.cli.options import write_json
from plmtune.config import compose
from plmtune.config.builtin import builtin_folder
from plmtune.config.choices import presets
from plmtune.config.schema import TrainingConfig
from plmtune.devices import costs, latent_form
from plmtune.devices.costs import ModelShape
from plmtune.devices.device import Device, load_device
from plmtune.devices.pareto import draw_speeds
from plmtune.devices.predict import Prediction, predict
from plmtune.devices.sweep import vocabulary
from plmtune.errors import UserError, either, near_names
from plmtune.export.lint import gguf_architecture, lint_deploy
from plmtune.io import hub
from plmtune.io.tables import Column, Table, numbers, show
from plmtune.models.adapters import read_model_config
from plmtune.models.assemble import component_from_config
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.models.hf_config import read_formats
from plmtune.modules.quantized import install
from plmtune.registry import describe_components
from plmtune.training.batch_rule import show_batch_rule
from plmtune.training.runtime import Runtime
from plmtune.units import show_bytes, show_count, show_number, show_number_of


@dataclass(frozen=True)
class Asked:
    """The parsed options."""

    devices: list[Device]
    schemes: list[str]
    schemes_given: bool
    runtimes: list[str]
    contexts: list[int]  # tokens in the cache, the fewest first
    contexts_given: bool
    prompt: int  # tokens read for the first one
    json_path: Path | None
    plot: Path | None


def with_preset(name: str, overlays: Sequence[str], overrides: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The config that a model's name alone stands for: plan needs no more of it than the model."""
    is_model = name in describe_components()["model"] or name in presets("model")
    if is_model and not (builtin_folder("conf") / f"{name}.yaml").is_file():
        return "pretrain", [*overlays], [f"model={name}", *overrides]
    configs = {path.stem for path in builtin_folder("conf").glob("*.yaml")}
    known = {*configs, *describe_components()["model"], *presets("model")}
    if name not in known and not name.endswith((".yaml", ".yml")) and (near := near_names(name, known)):
        raise UserError(f"There is no config or model {name}. Did you mean {either(near)}?")
    return name, [*overlays], [*overrides]


def published_rows(name: str, overlays: Sequence[str], overrides: Sequence[str]) -> int | None:
    """The vocabulary that a preset of a published model is planned with, where nothing chooses a tokenizer."""
    path = builtin_folder("conf") / "model" / f"{name}.yaml"
    if (
        overlays
        or not path.is_file()
        or any(text.lstrip("+~").startswith(("tokenizer", "phases")) for text in overrides)
    ):
        return None
    found = re.search(r", a vocabulary of ([\d,]+)", path.read_text(encoding="utf-8").partition("\n")[0])
    return int(found[1].replace(",", "")) if found else None


def read_model_shape(name: str, overlays: Sequence[str], overrides: Sequence[str]) -> tuple[ModelShape, Any]:
    """A config's or a checkpoint's model, on the meta device, and the config."""
    if Path(name).is_dir() or hub.parse(name) or Path(name).suffix == ".gguf":
        if overlays or overrides:
            raise UserError(
                f"{name} is a checkpoint, whose model is as it is: {[*overlays, *overrides][0]} has no place."
            )
        directory = checkpoint_directory(name, weights=False)
        description = read_model_config(directory)
        with torch.device("meta"):
            part = component_from_config("model", description, str(directory))
            model = compose.build("model", part, vocab_size=description["vocab_size"])
            install(model, read_formats(directory)[0] if (directory / "config.json").is_file() else {})
        return ModelShape.of(model), None
    cfg = compose.compose(*with_preset(name, overlays, overrides))
    if getattr(cfg, "model", None) is None:
        raise UserError(
            f"{name} names no model: it takes that of its checkpoint. Choose one (model=plm), or plan that."
        )
    with torch.device("meta"):
        model = compose.build(
            "model", cfg.model, vocab_size=published_rows(name, overlays, overrides) or vocabulary(cfg)
        )
    return ModelShape.of(model), cfg


def show_plan(
    name: str, model_shape: ModelShape, asked: Asked, training: dict[str, Any] | None, *, without_budget: bool
) -> None:
    """Print what a model costs on each device; write JSON and the plot where given."""
    longest = [context for context in asked.contexts if context <= model_shape.max_seq_len]
    left_out = [context for context in asked.contexts if context > model_shape.max_seq_len]
    if not longest:
        most, least = model_shape.max_seq_len, asked.contexts[0]
        raise UserError(f"--context: {name} takes {most:,} tokens at most, not {least:,}.")
    pairs, refused = _pairs(model_shape, asked)
    try:
        held = {pair: costs.weights(model_shape, *pair) for pair in pairs}
        predictions = [
            predict(model_shape, device, scheme=scheme, runtime=runtime, context=context, prompt=asked.prompt)
            for device in asked.devices
            for runtime, scheme in pairs
            for context in longest
        ]
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from error
    findings = lint_deploy(model_shape.model.config)

    _print_model(name, model_shape, asked.runtimes if not refused else ["plmtune"], longest[-1])
    forms = _print_forms(model_shape, [scheme for runtime, scheme in pairs if runtime == "llama.cpp"], longest[-1])
    for device in asked.devices:
        _print_device(device, [p for p in predictions if p.device == device.key], longest)
    if refused:
        show(f"\nNot for llama.cpp: {refused}")
    if left := ", ".join(f"{context:,}" for context in left_out):
        show(f"\nLeft out, as the model takes {model_shape.max_seq_len:,} tokens: contexts of {left}.")
    if training is not None:
        show("\n" + "\n".join(training.pop("lines")))
    elif without_budget:
        show("\nTraining is not planned: key phases is empty. Give phases='[{name: main, tokens: 2B}]'.")
    if findings:
        show("\nWhat will not deploy well")
        for finding in findings:
            show(f"  {finding.level}: {finding.text}")
    if asked.plot is not None:
        draw_speeds(predictions, asked.plot, f"{name}: predicted decode")
        show(f"\n{asked.plot} written")
    if asked.json_path is not None:
        content = {
            "config": name,
            "parameters": model_shape.parameters,
            "non_embedding_parameters": model_shape.non_embedding_parameters,
            "cache_bytes_a_token": {runtime: costs.cache_bytes(model_shape, runtime) for runtime in costs.RUNTIMES},
            "llama.cpp_forms": forms,
            "weights": [{"runtime": r, "scheme": s, **asdict(w)} for (r, s), w in held.items()],
            "devices": {device.key: asdict(device) for device in asked.devices},
            "predictions": [as_plain(prediction) for prediction in predictions],
            "training": training,
            "lint": [asdict(finding) for finding in findings],
        }
        write_json(asked.json_path, content)


def _pairs(model_shape: ModelShape, asked: Asked) -> tuple[list[tuple[str, str]], str]:
    """The pairs of runtime and scheme to predict, and why none is llama.cpp's, if it cannot have the model."""
    schemes, runtimes = asked.schemes, asked.runtimes
    if not asked.schemes_given:
        if model_shape.formats:
            schemes = [costs.STORED, *(s for s in schemes if s not in costs.our_schemes())]
        if len(runtimes) == 1:
            schemes = [s for s in schemes if s == costs.STORED or s in costs.schemes_of(runtimes[0])]
    pairs = costs.check_schemes(schemes, runtimes)
    if not asked.schemes_given:
        pairs = [pair for pair in pairs if pair != ("llama.cpp", "bf16")]  # f16 is there, of the same size
    pairs.sort(key=lambda pair: runtimes.index(pair[0]))
    try:
        gguf_architecture(model_shape.model.config)
    except UserError as error:
        ours = [pair for pair in pairs if pair[0] != "llama.cpp"]
        if not ours:
            raise
        return ours, str(error)
    return pairs, ""


def _print_model(name: str, model_shape: ModelShape, runtimes: list[str], context: int) -> None:
    layers = show_number_of(model_shape.num_layers, "layer")
    show(
        f"{name}: {model_shape.parameters:,} parameters ({model_shape.non_embedding_parameters:,} without embeddings), "
        f"{layers} of width {model_shape.model.embed_dim:,}, a vocabulary of {model_shape.model.vocab_size:,}"
    )
    for runtime in runtimes:
        a_token, whole = (costs.cache_bytes(model_shape, runtime, n) for n in (1, context))
        flops = costs.decode_flops(model_shape, runtime, context)
        show(
            f"{runtime:<10} a cache of {show_bytes(a_token)} a token, {show_bytes(whole)} at {context:,}; "
            f"{show_count(flops)} FLOPs a token there"
        )


def _print_forms(model_shape: ModelShape, schemes: list[str], context: int) -> dict[str, Any] | None:
    """Print what the other form of a PLM's GGUF file costs in one scheme, and return both; None: there is none."""
    if not schemes:
        return None
    scheme = "q8_0" if "q8_0" in schemes else schemes[0]
    forms = latent_form.of_model(model_shape, scheme)
    if forms is None:
        return None
    show(
        f"{'':<10} with plmtune export --to gguf --as deepseek2, in {scheme}: {latent_form.comparison(*forms, context)}"
    )
    return {"scheme": scheme, "plm": asdict(forms[0]), "deepseek2": asdict(forms[1])}


def _print_device(device: Device, predictions: list[Prediction], contexts: list[int]) -> None:
    how = "calibrated" if device.rates else f"reads at {show_number(device.bandwidth.value / 1e9)} GB/s"
    show(f"\n{device.key}: {device.name}; {show_bytes(device.available)} for a model, {how}")
    prompt = max(p.prompt for p in predictions)
    figures = {"weights": 2, f"memory at {contexts[-1]:,}": 0, "fits": 3, f"first of {prompt:,}": 1}
    figures |= {f"tokens/s at {context:,}": 0 for context in contexts}
    table = Table([Column("runtime", key=True), "scheme", *numbers(figures)])
    for first in predictions[:: len(contexts)]:
        row = [p for p in predictions if (p.runtime, p.scheme) == (first.runtime, first.scheme)]
        last = row[-1]
        waits = [p.first_token for p in row if p.prompt == prompt and p.first_token is not None]
        table.add(
            first.runtime,
            first.scheme,
            show_bytes(first.file),
            show_bytes(last.memory),
            "yes" if last.fits else "no",
            f"{show_number(waits[0])} s" if waits else "-",
            *(show_speed(p) for p in row),
        )
    show(table)
    if any(not p.fits for p in predictions):
        show("What does not fit is read from the disk for each token, a hundred times slower: no speed is given.")
    if any(p.is_bound for p in predictions):
        show("plmtune's speeds are what this memory allows: how near it comes, plmtune bench --calibrate measures.")


def show_speed(prediction: Prediction) -> str:
    if prediction.decode is None:
        return "does not fit"
    speed = show_number(prediction.decode)
    if prediction.is_bound:
        return f"at most {speed}"
    return f"{speed} ± {show_number(prediction.decode * prediction.error, 2)}"


def predict_training(cfg: TrainingConfig, train_on: str) -> dict[str, Any]:
    """Memory, FLOPs and hours of the config's own training."""
    device = load_device(train_on)
    if device.training is None or device.mfu is None:
        raise UserError(f"--train-on {train_on}: says no training_gflop_s. Take h200 or rtx_3090, or a file that does.")
    dtype = torch.float32 if cfg.runtime.precision == "fp32" else torch.bfloat16
    recipe = importlib.import_module(f"plmtune.recipes.{cfg.recipe}")
    found = recipe.plan(cfg, Runtime(torch.device("cpu"), dtype))
    estimate = replace(found.estimate, process=0, save=0)  # which a GPU's host holds
    memory = estimate.total
    tokens = found.num_steps * found.tokens_per_step
    measuring = found.measured_tokens * estimate.flops_per_token / 3  # a forward without its backward
    flops = tokens * estimate.flops_per_token + measuring
    hours = flops / (device.training.value * device.mfu.value) / 3600
    fits = "fits" if memory <= device.available else "does not fit one"
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "slack")
    shares = ", ".join(f"{part} {show_bytes(getattr(estimate, part))}" for part in parts)
    lines = [
        f"Training on {device.name}",
        f"  memory  {show_bytes(memory)} with micro-batches of {cfg.micro_batch_size} x {found.seq_len:,}: {fits} "
        f"({shares})",
        f"  compute {show_count(estimate.flops_per_token)} FLOPs a token",
    ]
    phases = []
    for phase in found.phases:
        count = phase.steps * found.tokens_per_step
        used = count * estimate.flops_per_token
        took = hours * used / flops
        phases.append({"name": phase.name, "tokens": count, "flops": used, "hours": took})
        lines.append(f"  phase {phase.name}: {show_count(count)} tokens, {show_count(used)} FLOPs, {_hours(took)}")
    if measuring:
        took = hours * measuring / flops
        phases.append(
            {"name": "losses between rounds", "tokens": found.measured_tokens, "flops": measuring, "hours": took}
        )
        lines.append(
            f"  losses between rounds: {show_count(found.measured_tokens)} tokens, {show_count(measuring)} FLOPs "
            f"(forward only), {_hours(took)}"
        )
    if phases:
        lines.append(
            f"  all phases: {_hours(hours)} of one device, at {device.mfu.value:.0%} of "
            f"{device.training.value / 1e12:,.4g} TFLOP/s ({device.mfu.source})"
        )
    else:
        lines.append("  how many tokens its pairs have is known when they are read")
    lr = cfg.optimizer.settings.get("lr") if cfg.optimizer and cfg.recipe == "pretrain" else None
    if lr is not None and (rule := show_batch_rule(found.tokens_per_step, lr)):
        lines.append(f"  {rule}")
    return {
        "device": device.key,
        "memory": memory,
        "fits": memory <= device.available,
        "flops_per_token": estimate.flops_per_token,
        "phases": phases,
        "hours": hours,
        "lines": lines,
    }


def _hours(hours: float) -> str:
    for unit, number in (("hours", hours), ("minutes", hours * 60)):
        if number >= 1:
            return f"{show_number(number)} device-{unit}"
    return f"{show_number(hours * 3600)} device-seconds"


def as_plain(prediction: Prediction) -> dict[str, Any]:
    return {**asdict(prediction), "memory": prediction.memory, "fits": prediction.fits}
