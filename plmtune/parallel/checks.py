"""Why a layout cannot train a model: sentences, before a process starts or a weight is allocated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from plmtune.parallel.layout import Layout, layers_of_stages
from plmtune.parallel.plan import divided_dimension, full_plan

_LAYER = re.compile(r"layers\.(\d+)")


def refusals(
    layout: Layout, model: nn.Module, *, seq_len: int, global_batch_size: int, micro_batch_size: int
) -> list[str]:
    """What keeps `layout` from training `model` on such batches, a sentence each; empty: nothing does.

    Args:
        model: a `Decoder`, best on the meta device.
        seq_len: tokens of a row.
        global_batch_size: rows of a step.
        micro_batch_size: rows of one forward.
    """
    of_tensors = tensor_refusals(layout, model)
    return [*of_tensors, *other_refusals(layout, model, seq_len, global_batch_size, micro_batch_size)]


def other_refusals(
    layout: Layout, model: nn.Module, seq_len: int, global_batch_size: int, micro_batch_size: int
) -> list[str]:
    """Those of `refusals` that `tensor_refusals` does not say."""
    batches = _of_batches(layout, global_batch_size, micro_batch_size)
    return [*_of_tokens(layout, seq_len), *_of_stages(layout, model), *batches]


def micro_batches(layout: Layout, global_batch_size: int, micro_batch_size: int) -> int:
    """Micro-batches of a step on one process; a batch that the processes do not divide is rounded down."""
    return global_batch_size // (layout.data_size * micro_batch_size)


def tensor_refusals(layout: Layout, model: nn.Module) -> list[str]:
    """Those of `refusals` that come from the model and from tp and cp alone: heads, and each divided parameter."""
    if layout.tp == layout.cp == 1:
        return []
    attentions: dict[str, Any] = {f"layers.{i}": layer.attention for i, layer in enumerate(_decoder(model).layers)}
    for place, attention in attentions.items():
        if not hasattr(attention, "head_shapes"):
            key = "tp" if layout.tp > 1 else "cp"
            return [f"parallel.{key}: {type(attention).__name__} of {_place(place)} does not say its heads"]
        scaling = getattr(getattr(attention, "rope", None), "scaling", None)
        if layout.cp > 1 and scaling is not None and scaling.by_length:
            return [
                f"parallel.cp: the RoPE of {_place(place)} is scaled by the length of each text, of which a process "
                "has a part. Set parallel.cp=1"
            ]
    if layout.tp == 1:
        return []
    for place, attention in attentions.items():
        if getattr(attention, "shortcut", None) is not None:
            return [
                f"parallel.tp: the attention shortcut of {_place(place)} is not divided between processes. Set "
                "parallel.tp=1"
            ]
    try:
        plan = full_plan(model)
    except ValueError as error:
        return [f"parallel.tp: {error}. Set parallel.tp=1"]
    undivided: dict[str, str] = {}  # what, and the first place that has it
    for place, attention in attentions.items():
        (heads, _), (kv_heads, _), _ = attention.head_shapes()
        for number, what in ((heads, "heads"), (kv_heads, "key and value heads")):
            if number % layout.tp and (what == "heads" or kv_heads != heads):
                undivided.setdefault(f"the {number} {what}", f" of {_place(place)}")
    for name, parameter in model.named_parameters():
        dimension = divided_dimension(plan, name)
        if dimension is None or parameter.shape[dimension] % layout.tp == 0:
            continue
        if not undivided or ".attention." not in name:  # where heads are not divided, their matrices are not either
            undivided.setdefault(*_dimension(name, parameter.shape[dimension]))
    return [f"parallel.tp: {layout.tp} does not divide {what}{place}" for what, place in undivided.items()]


def _decoder(model: nn.Module) -> Any:
    return model  # whose attributes mypy cannot see on a Module


def _place(module: str) -> str:
    found = _LAYER.match(module)
    return f"layer {found[1]}" if found else module


def _dimension(parameter: str, size: int) -> tuple[str, str]:
    """What a parameter's divided dimension is called in a config, and whose it is."""
    table = parameter.partition(".")[0]
    if table in ("tok_embeddings", "output"):
        return f"the vocabulary of {size:,}", ""
    if table in ("pos_embeddings", "query_embeddings"):
        return f"the {size:,} learned positions (model.max_seq_len)", ""
    if ".ffn." in parameter:
        return f"the hidden_dim of {size:,}", f" in the FFN of {_place(parameter)}"
    return f"the {size:,} of {parameter}", ""


def _of_tokens(layout: Layout, seq_len: int) -> Iterator[str]:
    """What a sequence is divided into."""
    if layout.cp > 1 and seq_len % (2 * layout.cp):
        yield (
            f"parallel.cp: {layout.cp} processes share {2 * layout.cp} equal parts of each sequence, which do not "
            f"divide seq_len {seq_len:,}"
        )
    elif layout.tp > 1 and (seq_len // layout.cp) % layout.tp:
        share = f"{seq_len // layout.cp:,} tokens (seq_len {seq_len:,} / parallel.cp {layout.cp})"
        yield (
            f"parallel.tp: {layout.tp} does not divide {f'seq_len {seq_len:,}' if layout.cp == 1 else share}, which "
            "its processes share between layers"
        )


def _of_stages(layout: Layout, model: nn.Module) -> Iterator[str]:
    if layout.pp == 1:
        return
    try:
        layers_of_stages(len(_decoder(model).layers), layout.num_stages)
    except ValueError as error:
        several = f" ({layout.schedule} has {layout.stages_per_rank} stages on each of {layout.pp} processes)"
        yield f"parallel.pp: {error}" + (several if layout.stages_per_rank > 1 else "")


def _of_batches(layout: Layout, global_batch_size: int, micro_batch_size: int) -> Iterator[str]:
    rows = layout.data_size * micro_batch_size
    if global_batch_size % rows:
        yield (
            f"global_batch_size: {global_batch_size} is not a multiple of {rows} (parallel.dp_replicate "
            f"{layout.dp_replicate} x parallel.dp_shard {layout.dp_shard} x micro_batch_size {micro_batch_size})"
        )
        return
    number = micro_batches(layout, global_batch_size, micro_batch_size)
    computed = f"{number} (global_batch_size {global_batch_size} / {rows} rows of all data processes' micro-batches)"
    if layout.pp > 1 and layout.schedule == "1f1b" and number < layout.pp:
        yield f"parallel.pp: {layout.pp} stages need {layout.pp} micro-batches a step or more, and there are {computed}"
    if layout.pp > 1 and layout.schedule == "interleaved_1f1b" and number % layout.pp:
        yield (
            f"parallel.schedule: interleaved_1f1b takes a multiple of parallel.pp {layout.pp} as micro-batches, and "
            f"there are {computed}"
        )
