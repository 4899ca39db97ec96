"""The layout that a config's keys ask for, given the number of processes."""

from __future__ import annotations

from typing import Literal

from plmtune.config.sections import ParallelConfig
from plmtune.errors import UserError
from plmtune.parallel.layout import Layout

Strategy = Literal["auto", "none", "ddp", "fsdp", "hsdp"]


def num_asked(sizes: ParallelConfig) -> int:
    """Processes that the given sizes make."""
    return _sharing_rows(sizes) * (sizes.dp_replicate or 1) * (sizes.dp_shard or 1)


def _sharing_rows(sizes: ParallelConfig) -> int:
    return sizes.tp * sizes.pp * sizes.cp


def choose_layout(
    sizes: ParallelConfig, strategy: Strategy, shard_size: int | None, *, world_size: int, of_machine: int
) -> tuple[Layout, str]:
    """Return (layout, why).

    Args:
        strategy: how data is shared by the processes that tp, pp and cp leave: shorthand for dp_replicate (ddp),
            dp_shard (fsdp) or both (hsdp).
        shard_size: of hsdp.
        world_size: processes.
        of_machine: those of one machine.

    Raises:
        UserError: for sizes that do not make world_size processes, or a strategy that contradicts them.
    """
    if strategy not in ("auto", "none", "ddp", "fsdp", "hsdp"):
        raise UserError(f"strategy={strategy} is unknown. Use auto, none, ddp, fsdp or hsdp.")
    if strategy != "hsdp" and shard_size is not None:
        raise UserError(f"shard_size={shard_size} belongs to strategy=hsdp; with {strategy}, leave it out.")
    asked = num_asked(sizes)
    given = {key: size for key in ("dp_replicate", "dp_shard") if (size := getattr(sizes, key)) is not None}
    if given and strategy != "auto":
        key, size = next(iter(given.items()))
        raise UserError(
            f"key runtime.strategy: {strategy} is shorthand for sizes of parallel, and parallel.{key}={size} is given, "
            "too. Leave one of the two out."
        )
    if world_size == 1 and asked == 1:
        many = strategy in ("ddp", "fsdp", "hsdp")
        why = f"{strategy} was asked for, but there is one process: start more with torchrun" if many else "1 process"
        return Layout(), f"none ({why})"
    if strategy == "none":
        raise UserError(f"strategy=none cannot train one model on {world_size} processes. Use ddp, fsdp or auto.")
    left, over = divmod(world_size, asked)
    if over or (left != 1 and len(given) == 2):
        several = "" if len(given) == 2 else "a multiple of "
        running = "one runs" if world_size == 1 else f"{world_size} run"
        raise UserError(
            f"key parallel: {_product(sizes)} needs {several}{asked} processes, and {running}. Start as many "
            f"(plmtune launch local --processes {asked} run NAME, or torchrun), or give other sizes."
        )
    replicate, shard, why = _share_data(
        given, strategy, shard_size, left * asked // _sharing_rows(sizes), sizes, of_machine
    )
    layout = Layout(replicate, shard, sizes.tp, sizes.pp, sizes.cp, sizes.schedule, sizes.reshard_after_forward)
    if _sharing_rows(sizes) > 1:
        why = f"{layout} ({world_size} processes)"
    return layout, why


def _share_data(
    given: dict[str, int], strategy: str, shard_size: int | None, processes: int, sizes: ParallelConfig, of_machine: int
) -> tuple[int, int, str]:
    """(dp_replicate, dp_shard, why) of the processes that have rows of their own."""
    if given:
        replicate = given.get("dp_replicate", 0) or processes // given["dp_shard"]
        return replicate, processes // replicate, f"{Layout(replicate, processes // replicate)} ({processes} processes)"
    if strategy == "hsdp":
        size = _hsdp_size(shard_size, processes, max(1, of_machine // (sizes.tp * sizes.cp)))
        why = f"hsdp ({processes // size} copies of the model, each on {size} processes)"
        return processes // size, size, why
    if strategy == "fsdp" or (strategy == "auto" and _sharing_rows(sizes) > 1):
        return 1, processes, f"fsdp ({processes} processes)"
    return processes, 1, f"ddp ({processes} processes)"


def _hsdp_size(shard_size: int | None, processes: int, of_machine: int) -> int:
    size = of_machine if shard_size is None else shard_size
    given = f"shard_size={size}" + (", the processes of this machine," if shard_size is None else "")
    instead = "" if shard_size else " or give shard_size a divisor of them"
    if size < 1 or processes % size:
        raise UserError(f"strategy=hsdp: {given} does not divide {processes} processes.")
    if size == 1:
        raise UserError(f"strategy=hsdp: {given} shards nothing, which is ddp. Use strategy=ddp{instead}.")
    if size == processes:
        raise UserError(f"strategy=hsdp: {given} makes one copy of all, which is fsdp. Use strategy=fsdp{instead}.")
    return size


def _product(sizes: ParallelConfig) -> str:
    named = {key: getattr(sizes, key) for key in ("dp_replicate", "dp_shard", "tp", "pp", "cp")}
    return " x ".join(f"{key}={size}" for key, size in named.items() if size and size > 1) or "no size above 1"
