"""How many numbers of each parameter a process holds under a layout, by arithmetic: no process group, no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from plmtune.parallel.layout import Layout, layers_of_stages
from plmtune.parallel.plan import divided_dimension, full_plan

EMBEDDING = "tok_embeddings.weight"  # of which the last stage has a copy, if it is the projection, too

_LAYER = re.compile(r"(?:layers|value_embeddings)\.(\d+)\.")


@dataclass(frozen=True)
class Part:
    """A parameter as one process of tensor parallelism has it, before FSDP2 divides its first dimension.

    Attributes:
        name: of the parameter in the whole model. A tied embedding comes twice: the last stage has a copy.
        stage: that holds it.
        rows, row: its first dimension, and the numbers of one row.
        divided: tensor parallelism divides it.
    """

    name: str
    stage: int
    rows: int
    row: int
    divided: bool

    @property
    def numel(self) -> int:
        return self.rows * self.row

    def held(self, shard: int, shards: int) -> int:
        """Numbers in one of so many shards: torch.chunk gives ceil(rows / shards) rows to each but the last ones."""
        chunk = -(-self.rows // shards)
        return max(0, min(chunk, self.rows - shard * chunk)) * self.row


def parts(model: nn.Module, layout: Layout) -> list[Part]:
    """Each parameter of `model` (a Decoder, best on the meta device), in the order of the model.

    The first stage has the embeddings of tokens and positions, the last one the final norm, the query layer's
    embeddings and the vocabulary projection; the embeddings of values are with their layers.

    Raises:
        ValueError: if there are fewer layers than stages, or a module does not say how tensor parallelism divides it.
    """
    decoder: Any = model
    stages = layers_of_stages(len(decoder.layers), layout.num_stages)
    of_layer = {layer: stage for stage, layers in enumerate(stages) for layer in layers}
    last = layout.num_stages - 1
    plan = full_plan(model) if layout.tp > 1 else {}
    found = []
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape) or [1]
        dimension = divided_dimension(plan, name) if plan else None
        if dimension is not None:
            shape[dimension] //= layout.tp
        layer = _LAYER.match(name)
        if layer:
            stage = of_layer[int(layer[1])]
        else:
            stage = 0 if name.partition(".")[0] in ("tok_embeddings", "pos_embeddings") else last
        row = 1
        for size in shape[1:]:
            row *= size
        found.append(Part(name, stage, shape[0], row, dimension is not None))
        if name == EMBEDDING and decoder.tied and layout.pp > 1:
            found.append(Part(name, last, shape[0], row, dimension is not None))
    return found


def of_process(found: list[Part], layout: Layout, pp_rank: int) -> Iterator[Part]:
    """The parts that a process of the pipeline has."""
    stages = set(layout.stages_of(pp_rank))
    return (part for part in found if part.stage in stages)


def held_elements(model: nn.Module, layout: Layout, rank: int) -> dict[str, int]:
    """{name of a parameter: its numbers that process `rank` holds}, with 0 for an empty shard.

    FSDP2 divides what tensor parallelism leaves by its first dimension, over dp_shard x cp processes. On a process
    with both ends of a pipeline (zbv) the copy of a tied embedding, which no optimizer updates, does not count.

    Args:
        model: a Decoder, best on the meta device.
        rank: in the mesh of `layout.DIMENSIONS`.

    Raises:
        ValueError: as `parts`.
    """
    place = layout.coordinates(rank)
    shard = place["dp_shard"] * layout.cp + place["cp"]
    held: dict[str, int] = {}
    for part in of_process(parts(model, layout), layout, place["pp"]):
        held[part.name] = part.held(shard, layout.shard_size)
    return held
