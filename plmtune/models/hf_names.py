"""Names of tensors: ours and Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "value_embeddings": "model.value_embeddings",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention": "self_attn",
    "ffn": "mlp",
}
SCORE = "score.weight"  # of a reward model, as in transformers' models for sequence classification


@dataclass(frozen=True)
class Names:
    """The names of a family's tensors.

    Attributes:
        table: beginnings of our names -> of Hugging Face's; inside a layer without the layer.
        layers: what stands before a layer's number there.
        fused: a module of theirs -> our modules that it holds, one after the other.
        transposed: their modules that store [in, out].
        buffers: endings of tensors that follow from the config.
    """

    table: Mapping[str, str] = field(default_factory=lambda: _NAMES)
    layers: str = "model.layers."
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)

    @property
    def one_to_one(self) -> bool:
        """Whether each tensor of theirs is one of ours."""
        return not self.fused and not self.transposed

    def hf(self, name: str) -> str:
        """`layers.0.ffn.up_proj.weight` -> `model.layers.0.mlp.up_proj.weight`."""
        return _rename(name, "layers.", self.layers, self.table)

    def ours(self, name: str) -> str:
        """The inverse of `hf`."""
        return _rename(name, self.layers, "layers.", {theirs: ours for ours, theirs in self.table.items()})

    def groups(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Each of their tensors -> our tensors that it holds, for our names."""
        holder = {ours: (theirs, parts) for theirs, parts in self.fused.items() for ours in parts}
        found: dict[str, tuple[str, ...]] = {}
        for name in names:
            layer, inside = _split(name, "layers.")
            module, _, leaf = inside.rpartition(".")
            if module in holder:
                theirs, parts = holder[module]
                found[f"{self.layers}{layer}{theirs}.{leaf}"] = tuple(f"layers.{layer}{part}.{leaf}" for part in parts)
            else:
                found[self.hf(name)] = (name,)
        return found

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor of theirs is stored as [in, out]."""
        return _split(name, self.layers)[1].removesuffix(".weight") in self.transposed and name.endswith(".weight")


STANDARD = Names()


def hf_name(name: str) -> str:
    """`Names.hf` of Llama's names, which most families share."""
    return STANDARD.hf(name)


def our_name(name: str) -> str:
    """`Names.ours` of Llama's names."""
    return STANDARD.ours(name)


def _split(name: str, prefix: str) -> tuple[str, str]:
    """(`0.`, the name inside the layer) of a layer's tensor, ("", name) of another."""
    if not name.startswith(prefix):
        return "", name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{number}.", rest


def _rename(name: str, prefix: str, new_prefix: str, names: Mapping[str, str]) -> str:
    layer, rest = _split(name, prefix)
    head = f"{new_prefix}{layer}" if layer else ""
    parts = rest.split(".")
    for length in range(len(parts), 0, -1):  # the longest known beginning
        known = names.get(".".join(parts[:length]))
        if known is not None:
            return head + ".".join((known, *parts[length:]))
    return head + rest
