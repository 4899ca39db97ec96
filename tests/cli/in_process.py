"""The command line in this process, where a fresh one would spend seconds on importing torch; a small model, a run."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from plmtune.cli import main
from plmtune.io.run_directory import RunDirectory
from plmtune.models.hf import save_model
from plmtune.models.plm import plm
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte


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


CONFIG = "recipe: pretrain\nmodel: {component: plm}\noptimizer: {component: adamw, lr: %s}\n"


def begin_run(path: Path, steps: int = 0, num_steps: int = 1200, *, lr: float = 0.1, **record: Any) -> RunDirectory:
    """A run that has logged so many steps, and whose process is this one; its metrics end in a torn line."""
    found = RunDirectory.create(path, CONFIG % lr, ["plmtune", "run", "pretrain", "model=plm", f"run_dir={path}"])
    found.update(num_steps=num_steps, parameters=1_430_000, **record)
    lines = [{"step": step, "loss": 5 - step / num_steps * 1.2} for step in range(max(1, steps - 400), steps + 1)]
    lines += [{"step": steps, "validation_loss": 4.5, "bits_per_byte": 2.25}] if steps >= num_steps else []
    found.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9999, "lo')
    return found
