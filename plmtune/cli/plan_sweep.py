"""What ``plmtune plan --sweep`` shows of keys with several values: the architectures that no other beats."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from plmtune.cli.options import write_json
from plmtune.cli.plan_report import Asked, as_plain, published_rows, show_speed, with_preset
from plmtune.devices import costs
from plmtune.devices.device import Device
from plmtune.devices.pareto import draw_front, front
from plmtune.devices.sweep import Point, sweep
from plmtune.errors import UserError
from plmtune.io import hub
from plmtune.io.tables import Table, numbers, show
from plmtune.io.terminal import Progress
from plmtune.units import show_bytes, show_count, show_number

_LISTED = 20  # of a front


def at_one(name: str, asked: Asked) -> tuple[Device, str, str, int]:
    """The one device, scheme, runtime and context of a sweep."""
    for option in ("device", "scheme", "runtime", "context"):
        count = len(getattr(asked, f"{option}s"))
        if count != 1:
            raise UserError(f"--{option}: a sweep compares architectures at one, not {count}.")
    if Path(name).is_dir() or hub.parse(name):
        raise UserError(f"{name} is a checkpoint: a sweep goes over what is still to be trained.")
    costs.check_schemes(asked.schemes, asked.runtimes)
    return asked.devices[0], asked.schemes[0], asked.runtimes[0], asked.contexts[0]


def show_sweep(name: str, overlays: list[str], overrides: list[str], asked: Asked) -> None:
    """Print the Pareto front of a sweep over architectures; write JSON and the plot where given."""
    device, scheme, runtime, context = at_one(name, asked)
    with Progress() as line:
        found = sweep(
            *with_preset(name, overlays, overrides),
            device,
            scheme=scheme,
            runtime=runtime,
            context=context,
            prompt=asked.prompt,
            rows=published_rows(name, overlays, overrides),
            progress=lambda done, total: line.update(f"{done:,} of {total:,} architectures"),
        )
    best = front(found.points)
    missed = sum(map(len, found.impossible.values()))
    too_large = [point for point in found.points if not point.prediction.fits]
    how = f"{name} on {device.name}: {scheme} in {runtime}, {context:,} tokens of context"
    show(
        f"{how}. {len(found.points) + missed:,} architectures; {missed:,} are impossible, {len(too_large):,} do not "
        f"fit {show_bytes(device.available)}"
    )
    for reason, settings in sorted(found.impossible.items(), key=lambda item: -len(item[1]))[:5]:
        example = ", ".join(f"{key}={value}" for key, value in settings[0].items())
        show(f"  impossible, {len(settings):,} times: {reason.rstrip('.')} (such as {example})")
    if not found.points:
        raise UserError("Not one of these architectures is possible.")
    if not best:
        smallest = min(point.prediction.memory for point in found.points)
        raise UserError(f"Not one of these architectures fits: the smallest takes {show_bytes(smallest)}.")
    _print_front(best)
    if asked.plot is not None:
        draw_front(found.points, asked.plot, how)
        show(f"\n{asked.plot} written")
    if asked.json_path is not None:
        on_front = {id(point) for point in best}
        points = [
            {
                "settings": point.settings,
                "parameters": point.parameters,
                "non_embedding_parameters": point.non_embedding,
                "front": id(point) in on_front,
                **as_plain(point.prediction),
            }
            for point in found.points
        ]
        content = {"config": name, "device": asdict(device), "points": points, "impossible": found.impossible}
        write_json(asked.json_path, content)


def _print_front(best: list[Point]) -> None:
    show(f"\nThe front of speed, memory and parameters: {len(best):,} that no other beats")
    keys = list(best[0].settings)
    figures = {"#": 0, **dict.fromkeys(keys, 0), "parameters": 0, "non-embedding": 2, "memory": 3}
    figures |= {f"first of {best[0].prediction.prompt:,}": 1, "tokens/s": 0}
    table = Table(numbers({name.removeprefix("model."): drop for name, drop in figures.items()}))
    for number, point in list(enumerate(best, 1))[:: -(-len(best) // _LISTED)]:
        table.add(
            str(number),
            *(point.settings[key] for key in keys),
            show_count(point.parameters),
            show_count(point.non_embedding),
            show_bytes(point.prediction.memory),
            "-" if point.prediction.first_token is None else f"{show_number(point.prediction.first_token)} s",
            show_speed(point.prediction),
        )
    show(table)
    if len(best) > _LISTED:
        show("Some of them; --json has all.")
