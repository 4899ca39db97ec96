"""Prepared directories made of given tokens, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from plmtune.data.shard_manifest import FORMAT, Manifest, dtype_for
from plmtune.data.shards import Shards, ShardWriter

MakeShards = Callable[..., Shards]


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Write tokens as a prepared directory and open it."""

    def make(
        name: str,
        train: Sequence[int],
        validation: Sequence[int] = (),
        *,
        vocab_size: int = 1000,
        eos_id: int = 0,
        shard_tokens: int = 1 << 20,
        tokenizer: str = "a tokenizer",
        breaks: Sequence[int] = (),
    ) -> Shards:
        directory = tmp_path / name
        directory.mkdir()
        writers = {
            split: ShardWriter(directory, split, dtype_for(vocab_size), shard_tokens)
            for split in ("train", "validation")
        }
        for split, tokens in (("train", train), ("validation", validation)):
            ids = np.array(tokens, dtype=np.int64)
            writers[split].append(ids)
            writers[split].counts.documents = int((ids == eos_id).sum())
            writers[split].close()
        writers["train"].counts.breaks = [*breaks]
        writers["train"].counts.documents += len(breaks)
        Manifest(
            format=FORMAT,
            name=name,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            eos_id=eos_id,
            dtype=dtype_for(vocab_size).str,
            source="a source",
            source_description="tokens of a test",
            settings={},
            skipped=0,
            splits={split: writer.counts for split, writer in writers.items()},
        ).save(directory)
        return Shards.open(directory, verify=False)

    return make
