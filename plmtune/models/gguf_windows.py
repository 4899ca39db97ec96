"""The architecture granite_swa of llama.cpp: Llama's form with a window, or without RoPE, in any of its layers.

Its architecture llama has neither, so Mistral, Ministral and others are written in this one. It adds a sink to
each head's softmax (arXiv 2309.17453): a score without a value. A sink of -65504 has no share of the softmax.
"""

from __future__ import annotations

from typing import Any

import torch

from plmtune.errors import UserError
from plmtune.models.gguf_keys import Metadata
from plmtune.models.gguf_layout import SINKS
from plmtune.models.gguf_settings import PATTERN, WINDOW, Config, Written, read_gqa, write_gqa

_ROPE_PATTERN, _SCALE, _LOGITS = "attention.rope_pattern", "attention.scale", "logit_scale"
_NOTHING = -65504.0


def read_windows(keys: Metadata) -> dict[str, Any]:
    settings = read_gqa(keys, freqs=True, biases=True)
    count, attention = settings["num_layers"], settings["attention"]
    if keys.decimal(_LOGITS, 1.0) != 1:
        raise keys.refuse(_LOGITS)
    if scale := keys.decimal(_SCALE, 0.0):
        attention["scale"] = scale
    sinks = [f"blk.{layer}.{SINKS}" for layer in range(count)]
    if any(name in keys.shapes and bool((keys.tensor(name) > _NOTHING).any()) for name in sinks):
        raise UserError(f"{keys.path}: {sinks[0]} and the others have a share of attention, which is not supported.")
    local, turned = (_pattern(keys, name, count) for name in (PATTERN, _ROPE_PATTERN))
    if any(near and not turns for near, turns in zip(local, turned, strict=True)):
        raise keys.refuse(_ROPE_PATTERN)
    window = keys.number(WINDOW)
    if window >= settings["max_seq_len"]:
        local = [False] * count
    layers = ["local" if near else "global" if turns else "nope" for near, turns in zip(local, turned, strict=True)]
    period = next(n for n in range(1, count + 1) if all(kind == layers[i % n] for i, kind in enumerate(layers)))
    attention["window"] = window if any(local) else None
    return settings | {"layers": layers[:period]}


def _pattern(keys: Metadata, name: str, count: int) -> list[bool]:
    """What a key says of each layer."""
    found = keys.get(name, [name == _ROPE_PATTERN] * count)
    if not isinstance(found, list) or len(found) != count or not all(type(item) is bool for item in found):
        raise keys.refuse(name)
    return found


def write_windows(config: Config) -> Written:
    attention = config["attention"]
    window, longest, count = attention.get("window"), config["max_seq_len"], config["num_layers"]
    pattern = config.get("layers") or ["global" if window is None else "local"]
    layers = [pattern[layer % len(pattern)] for layer in range(count)]
    keys, more = write_gqa(config, freqs=True, windows=True)
    if window is None or "local" not in layers:  # one layer must have a window
        window, layers = longest, ["local" if kind == "global" else kind for kind in layers]
    if "local" not in layers:
        raise UserError("llama.cpp has no architecture of Llama's form in which all layers lack RoPE.")
    keys |= {WINDOW: window, PATTERN: [kind == "local" for kind in layers]}
    keys[_ROPE_PATTERN] = [kind != "nope" for kind in layers]
    keys[_LOGITS] = 1.0
    if attention.get("scale") is not None:
        keys[_SCALE] = float(attention["scale"])
    return keys, more | {f"blk.{n}.{SINKS}": torch.full((config["num_heads"],), _NOTHING) for n in range(count)}
