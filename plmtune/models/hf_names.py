"""Names of tensors: ours and Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention": "self_attn",
    "ffn": "mlp",
}
_HF_NAMES = {theirs: ours for ours, theirs in _NAMES.items()}
SCORE = "score.weight"  # of a reward model, as in transformers' models for sequence classification


def hf_name(name: str) -> str:
    """`layers.0.ffn.up_proj.weight` -> `model.layers.0.mlp.up_proj.weight`."""
    return _rename(name, "layers.", "model.layers.", _NAMES)


def our_name(name: str) -> str:
    """The inverse of `hf_name`."""
    return _rename(name, "model.layers.", "layers.", _HF_NAMES)


def _rename(name: str, prefix: str, new_prefix: str, names: Mapping[str, str]) -> str:
    head, rest = "", name
    if name.startswith(prefix):
        number, _, rest = name.removeprefix(prefix).partition(".")
        head = f"{new_prefix}{number}."
    parts = rest.split(".")
    for length in range(len(parts), 0, -1):  # the longest known beginning
        known = names.get(".".join(parts[:length]))
        if known is not None:
            return head + ".".join((known, *parts[length:]))
    return head + rest
