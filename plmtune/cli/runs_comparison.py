"""What ``plmtune runs`` shows of runs that are compared: scores, predicted speeds, keys that differ, correlations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plmtune.cli.runs_table import status_cell
from plmtune.errors import UserError
from plmtune.io import manifest
from plmtune.io.run_comparison import (
    FEWEST,
    LAYERS,
    SCORE,
    SPEED,
    WIDTH,
    Correlations,
    Row,
    Score,
    by_chance,
    correlate,
    front,
    groups,
    number,
    varied,
)
from plmtune.io.run_directory import CONFIG
from plmtune.io.tables import Column, Table, numbers, show
from plmtune.units import show_count, show_number, show_number_of

if TYPE_CHECKING:
    from plmtune.devices.costs import ModelShape

_COLUMNS = 8  # keys that differ and have a column of their own


@dataclass(frozen=True)
class Speeds:
    """The device that speeds were predicted for.

    Attributes:
        how: device, scheme and context, in words.
        bound: the speeds are what memory allows at most.
        unknown: run -> why its speed is not known.
    """

    device: str
    how: str
    bound: bool
    unknown: dict[str, str]


def set_speeds(rows: Sequence[Row], name: str, scheme: str, context: int | None) -> Speeds:
    """Predict the decode speed of each run's model on a device and set it as a value of the run."""
    from plmtune.devices import costs
    from plmtune.devices.device import load_device
    from plmtune.devices.predict import predict

    device = load_device(name)
    costs.check_schemes([scheme], ["plmtune"])
    shapes, unknown = {}, {}
    for row in rows:
        try:
            shapes[row.summary.path] = _model_shape(Path(row.summary.path))
        except (UserError, ValueError) as error:
            unknown[row.summary.path] = str(error)
    longest = min((shape.max_seq_len for shape in shapes.values()), default=2048)
    if context is not None and context > longest and shapes:
        raise UserError(f"--context: one of these models takes {longest:,} tokens at most, not {context:,}.")
    tokens = context or min(2048, longest)
    bound = False
    for row in rows:
        if (shape := shapes.get(row.summary.path)) is None:
            continue
        own = costs.STORED if shape.formats else scheme  # what is quantized already stays so
        try:
            found = predict(shape, device, scheme=own, context=tokens)
        except (UserError, ValueError) as error:
            unknown[row.summary.path] = str(error)
            continue
        bound = bound or found.is_bound
        if found.decode is None:
            unknown[row.summary.path] = f"it does not fit {device.key}"
        else:
            row.values[SPEED] = found.decode
    how = f"{device.name}: {scheme} in plmtune, {tokens:,} tokens of context"
    return Speeds(device.key, how, bound, unknown)


def _model_shape(run: Path) -> ModelShape:
    """The shape of a run's newest checkpoint, or before there is one, of the model in its config."""
    import torch

    from plmtune.cli.plan_report import read_model_shape
    from plmtune.config import compose
    from plmtune.config.typed_config import load_config
    from plmtune.devices.costs import ModelShape
    from plmtune.devices.sweep import vocabulary

    if (step := next(reversed(manifest.steps(run / "checkpoints")), None)) is not None:
        return read_model_shape(str(manifest.step_path(run / "checkpoints", step)), (), ())[0]
    cfg = load_config(run / CONFIG)
    if getattr(cfg, "model", None) is None:
        raise UserError("it has no checkpoint, and its config no model")
    with torch.device("meta"):
        return ModelShape.of(compose.build("model", cfg.model, vocab_size=vocabulary(cfg)))


def compared_table(rows: Sequence[Row], score: Score, speeds: Speeds | None) -> tuple[Table, list[str]]:
    """A row for each run with the keys that differ as columns; and the keys that have no column."""
    keys = [key for key in varied(rows) if key not in (LAYERS, WIDTH)]
    shown, left = keys[:_COLUMNS], keys[_COLUMNS:]
    named = [_short(key, keys) for key in shown]
    figures = {"parameters": 4, "tokens": 3, **dict.fromkeys(named, 2), score.key: 0}
    columns: list[Column | str] = [Column("run", key=True), "status", Column("shape", right=True), *numbers(figures)]
    if speeds is not None:
        columns += numbers({"at most tokens/s" if speeds.bound else "tokens/s": 0})
    table = Table(columns)
    for row in rows:
        one = row.summary
        table.add(
            one.path,
            status_cell(one.status),
            row.shape,
            "" if one.parameters is None else show_count(one.parameters),
            "" if one.tokens is None else show_count(one.tokens),
            *("" if row.config.get(key) is None else _value(row.config[key]) for key in shown),
            "" if row.score is None else f"{row.score:.4f}",
            *([] if speeds is None else [show_number(row.values[SPEED]) if SPEED in row.values else "-"]),
        )
    return table, left


def _short(key: str, keys: Sequence[str]) -> str:
    """The last parts of a key that name no other: ffn.hidden_dim of model.ffn.hidden_dim."""
    parts = key.split(".")
    for length in range(min(2, len(parts)), len(parts)):
        name = ".".join(parts[-length:])
        if sum(f".{other}".endswith(f".{name}") for other in keys) == 1:
            return name
    return key


def _value(value: Any) -> str:
    return f"{value:,}" if type(value) is int else f"{value:g}" if isinstance(value, float) else f"{value!s:.40}"


def show_comparison(rows: Sequence[Row], score: Score, speeds: Speeds | None) -> None:
    """Print the table, what is left out of it, the Pareto front and the correlations."""
    if speeds is not None:
        show(f"Predicted decode on {speeds.how}\n")
    table, left = compared_table(rows, score, speeds)
    show(table)
    if left:
        show(f"{show_number_of(len(left), 'key')} more that differ have no column; --csv has all: {', '.join(left)}")
    if speeds is not None and speeds.unknown:
        path, why = next(iter(speeds.unknown.items()))
        show(f"Without a predicted speed: {show_number_of(len(speeds.unknown), 'run')}. {path}: {why}")
    if speeds is not None and (best := front(groups(rows), score)):
        names = ", ".join(group.name for group in best)
        show(f"Pareto front of {score.key} and speed, the fastest first: {names}")
    show("", *_correlations(correlate(rows, [SPEED] if speeds else []), score))


def _correlations(found: Correlations, score: Score) -> list[Table | str]:
    left = []
    if found.unfinished:
        left.append(f"{show_number_of(found.unfinished, 'run')} not finished")
    if found.without_score:
        left.append(f"{show_number_of(found.without_score, 'finished run')} without {score.key}")
    out = f" Left out: {', '.join(left)}." if left else ""
    if found.runs < FEWEST or not found.found:
        why = (
            f"{show_number_of(found.runs, 'run')} finished with a score" if found.runs < FEWEST else "no number differs"
        )
        return [f"No rank correlations with {score.key}: {why}.{out}"]
    over = show_number_of(found.runs, "finished run")
    if found.averaged:
        over += f", {show_number_of(found.averaged, 'value')} as means over runs that differ in the seed alone"
    table = Table([Column("key", key=True), *numbers({"rho": 0, "n": 0})])
    for one in found.found:
        name = "predicted tokens/s" if one.key == SPEED else one.key
        table.add(name, f"{one.rho:+.3f}", str(one.count))
    blocks: list[Table | str] = [f"Spearman correlations with {score.shown}, {over}.{out}", table]
    count = max(one.count for one in found.found)
    if (chance := by_chance(count)) is not None:
        blocks.append(
            f"With n = {count}, a key without effect reaches {chance:.2f} up or down in 5% of cases. Keys that change "
            "together share a correlation."
        )
    if found.no_numbers:
        blocks.append(f"These keys differ, too, but their values are not numbers: {', '.join(found.no_numbers)}.")
    return blocks


def as_json(rows: Sequence[Row], score: Score, speeds: Speeds | None) -> dict[str, Any]:
    """What `show_comparison` prints, as plain data."""
    best = {id(row) for group in front(groups(rows), score) for row in group.rows}
    found = correlate(rows, [SPEED] if speeds else [])
    keys = varied(rows)
    return {
        "score": asdict(score),
        "device": None if speeds is None else asdict(speeds),
        "runs": [
            asdict(row.summary)
            | {SCORE: row.score, SPEED: number(row.values.get(SPEED)), "front": id(row) in best}
            | {"differing": {key: row.config.get(key) for key in keys}}
            for row in rows
        ],
        "correlations": asdict(found),
    }
