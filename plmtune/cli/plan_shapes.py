"""What ``plmtune plan --sweep`` shows of shapes at equal parameters, and the command that trains them all."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import click

from plmtune.cli.options import write_json
from plmtune.cli.plan_report import Asked, as_plain, show_speed, with_preset
from plmtune.cli.plan_sweep import at_one
from plmtune.config import compose, override_checks
from plmtune.config.overrides import hydra_literal
from plmtune.devices import costs
from plmtune.devices.equal_shapes import FREE, EqualShapes, Shape, equal_shapes
from plmtune.devices.pareto import draw_shapes
from plmtune.devices.predict import Prediction, predict
from plmtune.devices.sweep import vocabulary
from plmtune.errors import UserError
from plmtune.io.tables import Column, Table, numbers, show
from plmtune.io.terminal import Progress
from plmtune.units import show_bytes, show_count, show_number, show_number_of


def parse_tolerance(text: str) -> float:
    """A share: 2% or 0.02."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"--tolerance {text}: must be a share of the parameters, above 0 and below 1: 2% or 0.02.")
    return share


def show_shapes(
    name: str,
    overlays: list[str],
    overrides: list[str],
    asked: Asked,
    *,
    tolerance: float,
    multiple: int | None,
    most: int,
) -> None:
    """Print shapes at equal parameters and the command that trains them; write JSON and the plot where given."""
    device, scheme, runtime, context = at_one(name, asked)
    plain, swept = override_checks.split_sweeps(overrides)
    base, files, plain = with_preset(name, overlays, plain)
    cfg = compose.compose(base, files, plain)
    if getattr(cfg, "model", None) is None:
        raise UserError(f"{name} names no model to sweep over. Choose one: model=plm")
    rows = vocabulary(cfg)
    with Progress() as line:
        found = equal_shapes(
            cfg.model,
            rows,
            tolerance=tolerance,
            multiple=multiple,
            given=_given(swept),
            progress=lambda done, total: line.update(f"{done:,} of {total:,} widths"),
        )
    if not found.shapes:
        raise UserError(_none_found(found, tolerance))
    longest = found.base.costs.max_seq_len
    if context > longest:
        if asked.contexts_given:
            raise UserError(f"--context: {name} takes {longest:,} tokens at most, not {context:,}.")
        context = longest
    shapes = found.spread(most)
    try:
        predictions = [
            predict(shape.costs, device, scheme=scheme, runtime=runtime, context=context, prompt=asked.prompt)
            for shape in shapes
        ]
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from error
    seq_len = int(getattr(cfg, "seq_len", None) or context)
    command = _command(base, files, plain, shapes)

    shown = f"{len(shapes):,} of {show_number_of(len(found.shapes) + 1, 'shape')}"
    how = f"{name} on {device.name}: {scheme} in {runtime}, {context:,} tokens of context"
    show(
        f"{how}. {shown} with {found.base.parameters:,} parameters, {_percent(tolerance)} more or less, a vocabulary "
        f"of {rows:,}; multiples of {found.multiple}, heads of {found.head_dim}\n"
    )
    show(_table(found, shapes, predictions, runtime, seq_len))
    show(f"The base has a star. FLOPs are of training, a token of sequences of {seq_len:,}.")
    if len(shapes) <= len(found.shapes):
        show(f"These lie far from each other; --shapes {len(found.shapes) + 1} shows all.")
    # Printed as it is: a wrapped command cannot be copied.
    click.echo(f"\nTo train them all, each on the same tokens:\n\n    {command}")
    show(f"\nTo compare them: plmtune runs runs/multirun --device {device.key} --plot shapes.png")
    if not getattr(cfg, "phases", None):
        show(
            "The config says no phases: append what a short run trains on, such as data.paths=my_text/ "
            "phases='[{name: main, tokens: 10M}]'; a compute-optimal run takes 20 tokens a parameter, "
            f"{show_count(20 * found.base.parameters)} (arXiv 2203.15556)."
        )
    if asked.plot is not None:
        draw_shapes(shapes, predictions, asked.plot, how)
        show(f"\n{asked.plot} written")
    if asked.json_path is not None:
        content = {
            "config": name,
            "device": device.key,
            "tolerance": tolerance,
            "multiple": found.multiple,
            "vocabulary": rows,
            "command": command,
            "found": [_plain(shape) for shape in (found.base, *found.shapes)],
            "points": [
                _plain(shape)
                | {
                    "base": shape is found.base,
                    "embedding_share": shape.embedding_share,
                    "kv_heads": shape.kv_heads,
                    "training_flops_per_token": shape.training_flops(seq_len),
                    "cache_bytes_a_token": costs.cache_bytes(shape.costs, runtime),
                    **as_plain(prediction),
                }
                for shape, prediction in zip(shapes, predictions, strict=True)
            ],
        }
        write_json(asked.json_path, content)


def _given(swept: dict[str, list[str]]) -> dict[str, list[int]]:
    """The values of keys with several, which a sweep at equal parameters takes instead of its own."""
    given = {}
    for key, texts in swept.items():
        name = key.removeprefix("model.")
        if not key.startswith("model.") or name not in FREE:
            known = ", ".join(f"model.{one}" for one in FREE)
            raise UserError(f"--tolerance: {key} has several values; at equal parameters these can have them: {known}.")
        values = [text.partition("=")[2] for text in texts]
        if (bad := next((value for value in values if not value.isdecimal()), None)) is not None:
            raise UserError(f"--sweep: {key}={bad} is not a whole number.")
        given[name] = [int(value) for value in values]
    return given


def _none_found(found: EqualShapes, tolerance: float) -> str:
    said = f"--sweep: no other shape has {found.base.parameters:,} parameters, {_percent(tolerance)} more or less"
    if found.nearest is None:
        return (
            f"{said}, with an FFN of half to twice the base's ratio. Give a smaller --multiple than {found.multiple}."
        )
    off = abs(found.nearest.parameters / found.base.parameters - 1)
    settings = " ".join(f"model.{key}={value}" for key, value in found.nearest.settings.items())
    return (
        f"{said}. The nearest has {found.nearest.parameters:,} ({settings}): give --tolerance "
        f"{show_number(off * 100 + 0.1, 2)}%, or a smaller --multiple than {found.multiple}."
    )


def _percent(share: float) -> str:
    return f"{show_number(share * 100)}%"


def _plain(shape: Shape) -> dict[str, Any]:
    settings = {f"model.{key}": value for key, value in shape.settings.items()}
    return {"settings": settings, "parameters": shape.parameters}


def _table(
    found: EqualShapes, shapes: Sequence[Shape], predictions: Sequence[Prediction], runtime: str, seq_len: int
) -> Table:
    figures = {"layers": 0, "width": 0, "FFN": 0, "ratio": 1, "heads": 4, "KV heads": 3}
    figures |= {"parameters": 0, "embedding": 5, "tokens/s": 0, "FLOPs": 2, "cache a token": 6}
    table = Table([Column("", key=True), *numbers(figures)])
    for shape, prediction in zip(shapes, predictions, strict=True):
        settings = shape.settings
        table.add(
            "*" if shape is found.base else "",
            f"{settings['num_layers']:,}",
            f"{settings['embed_dim']:,}",
            f"{settings['ffn.hidden_dim']:,}" if shape.ratio else "-",
            f"{shape.ratio:.2f}" if shape.ratio else "-",
            f"{settings['num_heads']:,}",
            "latent" if shape.costs.attention[0].kind == "latent" else f"{shape.kv_heads:,}",
            f"{shape.parameters:,}",
            f"{shape.embedding_share:.1%}",
            show_speed(prediction),
            show_count(shape.training_flops(seq_len)),
            show_bytes(costs.cache_bytes(shape.costs, runtime)),
        )
    return table


def _command(name: str, overlays: Sequence[str], overrides: Sequence[str], shapes: Sequence[Shape]) -> str:
    """The words of a shell that train every shape: a table of its keys is one value of the model."""
    tied = {f"model.{key}" for key in shapes[0].settings}
    kept = [left for text in overrides for left in override_checks.without_keys(text, tied)]
    tables = []
    for shape in shapes:
        table: dict[str, Any] = {}
        for key, value in shape.settings.items():
            *above, last = key.split(".")
            inner = table
            for part in above:
                inner = inner.setdefault(part, {})
            inner[last] = value
        tables.append(hydra_literal(table))
    words = ["plmtune", "run", "-m", name, *overlays, *kept, f"model={','.join(tables)}"]
    return shlex.join(words)
