"""Random tiny configs of every family, as a strategy of hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hypothesis import strategies as st

LENGTH = 24  # tokens that are compared
MISSING = object()
BOOL = (False, True)
WINDOWS = (2, 3, 5, 16, 24, 40)
# Further keys of each type of RoPE scaling.
SCALINGS: dict[str, dict[str, Sequence[Any]]] = {
    "linear": {},
    "dynamic": {},
    "llama3": {"low_freq_factor": (0.5, 1.0), "high_freq_factor": (2.0, 4.0, 8.0)},
    "yarn": {
        "beta_fast": (MISSING, 16.0, 32.0, 2.0),
        "beta_slow": (MISSING, 1.0, 0.5),
        "attention_factor": (MISSING, 1.0, 0.7, 1.25),
        "mscale": (MISSING, 1.0, 0.707),
        "mscale_all_dim": (MISSING, 1.0, 0.5),
        "truncate": (MISSING, *BOOL),
    },
    "longrope": {},
}


class Draw(Protocol):
    def __call__(self, strategy: st.SearchStrategy[Any], /) -> Any: ...


def _one_of(draw: Draw, *values: Any) -> Any:
    return draw(st.sampled_from(values))


def _drawn(draw: Draw, table: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    found = {name: _one_of(draw, *values) for name, values in table.items()}
    return {name: value for name, value in found.items() if value is not MISSING}


def _each(draw: Draw, count: int, *values: Any) -> list[Any]:
    return list(draw(st.lists(st.sampled_from(values), min_size=count, max_size=count)))


def _scaling(draw: Draw, kinds: Sequence[str], turned: int) -> dict[str, Any]:
    """A table of RoPE's scaling, empty for none.

    Args:
        turned: numbers a head that RoPE turns.
    """
    kind = _one_of(draw, MISSING, *kinds)
    if kind is MISSING:
        return {}
    table = {"rope_type": kind} | _drawn(draw, SCALINGS[kind])
    if kind == "longrope":
        return table | {
            f"{name}_factor": _each(draw, turned // 2, 1.0, 1.25, 2.0, 3.5, 9.0) for name in ("short", "long")
        }
    original = {} if kind in ("linear", "dynamic") else {"original_max_position_embeddings": (8, 12, 16)}
    return table | _drawn(draw, {"factor": (1.0, 1.5, 2.0, 4.0, 8.0)} | original)


def _sizes(draw: Draw, *, head_dim: bool | None = None) -> dict[str, Any]:
    """Keys that most families have.

    Args:
        head_dim: the family's class has it; None: and has a default.
    """
    kv_heads = _one_of(draw, 1, 2, 3)
    heads, width = kv_heads * _one_of(draw, 1, 2, 3), _one_of(draw, 4, 6, 8, 10, 16)
    explicit = head_dim is not False and _one_of(draw, *BOOL)
    fixed = {
        "hidden_size": heads * (_one_of(draw, 3, 5, 8) if explicit else width),  # the classes ask for a multiple
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **({"head_dim": width} if explicit or head_dim else {}),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return fixed | _drawn(draw, {
        "vocab_size": (31, 64, 101),
        "intermediate_size": (1, 7, 24, 40),
        "num_hidden_layers": (1, 2, 3, 5),
        "max_position_embeddings": (24, 32, 64),
        "rms_norm_eps": (1e-6, 1e-5, 1e-2),
        "rope_theta": (100.0, 1e4, 5e5),
        "tie_word_embeddings": BOOL,
    })  # fmt: skip


def _width(keys: dict[str, Any]) -> int:
    return int(keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"])


def _scaled(draw: Draw, keys: dict[str, Any]) -> dict[str, Any]:
    """Keys with a RoPE scaling of any type."""
    table = _scaling(draw, tuple(SCALINGS), _width(keys))
    kind = table.get("rope_type")
    if kind == "dynamic":
        # RoPE's tables are of max_position_embeddings x factor, and without growth nothing is to be seen.
        keys["max_position_embeddings"] = _one_of(draw, 12, 16, 24)
        table["factor"] = max(2.0, table["factor"])
    if kind == "longrope":
        table["original_max_position_embeddings"] = _one_of(draw, 8, 12, 16)
    return keys | ({"rope_scaling": table} if table else {})


def _plain(*, head_dim: bool | None = None, **table: Sequence[Any]) -> Callable[[Draw], dict[str, Any]]:
    """Sizes, keys of the family and any scaling."""
    return lambda draw: _scaled(draw, _sizes(draw, head_dim=head_dim) | _drawn(draw, table))


def _granite(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw, head_dim=False)
    return _scaled(draw, keys | _drawn(draw, {
        "attention_bias": BOOL,
        "attention_multiplier": (MISSING, 0.05, 1.0),
        "embedding_multiplier": (MISSING, 0.5, 12.0),
        "residual_multiplier": (MISSING, 0.22, 2.0),
        "logits_scaling": (MISSING, 0.5, 8.0),
    }))  # fmt: skip


def _layer_norm(draw: Draw, key: str, **table: Sequence[Any]) -> dict[str, Any]:
    """Keys of a family whose norms have another eps."""
    keys = _sizes(draw, head_dim=False)
    return keys | _drawn(draw, table) | {key: keys.pop("rms_norm_eps")}


def _partial(draw: Draw, keys: dict[str, Any]) -> dict[str, Any]:
    """Keys with a share of each head that RoPE turns."""
    shares = [share for share in (0.25, 0.5, 0.75, 1.0) if (turned := int(_width(keys) * share)) and turned % 2 == 0]
    return keys | _drawn(draw, {"partial_rotary_factor": shares})


def _with_types(draw: Draw, keys: dict[str, Any]) -> dict[str, Any]:
    types = _each(draw, keys["num_hidden_layers"], "sliding_attention", "full_attention")
    return keys | {"sliding_window": _one_of(draw, *WINDOWS)} | _drawn(draw, {"layer_types": (MISSING, types)})


def _smollm3(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw, head_dim=False)
    table = {"no_rope_layer_interval": (1, 2, 3, 4)}
    if _one_of(draw, *BOOL):
        table = {"no_rope_layers": (_each(draw, keys["num_hidden_layers"], 0, 1),)}
    return _scaled(draw, keys | _drawn(draw, {"attention_bias": BOOL} | table))


def _ministral(draw: Draw) -> dict[str, Any]:
    return _scaled(draw, _with_types(draw, _sizes(draw, head_dim=True)))


def _gemma(draw: Draw) -> dict[str, Any]:
    keys = _with_types(draw, _sizes(draw, head_dim=True))
    return keys | _drawn(draw, {
        "query_pre_attn_scalar": (1, 4, 10, 16, keys["head_dim"]),
        "attention_bias": BOOL,
        "attn_logit_softcapping": (None, 5.0, 50.0),
        "final_logit_softcapping": (None, 3.0, 30.0),
    })  # fmt: skip


def _gemma3(draw: Draw) -> dict[str, Any]:
    keys = _gemma(draw)
    table = _scaling(draw, ("linear", "llama3", "yarn"), keys["head_dim"])
    keys["rope_parameters"] = {
        "full_attention": {"rope_type": "default"} | table | {"rope_theta": keys.pop("rope_theta")},
        "sliding_attention": {"rope_type": "default", "rope_theta": _one_of(draw, 100.0, 1e4)},
    }
    return keys | ({} if "layer_types" in keys else _drawn(draw, {"sliding_window_pattern": (MISSING, 1, 2, 3)}))


def _phi3(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw, head_dim=False)
    shares = [share for share in (0.5, 0.75) if int(_width(keys) * share) % 2 == 0]
    keys |= _drawn(draw, {"sliding_window": (None, *WINDOWS), "partial_rotary_factor": (MISSING, *shares)})
    table = _scaling(draw, ("longrope",), int(_width(keys) * keys.get("partial_rotary_factor", 1)))
    if table:
        keys |= {"rope_scaling": table, "original_max_position_embeddings": _one_of(draw, 8, 12, 16, 24)}
    return keys


def _mla(draw: Draw, **table: Sequence[Any]) -> dict[str, Any]:
    keys = _sizes(draw, head_dim=False)
    heads, nope = keys["num_attention_heads"], _one_of(draw, 4, 6, 12)
    keys |= {"num_key_value_heads": heads, "hidden_size": heads * _one_of(draw, 3, 8)}  # which the class asks for
    keys |= _drawn(draw, table | {
        "q_lora_rank": (None, 5, 12),
        "kv_lora_rank": (4, 10),
        "qk_rope_head_dim": (2, 4, 8),
        "qk_nope_head_dim": (nope,),
        "v_head_dim": (2, 5, nope),
    })  # fmt: skip
    scaling = _scaling(draw, ("linear", "yarn"), keys["qk_rope_head_dim"])
    return keys | ({"rope_scaling": scaling} if scaling else {})


def _deepseek(draw: Draw, **table: Sequence[Any]) -> dict[str, Any]:
    keys = _mla(draw, **table)
    return keys | {"first_k_dense_replace": keys["num_hidden_layers"]}


def _gpt2(draw: Draw) -> dict[str, Any]:
    heads = _one_of(draw, 1, 2, 3)
    return {"n_head": heads, "bos_token_id": 1, "eos_token_id": 2} | _drawn(draw, {
        "vocab_size": (31, 64, 101),
        "n_embd": (heads * 3, heads * 8, heads * 10),
        "n_layer": (1, 2, 3),
        "n_positions": (24, 40),
        "n_inner": (None, 7, 24),
        "activation_function": ("gelu_new", "gelu", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5, 1e-2),
        "tie_word_embeddings": BOOL,
        "reorder_and_upcast_attn": BOOL,
    })  # fmt: skip


_FAMILIES: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "llama": _plain(attention_bias=BOOL),
    "qwen2": _plain(head_dim=False),
    "qwen3": _plain(head_dim=True, attention_bias=BOOL),
    "smollm3": _smollm3,
    "mistral": _plain(sliding_window=(None, *WINDOWS)),
    "ministral": _ministral,
    "gemma2": lambda draw: _scaled(draw, _gemma(draw)),
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "deepseek_v3": lambda draw: _deepseek(draw, rope_interleave=BOOL),
    "deepseek_v2": _deepseek,
    "youtu": lambda draw: _mla(draw, rope_interleave=BOOL),
    "gpt2": _gpt2,
    "granite": _granite,
    "arcee": _plain(attention_bias=BOOL),
    "ernie4_5": _plain(head_dim=True),
    "starcoder2": lambda draw: _scaled(draw, _layer_norm(
        draw, "norm_epsilon", use_bias=BOOL, sliding_window=(None, *WINDOWS),
        hidden_act=("gelu_pytorch_tanh", "gelu_new", "gelu"),
    )),
    "stablelm": lambda draw: _partial(draw, _layer_norm(draw, "layer_norm_eps", use_qkv_bias=BOOL)),
    "glm": lambda draw: _partial(draw, _sizes(draw, head_dim=True) | _drawn(draw, {"attention_bias": BOOL})),
}  # fmt: skip
MODEL_TYPES = tuple(_FAMILIES)


@st.composite
def keys_of(draw: Draw, model_type: str) -> dict[str, Any]:
    """Keys of a config.json of one model_type."""
    return _FAMILIES[model_type](draw)
