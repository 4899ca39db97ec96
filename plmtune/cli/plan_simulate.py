"""What ``plmtune plan CONFIG --simulate N`` shows: the layout of N processes, tried on this one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from plmtune.cli.plan_report import read_model_shape
from plmtune.config import compose
from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.tables import show
from plmtune.parallel.choose import choose_layout
from plmtune.parallel.simulate import simulate
from plmtune.training.layout_checks import check_layout
from plmtune.training.preflight import check_seq_len
from plmtune.training.runtime import Runtime
from plmtune.units import show_bytes


def show_simulation(name: str, overlays: Sequence[str], overrides: Sequence[str], processes: int) -> None:
    """Simulate representative ranks of `processes`, and print what was found.

    Raises:
        UserError: for a layout that is refused, or does not work.
    """
    shape, cfg = read_model_shape(name, overlays, overrides)
    if cfg is None or getattr(cfg, "seq_len", None) is None or getattr(cfg, "global_batch_size", None) is None:
        raise UserError(f"--simulate tries training, and {name} says no batches. Give a config such as pretrain.")
    if processes < 2:
        raise UserError(f"--simulate {processes}: give the number of processes, 2 or more.")
    check_seq_len(cfg.seq_len, shape.model)
    run = cfg.runtime
    layout, _ = choose_layout(cfg.parallel, run.strategy, run.shard_size, world_size=processes, of_machine=8)
    model: nn.Module = shape.model
    batch = (cfg.micro_batch_size, cfg.seq_len)
    dtype = torch.float32 if run.precision == "fp32" else torch.bfloat16
    check_layout(cfg, Runtime(torch.device("cpu"), dtype, layout), model)
    found = simulate(
        model,
        layout,
        batch=batch,
        dtype=dtype,
        optimizer_of=lambda model: compose.build("optimizer", cfg.optimizer, model=model),
        report=lambda line: terminal.echo(line, err=True),
    )
    held = found.held.values()
    show(f"{name} on {processes:,} processes: {layout}")
    show(f"ranks tried    {', '.join(str(rank) for rank in found.ranks)}")
    show(f"tensors        {found.tensors:,} of {sum(p.numel() for p in model.parameters()):,} elements")
    if held:
        least, most = min(held), max(held)
        show(
            f"a rank holds   {least:,} to {most:,} elements; in fp32 {show_bytes(4 * least)} to {show_bytes(4 * most)}"
        )
    did = "forward, backward and a step of the optimizer" if found.forward else "no forward: parallel.cp is above 1"
    show(f"each rank ran  {did}, {batch[0]} x {batch[1]:,} tokens")
    show(f"time           {found.seconds:.0f} s")
    if found.failures:
        raise UserError("\n".join(f"{sentence}." for sentence in found.failures))
    show("Shapes, shards, names of state dicts and plans are right.")
