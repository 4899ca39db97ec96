from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmtune.data.batches import Row
from plmtune.losses.distillation import TeacherTopK
from plmtune.training.teacher_cache import TeacherCache, decode, encode, most_likely, record_bytes, row_digest


def drawn(n: int, k: int, vocab_size: int, seed: int = 0) -> TeacherTopK:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocab_size, generator=generator)[:k] for _ in range(n)])
    log_probs = -10 * torch.rand(n, k + 1, generator=generator)
    return TeacherTopK(ids, log_probs[:, :k], log_probs[:, k])


def row(number: int, length: int = 6, counted: int = 6) -> Row:
    targets = np.full(length, -100)
    targets[:counted] = number
    return Row(np.arange(length) + number, targets)


class TestRecords:
    @given(st.integers(1, 70), st.sampled_from([70, 257, 65_536, 65_537, 151_936, 262_144]), st.integers(0, 99))
    @settings(deadline=None, max_examples=30)
    def test_ids_come_back_exactly_and_numbers_in_fp16(self, k: int, vocab_size: int, seed: int) -> None:
        top = drawn(3, k, vocab_size, seed)
        records = encode(top, vocab_size)
        assert records.shape == (3, record_bytes(k, vocab_size))
        again = decode(records, k, vocab_size)
        assert torch.equal(again.ids, top.ids)
        assert torch.equal(again.log_probs, top.log_probs.half().float())
        assert torch.equal(again.log_rest, top.log_rest.half().float())

    def test_64_tokens_take_less_than_300_bytes(self) -> None:
        assert record_bytes(64, 49_152) == 258
        assert record_bytes(64, 262_144) == 274

    def test_most_likely_equals_the_softmax(self) -> None:
        logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
        top = most_likely(logits, 4)
        p = torch.softmax(logits.double(), dim=1)
        assert torch.allclose(top.log_probs.exp().double(), p.gather(1, top.ids))
        assert torch.allclose(top.log_rest.exp().double(), 1 - p.topk(4).values.sum(1))
        assert most_likely(logits, 20).log_rest.tolist() == [-torch.inf] * 5


class TestRowDigest:
    def test_tokens_places_that_count_and_texts_make_another_row(self) -> None:
        rows = [row(1), row(2), row(1, counted=3), Row(row(1).tokens, row(1).targets, (2, 4))]
        assert len({row_digest(each) for each in rows}) == 4
        assert row_digest(row(1)) == row_digest(row(1))


class TestTeacherCache:
    def test_rows_are_read_in_the_order_asked_for(self, tmp_path: Path) -> None:
        cache = TeacherCache(tmp_path / "cache", 4, 300)
        tops = {number: drawn(6, 4, 300, number) for number in range(3)}
        for number in (0, 1):
            cache.add(row_digest(row(number)), tops[number])
        cache.flush()
        cache.add(row_digest(row(2)), tops[2])
        cache.flush()
        found = TeacherCache(tmp_path / "cache", 4, 300)
        assert found.refresh() == []
        read = found.read([row(2), row(9, counted=0), row(0)])
        assert torch.equal(read["top_ids"], torch.cat([tops[2].ids, tops[0].ids]))
        assert row_digest(row(9)) not in found

    def test_two_runs_side_by_side_may_write_the_same_rows(self, tmp_path: Path) -> None:
        both = [TeacherCache(tmp_path, 4, 300) for _ in range(2)]
        tops = {number: drawn(6, 4, 300, number) for number in range(3)}
        for cache, numbers in zip(both, ((0, 1), (1, 2)), strict=True):  # neither sees what the other has computed
            for number in numbers:
                cache.add(row_digest(row(number)), tops[number])
        for cache in both:
            cache.flush()
        assert both[0].refresh() == both[1].refresh() == []
        for cache in both:
            read = cache.read([row(number) for number in range(3)])
            assert torch.equal(read["top_ids"], torch.cat([tops[number].ids for number in range(3)]))

    def test_rows_that_count_nothing_read_nothing(self, tmp_path: Path) -> None:
        read = TeacherCache(tmp_path, 4, 300).read([row(0, counted=0)])
        assert read["top_ids"].shape == (0, 4) and read["top_log_rest"].shape == (0,)

    @pytest.mark.parametrize("suffix", ["bin", "json"])
    def test_a_damaged_part_is_reported_once_and_not_read(self, tmp_path: Path, suffix: str) -> None:
        cache = TeacherCache(tmp_path, 4, 300)
        cache.add(row_digest(row(0)), drawn(6, 4, 300))
        cache.flush()
        (path,) = tmp_path.glob(f"*.{suffix}")
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
        found = TeacherCache(tmp_path, 4, 300)
        (line,) = found.refresh()
        assert "cannot be used" in line and found.refresh() == []
        assert row_digest(row(0)) not in found

    def test_a_part_of_another_teacher_is_not_read(self, tmp_path: Path) -> None:
        cache = TeacherCache(tmp_path / "one", 4, 300)
        cache.add(row_digest(row(0)), drawn(6, 4, 300))
        cache.flush()
        (tmp_path / "one").rename(tmp_path / "two")
        found = TeacherCache(tmp_path / "two", 4, 300)
        assert "of another teacher or other settings (one)" in found.refresh()[0]
        assert row_digest(row(0)) not in found

    def test_what_is_not_flushed_is_not_there(self, tmp_path: Path) -> None:
        cache = TeacherCache(tmp_path, 4, 300)
        cache.add(row_digest(row(0)), drawn(6, 4, 300))
        assert cache.refresh() == [] and row_digest(row(0)) not in cache
