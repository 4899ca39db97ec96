"""What is trained, as far as its costs go: sizes of a model and of its batches, taken once for all layouts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from plmtune.modules.checkpointing import Checkpointing, of_layer
from plmtune.modules.decoder import Decoder
from plmtune.optim.optimizers import optimizer_bytes
from plmtune.parallel.elements import EMBEDDING, Part, parts
from plmtune.parallel.layout import Layout, layers_of_stages
from plmtune.training.activations import activation_bytes
from plmtune.training.estimate import attention_flops


@dataclass(frozen=True)
class Activations:
    """Bytes a token of one layer that is whole on one process.

    Attributes:
        kept: from a layer's forward to its backward.
        at_work: of the layer whose backward runs, besides.
    """

    kept: float
    at_work: float


@dataclass(frozen=True)
class Job:
    """A model (on the meta device) and its batches.

    Attributes:
        seq_len: tokens of a row.
        global_batch_size: rows of a step.
        dtype: of the arithmetic.
        optimizer: its name in the registry.
        chunk_rows: tokens whose logits the loss holds at once.
    """

    model: Decoder = field(repr=False)
    seq_len: int
    global_batch_size: int
    dtype: torch.dtype
    optimizer: str = "adamw"
    chunk_rows: int = 1024
    _sizes: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the arithmetic's dtype."""
        return self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.global_batch_size * self.seq_len

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def moments(self) -> float:
        """Bytes of optimizer state for a number of a parameter."""
        return optimizer_bytes(self.optimizer, self.model) / self.parameters

    @cached_property
    def multiplied(self) -> int:
        """Numbers that each token is multiplied with."""
        model: Any = self.model
        read = sum(p.numel() for name, p in model.named_parameters() if is_read(name, tied=model.tied))
        return self.parameters - read

    @cached_property
    def flops_per_token(self) -> float:
        """6N and attention in full, forward and backward: the convention of `training.estimate`, for MFU."""
        return 6.0 * self.multiplied + attention_flops(self.model, self.seq_len)

    @cached_property
    def attention(self) -> float:
        """FLOPs a token and layer of causal attention's forward, of which a kernel computes half: the mean layer."""
        return attention_flops(self.model, self.seq_len) / 6 / self.num_layers

    @cached_property
    def key_values(self) -> tuple[int, int, int]:
        """Numbers a token that context parallelism gathers in the first layer: (whole on each process of tensor
        parallelism, divided by it), and what is kept of them, divided by it.

        MLA sends the latent and the RoPE key, and makes keys and values of each head from them.
        """
        attention: Any = self.model.layers[0].attention
        (_, _), (kv_heads, key), (_, value) = attention.head_shapes()
        if len(attention.cache_shapes()) == 1:
            ((_, latent),) = attention.cache_shapes()
            return latent, 0, kv_heads * (attention.qk_nope_head_dim + key + value)
        return 0, kv_heads * (key + value), kv_heads * (key + value)

    @cached_property
    def expansion(self) -> int:
        """Numbers of the matrix that makes an MLA's keys and values from the latent, in one layer; else 0."""
        attention: Any = self.model.layers[0].attention
        found = getattr(attention, "kv_b_proj", None)
        return 0 if found is None else int(found.weight.numel())

    def kinds(self, checkpointing: Checkpointing) -> list[str]:
        """How each layer is computed."""
        return [of_layer(checkpointing, index) for index in range(self.num_layers)]

    def activations(self, checkpointing: Checkpointing) -> Activations:
        """Those of a layer, found by forwards of a few tokens (`training.activations.activation_bytes`)."""
        key = ("activations", checkpointing)
        kinds = self.kinds(checkpointing)
        if len(set(kinds)) > 1:  # the mean of all layers
            none, full = self.activations("none"), self.activations("full")
            share = kinds.count("full") / len(kinds)
            self._sizes[key] = Activations(none.kept + share * (full.kept - none.kept), full.at_work)
        elif key not in self._sizes:
            deep = min(self.num_layers, 8)
            one, several = (self._of_layers(number, checkpointing) for number in (1, deep))
            kept = (several - one) / (deep - 1) if deep > 1 else one
            bare = self._of_layers(1, "none") - self._of_layers(2, "none") / 2 if self.num_layers > 1 else 0.0
            ends = max(0.0, 2 * bare)
            self._sizes[key] = Activations(kept, max(0.0, one - ends - kept))
        found: Activations = self._sizes[key]
        return found

    def _of_layers(self, number: int, checkpointing: Checkpointing) -> float:
        """Bytes a token of a model with fewer layers."""
        model = copy.copy(self.model)
        model._modules = dict(self.model._modules)
        model.layers = nn.ModuleList(list(self.model.layers)[:number])
        tokens = min(self.seq_len, 128)
        return activation_bytes(model, 1, tokens, self.dtype, checkpointing, casts=False) / tokens

    def sizes(self, layout: Layout) -> list[StageSizes]:
        """Those of each stage, for a process of tensor parallelism and the first of its shards."""
        key = (layout.tp, layout.num_stages, layout.pp > 1, layout.shard_size)
        if key not in self._sizes:
            self._sizes[key] = _stage_sizes(self, layout, self._parts(layout))
        found: list[StageSizes] = self._sizes[key]
        return found

    def _parts(self, layout: Layout) -> list[Part]:
        key = ("parts", layout.tp, layout.num_stages, layout.pp > 1)
        if key not in self._sizes:
            self._sizes[key] = parts(self.model, layout)
        found: list[Part] = self._sizes[key]
        return found


@dataclass(frozen=True)
class StageSizes:
    """One stage on one process of tensor parallelism.

    Attributes:
        layers: of the stage.
        numel: parameters before FSDP2 divides them; held: after, in the first shard, which is the largest.
        multiplied: numbers that each token is multiplied with, the head's not among them.
        head: numbers of the vocabulary projection, on the last stage.
        outside: of numel, those outside layers; layer: the largest layer's.
        first, last: whether it is the stage with the embedding, with the head.
    """

    layers: int
    numel: int
    held: int
    multiplied: int
    head: int
    outside: int
    layer: int
    first: bool
    last: bool


def is_read(name: str, *, tied: bool) -> bool:
    """Whether a parameter is a table that is only read; a tied embedding is multiplied, as the head."""
    table = name.partition(".")[0]
    return table in ("pos_embeddings", "query_embeddings", "value_embeddings") or (name == EMBEDDING and not tied)


def _stage_sizes(job: Job, layout: Layout, found: list[Part]) -> list[StageSizes]:
    sizes = []
    last = layout.num_stages - 1
    tied = bool(job.model.tied)
    for stage, layers in enumerate(layers_of_stages(job.num_layers, layout.num_stages)):
        of_stage = [part for part in found if part.stage == stage]
        inside = [part for part in of_stage if part.name.startswith("layers.")]
        of_layer: dict[str, int] = {}
        for part in inside:
            number = part.name.split(".")[1]
            of_layer[number] = of_layer.get(number, 0) + part.numel
        head = 0
        if stage == last:
            name = EMBEDDING if tied else "output.weight"
            head = next(part.numel for part in of_stage if part.name == name)
        sizes.append(
            StageSizes(
                layers=len(layers),
                numel=sum(part.numel for part in of_stage),
                held=sum(part.held(0, layout.shard_size) for part in of_stage),
                multiplied=sum(part.numel for part in inside),
                head=head,
                outside=sum(part.numel for part in of_stage) - sum(part.numel for part in inside),
                layer=max(of_layer.values()),
                first=stage == 0,
                last=stage == last,
            )
        )
    return sizes
