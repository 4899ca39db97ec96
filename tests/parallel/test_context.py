"""Parts of sequences under context parallelism, and attention of a part against that of whole rows."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmtune.data.batches import IGNORE, Batch
from plmtune.modules.attention_kernels import attend
from plmtune.modules.segments import Segments
from plmtune.modules.shared_sequence import SharedSequence
from plmtune.parallel.context import ContextShard, in_order

TEXTS = Segments.of([[5, 11], [16]])


def shards(size: int) -> list[ContextShard]:
    return [ContextShard(rank, size, cast(Any, None)) for rank in range(size)]


def local(whole: torch.Tensor, shard: ContextShard, dim: int) -> torch.Tensor:
    """What a process has of a tensor."""
    return torch.cat([whole.narrow(dim, c.start, len(c)) for c in shard.chunks(whole.shape[dim])], dim)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 6), length=st.integers(1, 5), dim=st.integers(0, 1))
def test_the_parts_of_all_processes_are_the_sequence_in_order(size: int, length: int, dim: int) -> None:
    whole = torch.arange(2 * size * length).expand(2 * size * length, -1)
    whole = whole.T if dim == 0 else whole
    parts = torch.cat([local(whole, shard, dim) for shard in shards(size)], dim)
    assert torch.equal(in_order(parts, dim, size), whole)


@given(size=st.integers(1, 6), length=st.integers(1, 5))
def test_each_process_computes_equally_many_scores(size: int, length: int) -> None:
    seen = {sum(place + 1 for c in shard.chunks(2 * size * length) for place in c) for shard in shards(size)}
    assert len(seen) == 1


def test_a_length_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="4 processes share 8 chunks, which do not divide 12 tokens"):
        shards(4)[0].chunks(12)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("texts", [None, TEXTS], ids=["plain", "texts"])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (3, None), (None, 2.0), (3, 2.0)])
def test_a_part_attends_as_in_whole_rows(
    size: int, texts: Segments | None, window: int | None, soft_cap: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 16, 8, generator=generator) for heads in (4, 2, 2))
    whole = attend(q, k, v, texts, 0.3, window=window, soft_cap=soft_cap)
    for shard in shards(size):
        mask = SharedSequence(shard.chunks(16), shard.gather, texts)
        mine = mask.attend(local(q, shard, 2), k, v, 0.3, window=window, soft_cap=soft_cap)
        torch.testing.assert_close(mine, local(whole, shard, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("texts", [None, TEXTS], ids=["plain", "texts"])
def test_parts_of_a_batch_are_the_batch(texts: Segments | None) -> None:
    tokens = torch.arange(32).view(2, 16)
    targets = torch.where(tokens % 5 == 0, IGNORE, tokens + 1)
    positions = (targets.flatten() != IGNORE).nonzero()[:, 0]
    input_pos = None if texts is None else tokens % 11
    parts = [Batch(tokens, targets, texts, input_pos, len(positions), positions).part(shard) for shard in shards(2)]
    assert sum(part.num_valid for part in parts) == len(positions)
    places = torch.cat([part.input_pos for part in parts if part.input_pos is not None], 1)
    assert torch.equal(in_order(places, 1, 2), torch.arange(16).expand(2, -1) if input_pos is None else input_pos)
    assert torch.equal(in_order(torch.cat([part.tokens for part in parts], 1), 1, 2), tokens)
    assert torch.equal(in_order(torch.cat([part.targets for part in parts], 1), 1, 2), targets)
    for part in parts:
        hidden = part.tokens[..., None].float()
        assert torch.equal(part.counted(hidden)[1], part.targets[part.targets != IGNORE])
