"""``plmtune plan``: how large and how fast a model will be on a device, before it is trained."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plmtune.cli import import_option
from plmtune.cli.options import divide
from plmtune.config.builtin import builtin_folder
from plmtune.errors import UserError
from plmtune.io import hub
from plmtune.io.tables import Column, Table, numbers, show

if TYPE_CHECKING:
    from plmtune.devices.costs import ModelShape
    from plmtune.devices.device import Device
    from plmtune.devices.predict import Prediction

_SCHEMES = "bf16,int8,int4,f16,q8_0,q4_0,q4_k_m"
_CONTEXTS = "128,2048,4096"


@click.command()
@click.argument("name", metavar="CONFIG")
@click.argument("arguments", nargs=-1, metavar="[FILE.yaml] [KEY=VALUE]...")
@click.option("--device", "devices", default="pi5", show_default=True, help="Names or FILE.yaml, with commas.")
@click.option("--scheme", "schemes", help=f"With commas; default: {_SCHEMES.replace(',', ', ')}; of a sweep int4.")
@click.option("--runtime", "runtimes", help="plmtune or llama.cpp, or both; default: both; of a sweep plmtune.")
@click.option("--context", "contexts", help=f"Tokens in the cache; of a sweep one; default: {_CONTEXTS}, or 2048.")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens read for the first one.")
@click.option("--train-on", default="h200", show_default=True, help="Device of the hours that training takes.")
@click.option("--sweep", is_flag=True, help="Predict every combination of the keys that have several values.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures there.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw speeds, or a sweep's front.")
@import_option
def plan(
    name: str,
    arguments: tuple[str, ...],
    devices: str,
    schemes: str | None,
    runtimes: str | None,
    contexts: str | None,
    prompt: int,
    train_on: str,
    sweep: bool,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Say what a model will cost: memory, speed and training, from its config alone.

    CONFIG is what plmtune run takes, a model (plmtune ls model), or a checkpoint. Nothing is trained or allocated.
    Devices (plmtune ls devices) are YAML files, and plmtune bench --calibrate FILE.yaml writes one for this machine.

    \b
    plmtune plan plm_1.8b --device pi5,jetson_orin_nano
    plmtune plan pretrain model=plm_150m --device mine.yaml --scheme int8,int4 --runtime plmtune
    plmtune plan runs/demo/latest --device pi5
    plmtune plan pretrain model=plm_150m --sweep model.embed_dim=512,768 'model.num_layers=range(8,25,4)'
    """
    for path, suffix in ((json_path, ".json"), (plot, ".png")):
        if path is not None and (path.suffix != suffix or not path.parent.is_dir()):
            raise UserError(f"{path}: must be a {suffix} file in a folder that is there.")

    from plmtune.devices.device import load_device

    asked = Asked(
        devices=[load_device(device) for device in _words(devices, "--device")],
        schemes=_words(schemes or ("int4" if sweep else _SCHEMES), "--scheme"),
        schemes_given=schemes is not None,
        runtimes=_words(runtimes or ("plmtune" if sweep else "plmtune,llama.cpp"), "--runtime"),
        contexts=_lengths(contexts or ("2048" if sweep else _CONTEXTS)),
        prompt=prompt,
        json_path=json_path,
        plot=plot,
    )
    overlays, overrides = divide(arguments)
    if sweep:
        from plmtune.cli.plan_sweep import show_sweep

        show_sweep(name, overlays, overrides, asked)
        return
    model_shape, cfg = _read(name, overlays, overrides)
    if contexts is None:  # the usual ones, as far as this model goes
        asked = replace(asked, contexts=sorted({min(length, model_shape.max_seq_len) for length in asked.contexts}))
    budget = cfg is not None and getattr(cfg, "phases", True)  # a preference run has none: its pairs say it
    training = _training(cfg, train_on) if budget else None
    _plan(name, model_shape, asked, training, without_budget=cfg is not None and not budget)


@dataclass(frozen=True)
class Asked:
    """What the options ask for.

    Attributes:
        contexts: tokens in the cache, the fewest first.
        prompt: tokens read for the first one.
    """

    devices: list[Device]
    schemes: list[str]
    schemes_given: bool
    runtimes: list[str]
    contexts: list[int]
    prompt: int
    json_path: Path | None
    plot: Path | None


def with_preset(name: str, overlays: Sequence[str], overrides: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The config that a model's name alone stands for: plan needs no more of it than the model."""
    from plmtune.config.choices import presets
    from plmtune.registry import describe

    is_model = name in describe()["model"] or name in presets("model")
    if is_model and not (builtin_folder("conf") / f"{name}.yaml").is_file():
        return "pretrain", [*overlays], [f"model={name}", *overrides]
    return name, [*overlays], [*overrides]


def _words(text: str, option: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise UserError(f"{option}: names nothing.")
    return words


def _lengths(text: str) -> list[int]:
    words = _words(text, "--context")
    if not all(word.isdecimal() and 0 < int(word) < 2**40 for word in words):
        raise UserError(f"--context: {text!r:.80} must be numbers of tokens with commas, such as 128,2048.")
    return sorted(map(int, words))


def _read(name: str, overlays: Sequence[str], overrides: Sequence[str]) -> tuple[ModelShape, Any]:
    """A config's or a checkpoint's model, on the meta device, and the config."""
    import torch

    from plmtune.config import compose
    from plmtune.devices.costs import ModelShape
    from plmtune.devices.sweep import vocabulary

    if Path(name).is_dir() or hub.parse(name) or Path(name).suffix == ".gguf":
        if overlays or overrides:
            raise UserError(
                f"{name} is a checkpoint, whose model is as it is: {[*overlays, *overrides][0]} has no place."
            )
        from plmtune.models.adapters import read_model_config
        from plmtune.models.assemble import component_from_config
        from plmtune.models.checkpoint_files import checkpoint_directory
        from plmtune.models.hf import read_formats
        from plmtune.modules.quantized import install

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
        model = compose.build("model", cfg.model, vocab_size=vocabulary(cfg))
    return ModelShape.of(model), cfg


def _plan(
    name: str, model_shape: ModelShape, asked: Asked, training: dict[str, Any] | None, *, without_budget: bool
) -> None:
    """Print what a model costs on each device, and write what was asked for."""
    from plmtune.devices import costs
    from plmtune.devices.pareto import draw_speeds
    from plmtune.devices.predict import predict
    from plmtune.export.lint import lint_deploy

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
    findings = lint_deploy(model_shape.config)

    _print_model(name, model_shape, asked.runtimes if not refused else ["plmtune"], longest[-1])
    for device in asked.devices:
        _print_device(device, [p for p in predictions if p.device == device.key], longest)
    if refused:
        show(f"\nNot for llama.cpp: {refused}")
    if left_out:
        show(f"\nLeft out, as the model takes {model_shape.max_seq_len:,} tokens: contexts of {_joined(left_out)}.")
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
            "weights": [{"runtime": r, "scheme": s, **asdict(w)} for (r, s), w in held.items()],
            "devices": {device.key: asdict(device) for device in asked.devices},
            "predictions": [as_plain(prediction) for prediction in predictions],
            "training": training,
            "lint": [asdict(finding) for finding in findings],
        }
        write_json(asked.json_path, content)


def _pairs(model_shape: ModelShape, asked: Asked) -> tuple[list[tuple[str, str]], str]:
    """The pairs of runtime and scheme to predict, and why none is llama.cpp's, if it cannot have the model.

    Raises:
        UserError: for a scheme that no runtime has, or if only llama.cpp was asked for.
    """
    from plmtune.devices import costs
    from plmtune.export.lint import gguf_architecture

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
        gguf_architecture(model_shape.config)
    except UserError as error:
        ours = [pair for pair in pairs if pair[0] != "llama.cpp"]
        if not ours:
            raise
        return ours, str(error)
    return pairs, ""


def _print_model(name: str, model_shape: ModelShape, runtimes: list[str], context: int) -> None:
    from plmtune.devices import costs
    from plmtune.units import show_bytes, show_count, show_number_of

    layers = show_number_of(model_shape.num_layers, "layer")
    show(
        f"{name}: {model_shape.parameters:,} parameters ({model_shape.non_embedding_parameters:,} without embeddings), "
        f"{layers} of width {model_shape.embed_dim:,}, a vocabulary of {model_shape.vocab_size:,}"
    )
    for runtime in runtimes:
        a_token, whole = (costs.cache_bytes(model_shape, runtime, n) for n in (1, context))
        flops = costs.decode_flops(model_shape, runtime, context)
        show(
            f"{runtime:<10} a cache of {show_bytes(a_token)} a token, {show_bytes(whole)} at {context:,}; "
            f"{show_count(flops)} FLOPs a token there"
        )


def _joined(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def _print_device(device: Device, predictions: list[Prediction], contexts: list[int]) -> None:
    from plmtune.units import show_bytes, show_number

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
    from plmtune.units import show_number

    if prediction.decode is None:
        return "does not fit"
    speed = show_number(prediction.decode)
    if prediction.is_bound:
        return f"at most {speed}"
    return f"{speed} ± {show_number(prediction.decode * prediction.error, 2)}"


def _training(cfg: Any, train_on: str) -> dict[str, Any]:
    """Memory, FLOPs and hours of the config's own training."""
    import torch

    from plmtune.devices.device import load_device
    from plmtune.training import plans
    from plmtune.training.runtime import Runtime
    from plmtune.units import show_bytes, show_count

    device = load_device(train_on)
    if device.training is None or device.mfu is None:
        raise UserError(f"--train-on {train_on}: says no training_gflop_s. Take h200 or rtx_3090, or a file that does.")
    dtype = torch.float32 if cfg.runtime.precision == "fp32" else torch.bfloat16
    found = plans.plan(
        cfg,
        Runtime(torch.device("cpu"), dtype, "none"),
        importlib.import_module(f"plmtune.recipes.{cfg.recipe}").KIND,
    )
    estimate = replace(found.estimate, process=0, save=0)  # which a GPU's host holds
    memory = estimate.total
    tokens = found.num_steps * found.tokens_per_step
    flops = tokens * estimate.flops_per_token
    hours = flops / (device.training.value * device.mfu.value) / 3600
    fits = "fits" if memory <= device.available else "does not fit one"
    lines = [
        f"Training on {device.name}",
        f"  memory  {show_bytes(memory)} with micro-batches of {cfg.micro_batch_size} x {cfg.seq_len:,}: {fits} "
        f"(weights {show_bytes(estimate.weights)}, gradients {show_bytes(estimate.gradients)}, optimizer "
        f"{show_bytes(estimate.optimizer)}, activations {show_bytes(estimate.activations)}, logits "
        f"{show_bytes(estimate.logits)}, slack {show_bytes(estimate.slack)})",
        f"  compute {show_count(estimate.flops_per_token)} FLOPs a token",
    ]
    phases = []
    for phase in found.phases:
        count = phase.steps * found.tokens_per_step
        took = hours * count / tokens
        phases.append({"name": phase.name, "tokens": count, "flops": count * estimate.flops_per_token, "hours": took})
        lines.append(
            f"  phase {phase.name}: {show_count(count)} tokens, {show_count(count * estimate.flops_per_token)} FLOPs, "
            f"{_hours(took)}"
        )
    if phases:
        lines.append(
            f"  all phases: {_hours(hours)} of one device, at {device.mfu.value:.0%} of "
            f"{device.training.value / 1e12:,.4g} TFLOP/s ({device.mfu.source})"
        )
    else:
        lines.append("  how many tokens its pairs have is known when they are read")
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
    from plmtune.units import show_number

    for unit, number in (("hours", hours), ("minutes", hours * 60)):
        if number >= 1:
            return f"{show_number(number)} device-{unit}"
    return f"{show_number(hours * 3600)} device-seconds"


def as_plain(prediction: Prediction) -> dict[str, Any]:
    return {**asdict(prediction), "memory": prediction.memory, "fits": prediction.fits}


def write_json(path: Path, content: dict[str, Any]) -> None:
    from plmtune.io.atomic import atomic_write

    with atomic_write(path, user_error=True) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    show(f"{path} written")
