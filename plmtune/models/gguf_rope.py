"""RoPE and its scaling in GGUF files: keys rope.*, and tensors that hold a divisor for each frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.models.gguf_keys import Metadata
from plmtune.modules.rope_scaling import Llama3, RopeScaling
from plmtune.registry import load

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_NONE = {"component": "none"}


def scaling_of(attention: Mapping[str, Any]) -> RopeScaling:
    """The scaling that an attention's settings describe, other than none."""
    held = dict(attention["rope_scaling"])
    made: RopeScaling = load("rope_scaling", held.pop("component"))(**held)
    return made


def rope_width(config: Mapping[str, Any]) -> int:
    """Numbers a head that RoPE turns."""
    attention = config["attention"]
    if attention["component"] == "mla":
        return int(attention["qk_rope_head_dim"])
    width = attention["head_dim"] or config["embed_dim"] // config["num_heads"]
    return int(attention.get("rope_dim") or width)


def write_scaling(
    config: Mapping[str, Any], *, freqs: bool = False, factors: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys and tensors of a model's RoPE scaling; what they cannot say is found when they are read again.

    Args:
        freqs: the architecture divides frequencies by the tensor rope_freqs.
        factors: it divides them by rope_factors_short or rope_factors_long.
    """
    attention, longest = config["attention"], config["max_seq_len"]
    held = attention.get("rope_scaling", _NONE)
    kind = held["component"]
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(held["factor"])}, {}
    if kind == "yarn":
        made = scaling_of(attention)
        keys = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(held["factor"]),
            "rope.scaling.original_context_length": held["original_max_seq_len"],
        }
        for name in ("beta_fast", "beta_slow"):
            if held[name] != _YARN[name]:
                keys[f"rope.scaling.yarn_{name}"] = float(held[name])
        share = made.attention_factor / _sharpness(held["factor"])
        if not math.isclose(share, 1, rel_tol=1e-7):
            keys["rope.scaling.attn_factor"] = share
        return keys, {}
    if kind == "longrope" and factors:
        made = scaling_of(attention)
        keys = {
            "rope.scaling.original_context_length": held["original_max_seq_len"],
            "rope.scaling.attn_factor": float(made.attention_factor),
        }
        lists = {LONG: held["long_factor"], SHORT: held["short_factor"]}
        return keys, {name: torch.tensor(values) for name, values in lists.items()}
    if kind in ("llama3", "longrope") and freqs:
        made = scaling_of(attention)
        plain = _plain(rope_width(config), attention["rope_theta"])
        return {}, {FREQS: (plain / made.frequencies(plain, attention["rope_theta"], made.key(longest))).float()}
    return {}, {}


_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}


def _sharpness(factor: float) -> float:
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _plain(width: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def read_scaling(
    keys: Metadata, width: int, theta: float, longest: int, *, freqs: bool = False, factors: bool = False
) -> dict[str, Any]:
    """The `rope_scaling` of a file.

    Args:
        width: numbers a head that RoPE turns.
        theta: its base.
        longest: context length.
        freqs, factors: as for `write_scaling`.
    """
    kind = keys.get("rope.scaling.type", "none")
    linear = keys.get("rope.scale_linear")  # of old files
    factor = keys.get("rope.scaling.factor") if kind != "none" else linear
    if kind != "yarn" and not factors:
        keys.get("rope.scaling.original_context_length")  # of no other kind
    if factors and LONG in keys.shapes and SHORT in keys.shapes:
        short, long = ([_short(value) for value in keys.tensor(name).tolist()] for name in (SHORT, LONG))
        original = keys.number("rope.scaling.original_context_length", longest)
        return {
            "component": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_seq_len": original,
            "factor": longest / original,
            "attention_factor": keys.decimal("rope.scaling.attn_factor", 1.0),
        }
    if freqs and FREQS in keys.shapes:
        if kind not in ("none", "linear") or (factor or 1) != 1:
            raise keys.refuse("rope.scaling.type")
        if keys.shapes[FREQS] != (width // 2,):
            raise UserError(
                f"{keys.path}: {FREQS} has shape {list(keys.shapes[FREQS])}, and RoPE turns {width // 2} pairs."
            )
        return _read_freqs(keys.tensor(FREQS), width, theta, longest)
    if kind == "none" or (kind == "linear" and factor is None):
        kind = "none" if (linear or 1) == 1 else "linear"
        factor = linear
    if kind == "none":
        return _NONE
    if kind == "linear":
        name = "rope.scaling.factor" if keys.has("rope.scaling.factor") else "rope.scale_linear"
        factor = keys.decimal(name)
        return _NONE if factor == 1 else {"component": "linear", "factor": factor}
    if kind != "yarn":
        raise keys.refuse("rope.scaling.type")
    factor = keys.decimal("rope.scaling.factor")
    share = keys.decimal("rope.scaling.attn_factor", 1.0)
    return {
        "component": "yarn",
        "factor": factor,
        "original_max_seq_len": keys.number("rope.scaling.original_context_length", max(1, int(longest / factor))),
        "beta_fast": keys.decimal("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.decimal("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": None if share == 1 else _short(share * _sharpness(factor)),
    }


# Ten times the key is what the file's code of DeepSeek-V2 calls mscale_all_dim.
_LOG = "rope.scaling.yarn_log_multiplier"
_LEAST_LOG = 1e-7  # llama.cpp takes 0 for a key that is not there


def write_latent_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """`write_scaling` for the architecture deepseek2, in whose graph YaRN multiplies the scores, too.

    With a = attn_factor and L = ln(factor), llama.cpp multiplies cos and sin by a, and scores by (a (1 + m L))^2, for
    the key yarn_log_multiplier m.
    """
    keys, _ = write_scaling(config)
    if keys.get("rope.scaling.type") != "yarn":
        return keys
    made = scaling_of(config["attention"])
    factor = made.attention_factor
    log = math.log(max(keys["rope.scaling.factor"], 1))
    if log == 0:
        return {}
    keys["rope.scaling.attn_factor"] = factor
    return keys | {_LOG: (math.sqrt(made.softmax_factor) / factor - 1) / log or _LEAST_LOG}


def read_latent_scaling(keys: Metadata, width: int, theta: float, longest: int) -> dict[str, Any]:
    """The inverse of `write_latent_scaling`; arguments as for `read_scaling`."""
    found = read_scaling(keys, width, theta, longest)
    if found["component"] == "none":
        return found
    if found["component"] != "yarn":  # deepseek2's graph divides cos and sin of any scaling as YaRN needs it
        raise keys.refuse("rope.scaling.type")
    log = math.log(max(found["factor"], 1))
    if not keys.has(_LOG) or log == 0:
        raise keys.refuse("rope.scaling.type")
    factor = keys.decimal("rope.scaling.attn_factor", 1.0)
    scale = factor * (1 + keys.decimal(_LOG) * log)  # of queries, and of keys
    every = _short((scale - 1) / (0.1 * log)) if scale > 1 + 1e-6 else None
    if scale < 1 - 1e-6:
        raise keys.refuse(_LOG)
    if every is not None and math.isclose(factor, 1, rel_tol=1e-6):
        return found | {"attention_factor": None, "mscale": every, "mscale_all_dim": every}
    return found | {"attention_factor": _short(factor), "mscale_all_dim": every}


def _short(value: float) -> float:
    """A number of fp32 in as few digits as tell it from others."""
    return float(f"{value:.7g}")


def _read_freqs(stored: Tensor, width: int, theta: float, longest: int) -> dict[str, Any]:
    """Llama 3's scaling where the divisors are its own, or else a list of divisors."""
    divisors = stored.double()
    plain, factor = _plain(width, theta), _short(float(divisors.max()))
    for power in range(4, 21):
        settings: dict[str, Any] = {
            "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 2**power
        }  # fmt: skip
        found = plain / Llama3(**settings).frequencies(plain, theta, None)
        if torch.allclose(found, divisors, rtol=1e-6, atol=0):
            return {"component": "llama3"} | settings
    values = [_short(value) for value in divisors.tolist()]
    return {
        "component": "longrope",
        "short_factor": values,
        "long_factor": values,
        "original_max_seq_len": max(2, longest),
        "factor": 1.0,
        "attention_factor": 1.0,
    }
