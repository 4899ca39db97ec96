"""DeepSeek-V2 and -V3, dense (arXiv 2405.04434, 2412.19437), and Youtu-LLM (arXiv 2512.24618): MLA with SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmtune.models.assemble import assemble
from plmtune.models.family import Family, Keys, read_rope, sizes
from plmtune.models.plm import latent_keys
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "deepseek")
def deepseek(
    vocab_size: int,
    *,
    attention: Component = component("attention", "mla", q_lora_rank=1536, rope_theta=1.6e6, latent_eps=1e-6),  # noqa: B008
    ffn: Component = component("ffn", "swiglu", hidden_dim=6144),  # noqa: B008
    norm: Component = component("norm", "rms_norm", eps=1e-6),  # noqa: B008
    embed_dim: int = 2048,
    num_layers: int = 32,
    num_heads: int = 16,
    max_seq_len: int = 131072,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
) -> Decoder:
    """Youtu-LLM-2B by default, with its vocabulary of 128,256.

    Arguments as for plm.
    """
    return assemble("deepseek", locals())


def _read(keys: Keys) -> dict[str, Any]:
    keys.demand("hidden_act", "silu", "swish")
    keys.demand("attention_bias", False)
    keys.demand("mlp_bias", False)
    layers = keys.whole("num_hidden_layers", 61 if keys.model_type == "deepseek_v3" else 32)
    if keys.model_type != "youtu":
        dense = keys.get("first_k_dense_replace", 3 if keys.model_type == "deepseek_v3" else 0)
        if dense < layers and keys.get("n_routed_experts", 64):
            raise keys.error(
                "first_k_dense_replace", f"is {dense} of {layers} layers: the others have experts, which plmtune lacks"
            )
        # Of layers with experts, and of prediction heads that generation leaves out.
        keys.ignore(
            "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group",
            "topk_group", "topk_method", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "moe_layer_freq",
            "output_router_logits", "num_nextn_predict_layers", "aux_loss_alpha", "seq_aux", "ep_size",
        )  # fmt: skip
    if keys.get("num_key_value_heads", keys.whole("num_attention_heads")) != keys.whole("num_attention_heads"):
        raise keys.error(
            "num_key_value_heads", "differs from num_attention_heads, and each head of MLA has its own keys"
        )
    keys.ignore("embedding_initializer_range")
    nope, turned = keys.whole("qk_nope_head_dim", 128), keys.whole("qk_rope_head_dim", 64)
    keys.demand("head_dim", turned)
    keys.demand("qk_head_dim", nope + turned)
    positions = {"youtu": 131072, "deepseek_v3": 4096}.get(keys.model_type, 2048)
    rope = read_rope(keys, 1e4, positions=positions)
    longest = rope.pop("max_seq_len")
    return {
        "attention": {
            "component": "mla",
            "q_lora_rank": keys.optional("q_lora_rank", 1536),
            "kv_lora_rank": keys.get("kv_lora_rank", 512),
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": turned,
            "v_head_dim": keys.get("v_head_dim", 128),
            "rope_interleaved": keys.model_type == "deepseek_v2" or bool(keys.optional("rope_interleave", True)),
            # transformers' classes leave the latents' norms at their default.
            "latent_eps": 1e-6,
        }
        | rope,
        "ffn": {"component": "swiglu", "hidden_dim": keys.whole("intermediate_size")},
        "norm": {"component": "rms_norm", "eps": keys.get("rms_norm_eps", 1e-6)},
        "num_heads": keys.whole("num_attention_heads"),
    } | sizes(keys, longest, tie=keys.model_type == "youtu")


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return latent_keys(config) | {"hidden_act": "silu", "rope_interleave": config["attention"]["rope_interleaved"]}


FAMILY = Family(
    "deepseek",
    {"youtu": "YoutuForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"},
    _read,
    _write,
)
