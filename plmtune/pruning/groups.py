"""Which parameters of a model are cut together.

A group holds units of one kind: the channels of the residual stream, the neurons of one layer's FFN, its attention
heads, its KV heads, the numbers of its latents (MLA). A unit is a slice of several tensors: a neuron is a row of the
gate's and of the up projection and a column of the down projection. The groups follow from the attributes of the
modules, so a new family needs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.errors import UserError
from plmtune.modules.decoder import Decoder

Kind = Literal["channels", "neurons", "heads", "kv_heads", "kv_rank", "q_rank"]
# The setting of a model's config that counts the units of a group.
SETTINGS: dict[Kind, str] = {
    "channels": "embed_dim",
    "neurons": "ffn.hidden_dim",
    "heads": "num_heads",
    "kv_heads": "attention.num_kv_heads",
    "kv_rank": "attention.kv_lora_rank",
    "q_rank": "attention.q_lora_rank",
}
CHANNELS = "channels"


@dataclass(frozen=True)
class Part:
    """The share of a group in one tensor: unit u has the entries offset + u width to offset + (u + 1) width - 1 of a
    dimension. The entries outside belong to no unit of the group.

    With `leading` the tensor is of the first units only, as many as it has entries.
    """

    tensor: str
    dim: int
    width: int = 1
    offset: int = 0
    leading: bool = False

    def of_units(self, values: Tensor, units: int) -> Tensor:
        """The sum of values (Tensor), one an entry of the dimension, over each unit: [units]."""
        if self.leading:
            return F.pad(values, (0, units - len(values)))
        return values[self.offset : self.offset + units * self.width].view(units, self.width).sum(1)

    def cut(self, tensor: Tensor, units: int, kept: Tensor) -> Tensor:
        """What is left of a tensor when of `units` those in kept (Tensor) stay."""
        every = torch.arange(tensor.shape[self.dim])
        if self.leading:
            # The first of the units that stay may be later ones, which the tensor had no number for.
            count = min(len(every), len(kept))
            found = tensor.index_select(self.dim, kept[kept < len(every)][:count].to(tensor.device))
            shape = list(found.shape)
            shape[self.dim] = count - shape[self.dim]
            return torch.cat((found, found.new_zeros(shape)), self.dim)
        first, last = self.offset, self.offset + units * self.width
        middle = every[first:last].view(units, self.width)[kept].flatten()
        return tensor.index_select(self.dim, torch.cat((every[:first], middle, every[last:])).to(tensor.device))


@dataclass(frozen=True)
class Group:
    """Units of one kind that stay or go.

    Attributes:
        name: "channels", or the layer in front: "layers.3.neurons".
        layer: its number; None: the group is of the whole model.
        parts: of tensors, by the names of the model's state.
        norms: names of the norms over the units.
    """

    name: str
    kind: Kind
    layer: int | None
    units: int
    parts: tuple[Part, ...]
    norms: tuple[str, ...] = ()


def groups_of(model: Decoder) -> dict[str, Group]:
    """The groups of a model by name, those of the first layer first, the channels last.

    Raises:
        UserError: for a layer whose attention or FFN is of an unknown structure.
    """
    found: dict[str, Group] = {}
    channels: list[Part] = []
    norms: list[str] = []
    for index, layer in enumerate(model.layers):
        prefix = f"layers.{index}."
        of_layer = _of_attention(cast(Any, layer).attention, f"{prefix}attention.", index, channels)
        of_layer += _of_ffn(cast(Any, layer).ffn, f"{prefix}ffn.", index, channels)
        found |= {group.name: group for group in of_layer}
        for name in ("attention_norm", "ffn_norm", "post_attention_norm", "post_ffn_norm"):
            if getattr(layer, name) is not None:
                norms.append(prefix + name)
    norms.append("norm")
    for name in ("tok_embeddings", "pos_embeddings", "query_embeddings", "output", "score"):
        if getattr(model, name, None) is not None:
            channels.append(Part(f"{name}.weight", 1))
    channels += _of_norms(model, norms)
    return found | {CHANNELS: Group(CHANNELS, "channels", None, model.embed_dim, tuple(channels), tuple(norms))}


def _of_attention(attention: nn.Module, prefix: str, layer: int, channels: list[Part]) -> list[Group]:
    held: Any = attention

    def group(kind: Kind, units: int, parts: list[Part], *norms: str) -> Group:
        names = tuple(prefix + name for name in norms)
        every = (*parts, *_of_norms(attention, norms, prefix))
        return Group(f"layers.{layer}.{kind}", kind, layer, units, every, names)

    def rows(name: str, width: int, offset: int = 0) -> list[Part]:
        return list(_rows(getattr(held, name), prefix + name, width, offset))

    def columns(name: str, width: int) -> list[Part]:
        return [Part(f"{prefix}{name}.weight", 1, width)]

    channels += rows("o_proj", 1) if hasattr(held, "o_proj") else []
    if getattr(held, "shortcut", None) is not None:  # its inner width stays
        channels += [Part(f"{prefix}shortcut.down", 1), Part(f"{prefix}shortcut.up", 0)]
    if hasattr(held, "kv_lora_rank"):
        heads, rank, nope, v = held.num_heads, held.kv_lora_rank, held.qk_nope_head_dim, held.v_head_dim
        queries = "q_proj" if held.q_lora_rank is None else "q_b_proj"
        channels += columns("kv_a_proj", 1) + columns("q_proj" if held.q_lora_rank is None else "q_a_proj", 1)
        found = [
            group(
                "heads",
                heads,
                rows(queries, nope + held.qk_rope_head_dim) + rows("kv_b_proj", nope + v) + columns("o_proj", v),
            ),
            # The rows of kv_a_proj after the latent's are the RoPE key's, which all heads share.
            group("kv_rank", rank, rows("kv_a_proj", 1) + columns("kv_b_proj", 1), "kv_a_norm"),
        ]
        if held.q_lora_rank is not None:
            parts = rows("q_a_proj", 1) + columns("q_b_proj", 1)
            found.append(group("q_rank", held.q_lora_rank, parts, "q_a_norm"))
        return found
    if not hasattr(held, "num_kv_heads"):
        raise _unknown(attention, prefix)
    channels += [part for name in ("q_proj", "k_proj", "v_proj") for part in columns(name, 1)]
    width = held.head_dim
    kv = rows("k_proj", width) + rows("v_proj", width)
    if getattr(held, "value_gate", None) is not None:
        # A gate a KV head, of the first channels; the decoder holds the vectors that are added to the values.
        kv += [Part(f"{prefix}value_gate", 0), Part(f"value_embeddings.{layer}.weight", 1, width)]
        channels.append(Part(f"{prefix}value_gate", 1, leading=True))
    return [
        group("heads", held.num_heads, rows("q_proj", width) + columns("o_proj", width)),
        group("kv_heads", held.num_kv_heads, kv),
    ]


def _of_ffn(ffn: nn.Module, prefix: str, layer: int, channels: list[Part]) -> list[Group]:
    names = [name for name in ("gate_proj", "up_proj") if getattr(ffn, name, None) is not None]
    if "up_proj" not in names or not hasattr(ffn, "down_proj"):
        raise _unknown(ffn, prefix)
    down: Any = ffn.down_proj
    channels += [Part(f"{prefix}{name}.weight", 1) for name in names]
    channels += _rows(down, f"{prefix}down_proj", 1)
    parts = [part for name in names for part in _rows(getattr(ffn, name), prefix + name, 1)]
    parts.append(Part(f"{prefix}down_proj.weight", 1))
    return [Group(f"layers.{layer}.neurons", "neurons", layer, down.in_features, tuple(parts))]


def _rows(linear: nn.Module, name: str, width: int, offset: int = 0) -> Iterator[Part]:
    """The rows of a projection, and its bias."""
    yield Part(f"{name}.weight", 0, width, offset)
    if linear.bias is not None:
        yield Part(f"{name}.bias", 0, width, offset)


def _of_norms(owner: nn.Module, names: tuple[str, ...] | list[str], prefix: str = "") -> list[Part]:
    return [
        Part(f"{prefix}{name}.{key}", 0) for name in names for key, _ in owner.get_submodule(name).named_parameters()
    ]


def _unknown(module: nn.Module, prefix: str) -> UserError:
    return UserError(
        f"{prefix.rstrip('.')} is a {type(module).__name__}: which of its parameters are cut together is not known. "
        "Pruning knows gqa, mha and mla, and FFNs of up_proj, down_proj and gate_proj."
    )
