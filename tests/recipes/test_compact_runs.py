"""Runs whose model has a compressed tokenizer."""

from pathlib import Path

import pytest
from cli_runs import start, stop_at
from test_resuming import plmtune

from plmtune.tokenizers.tokenizer_files import load_tokenizer
from plmtune.tokenizers.train_bpe import train_bpe


def test_every_checkpoint_says_which_tokens_were_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_bpe([path.read_text() for path in sorted(place.glob("corpus/*"))], 300).save(place / "bpe")
    start("run_dir=big", "tokenizer=file", "tokenizer.path=bpe", "phases=[{name: main, steps: 1}]")
    plmtune("tokenizer", "compress", "big", "corpus/0*.txt", "--vocab-size", "280", "--out", "small")
    kept = load_tokenizer(place / "small").kept
    assert kept[0].original == load_tokenizer(place / "bpe").fingerprint
    stop_at(monkeypatch, 5, "run_dir=run", "init_from=small", "model=null", "tokenizer=null")
    plmtune("resume", "run")
    steps = sorted((place / "run/checkpoints").glob("step-*"))
    assert len(steps) > 1 and all(load_tokenizer(step).kept == kept for step in steps)
    sizes = ("data=files", "data.paths=[corpus]", "calibration_tokens=0", "test_tokens=2000")
    plmtune("run", "quantize", "checkpoint=run", "quantization=int8", "run_dir=int8", *sizes)
    assert load_tokenizer(place / "int8").kept == kept
