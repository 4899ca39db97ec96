"""PanGu-alpha (arXiv 2104.12369): GPT-2's form, with a query layer on top."""

from __future__ import annotations

from plmtune.models.assemble import assemble
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "pangu_alpha")
def pangu_alpha(
    vocab_size: int,
    *,
    attention: Component = component("attention", "gqa", num_kv_heads=32, rope=False, bias=True),  # noqa: B008
    ffn: Component = component("ffn", "gelu", hidden_dim=10240),  # noqa: B008
    norm: Component = component("norm", "layer_norm", eps=1e-5),  # noqa: B008
    embed_dim: int = 2560,
    num_layers: int = 32,
    num_heads: int = 32,
    max_seq_len: int = 1024,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
) -> Decoder:
    """PanGu-alpha 2.6B by default, with its vocabulary of 40,000.

    The last of num_layers is the query layer, as in the released code (init=gpt2 has its scaling of the output
    projections). document_mask=true resets positions and attention at each document, as the paper does.

    Arguments as for plm.
    """
    return assemble("pangu_alpha", locals(), learned_positions=True, query_layer=True)
