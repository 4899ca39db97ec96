"""Every file that is written has the mode that the umask asks for, so that others may read what they should."""

import ast
import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_adapters import save_adapter

from plmtune.data.prepare import prepare
from plmtune.data.text_files import files
from plmtune.io import checksummed_json, manifest, safetensors_writer
from plmtune.io.atomic import atomic_write
from plmtune.io.metrics import MetricsFile
from plmtune.io.run_directory import RunDirectory
from plmtune.models.adapters import load_model
from plmtune.models.directory import new_directory
from plmtune.models.hf import save_model
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import init_adapters
from plmtune.registry import component, load
from plmtune.tokenizers.tokenizer_files import byte
from plmtune.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]


def small() -> Decoder:
    torch.manual_seed(0)
    return llama(
        byte().vocab_size,
        attention=component("attention", "gqa", num_kv_heads=1),
        ffn=component("ffn", "swiglu", hidden_dim=32),
        embed_dim=32,
        num_layers=1,
        num_heads=2,
        max_seq_len=32,
    )


def model(place: Path) -> None:
    save_model(small(), None, place / "one")
    save_model(small(), None, place / "many", max_shard_bytes=10_000)


def adapters(place: Path) -> None:
    save_model(small(), None, place / "base")
    adapted = load_model(place / "base")
    load("peft", "lora")(model=adapted, rank=2)
    init_adapters(adapted, torch.Generator().manual_seed(0))
    save_adapter(adapted, place / "adapters", place / "base")


def whole_directory(place: Path) -> None:
    with new_directory(place / "new") as temporary:
        save_model(small(), None, temporary)
        byte().save(temporary)


def checkpoint(place: Path) -> None:
    held = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(held.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with contextlib.closing(Checkpoints(place / "checkpoints")) as checkpoints:
        checkpoints.save(1, model=held, optimizer=optimizer, scheduler=scheduler, wait=True)
    manifest.check_files_once(place / "checkpoints/step-00000001")


def run(place: Path) -> None:
    with RunDirectory.create(place / "run", "seed: 1\n", ["plmtune"]) as opened, MetricsFile(opened.metrics) as metrics:
        metrics.append(1, {"loss": 1.0})


def shards(place: Path) -> None:
    (place / "text").mkdir()
    for number in range(3):
        (place / f"text/{number}.txt").write_text("some words\n" * 40)
    prepare(files((str(place / "text"),)), byte(), place / "data", holdout=0.3)


def small_files(place: Path) -> None:
    with atomic_write(place / "a") as temporary:
        temporary.write_text("x")
    manifest.write_text(place / "c", "x")
    checksummed_json.save(place / "d", {})
    safetensors_writer.write(place / "e", {"x": torch.ones(2)})


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("write", [model, adapters, whole_directory, checkpoint, run, shards, small_files])
def test_files_and_directories_have_the_mode_of_the_umask(
    write: Callable[[Path], Any], umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with umask_of(umask):
        write(tmp_path)
    found = {path: stat.S_IMODE(path.lstat().st_mode) for path in tmp_path.rglob("*") if not path.is_symlink()}
    assert found
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_nothing_that_makes_private_files_is_used_where_they_are_kept() -> None:
    """safetensors' save_file and Python's mkstemp make files of mode 0600; temporary folders are for what is let go."""
    for path in sorted([*(ROOT / "plmtune").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert name not in ("save_file", "mkstemp", "NamedTemporaryFile", "mkdtemp"), path


@contextlib.contextmanager
def umask_of(umask: int) -> Iterator[None]:
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)
