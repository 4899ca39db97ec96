"""Random tiny configs of every family, as a strategy of hypothesis."""

from __future__ import annotations

from typing import Any, Protocol

from hypothesis import strategies as st

LENGTH = 24  # tokens that are compared


class Draw(Protocol):
    def __call__(self, strategy: st.SearchStrategy[Any], /) -> Any: ...


def _one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def _scaling(draw: Draw, kinds: tuple[str, ...], turned: int, original: int) -> dict[str, Any] | None:
    """A table of RoPE's scaling.

    Args:
        turned: numbers a head that RoPE turns.
        original: below the longest context.
    """
    kind = draw(_one_of("none", *kinds))
    factor = draw(_one_of(1.0, 1.5, 2.0, 4.0, 8.0))
    if kind == "none":
        return None
    if kind in ("linear", "dynamic"):
        return {"rope_type": kind, "factor": factor}
    if kind == "llama3":
        low, high = draw(_one_of((1.0, 4.0), (1.0, 2.0), (0.5, 8.0)))
        return {
            "rope_type": kind,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    if kind == "yarn":
        table = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
        if draw(st.booleans()):
            table |= {"beta_fast": draw(_one_of(16.0, 32.0, 2.0)), "beta_slow": draw(_one_of(1.0, 0.5))}
        if draw(st.booleans()):
            table["attention_factor"] = draw(_one_of(1.0, 0.7, 1.25))
        if draw(st.booleans()):
            table |= {"mscale": draw(_one_of(1.0, 0.707)), "mscale_all_dim": draw(_one_of(1.0, 0.5))}
        if draw(st.booleans()):
            table["truncate"] = draw(st.booleans())
        return table
    divisors = st.lists(_one_of(1.0, 1.25, 2.0, 3.5, 9.0), min_size=turned // 2, max_size=turned // 2)
    return {"rope_type": kind, "short_factor": draw(divisors), "long_factor": draw(divisors)}


_SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")


def _sizes(draw: Draw, *, head_dim: bool = True) -> dict[str, Any]:
    """Keys that most families have.

    Args:
        head_dim: the family's class has it.
    """
    kv_heads = draw(_one_of(1, 2, 3))
    heads = kv_heads * draw(_one_of(1, 2, 3))
    width = draw(_one_of(4, 6, 8, 10, 16))
    explicit = head_dim and draw(st.booleans())
    return {
        "vocab_size": draw(_one_of(31, 64, 101)),
        "hidden_size": heads * (draw(_one_of(3, 5, 8)) if explicit else width),  # the classes ask for a multiple
        "intermediate_size": draw(_one_of(1, 7, 24, 40)),
        "num_hidden_layers": draw(_one_of(1, 2, 3, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **({"head_dim": width} if explicit else {}),
        "max_position_embeddings": draw(_one_of(24, 32, 64)),
        "rms_norm_eps": draw(_one_of(1e-6, 1e-5, 1e-2)),
        "rope_theta": draw(_one_of(100.0, 1e4, 5e5)),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _width(keys: dict[str, Any]) -> int:
    return int(keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"])


def _types(draw: Draw, layers: int) -> list[str]:
    kinds = _one_of("sliding_attention", "full_attention")
    return list(draw(st.lists(kinds, min_size=layers, max_size=layers)))


def _window(draw: Draw) -> int:
    return int(draw(_one_of(2, 3, 5, 16, 24, 40)))


def _scaled(draw: Draw, keys: dict[str, Any], *, kinds: tuple[str, ...] = _SCALINGS) -> None:
    """Add a RoPE scaling to keys."""
    original = draw(_one_of(8, 12, 16))
    table = _scaling(draw, kinds, _width(keys), original)
    if table is None:
        return
    if table["rope_type"] == "dynamic":
        # RoPE's tables are of max_position_embeddings x factor, and without growth nothing is to be seen.
        keys["max_position_embeddings"] = draw(_one_of(12, 16, 24))
        table["factor"] = max(2.0, table["factor"])
    if table["rope_type"] == "longrope":
        table["original_max_position_embeddings"] = original
    keys["rope_scaling"] = table


def _llama(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw) | {"attention_bias": draw(st.booleans())}
    _scaled(draw, keys)
    return keys


def _qwen2(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw, head_dim=False)
    _scaled(draw, keys)
    return keys


def _qwen3(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw)
    keys |= {"head_dim": _width(keys), "attention_bias": draw(st.booleans())}
    _scaled(draw, keys)
    return keys


def _smollm3(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw, head_dim=False) | {"attention_bias": draw(st.booleans())}
    layers = keys["num_hidden_layers"]
    if draw(st.booleans()):
        keys["no_rope_layers"] = draw(st.lists(_one_of(0, 1), min_size=layers, max_size=layers))
    else:
        keys["no_rope_layer_interval"] = draw(_one_of(1, 2, 3, 4))
    _scaled(draw, keys)
    return keys


def _mistral(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw) | {"sliding_window": draw(st.none() | st.just(_window(draw)))}
    _scaled(draw, keys)
    return keys


def _ministral(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw) | {"sliding_window": _window(draw)}
    keys["head_dim"] = _width(keys)
    if draw(st.booleans()):
        keys["layer_types"] = _types(draw, keys["num_hidden_layers"])
    _scaled(draw, keys)
    return keys


def _gemma(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw)
    keys |= {
        "head_dim": _width(keys),
        "query_pre_attn_scalar": draw(_one_of(1, 4, 10, 16, keys.get("head_dim", 8))),
        "sliding_window": _window(draw),
        "attention_bias": draw(st.booleans()),
        "attn_logit_softcapping": draw(_one_of(None, 5.0, 50.0)),
        "final_logit_softcapping": draw(_one_of(None, 3.0, 30.0)),
    }
    if draw(st.booleans()):
        keys["layer_types"] = _types(draw, keys["num_hidden_layers"])
    return keys


def _gemma2(draw: Draw) -> dict[str, Any]:
    keys = _gemma(draw)
    _scaled(draw, keys)
    return keys


def _gemma3(draw: Draw) -> dict[str, Any]:
    keys = _gemma(draw)
    theta = keys.pop("rope_theta")
    table = _scaling(draw, ("linear", "llama3", "yarn"), keys["head_dim"], draw(_one_of(8, 12)))
    keys["rope_parameters"] = {
        "full_attention": {"rope_type": "default"} | (table or {}) | {"rope_theta": theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": draw(_one_of(100.0, 1e4))},
    }
    if "layer_types" not in keys and draw(st.booleans()):
        keys["sliding_window_pattern"] = draw(_one_of(1, 2, 3))
    return keys


def _phi3(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw, head_dim=False) | {"sliding_window": draw(st.none() | st.just(_window(draw)))}
    width = _width(keys)
    share = draw(_one_of(1.0, 0.5, 0.75))
    turned = int(width * share)
    if turned % 2 or turned < 2:
        share, turned = 1.0, width
    if share != 1:
        keys["partial_rotary_factor"] = share
    if draw(st.booleans()):
        keys["original_max_position_embeddings"] = draw(_one_of(8, 12, 16, 24))
        keys["rope_scaling"] = _scaling(draw, ("longrope",), turned, 0)
    return keys


def _mla(draw: Draw) -> dict[str, Any]:
    keys = _sizes(draw, head_dim=False)
    heads = keys["num_attention_heads"]
    nope, turned = draw(_one_of(4, 6, 12)), draw(_one_of(2, 4, 8))
    keys |= {
        "num_key_value_heads": heads,
        "hidden_size": heads * draw(_one_of(3, 8)),  # which the class asks for
        "q_lora_rank": draw(_one_of(None, 5, 12)),
        "kv_lora_rank": draw(_one_of(4, 10)),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": turned,
        "v_head_dim": draw(_one_of(2, 5, nope)),
    }
    original = draw(_one_of(8, 12))
    table = _scaling(draw, ("linear", "yarn"), turned, original)
    if table:
        keys["rope_scaling"] = table
    return keys


def _deepseek_v3(draw: Draw) -> dict[str, Any]:
    keys = _mla(draw)
    return keys | {"first_k_dense_replace": keys["num_hidden_layers"], "rope_interleave": draw(st.booleans())}


def _deepseek_v2(draw: Draw) -> dict[str, Any]:
    keys = _mla(draw)
    return keys | {"first_k_dense_replace": keys["num_hidden_layers"]}


def _youtu(draw: Draw) -> dict[str, Any]:
    return _mla(draw) | {"rope_interleave": draw(st.booleans())}


def _gpt2(draw: Draw) -> dict[str, Any]:
    heads = draw(_one_of(1, 2, 3))
    return {
        "vocab_size": draw(_one_of(31, 64, 101)),
        "n_embd": heads * draw(_one_of(3, 8, 10)),
        "n_layer": draw(_one_of(1, 2, 3)),
        "n_head": heads,
        "n_positions": draw(_one_of(24, 40)),
        "n_inner": draw(_one_of(None, 7, 24)),
        "activation_function": draw(_one_of("gelu_new", "gelu", "gelu_pytorch_tanh")),
        "layer_norm_epsilon": draw(_one_of(1e-5, 1e-2)),
        "tie_word_embeddings": draw(st.booleans()),
        "reorder_and_upcast_attn": draw(st.booleans()),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


_DRAWN = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "mistral": _mistral,
    "ministral": _ministral,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v2": _deepseek_v2,
    "youtu": _youtu,
    "gpt2": _gpt2,
}
MODEL_TYPES = tuple(_DRAWN)


@st.composite
def keys_of(draw: Draw, model_type: str) -> dict[str, Any]:
    """Keys of a config.json of one model_type."""
    return _DRAWN[model_type](draw)
