"""What ``plmtune plan CONFIG --cluster`` shows: layouts of a cluster's devices, ranked by their predicted speed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from plmtune.cli.options import write_json
from plmtune.cli.plan_report import read_model_shape
from plmtune.clusters.cluster import Cluster, Link, load_cluster
from plmtune.clusters.job import Job
from plmtune.clusters.layouts import Found, parse_layout, search
from plmtune.clusters.memory import Memory, Plan
from plmtune.clusters.predict import Prediction
from plmtune.clusters.programs import MOST_PROCESSES, simulate_plan
from plmtune.clusters.timeline import draw_timeline
from plmtune.errors import UserError
from plmtune.io.tables import Column, Table, numbers, show
from plmtune.parallel.checks import refusals
from plmtune.parallel.layout import DIMENSIONS, Layout
from plmtune.training.preflight import check_seq_len
from plmtune.units import byte_unit, show_bytes, show_number, show_number_of

_SHOWN = 10
_REASONS = 8
_MICRO_BATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Asked:
    """The parsed options.

    Attributes:
        processes: in place of the cluster's own number of devices.
        layout: one whose place among the others is shown.
    """

    cluster: str
    processes: int | None
    layout: str | None
    json_path: Path | None
    plot: Path | None


def show_cluster_plan(name: str, overlays: Sequence[str], overrides: Sequence[str], asked: Asked) -> None:
    """Search the layouts of a cluster for a config; print, plot and write what was found."""
    cluster = load_cluster(asked.cluster)
    if asked.processes is not None:
        cluster = cluster.of_processes(asked.processes)
    own = parse_layout(asked.layout, cluster.num_devices) if asked.layout else None
    shape, cfg = read_model_shape(name, overlays, overrides)
    if cfg is None or getattr(cfg, "global_batch_size", None) is None:
        raise UserError(f"--cluster plans training, and {name} says no batches. Give a config such as pretrain.")
    check_seq_len(cfg.seq_len, shape.model)
    given = {text.lstrip("+~").partition("=")[0] for text in overrides}
    in_fp32 = cfg.runtime.precision == "fp32" or (cfg.runtime.precision == "auto" and cluster.shared)
    job = Job(
        shape.model,
        cfg.seq_len,
        cfg.global_batch_size,
        torch.float32 if in_fp32 else torch.bfloat16,
        cfg.optimizer.name if cfg.optimizer else "adamw",
        int(cfg.loss.settings.get("chunk_rows", 1024)),
    )
    found = search(
        job,
        cluster,
        micro_batch_sizes=_choices(cfg.micro_batch_size, _MICRO_BATCH_SIZES, fixed="micro_batch_size" in given),
        checkpointings=_choices(
            cfg.runtime.activation_checkpointing, ("none", "full"), fixed="runtime.activation_checkpointing" in given
        ),
        fixed=_fixed(cfg.parallel, given),
    )
    best = _best_of_layouts(found)
    precision = "fp32" if in_fp32 else "bf16"
    show(
        f"{name} on {cluster.name}: {show_number_of(cluster.nodes, 'node')}, "
        f"{show_number_of(cluster.num_devices, 'device')}",
        f"{job.parameters:,} parameters, {precision}, {job.global_batch_size:,} rows of {job.seq_len:,} tokens a step",
        "Predicted from the cluster's figures; nothing here is measured. "
        f"{show_number_of(found.num_layouts, 'layout')}: {sum(found.refused.values()):,} refused, {len(best):,} fit "
        f"into {show_bytes(cluster.available)}.",
    )
    shown = best[:_SHOWN]
    if shown:
        _print_ranking(shown, best, own)
        _print_terms(shown)
        _print_memory(shown)
        _print_command(name, overrides, shown[0].plan)
    if own is not None:
        _print_own(own, best, found, job, cfg.micro_batch_size)
    _print_reasons(found, best, cluster)
    if shown:
        _simulate(job, cluster, _of_layout(best, own) or shown[0], asked.plot, name)
    if asked.json_path is not None:
        write_json(asked.json_path, _as_plain(name, cluster, job, found, best))
    if not shown:
        raise UserError(f"no layout of {cluster.num_devices:,} devices trains {name}: see the reasons above.")


def _choices(own: Any, usual: Sequence[Any], *, fixed: bool) -> list[Any]:
    return [own] if fixed else list(dict.fromkeys([*usual, own]))


def _fixed(parallel: Any, given: set[str]) -> dict[str, Any]:
    """The dimensions that the config or an override chooses."""
    usual = type(parallel)()
    names = (*DIMENSIONS, "schedule", "reshard_after_forward")
    chosen = {name: getattr(parallel, name) for name in names}
    return {
        name: value
        for name, value in chosen.items()
        if value is not None and (f"parallel.{name}" in given or value != getattr(usual, name))
    }


def _best_of_layouts(found: Found) -> list[Prediction]:
    """The fastest plan of each layout."""
    best: dict[Layout, Prediction] = {}
    for prediction in found.fitting:
        best.setdefault(prediction.plan.layout, prediction)
    return list(best.values())


def _of_layout(best: list[Prediction], layout: Layout | None) -> Prediction | None:
    return next((each for each in best if each.plan.layout == layout), None)


def _name_of(layout: Layout) -> str:
    return str(layout) + ("" if layout.reshard_after_forward else " reshard_after_forward=false")


def _print_ranking(shown: list[Prediction], best: list[Prediction], own: Layout | None) -> None:
    columns = ["micro-batch", "checkpointing", "memory", "step, s", "tokens/s", "MFU"]
    table = Table([Column("#", right=True), "layout", *numbers(dict.fromkeys(columns, 0))])
    rows = list(enumerate(shown, 1))
    if own is not None and (mine := _of_layout(best, own)) is not None and mine not in shown:
        rows.append((best.index(mine) + 1, mine))
    for place, each in rows:
        table.add(
            f"{place:,}",
            _name_of(each.plan.layout),
            f"{each.plan.micro_batch_size} x {each.micro_batches}",
            str(each.plan.checkpointing),
            show_bytes(each.memory.total),
            show_number(each.seconds),
            show_number(each.tokens_per_second, 4),
            f"{each.mfu:.1%}",
        )
    show("", table, "micro-batch: rows of one forward x forwards of a step, on each process")


def _print_terms(shown: list[Prediction]) -> None:
    names = [term.name for term in fields(shown[0].terms)]
    table = Table([Column("#", right=True), *numbers(dict.fromkeys(names, 0))], title="Seconds of a step")
    for place, each in enumerate(shown, 1):
        table.add(str(place), *(show_number(getattr(each.terms, term)) for term in names))
    show("", table)


def _print_memory(shown: list[Prediction]) -> None:
    names = [part.name for part in fields(Memory)]
    sent = ("in node", "between nodes")
    size, unit = byte_unit(max(each.memory.total for each in shown))
    title = f"{unit} that the fullest device holds, and that the busiest one sends in a step"
    table = Table([Column("#", right=True), *numbers(dict.fromkeys((*names, *sent), 0))], title=title)
    for place, each in enumerate(shown, 1):
        held = [getattr(each.memory, part) for part in names]
        links = [sum(getattr(one, link) for one in each.traffic) for link in ("node", "network")]
        table.add(str(place), *(show_number(value / size) for value in (*held, *links)))
    show("", table)


def _print_command(name: str, overrides: Sequence[str], plan: Plan) -> None:
    layout = plan.layout
    sizes = [f"parallel.{key}={getattr(layout, key)}" for key in DIMENSIONS]
    more = [f"parallel.schedule={layout.schedule}"] if layout.schedule != "1f1b" else []
    more += [] if layout.reshard_after_forward else ["parallel.reshard_after_forward=false"]
    others = [f"micro_batch_size={plan.micro_batch_size}", f"runtime.activation_checkpointing={plan.checkpointing}"]
    show("", "Keys of the first: " + " ".join([*sizes, *more, *others]))


def _print_own(own: Layout, best: list[Prediction], found: Found, job: Job, micro_batch_size: int) -> None:
    mine = _of_layout(best, own)
    if mine is not None:
        slower = mine.seconds / best[0].seconds - 1
        show(
            "",
            f"{_name_of(own)} is number {best.index(mine) + 1:,} of {len(best):,} layouts that fit, {slower:.1%} "
            "slower than the first.",
        )
        return
    large = next((each for each in found.too_large if each[0].layout == own), None)
    if large is not None:
        show("", f"{_name_of(own)} does not fit: {_show_large(*large)}.")
        return
    said = refusals(
        own,
        job.model,
        seq_len=job.seq_len,
        global_batch_size=job.global_batch_size,
        micro_batch_size=micro_batch_size,
    )
    show("", f"{_name_of(own)} is refused:", *(f"  {sentence}" for sentence in said or ["another is fixed by a key"]))


def _show_large(plan: Plan, memory: Memory) -> str:
    return (
        f"micro-batches of {plan.micro_batch_size} with checkpointing {plan.checkpointing} need "
        f"{show_bytes(memory.total)}"
    )


def _print_reasons(found: Found, best: list[Prediction], cluster: Cluster) -> None:
    lines = []
    kinds: dict[str, list[tuple[str, int]]] = {}  # sentences that differ in numbers only
    for sentence, count in found.refused.items():
        kinds.setdefault(re.sub(r"[\d,]*\d", "N", sentence.partition(" (")[0]), []).append((sentence, count))
    for said in sorted(kinds.values(), key=lambda said: -sum(count for _, count in said))[:_REASONS]:
        layouts = show_number_of(sum(count for _, count in said), "layout")
        lines.append(f"  {layouts}{', such as' if len(said) > 1 else ''}: {said[0][0]}")
    fitting = {each.plan.layout for each in best}
    large: dict[Layout, tuple[Plan, Memory]] = {}
    for plan, memory in found.too_large:
        if plan.layout not in fitting:
            large.setdefault(plan.layout, (plan, memory))
    if large:
        number = show_number_of(len(large), "layout")
        lines.append(f"  {number}: no plan fits into the {show_bytes(cluster.available)} of a device. The nearest:")
        pure = [each for layout, each in large.items() if _is_pure(layout)]
        for plan, memory in dict.fromkeys([*list(large.values())[:3], *pure]):
            over = show_bytes(memory.total - cluster.available)
            lines.append(f"    {_name_of(plan.layout)}: {_show_large(plan, memory)}, {over} too much")
    if lines:
        show("", "Why others do not", *lines)


def _is_pure(layout: Layout) -> bool:
    """Whether a layout has one dimension only."""
    return sum(getattr(layout, name) > 1 for name in DIMENSIONS) == 1


def _simulate(job: Job, cluster: Cluster, prediction: Prediction, plot: Path | None, name: str) -> None:
    """Check a prediction by simulation, and draw a step of it."""
    plan = prediction.plan
    simulated = simulate_plan(job, cluster, plan)
    show(
        "",
        f"Simulated event by event, a step of {_name_of(plan.layout)} takes {show_number(simulated.makespan, 4)} s, "
        f"{simulated.makespan / prediction.seconds - 1:+.1%} from the formula; its processes compute "
        f"{1 - simulated.idle:.0%} of that.",
    )
    if plot is not None:
        most = 4 * plan.layout.num_stages  # more would be too thin to see
        number = min(prediction.micro_batches, most)
        rows = number * plan.layout.data_size * plan.micro_batch_size
        drawn = simulate_plan(replace(job, global_batch_size=rows), cluster, plan)
        every = plan.layout.num_processes // plan.layout.pp if plan.layout.num_processes <= MOST_PROCESSES else 1
        part = f", {number} of {prediction.micro_batches} micro-batches" if number < prediction.micro_batches else ""
        title = f"{name}, {_name_of(plan.layout)}: simulated step{part}"
        draw_timeline(drawn, plot, title, [every * rank for rank in range(plan.layout.pp)])
        show(f"{plot} written")


def _as_plain(name: str, cluster: Cluster, job: Job, found: Found, best: list[Prediction]) -> dict[str, Any]:
    return {
        "config": name,
        "cluster": {"key": cluster.key} | {f.name: _plain_figure(getattr(cluster, f.name)) for f in fields(cluster)},
        "seq_len": job.seq_len,
        "global_batch_size": job.global_batch_size,
        "parameters": job.parameters,
        "flops_per_token": job.flops_per_token,
        "layouts": [
            {
                **{key: getattr(each.plan.layout, key) for key in (*DIMENSIONS, "schedule", "reshard_after_forward")},
                "micro_batch_size": each.plan.micro_batch_size,
                "activation_checkpointing": each.plan.checkpointing,
                "micro_batches": each.micro_batches,
                "memory": asdict(each.memory),
                "seconds": asdict(each.terms),
                "sent": {sent.dimension: {"node": sent.node, "network": sent.network} for sent in each.traffic},
                "step_seconds": each.seconds,
                "tokens_per_second": each.tokens_per_second,
                "mfu": each.mfu,
            }
            for each in best
        ],
        "refused": found.refused,
    }


def _plain_figure(value: Any) -> Any:
    return asdict(value) if isinstance(value, Link) or hasattr(value, "source") else value
