"""Models whose scales follow from their sizes."""

from plmtune.models.gemma import gemma2
from plmtune.modules.decoder import Decoder
from plmtune.registry import component


def gemma_like() -> Decoder:
    """Scaled embedding, norms before and after, capped logits, local and global layers."""
    gqa = component("attention", "gqa", num_kv_heads=2, head_dim=10, window=5, soft_cap=20.0)
    ffn = component("ffn", "geglu", hidden_dim=48)
    sizes = {"embed_dim": 32, "num_layers": 4, "num_heads": 4, "max_seq_len": 64, "init_std": 0.2}
    return gemma2(101, attention=gqa, ffn=ffn, **sizes).eval()  # type: ignore[arg-type]
