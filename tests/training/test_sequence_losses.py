"""The loss of each sequence, against the same computed a document at a time, and what is kept of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_families import make
from small import small_gpt2, small_llama, small_minicpm, small_plm, small_valued
from torch import Tensor
from torch.nn import functional as F

from plmtune.data.batches import IGNORE, Row, make_batch
from plmtune.models.hf import load_model
from plmtune.training.runtime import Runtime
from plmtune.training.sequence_losses import LossCache, sequence_losses

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
# Documents of each row, and how many of a row's last targets count nothing besides those at the documents' ends.
DOCUMENTS = [((5, 9, 10), 0), ((24,), 7), ((1, 23), 24), ((12, 12), 0)]


def rows(*, masked: bool) -> list[Row]:
    generator = np.random.default_rng(0)
    made = []
    for lengths, padding in DOCUMENTS:
        ids = generator.integers(3, 101, 25)
        targets = ids[1:].copy()
        if masked:
            targets[np.cumsum(lengths) - 1] = IGNORE
        targets[24 - padding :] = IGNORE
        made.append(Row(ids[:-1], targets, lengths if masked else None))
    return made


def naive(logits: Callable[[Tensor], Tensor], row: Row) -> float:
    """The mean of -log p over what counts, each document by itself."""
    nats, first = [], 0
    for length in row.lengths or (24,):
        part = slice(first, first + length)
        found = logits(torch.from_numpy(row.tokens[part])[None])[0].float()
        nats.append(F.cross_entropy(found, torch.from_numpy(row.targets[part]), reduction="none"))
        first += length
    counted = torch.from_numpy(row.targets) != IGNORE
    return float(torch.cat(nats)[counted].sum() / max(1, int(counted.sum())))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("build", [small_plm, small_llama, small_valued, small_gpt2, small_minicpm])
@torch.no_grad()
def test_losses_are_the_cross_entropy_of_each_row(build: Any, masked: bool) -> None:
    model, made = build(), rows(masked=masked)
    found = sequence_losses(model, make_batch(made), RUNTIME)
    assert found.tolist() == pytest.approx([naive(model, row) for row in made], rel=1e-5, abs=1e-6)
    assert found[2] == 0  # nothing counts in it


@torch.no_grad()
def test_capped_logits_and_windows_are_those_of_the_reference(tmp_path: Path) -> None:
    reference, made = make("gemma2", tmp_path), rows(masked=True)
    found = sequence_losses(load_model(tmp_path), make_batch(made), RUNTIME)
    expected = [naive(lambda ids: reference(ids).logits, row) for row in made]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


class TestLossCache:
    def test_parts_are_read_together(self, tmp_path: Path) -> None:
        cache = LossCache(tmp_path / "losses")
        cache.add(np.array([3, 1]), np.array([0.5, 1.5], np.float32))
        cache.flush()
        cache.add(np.array([0]), np.array([2.5], np.float32))
        cache.flush()
        cache.flush()  # nothing more
        losses, damaged = LossCache(tmp_path / "losses").read(5)
        assert damaged == [] and len(list(tmp_path.glob("losses/*.json"))) == 2
        assert losses.tolist()[:2] == [2.5, 1.5] and losses[3] == 0.5 and np.isnan(losses[[2, 4]]).all()

    @pytest.mark.parametrize("suffix", ["safetensors", "json"])
    def test_a_damaged_part_is_named_and_not_read(self, tmp_path: Path, suffix: str) -> None:
        cache = LossCache(tmp_path)
        cache.add(np.array([0]), np.array([2.5], np.float32))
        cache.flush()
        (path,) = tmp_path.glob(f"*.{suffix}")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        losses, (line,) = cache.read(1)
        assert np.isnan(losses[0]) and path.stem in line and "measured again" in line

    def test_a_part_without_its_note_is_not_there(self, tmp_path: Path) -> None:
        cache = LossCache(tmp_path)
        cache.add(np.array([0]), np.array([2.5], np.float32))
        cache.flush()
        next(tmp_path.glob("*.json")).unlink()
        assert np.isnan(cache.read(1)[0][0]) and cache.read(1)[1] == []
