"""The rungs of the ladder have equal parameters, their settings compose, and results of other settings are refused."""

from __future__ import annotations

import importlib
import json
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

import plmtune
from plmtune.config import compose
from plmtune.data.sources import stdlib
from plmtune.models.llama import llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("pangu_pi_pro", "side_by_side"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("pangu_pi_pro")


def parameters(vocabulary: int, cfg: compose.Config) -> int:
    sizes = dict(cfg.model.settings)
    attention = plmtune.component("attention", "gqa", num_kv_heads=sizes["num_heads"])
    ffn = plmtune.component("ffn", "swiglu", hidden_dim=sizes["ffn"].settings["hidden_dim"])
    names = ("embed_dim", "num_layers", "num_heads", "max_seq_len", "tie_embeddings")
    with torch.device("meta"):
        model = llama(vocabulary, attention=attention, ffn=ffn, **{name: sizes[name] for name in names})
    return sum(each.numel() for each in model.parameters())


def test_the_models_of_all_rungs_have_equal_parameters(ladder: ModuleType) -> None:
    counts = []
    for vocabulary, shapes in ((ladder.BIG, (ladder.BASE,)), (ladder.SMALL, ladder.SHAPES)):
        for shape in shapes:
            overrides = ["data.paths=[x.txt]", "tokenizer.path=x", *shape.overrides()]
            counts.append(parameters(vocabulary, compose.compose("pretrain", [str(ladder.OVERLAY)], overrides)))
    assert max(counts) / min(counts) < 1.004


def test_a_text_is_cut_at_its_titles_or_else_at_blank_lines(ladder: ModuleType) -> None:
    title, line = "=====\nTitle\n=====\n", "Words of a paragraph.\n\n"
    titled = ladder.split("".join(title + line * 100 for _ in range(24)))
    assert len(titled) == 24 and all(text.startswith(title) for text in titled)
    plain = ladder.split(line * 4000)
    assert "".join(plain) == line * 4000 and {len(text) // 1000 for text in plain[:-1]} == {15, 16}


def test_results_of_other_settings_are_refused(ladder: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Words.")
    (tmp_path / "settings.json").write_text(json.dumps({"budget": {}}))
    with pytest.raises(SystemExit, match="other settings"):
        ladder.Ladder(tmp_path, ladder.QUICK).prepare([text], [])


@pytest.mark.slow
def test_a_quick_run_prints_every_rung_and_resumes(ladder: ModuleType, tmp_path, monkeypatch, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(islice(stdlib().documents(), 400)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["pangu_pi_pro.py", "--text", str(text), "--out", str(tmp_path), "--quick"])
    ladder.main()
    said = capsys.readouterr().out
    rungs = [name for name in ladder.Ladder(tmp_path, ladder.QUICK).rungs() if name not in ladder.CONTROLS]
    assert len(rungs) == 6 and all(f"| {name} |" in said for name in rungs)
    monkeypatch.setattr(ladder.Ladder, "run", lambda *words: pytest.fail(f"ran {words}"))
    ladder.main()
    assert capsys.readouterr().out.splitlines()[-20:] == said.splitlines()[-20:]
