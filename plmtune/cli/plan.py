"""``plmtune plan``: how large and how fast a model will be on a device, before it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from plmtune.cli.options import check_output, divide, import_option, json_option, lengths_of, option, words_of
from plmtune.errors import UserError

_SCHEMES = "bf16,int8,int4,f16,q8_0,q4_0,q4_k_m"
_CONTEXTS = "128,2048,4096"


@click.command()
@click.argument("name", metavar="CONFIG")
@click.argument("arguments", nargs=-1, metavar="[FILE.yaml] [KEY=VALUE]...")
@option(
    "--device TEXT", "Predict for these devices: names or FILE.yaml, separated by commas.", "devices", default="pi5"
)
@option(
    "--scheme TEXT",
    f"Predict for these schemes, separated by commas (default: {_SCHEMES.replace(',', ', ')}; with --sweep int4).",
    "schemes",
)
@option("--runtime TEXT", "Predict for plmtune, llama.cpp or both (default: both; with --sweep plmtune).", "runtimes")
@option(
    "--context TEXT",
    f"Predict at these numbers of tokens in the cache (default: {_CONTEXTS}; with --sweep one: 2048).",
    "contexts",
)
@option("--prompt N", "Predict the time to first token for a prompt of N tokens.", default=512)
@option("--train-on TEXT", "Predict training hours on this device.", default="h200")
@option(
    "--sweep",
    "Predict every combination of the keys that have several values; without such keys, find shapes at equal "
    "parameters and print the command that trains them all.",
)
@option("--tolerance TEXT", "With --sweep, take shapes whose parameters are this share more or less (default: 2%).")
@option("--multiple N", "With --sweep at equal parameters, take widths that are multiples of N (default: 64 or 32).")
@option("--shapes N", "With --sweep at equal parameters, show N shapes (default: 12).")
@option("--cluster TEXT", "Rank the layouts of training on this cluster: a name or FILE.yaml.")
@option("--processes N", "With --cluster, plan for N processes: whole nodes, or a part of one.")
@option("--layout TEXT", "With --cluster, show the place of this layout, too, such as tp=8,pp=16,dp_shard=16.")
@option("--simulate N", "Try the layout of the config on N processes, with a fake process group on this one.")
@json_option
@option("--plot FILE.png", "Plot speeds, the Pareto front of a sweep, or with --cluster a simulated step.")
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
    tolerance: str | None,
    multiple: int | None,
    shapes: int | None,
    cluster: str | None,
    processes: int | None,
    layout: str | None,
    simulate: int | None,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Say what a model will cost: memory, speed and training, from its config alone.

    CONFIG is what plmtune run takes, a model (plmtune ls model), or a checkpoint. Nothing is trained or allocated.
    Devices (plmtune ls devices) are YAML files, and plmtune bench --calibrate FILE.yaml writes one for this machine.
    With --cluster (plmtune ls clusters) the layouts of its devices are ranked by their predicted speed of training.

    \b
    plmtune plan plm_1.8b --device pi5,jetson_orin_nano
    plmtune plan pretrain model=plm_150m --device mine.yaml --scheme int8,int4 --runtime plmtune
    plmtune plan runs/demo/latest --device pi5
    plmtune plan pretrain model=plm_150m --sweep model.embed_dim=512,768 'model.num_layers=range(8,25,4)'
    plmtune plan demo --sweep --device pi5
    plmtune plan plm_1.8b --cluster h100 --processes 32
    plmtune plan plm_1.8b --simulate 64 parallel.tp=2 global_batch_size=512
    """
    check_output(json_path, ".json")
    check_output(plot, ".png")
    if simulate is not None:
        _refuse_besides("--simulate", "simulate")

        from plmtune.cli.plan_simulate import show_simulation

        show_simulation(name, *divide(arguments), simulate)
        return
    if cluster is not None:
        _refuse_besides("--cluster", "cluster", "processes", "layout", "json_path", "plot")

        from plmtune.cli.plan_cluster import Asked as AskedOfCluster
        from plmtune.cli.plan_cluster import show_cluster_plan

        asked_of_cluster = AskedOfCluster(cluster, processes, layout, json_path, plot)
        show_cluster_plan(name, *divide(arguments), asked_of_cluster)
        return
    if processes is not None or layout is not None:
        raise UserError(f"{'--layout' if processes is None else '--processes'} counts with --cluster.")

    from plmtune.cli.plan_report import Asked, predict_training, read_model_shape, show_plan
    from plmtune.devices.device import load_device

    asked = Asked(
        devices=[load_device(device) for device in words_of(devices, "--device")],
        schemes=words_of(schemes or ("int4" if sweep else _SCHEMES), "--scheme"),
        schemes_given=schemes is not None,
        runtimes=words_of(runtimes or ("plmtune" if sweep else "plmtune,llama.cpp"), "--runtime"),
        contexts=lengths_of(contexts or ("2048" if sweep else _CONTEXTS), "--context"),
        contexts_given=contexts is not None,
        prompt=prompt,
        json_path=json_path,
        plot=plot,
    )
    overlays, overrides = divide(arguments)
    at_equal = {"--tolerance": tolerance, "--multiple": multiple, "--shapes": shapes}
    given = [flag for flag, value in at_equal.items() if value is not None]
    if given and not sweep:
        raise UserError(f"{given[0]} counts with --sweep, at equal parameters.")
    if sweep:
        from plmtune.cli.plan_shapes import parse_tolerance, show_shapes
        from plmtune.cli.plan_sweep import show_sweep
        from plmtune.config.override_checks import split_sweeps

        if tolerance is None and split_sweeps(overrides)[1]:
            if given:
                raise UserError(f"{given[0]} counts at equal parameters: give --tolerance, or no key several values.")
            show_sweep(name, overlays, overrides, asked)
        else:
            share = parse_tolerance(tolerance or "2%")
            show_shapes(name, overlays, overrides, asked, tolerance=share, multiple=multiple, most=shapes or 12)
        return
    model_shape, cfg = read_model_shape(name, overlays, overrides)
    if contexts is None:  # the usual ones, as far as this model goes
        asked = replace(asked, contexts=sorted({min(length, model_shape.max_seq_len) for length in asked.contexts}))
    budget = cfg is not None and getattr(cfg, "phases", True)  # a preference run has none: its pairs say it
    training = predict_training(cfg, train_on) if budget else None
    show_plan(name, model_shape, asked, training, without_budget=cfg is not None and not budget)


def _refuse_besides(flag: str, *names: str) -> None:
    """Refuse options that do not count with `flag`, whose own are `names`."""
    context = click.get_current_context()
    for parameter in context.command.params:
        kept = ("name", "arguments", *names)
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.param_type_name == "option" and parameter.name not in kept and parameter.expose_value:
            of_one = f"{parameter.opts[0]} is of a plan for one device, and --cluster of training: leave one out."
            raise UserError(of_one if flag == "--cluster" else f"{parameter.opts[0]} does not count with {flag}.")
