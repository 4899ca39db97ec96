import threading

import pytest
import torch

from plmtune.data.batches import IGNORE, Batches, Phase, make_batch
from plmtune.errors import UserError


@pytest.fixture
def sources(make_shards):
    return {
        "a": make_shards("a", [i % 97 + 1 for i in range(400)], range(100, 137)),
        "b": make_shards("b", [i % 89 + 200 for i in range(1000)], range(500, 520)),
    }


PHASES = [Phase("one", 20, {"a": 1, "b": 3}), Phase("two", 10, {"a": 1, "b": 1})]


def batches(sources, phases=PHASES, **changes):
    settings = {"seq_len": 8, "global_batch_size": 12, "micro_batch_size": 5, "seed": 3}
    return Batches(sources, phases, **(settings | changes))


def rows(micro_batches):
    return [row for batch in micro_batches for row in batch.tokens.tolist()]


class TestStep:
    def test_targets_are_the_next_tokens(self, sources):
        for batch in batches(sources).step(0):
            assert batch.tokens.dtype == batch.targets.dtype == torch.int64
            assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
            assert batch.mask is None
            assert batch.input_pos is None
            assert batch.num_valid == batch.targets.numel()

    def test_the_last_micro_batch_may_be_smaller(self, sources):
        assert [len(batch.tokens) for batch in batches(sources).step(0)] == [5, 5, 2]

    def test_does_not_depend_on_what_was_asked_before(self, sources):
        fresh = {step: rows(batches(sources).step(step)) for step in (0, 7, 19, 20, 29)}
        used = batches(sources)
        for step in (29, 0, 20, 7, 19, 0):
            assert rows(used.step(step)) == fresh[step]

    @pytest.mark.parametrize("micro", [1, 3, 12, 100])
    @pytest.mark.parametrize("world", [1, 2, 4])
    def test_ranks_and_micro_batches_slice_the_same_tokens(self, sources, world, micro):
        for step in (0, 25):
            parts = [
                rows(batches(sources, rank=rank, world_size=world, micro_batch_size=micro).step(step))
                for rank in range(world)
            ]
            assert len({len(part) for part in parts}) == 1
            assert [row for part in parts for row in part] == rows(batches(sources).step(step))

    def test_origin_names_the_windows_of_the_step(self, sources):
        for rank in (0, 1):
            data = batches(sources, rank=rank, world_size=2)
            expected = [sources[n].train.window(w, 8)[:-1].tolist() for n, w in data.origin(4)]
            assert rows(data.step(4)) == expected

    def test_phases_know_their_steps(self, sources):
        data = batches(sources)
        assert data.num_steps == 30
        assert [data.phase(step).name for step in (0, 19, 20, 29)] == ["one", "one", "two", "two"]

    def test_epochs_are_sequences_over_windows(self, sources):
        data = batches(sources, [Phase("main", 1024 // 4, {"a": 1, "b": 1})], global_batch_size=4)
        assert data.epochs() == {"a": 512 / 49, "b": 512 / 124}
        assert "a: 400 tokens, seen 10.45 times" in data.describe()
        assert "phase main: 256 steps, 8,192 tokens (a 50.0%, b 50.0%)" in data.describe()

    def test_moves_to_a_device_whole(self, sources):
        batch = batches(sources, document_mask=True).step(0)[0].to("meta")
        assert {t.device.type for t in (batch.tokens, batch.targets, batch.mask, batch.input_pos)} == {"meta"}
        assert batch.num_valid == 40


class TestDocumentMask:
    def test_documents_do_not_see_each_other(self):
        tokens = torch.tensor([[5, 6, 0, 7, 0, 0, 8, 9]])  # 0 ends a document: 5 6 0 | 7 0 | 0 | 8 9
        targets = torch.tensor([[6, 0, 7, 0, 0, 8, 9, 3]])
        batch = make_batch(tokens, targets, eos_id=0)
        document = [0, 0, 0, 1, 1, 2, 3, 3]
        for i in range(8):
            for j in range(8):
                assert bool(batch.mask[0, i, j]) == (j <= i and document[i] == document[j])
        assert batch.input_pos.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]

    def test_what_an_end_token_would_predict_is_not_counted(self):
        tokens, targets = torch.tensor([[5, 0, 7, 8]]), torch.tensor([[0, 7, 8, 9]])
        assert make_batch(tokens, targets, eos_id=0).targets.tolist() == [[0, IGNORE, 8, 9]]
        assert make_batch(tokens, targets, eos_id=0).num_valid == 3
        assert make_batch(tokens, targets, eos_id=None).targets.tolist() == [[0, 7, 8, 9]]

    def test_rows_without_an_end_are_one_document(self):
        tokens = torch.arange(1, 13).reshape(2, 6)
        batch = make_batch(tokens, tokens + 1, eos_id=0)
        assert torch.equal(batch.mask, torch.ones(2, 6, 6, dtype=torch.bool).tril())
        assert batch.input_pos.tolist() == [list(range(6))] * 2
        assert batch.num_valid == 12

    def test_rows_do_not_mix(self):
        tokens = torch.tensor([[1, 0, 2], [1, 2, 3]])
        assert make_batch(tokens, tokens, eos_id=0).input_pos.tolist() == [[0, 1, 0], [0, 1, 2]]


class TestIterate:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_gives_the_same_steps_from_any_start(self, sources, workers):
        plain = batches(sources)
        for start in (0, 17, 30):
            got = [(i, rows(b)) for i, b in batches(sources, num_workers=workers).iterate(start)]
            assert got == [(i, rows(plain.step(i))) for i in range(start, 30)]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_error_surfaces_at_its_step(self, sources, workers):
        data = batches(sources, num_workers=workers)
        good = data.step

        def step(i):
            if i == 5:
                raise OSError("the disk is gone")
            return good(i)

        data.step = step
        seen = []
        with pytest.raises(OSError, match="the disk is gone"):
            for i, _ in data.iterate(0):
                seen.append(i)
        assert seen == [0, 1, 2, 3, 4]

    def test_closing_ends_the_threads(self, sources):
        steps = batches(sources, num_workers=2).iterate(0)
        next(steps)
        assert any(t.name.startswith("batches") for t in threading.enumerate())
        steps.close()
        assert not any(t.name.startswith("batches") for t in threading.enumerate())


class TestValidation:
    def targets(self, found):
        return [t for batch in found for t in batch.targets.flatten().tolist() if t != IGNORE]

    def test_every_held_out_token_but_the_first_is_a_target_once(self, sources):
        assert self.targets(batches(sources).validation()) == [*range(101, 137), *range(501, 520)]

    @pytest.mark.parametrize("world", [2, 3, 4, 12])
    def test_ranks_share_the_tokens_and_get_equally_many_batches(self, sources, world):
        parts = [list(batches(sources, rank=r, world_size=world).validation()) for r in range(world)]
        assert len({tuple(len(b.tokens) for b in part) for part in parts}) == 1
        whole = self.targets(batches(sources).validation())
        assert [t for part in parts for t in self.targets(part)] == whole
        assert sum(b.num_valid for part in parts for b in part) == len(whole)

    def test_a_limit_spreads_the_sequences_over_all_sources(self, sources):
        some = self.targets(batches(sources).validation(32))
        assert len(some) <= 32
        assert any(t < 200 for t in some)
        assert any(t > 500 for t in some)

    def test_is_the_same_each_time(self, sources):
        data = batches(sources)
        assert [rows([b]) for b in data.validation(40)] == [rows([b]) for b in data.validation(40)]

    def test_nothing_held_out_gives_nothing(self, make_shards):
        assert list(batches({"a": make_shards("a", range(100))}, [Phase("main", 1)]).validation()) == []


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"world_size": 5}, r"global_batch_size \(12\) must be a multiple of world_size \(5\)"),
            ({"rank": 2, "world_size": 2}, r"rank \(2\) must be below world_size \(2\)"),
            ({"seq_len": 0}, r"seq_len \(0\)"),
            ({"micro_batch_size": 0}, r"micro_batch_size \(0\)"),
            ({"global_batch_size": 0}, r"global_batch_size \(0\)"),
            ({"num_workers": -1}, r"num_workers \(-1\)"),
        ],
    )
    def test_sizes_that_cannot_be_are_named_with_their_values(self, sources, changes, message):
        with pytest.raises(ValueError, match=message):
            batches(sources, **changes)

    def test_a_corpus_too_small_for_one_sequence_names_both_sizes(self, sources):
        with pytest.raises(UserError, match=r"Source a .* has 400 training tokens, too few for seq_len=400"):
            batches(sources, seq_len=400)

    def test_sources_of_different_tokenizers(self, sources, make_shards):
        other = make_shards("c", range(100), tokenizer="another")
        with pytest.raises(ValueError, match="the sources a, b, c come from different tokenizers"):
            batches({**sources, "c": other})

    def test_no_source(self):
        with pytest.raises(ValueError, match="at least one source"):
            batches({})
