"""The overlay of the Shakespeare benchmark composes; the script itself takes minutes."""

from pathlib import Path

from plmtune.config import compose

ROOT = Path(__file__).parents[2]


def test_the_overlay_composes_with_the_tokenizer_it_trains() -> None:
    cfg = compose.compose("pretrain", [str(ROOT / "benchmarks/tinyshakespeare.yaml")], ["data.paths=[x.txt]"])
    assert (cfg.seq_len, cfg.global_batch_size, cfg.tokenizer.name) == (64, 12, "file")
    assert cfg.model.settings["embed_dim"] == 128
