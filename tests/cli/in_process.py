"""The command line in this process, where a fresh one would spend seconds on importing torch; and a small model."""

import io
import sys
from pathlib import Path

import pytest
import torch

from plmtune.cli import main
from plmtune.data.tokenizers import byte
from plmtune.models.hf import save_model
from plmtune.models.plm import plm
from plmtune.registry import component


class Terminal(io.TextIOWrapper):
    """Bytes that come from a person."""

    def isatty(self) -> bool:
        return True


def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *words: object,
    stdin: bytes = b"",
    person: bool = False,
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `plmtune WORDS`."""
    monkeypatch.setattr(sys, "argv", ["plmtune", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", (Terminal if person else io.TextIOWrapper)(io.BytesIO(stdin), "utf-8"))
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0), *capsys.readouterr()


def save_small(directory: Path, *, max_seq_len: int = 64, init_std: float = 0.3) -> Path:
    """A model directory of bytes, the same each time."""
    torch.manual_seed(0)
    model = plm(
        byte().vocab_size,
        attention=component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        ffn=component("ffn", "squared_relu", hidden_dim=32),
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        max_seq_len=max_seq_len,
        init_std=init_std,
    )
    save_model(model, None, directory)
    byte().save(directory)
    return directory
