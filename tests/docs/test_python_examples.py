"""The Python in README.md and docs/ runs, over a small model and a folder of text."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import documented
import pytest
import torch
from documented import Code

from plmtune.config.compose import build, compose
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.models.hf import save_model
from plmtune.tokenizers.tokenizer_files import bundled

# The recipe of config.md runs in tests/cli/test_own_recipe.py; CONTRIBUTING.md's loss is tested below.
EXAMPLES = [block for block in documented.code("python") if block.page.name not in ("config.md", "CONTRIBUTING.md")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run's model and some text."""
    where = tmp_path_factory.mktemp("examples")
    documented.make_place(where)
    tokenizer, cfg = bundled(), compose("demo", [], ["model=plm_tiny"])
    model = build("model", cfg.model, vocab_size=tokenizer.vocab_size)
    model.init_weights(torch.Generator().manual_seed(0))
    run = where / "runs" / "demo" / "latest"
    run.mkdir(parents=True)
    save_model(model, None, run)
    tokenizer.save(run)
    return where


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda block: block.page.name)
def test_runs(place: Path, example: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    exec(compile(example.text, example.page.name, "exec"), {"__name__": "example"})


def test_the_loss_that_contributing_adds_is_cross_entropy_at_gamma_0() -> None:
    text = textwrap.dedent(next(b.text for b in documented.code("python") if 'loss", "focal' in b.text))
    defined: dict[str, Any] = {}
    exec(text.replace('@register("loss", "focal")\n', ""), defined)
    hidden, weight, targets = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([1, 6, -100, 0, 3])
    loss = defined["focal"](gamma=0.0)(hidden, weight, targets)
    torch.testing.assert_close(loss, cross_entropy()(hidden, weight, targets))


def test_every_page_with_python_is_among_them() -> None:
    assert {block.page.name for block in EXAMPLES} >= {"README.md", "checkpoints.md", "data.md", "tokenizers.md"}
