"""The sections of a model card that describe a run: its training, data and sparsity."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plmtune.data.order import show_mix
from plmtune.errors import UserError
from plmtune.evaluation.card_values import show_component, show_settings, show_value
from plmtune.evaluation.markdown import Markdown, code, escape, hub_link, table
from plmtune.evaluation.model_facts import Run
from plmtune.training.plot import sparsity_layers
from plmtune.units import parse_count, show_count

CURVES = "curves.png"
# A validation's numbers that the card shows, with what they are.
_MEASURED = {
    "validation_loss": "validation loss",
    "bits_per_byte": "validation, bits per byte",
    "validation/accuracy": "held-out pairs whose chosen answer is preferred",
    "validation/margin": "margin of rewards on held-out pairs",
}
_ROUND = {"direct": "reward of direct answers after the rounds", "refined": "reward of refined answers after them"}


def training_section(run: Run, curves: bool) -> list[str]:
    config = run.config
    rows: list[tuple[str, str]] = [("recipe", f"{config.get('recipe')}, config {config.get('name')}")]
    command = run.record.get("command")
    if isinstance(command, list) and command:
        rows.append(("command", code(shlex.join([Path(str(command[0])).name, *map(str, command[1:])]))))
    rows += [("data", text) for text in _data(config.get("data"))]
    for phase in config.get("phases") or []:
        length = (
            f"{show_value(phase['tokens'])} tokens"
            if phase.get("tokens")
            else f"{show_value(phase.get('steps'))} steps"
        )
        mix = _mix(phase, config)
        rows.append((f"phase {phase.get('name')}", length + (f", mixed of {mix}" if mix else "")))
    if config.get("rounds"):
        rows.append(("rounds", f"{show_value(config['rounds'])}, of {show_settings(config.get('generation') or {})}"))
    rows.append(("steps", show_value(run.step)))
    if (tokens := run.latest("tokens")) is not None:
        rows.append(("tokens", f"{tokens:,} ({show_count(tokens)})"))
    unit = "pairs" if config.get("recipe") == "preference" else "sequences"
    rows.append(
        ("batch", f"{show_value(config.get('global_batch_size'))} {unit} of {show_value(config.get('seq_len'))} tokens")
    )
    for key in ("loss", "optimizer", "scheduler", "peft", "reward"):
        if isinstance(config.get(key), dict):
            rows.append((key, show_component(config[key])))
    if config.get("max_grad_norm"):
        rows.append(("gradient norm", f"clipped at {show_value(config['max_grad_norm'])}"))
    rows.append(("seed", show_value(config.get("seed"))))
    rows += _machine(run)
    for key, name in (_MEASURED | _ROUND).items():
        if (value := run.latest(key)) is not None:
            of = f" (nats a {'pair' if unit == 'pairs' else 'token'})" if key == "validation_loss" else ""
            rows.append((name + of, f"{value:.4f}"))
    if (loss := run.latest("loss")) is not None:
        rows.append(("training loss, last logged", f"{loss:.4f}"))
    lines = ["## Training", "", *table(("", ""), rows)]
    return [*lines, "", f"![loss and learning rate of the run]({CURVES})"] if curves else lines


def _mix(phase: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The shares that a phase draws of its sources."""
    weights = phase.get("mix") or {}
    try:
        steps, sequences = phase.get("steps"), int(config["global_batch_size"])
        if steps is None:
            steps = math.ceil(parse_count(phase["tokens"], "tokens") / (sequences * int(config["seq_len"])))
        return show_mix({str(name): float(weight) for name, weight in weights.items()}, int(steps) * sequences)
    except (KeyError, TypeError, ValueError, UserError):  # of another recipe
        return show_settings(weights)


def _machine(run: Run) -> list[tuple[str, str]]:
    attempts = [one for one in run.record.get("attempts") or [] if isinstance(one, dict)]
    devices = dict.fromkeys(str(one["device"]) for one in attempts if one.get("device"))
    runtime = run.config.get("runtime") or {}
    rows = [("hardware", ", ".join(devices) or "not recorded")]
    wanted = {key: runtime.get(key) for key in ("device", "precision", "strategy")}
    rows.append(("asked of the hardware", show_settings(wanted)))
    seconds = last = 0.0
    for entry in run.entries:
        if isinstance(now := entry.get("time"), int | float):  # seconds of one process: a resumed run starts at 0
            seconds += now if now < last else now - last
            last = now
    if seconds:
        rows.append(("time in steps", _duration(seconds)))
    return rows


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.1f} seconds"


def _data(data: Any) -> Iterable[str]:
    """What a config says of its data, a line a source."""
    if not isinstance(data, dict):
        return []
    if data.get("component") == "mix" and isinstance(data.get("sources"), dict):
        return [Markdown(f"{escape(name)}: {_source(source)}") for name, source in data["sources"].items()]
    return [_source(data)]


def _source(settings: Any) -> Markdown:
    """A source of data; a dataset of the hub with a link to it, at its revision."""
    if not isinstance(settings, dict):
        return escape(settings)
    component = settings.get("component")
    key = "name" if component == "hub" else "hub"
    named = settings.get(key) if component in ("hub", "conversations", "preferences") else None
    link = hub_link(named, settings.get("revision"), dataset=True)
    if link is None:
        return escape(show_component(settings))
    more = show_settings(
        {name: value for name, value in settings.items() if name not in ("component", key) and value != []}
    )
    return Markdown(f"{escape(component)}: the hub's dataset {link}" + (f" ({escape(more)})" if more else ""))


def sparsity_section(run: Run) -> list[str]:
    layers = sparsity_layers(run.entries)
    if not layers:
        return []
    values = [(key, run.latest(key)) for key in layers]
    known = [value for _, value in values if value is not None]
    if not known:
        return []
    rows = [(key.partition("/")[2], "-" if value is None else f"{value:.1%}") for key, value in values]
    return [
        "## Sparsity",
        "",
        f"Zeros among the activations of the squared ReLU, in the latest validation: {sum(known) / len(known):.1%} on "
        "average over the layers.",
        "",
        *table(("layer", "zeros"), rows),
    ]
