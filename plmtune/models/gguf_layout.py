"""How a GGUF file holds a model's tensors, as llama.cpp's converters write them: names and the order of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plmtune.models.gguf_squared_relu import Factors
from plmtune.models.hf_names import Names
from plmtune.modules.gqa import default_kv_heads

# Our names, and those of the format without ".weight".
TABLE = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "attention.kv_a_proj": "attn_kv_a_mqa",
    "attention.kv_a_norm": "attn_kv_a_norm",
    "attention.kv_b_proj": "attn_kv_b",
    "ffn.gate_proj": "ffn_gate",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}
STANDARD = Names(TABLE, layers="blk.")
SINKS = "attn_sinks.weight"  # of a layer
_FOLLOW = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Layout:
    """How an architecture's file holds tensors.

    Attributes:
        names: our names -> the file's; fused ones hold several of ours, row after row.
        permuted: llama.cpp rotates neighbours, so the rows of queries and keys with half-split RoPE are reordered.
        unit_offset: the weights of norms are stored as 1 + weight.
        sinks: its layers have tensors `SINKS`, which we have not.
        split_latent: kv_b_proj is stored as attn_k_b, transposed, and attn_v_b, head by head.
        squared_relu: factors of an FFN with squared ReLU, which is stored as SwiGLU: up_proj twice.
    """

    names: Names = field(default=STANDARD)
    permuted: bool = False
    unit_offset: bool = False
    split_latent: bool = False
    squared_relu: Factors | None = None
    sinks: bool = False

    def is_ours(self, name: str) -> bool:
        """Whether a tensor of the file is a part of the model's, rather than one that follows from its keys."""
        return not (name in _FOLLOW or (self.sinks and name.endswith(f".{SINKS}")))

    def groups(self, ours: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Each tensor of the file -> our tensors that it holds, for our names."""
        found: dict[str, tuple[str, ...]] = {}
        for theirs, held in self.names.groups(ours).items():
            parts = [theirs]
            if self.split_latent and theirs.endswith(".attn_kv_b.weight"):
                parts = [theirs.replace("_kv_b", part) for part in ("_k_b", "_v_b")]
            elif self.squared_relu is not None and theirs.endswith(".ffn_up.weight"):
                parts.append(theirs.replace("_up", "_gate"))
            found |= dict.fromkeys(parts, held)
        return found

    def copies(self, groups: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
        """Each of our tensors that the file holds twice -> the file's second one, times another factor."""
        if self.squared_relu is None:
            return {}
        return {ours[0]: theirs for theirs, ours in groups.items() if theirs.endswith(".ffn_gate.weight")}

    def write(self, config: Mapping[str, Any], theirs: str, ours: tuple[str, ...], read: Read) -> Tensor:
        """A tensor of the file, from our tensors that it holds.

        Args:
            config: the model's.
            read: gives one of our tensors.
        """
        parts = []
        for name in ours:
            tensor = read(name)
            if self.unit_offset and name.endswith("norm.weight"):
                tensor = tensor.float() + 1
            heads = self.heads_of_halves(config, name)
            parts.append(tensor if heads is None else to_neighbours(tensor, heads))
        if theirs.endswith(("_k_b.weight", "_v_b.weight")):
            keys, values = _latent_parts(config, parts[0])
            return keys.transpose(1, 2).contiguous() if "_k_b." in theirs else values.contiguous()
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        factor = self.factor(theirs)
        return whole if factor == 1 else whole.float() * factor

    def read(
        self, config: Mapping[str, Any], name: str, groups: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int],
        read: Read,
    ) -> Tensor:  # fmt: skip
        """One of our tensors, from those of the file that hold it.

        Args:
            config: the model's.
            groups: of all our tensors.
            sizes: rows of our tensors.
            read: gives a tensor of the file.
        """
        held = [theirs for theirs, ours in groups.items() if name in ours]
        if self.split_latent and len(held) == 2 and "_k_b." in held[0]:
            keys, values = read(held[0]).transpose(1, 2), read(held[1])
            return torch.cat((keys, values), dim=1).flatten(0, 1)
        tensor, ours = self.without_factor(held[0], read), groups[held[0]]
        if len(ours) > 1:
            tensor = tensor.split([sizes[part] for part in ours])[ours.index(name)].clone()
        if self.unit_offset and name.endswith("norm.weight"):
            tensor = tensor - 1
        heads = self.heads_of_halves(config, name)
        return tensor if heads is None else to_halves(tensor, heads)

    def factor(self, theirs: str) -> float:
        """What a tensor of the file is ours times."""
        return 1.0 if self.squared_relu is None else self.squared_relu.of(theirs)

    def without_factor(self, theirs: str, read: Read) -> Tensor:
        """A tensor of the file, divided by its factor."""
        factor = self.factor(theirs)
        return read(theirs) if factor == 1 else read(theirs) / factor

    def heads_of_halves(self, config: Mapping[str, Any], name: str) -> int | None:
        """As the function, None in an architecture that does not reorder."""
        return heads_of_halves(config, name) if self.permuted else None

    def shapes(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes of the file's tensors, for ours, on the meta device."""
        return {
            theirs: tuple(self.write(config, theirs, ours, tensors.__getitem__).shape)
            for theirs, ours in self.groups(tensors).items()
        }


def _latent_parts(config: Mapping[str, Any], tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of kv_b_proj (Tensor), [h (n + v), c], as [h, n, c] and [h, v, c]."""
    attention = config["attention"]
    parts = tensor.unflatten(0, (config["num_heads"], -1))
    keys, values = parts.split((attention["qk_nope_head_dim"], attention["v_head_dim"]), dim=1)
    return keys, values


def kv_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values that a model's `config` asks for."""
    heads, attention = config["num_heads"], config["attention"]
    if attention["component"] != "gqa":
        return int(heads)
    return int(attention["num_kv_heads"] or default_kv_heads(heads))


def heads_of_halves(config: Mapping[str, Any], name: str) -> int | None:
    """The heads of a tensor whose rows llama.cpp has in another order; None if the order is the same.

    llama.cpp's RoPE rotates neighbours, so its converters put the pairs of a half-split RoPE side by side.
    """
    attention, part = config["attention"], name.split(".")[-2]
    if attention["component"] == "mla" or attention["rope_interleaved"]:
        return None
    return {"q_proj": config["num_heads"], "k_proj": kv_heads(config)}.get(part)


def to_neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows of tensor (Tensor), [heads x width, ...], whose pairs stand side by side, of those with halves."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def to_halves(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `to_neighbours`."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
