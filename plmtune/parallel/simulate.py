"""A layout of thousands of processes tried on one: the real mesh and modules, no weights, nothing sent.

torch's fake process group stands for one rank of the run: collectives return at once. The modules are divided as in
training, and their forward and backward run on fake tensors, which have shapes and no numbers.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plmtune.modules.sharding import is_sharded, to_local
from plmtune.parallel.divide import divide
from plmtune.parallel.elements import EMBEDDING, held_elements, parts
from plmtune.parallel.layout import Layout
from plmtune.parallel.mesh import arrange
from plmtune.parallel.pipeline import Pipeline

Box = tuple[tuple[int, int], ...]  # (first, past the last) of each dimension


@dataclass
class Simulation:
    """What was found.

    Attributes:
        ranks: that were tried.
        tensors: of the whole model.
        held: {rank: numbers that it holds}.
        failures: sentences; empty: the layout works.
        forward: forward, backward and a step of the optimizer ran on each rank.
    """

    ranks: list[int]
    tensors: int
    held: dict[int, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    forward: bool = True
    seconds: float = 0.0


def representatives(layout: Layout) -> list[int]:
    """The first rank of each stage of a pipeline, and at both ends of it the corners of the other dimensions."""
    of_stage = layout.num_processes // layout.pp
    found = {stage * of_stage for stage in range(layout.pp)}
    corners = {layout.tp - 1, of_stage - layout.tp, of_stage - 1}
    found |= {stage * of_stage + corner for stage in (0, layout.pp - 1) for corner in corners}
    return sorted(found)


def simulate(
    model: nn.Module,
    layout: Layout,
    *,
    batch: tuple[int, int],
    dtype: torch.dtype,
    optimizer_of: Callable[[nn.Module], Any],
    ranks: Sequence[int] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Simulation:
    """Divide `model` as some ranks of a layout do, and check shapes, shards, names, forward and backward.

    Args:
        model: a Decoder on the meta device.
        batch: (rows, tokens of a row) of a forward.
        dtype: that FSDP2 computes in.
        optimizer_of: builds the run's optimizer for a divided model.
        ranks: those to try, None: `representatives`.
        report: called with a line before each rank.

    Raises:
        RuntimeError: if this process is in a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("a layout is simulated outside of a run: this process is in a process group")
    started = time.perf_counter()
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = Simulation(list(representatives(layout) if ranks is None else ranks), len(whole))
    found.forward = layout.cp == 1
    found.failures += _unequal_sums(model, layout)
    names: set[str] = set()
    tiled: set[Any] = set()
    for rank in found.ranks:
        report(f"rank {rank:,} of {layout.num_processes:,}")
        try:
            with _Rank(rank, layout.num_processes):
                names |= _try_rank(model, layout, rank, found, tiled, batch, dtype, optimizer_of)
        except Exception as error:  # whatever a wrong plan raises is a finding
            first = str(error).strip().partition("\n")[0]
            found.failures.append(f"rank {rank}: {type(error).__name__}: {first}")
    stages = {layout.coordinates(rank)["pp"] for rank in found.ranks}
    if len(stages) == layout.pp and not found.failures and names != whole.keys():
        missing = ", ".join(sorted(whole.keys() ^ names)[:3])
        found.failures.append(f"the state dicts of all stages together are not the whole model's: {missing}")
    found.seconds = time.perf_counter() - started
    return found


class _Rank:
    """Be one rank of a fake process group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __enter__(self) -> None:
        # The fake process group has no public home; torch's own tests and memory estimates use it from here.
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.size)

    def __exit__(self, *error: object) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.distributed.tensor import debug

        dist.destroy_process_group()
        # These caches hold names of the groups of this rank; an equal mesh of the next one has other names.
        debug._clear_sharding_prop_cache()
        debug._clear_fast_path_sharding_prop_cache()
        FakeTensorMode.cache_clear()


def _try_rank(
    model: nn.Module,
    layout: Layout,
    rank: int,
    found: Simulation,
    tiled: set[Any],
    batch: tuple[int, int],
    dtype: torch.dtype,
    optimizer_of: Callable[[nn.Module], Any],
) -> set[str]:
    """Check one rank; return the names in its state dict."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    processes = arrange(layout, torch.device("cpu"), timedelta(minutes=1))
    own: Any = model if layout.pp > 1 else copy.deepcopy(model)  # a pipeline copies its layers
    if not layout.whole_models:
        own = divide(own, processes, dtype)
    held = {name: to_local(parameter).numel() for name, parameter in own.named_parameters()}
    found.held[rank] = sum(held.values())
    found.failures += _wrong_shapes(own, held, held_elements(model, layout, rank), rank, tiled)
    names = set(own.state_dict())
    if names != held.keys():
        found.failures.append(f"rank {rank}: the state dict has other names than its parameters")
    if found.forward:
        with FakeTensorMode(allow_non_fake_inputs=True):
            own.to_empty(device="cpu")
            _step(own, layout, batch, dtype)
            optimizer_of(own).step()
    return names


def _wrong_shapes(
    own: nn.Module, held: dict[str, int], predicted: dict[str, int], rank: int, tiled: set[Any]
) -> Iterator[str]:
    """Sentences about parameters that are not what arithmetic says, or whose shards do not tile them."""
    for name in sorted(held.keys() ^ predicted.keys()):
        yield f"rank {rank}: {name} is {'not ' if name in predicted else ''}there, against the stages of elements.py"
    for name, parameter in own.named_parameters():
        if name in predicted and held[name] != predicted[name]:
            yield f"rank {rank}: {name} has {held[name]:,} numbers here, and elements.py says {predicted[name]:,}"
        if not is_sharded(parameter):
            continue
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = parameter.device_mesh, parameter.placements
        shape, _ = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        local = to_local(parameter)
        if tuple(shape) != tuple(local.shape) and local.numel():
            yield f"rank {rank}: {name} has the shape {tuple(local.shape)}, and its placements say {tuple(shape)}"
        key = (tuple(parameter.shape), tuple(mesh.shape), placements)
        if key not in tiled:
            tiled.add(key)
            if not tiles(parameter.shape, _boxes(parameter.shape, tuple(mesh.shape), placements)):
                yield f"{name}: the shards of all processes leave gaps or overlap ({placements})"


def _boxes(shape: Sequence[int], mesh: tuple[int, ...], placements: Any) -> set[Box]:
    """Where the shards of all coordinates of a mesh lie, empty ones left out."""
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as place_of

    found: set[Box] = set()
    for coordinate in itertools.product(*map(range, mesh)):
        # Private, as the public form knows this process's coordinate alone.
        sizes, starts = place_of(tuple(shape), mesh, coordinate.__getitem__, placements)
        if all(sizes):
            found.add(tuple((start, start + size) for start, size in zip(starts, sizes, strict=True)))
    return found


def tiles(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether boxes are a grid that fills a tensor without gap or overlap."""
    found = set(boxes)
    number = 1
    for dim, size in enumerate(shape):
        spans = sorted({box[dim] for box in found})
        ends = [0, *(end for _, end in spans)]
        if [start for start, _ in spans] != ends[:-1] or ends[-1] != size:
            return False
        number *= len(spans)
    return number == len(found)


def _unequal_sums(model: nn.Module, layout: Layout) -> Iterator[str]:
    """Parameters whose shards of all processes are not the whole, by arithmetic."""
    decoder: Any = model
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for part in parts(model, layout):
        total = sum(part.held(shard, layout.shard_size) for shard in range(layout.shard_size))
        total *= layout.tp if part.divided else 1
        if total != shapes[part.name]:
            yield f"{part.name}: all processes have {total:,} of {shapes[part.name]:,} numbers"
    copies = sum(part.name == EMBEDDING for part in parts(model, layout))
    if copies != (2 if decoder.tied and layout.pp > 1 else 1):
        yield f"{EMBEDDING}: {copies} stages have it"


def _step(own: Any, layout: Layout, batch: tuple[int, int], dtype: torch.dtype) -> None:
    """Forward and backward of one micro-batch, on fake tensors."""
    tokens = torch.zeros(batch, dtype=torch.long)
    if not isinstance(own, Pipeline):
        own(tokens, hidden=True).float().sum().backward()
        return
    rows, length = batch
    for stage in own.held.values():
        stage.batches = [SimpleNamespace(tokens=tokens, input_pos=None, mask=None)]
        hidden = torch.zeros(rows, length // layout.tp, own.embed_dim, dtype=dtype, requires_grad=True)
        result = stage(tokens if stage.first else hidden, 0)
        expected = (rows, length if stage.last else length // layout.tp, own.embed_dim)
        if tuple(result.shape) != expected:
            raise ValueError(f"a stage gives {tuple(result.shape)}, and the next one takes {expected}")
        result.float().sum().backward()
        stage.batches = ()
