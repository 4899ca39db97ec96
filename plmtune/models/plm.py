"""PLM (arXiv 2503.12167): latent attention and a squared-ReLU FFN for devices with little memory."""

from __future__ import annotations

from plmtune.models.assemble import assemble
from plmtune.modules.decoder import Decoder
from plmtune.registry import Component, component, register


@register("model", "plm")
def plm(
    vocab_size: int,
    *,
    attention: Component = component("attention", "mla"),  # noqa: B008
    ffn: Component = component("ffn", "squared_relu"),  # noqa: B008
    norm: Component = component("norm", "rms_norm"),  # noqa: B008
    embed_dim: int = 2048,
    num_layers: int = 32,
    num_heads: int = 16,
    max_seq_len: int = 4096,
    tie_embeddings: bool = True,
    init_std: float = 0.02,
) -> Decoder:
    """PLM-1.8B by default: 1,825,458,176 parameters with its vocabulary of 151,936.

    Args:
        vocab_size: rows of the embedding.
        attention, ffn, norm: the components of each layer.
        embed_dim: width of the residual stream.
        num_layers: layers.
        num_heads: query heads.
        max_seq_len: longest sequence.
        tie_embeddings: the embedding is also the vocabulary projection.
        init_std: standard deviation of the initial matrices. Ours; the paper's is not public.
    """
    return assemble(
        "plm",
        vocab_size=vocab_size,
        attention=attention,
        ffn=ffn,
        norm=norm,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        max_seq_len=max_seq_len,
        tie_embeddings=tie_embeddings,
        init_std=init_std,
    )
