"""What the tests of fine-tuning share: a base model, a few conversations and pairs, and short runs on them."""

import contextlib
import copy
import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from plmtune.config import compose as config
from plmtune.errors import UserError
from plmtune.models.hf import save_model
from plmtune.registry import import_module
from plmtune.tokenizers.tokenizer_files import bundled

QUICK = [
    "init_from=base",
    "runtime.precision=fp32",
    "logger=jsonl",
    "seq_len=96",
    "global_batch_size=4",
    "micro_batch_size=2",
    "log_every=1",
    "validation.every=3",
    "checkpoint={every: 2, keep: 0}",
]
SFT = [
    *QUICK,
    "data=conversations",
    "data.paths=[talk.jsonl]",
    "chat.holdout=0.2",
    "phases=[{name: main, steps: 6}]",
    "sample.max_new_tokens=0",
    "validation.tokens=1000",
]
PREFERENCE = [*QUICK, "data=preferences", "data.paths=[pairs.jsonl]", "chat.holdout=0.2", "optimizer.lr=1e-3"]


import_module("rewards_of_tests")


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random model of ChatML, and small files of conversations and pairs."""
    place = tmp_path_factory.mktemp("origin")
    tokenizer = bundled()
    tiny = config.compose("pretrain", (), ["model=plm_tiny"]).model
    model = tiny(vocab_size=tokenizer.vocab_size)
    model.init_weights(torch.Generator().manual_seed(3))
    save_model(model, None, place / "base")
    tokenizer.save(place / "base")
    words = ["path", "file", "list", "name", "text", "line", "word", "type", "date", "time"]
    talks, pairs = [], []
    for i in range(40):
        word, other = words[i % 10], words[(i * 7 + 3) % 10]
        question = f"What is {word} number {i}?"
        good = f"The {word} is a {other}, and it has the number {i}."
        talks.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": good}]})
        pairs.append({"prompt": question, "chosen": good, "rejected": f"I do not know any {other}."})
    (place / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return place


@pytest.fixture
def base(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the origin as the working directory."""
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def undisturbed(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a run that nothing disturbed, made once for all tests that compare with it."""

    @cache
    def whole(name: str, *overrides: str) -> Path:
        place = tmp_path_factory.mktemp("undisturbed")
        shutil.copytree(origin, place, dirs_exist_ok=True)
        with contextlib.chdir(place):
            run(name, "run_dir=whole", *overrides)
        return place / "whole"

    return whole


_composed = cache(config.compose)


def compose(name: str, *overrides: str) -> Any:
    """`config.compose`, which takes as long as ten steps, once for all runs that differ in `run_dir` or `resume`."""
    own = dict(text.split("=") for text in overrides if text.startswith("run_dir=") or text == "resume=true")
    rest = tuple(text for text in overrides if text.partition("=")[0] not in own)
    cfg = copy.deepcopy(_composed(name, (), rest))
    cfg.run_dir, cfg.resume = own.get("run_dir", cfg.run_dir), "resume" in own or cfg.resume
    return cfg


def run(name: str, *overrides: str, **options: Any) -> float:
    """Run a recipe in this process."""
    small = SFT if name == "sft" else PREFERENCE
    named = {text.partition("=")[0] for text in overrides}
    kept = [text for text in small if text.partition("=")[0] not in named]
    if any(text.startswith("data=") for text in overrides):
        kept = [text for text in kept if not text.startswith("data.")]
    cfg = compose(name, *kept, *overrides)
    return importlib.import_module(f"plmtune.recipes.{cfg.recipe}").main(cfg, **options)


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        run(name, *overrides)
    return str(caught.value)


def stop_in(patch: pytest.MonkeyPatch, owner: Any, method: str, call: int) -> None:
    """Send this process a signal at the `call`-th call of a method, counted from 1."""
    whole, calls = getattr(owner, method), [0]

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments, **keywords)

    patch.setattr(owner, method, wrapped)
