"""``plmtune plan``: how large and how fast a model will be on a device, before it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from plmtune.cli import import_option
from plmtune.cli.options import divide, json_option
from plmtune.cli.plan_report import Asked, predict_training, read_model_shape, show_plan
from plmtune.errors import UserError

if TYPE_CHECKING:
    pass

_SCHEMES = "bf16,int8,int4,f16,q8_0,q4_0,q4_k_m"
_CONTEXTS = "128,2048,4096"


@click.command()
@click.argument("name", metavar="CONFIG")
@click.argument("arguments", nargs=-1, metavar="[FILE.yaml] [KEY=VALUE]...")
@click.option(
    "--device",
    "devices",
    default="pi5",
    show_default=True,
    help="Predict for these devices: names or FILE.yaml, separated by commas.",
)
@click.option(
    "--scheme",
    "schemes",
    help=f"Predict for these schemes, separated by commas (default: {_SCHEMES.replace(',', ', ')}; with --sweep int4).",
)
@click.option(
    "--runtime", "runtimes", help="Predict for plmtune, llama.cpp or both (default: both; with --sweep plmtune)."
)
@click.option(
    "--context",
    "contexts",
    help=f"Predict at these numbers of tokens in the cache (default: {_CONTEXTS}; with --sweep one: 2048).",
)
@click.option(
    "--prompt",
    type=click.IntRange(1),
    metavar="N",
    default=512,
    show_default=True,
    help="Predict the time to first token for a prompt of N tokens.",
)
@click.option("--train-on", default="h200", show_default=True, help="Predict training hours on this device.")
@click.option("--sweep", is_flag=True, help="Predict every combination of the keys that have several values.")
@json_option
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Plot speeds, or the Pareto front of a sweep."
)
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
    model_shape, cfg = read_model_shape(name, overlays, overrides)
    if contexts is None:  # the usual ones, as far as this model goes
        asked = replace(asked, contexts=sorted({min(length, model_shape.max_seq_len) for length in asked.contexts}))
    budget = cfg is not None and getattr(cfg, "phases", True)  # a preference run has none: its pairs say it
    training = predict_training(cfg, train_on) if budget else None
    show_plan(name, model_shape, asked, training, without_budget=cfg is not None and not budget)


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
