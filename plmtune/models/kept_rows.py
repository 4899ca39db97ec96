"""A model with fewer tokens: the rows of kept tokens, gathered, and the ids in its configuration, renumbered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plmtune.errors import UserError
from plmtune.models.assemble import meta_model
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import is_quantized

# Keys of config.json and generation_config.json whose lists hold ids, besides *_token_id and *_token_ids.
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_SEQUENCES = ("bad_words_ids", "force_words_ids", "sequence_bias", "forced_decoder_ids", "constraints")


def row_parameters(config: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Return (parameters for each row of the vocabulary, all other parameters) of a model's `config`."""
    rows = config["vocab_size"]
    models = (meta_model({**config, "vocab_size": size}, where) for size in (rows, rows + 1))
    total, other = (sum(p.numel() for p in model.parameters()) for model in models)
    return other - total, total - rows * (other - total)


@torch.no_grad()
def keep_rows(model: Decoder, ids: Sequence[int]) -> None:
    """Gather the rows of some tokens in place, of the embedding, the head and whatever else has a row a token.

    Args:
        ids: of the tokens, in the order of their new ids.

    Raises:
        UserError: if the model is quantized.
    """
    if is_quantized(model):
        raise UserError("A quantized model's rows cannot be gathered: compress the checkpoint that was quantized.")
    old = model.vocab_size
    rows, config = torch.tensor(ids, device=model.device), {**model.config, "vocab_size": len(ids)}
    for name, wanted in meta_model(config, "the model's config").named_parameters():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        held = module.get_parameter(leaf)
        if held.shape == wanted.shape:
            continue
        assert held.shape == (old, *wanted.shape[1:]), name
        setattr(module, leaf, nn.Parameter(held[rows], requires_grad=held.requires_grad))
        for size in ("num_embeddings", "out_features"):
            if hasattr(module, size):
                setattr(module, size, len(ids))
    model.vocab_size, model.config = len(ids), config


def named_ids(keys: Mapping[str, Any]) -> set[int]:
    """The ids of single tokens that a config.json or generation_config.json names, such as eos_token_id."""
    return {identity for name in keys if _names_one(name) for identity in _flat(keys[name])}


def refuse_sequences(keys: Mapping[str, Any], where: Path) -> None:
    """Refuse keys that name sequences of tokens: after the compression other tokens write that text.

    Raises:
        UserError: naming the key.
    """
    if named := [name for name in _SEQUENCES if keys.get(name)]:
        raise UserError(
            f"{where}, key {named[0]}: it names sequences of tokens, whose text other tokens write after the "
            "compression. Remove the key from a copy, and write it anew for the compressed tokenizer."
        )


def renumbered(keys: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return a config.json or generation_config.json with new ids.

    An id without a new one, such as that of a padding row, becomes null or leaves its list.
    """
    found = dict(keys)
    for name, value in keys.items():
        if _names_one(name) or name in _LISTS:
            is_list = isinstance(value, list)
            ids = [new[identity] for identity in _flat(value) if identity in new]
            found[name] = ids if is_list else next(iter(ids), None)
    return found


def _names_one(name: str) -> bool:
    return name.endswith(("_token_id", "_token_ids"))


def _flat(value: Any) -> list[int]:
    return [held for held in (value if isinstance(value, list) else [value]) if type(held) is int]
