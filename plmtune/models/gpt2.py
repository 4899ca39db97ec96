"""GPT-2, and PanGu-alpha's form of it (arXiv 2104.12369): learned positions, layer norm, biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys
from plmtune.models.hf_names import Names
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "gpt2")
def gpt2(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=12, rope=False, bias=True),  # noqa: B008
    ffn: Component = component("ffn", "gelu", hidden_dim=3072),  # noqa: B008
    norm: Component = component("norm", "layer_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    max_seq_len: int = 1024,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
) -> Decoder:
    """GPT-2 (124M) by default, with its vocabulary of 50,257.

    Arguments as for plm.
    """
    return assemble("gpt2", locals(), learned_positions=True)


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu")
    keys.demand("scale_attn_weights", True)
    keys.demand("scale_attn_by_inverse_layer_idx", False)
    keys.demand("add_cross_attention", False)
    # Of other heads than the language model's, of its precision alone, and of training.
    keys.ignore(
        "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
        "summary_first_dropout", "n_ctx", "task_specific_params",
    )  # fmt: skip
    width, heads = keys.whole("n_embd", 768), keys.whole("n_head", 12)
    exact = keys.get("activation_function", "gelu_new") == "gelu"
    return {
        "attention": {"component": "gqa", "num_kv_heads": heads, "rope": False, "bias": True},
        "ffn": {
            "component": "gelu",
            "hidden_dim": keys.get("n_inner", 4 * width),
            "approximate": "none" if exact else "tanh",
        },
        "norm": {"component": "layer_norm", "eps": keys.get("layer_norm_epsilon", 1e-5)},
        "embed_dim": width,
        "num_layers": keys.whole("n_layer", 12),
        "num_heads": heads,
        "max_seq_len": keys.whole("n_positions", 1024),
        "tie_embeddings": keys.get("tie_word_embeddings", True),
        "init_std": keys.get("initializer_range", 0.02),
    }


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": config["vocab_size"],
        "n_embd": config["embed_dim"],
        "n_layer": config["num_layers"],
        "n_head": config["num_heads"],
        "n_positions": config["max_seq_len"],
        "n_inner": config["ffn"]["hidden_dim"],
        "activation_function": "gelu_new" if config["ffn"]["approximate"] == "tanh" else "gelu",
        "layer_norm_epsilon": config["norm"]["eps"],
        "tie_word_embeddings": config["tie_embeddings"],
        "initializer_range": config["init_std"],
        "use_cache": True,
    }


_NAMES = Names(
    {
        "tok_embeddings": "transformer.wte",
        "pos_embeddings": "transformer.wpe",
        "norm": "transformer.ln_f",
        "output": "lm_head",
        "attention_norm": "ln_1",
        "ffn_norm": "ln_2",
        "attention.o_proj": "attn.c_proj",
        "ffn.up_proj": "mlp.c_fc",
        "ffn.down_proj": "mlp.c_proj",
    },
    layers="transformer.h.",
    fused={"attn.c_attn": ("attention.q_proj", "attention.k_proj", "attention.v_proj")},
    transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    buffers=(".attn.bias", ".attn.masked_bias"),
)
FAMILY = Family("gpt2", {"gpt2": "GPT2LMHeadModel"}, _read, _write, _NAMES)
