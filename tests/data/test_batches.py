import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import xxhash

from plmtune.data import batches as module
from plmtune.data.batches import IGNORE, Batches, Phase, make_batch
from plmtune.data.shards import Windows, open_windows
from plmtune.errors import UserError


@pytest.fixture
def sources(make_shards):
    return {
        "a": make_shards("a", [i % 97 + 1 for i in range(400)], range(100, 137)),
        "b": make_shards("b", [i % 89 + 200 for i in range(1000)], range(500, 520)),
    }


PHASES = [Phase("one", 20, {"a": 1, "b": 3}), Phase("two", 10, {"a": 1, "b": 1})]


def batches(sources, phases=PHASES, *, seq_len=8, document_mask=False, **changes):
    train, held_out = open_windows(sources, seq_len, document_mask=document_mask)
    settings = {"global_batch_size": 12, "micro_batch_size": 5, "seed": 3}
    return Batches(train, phases, validation=held_out, **(settings | changes))


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
        tensors = (batch.tokens, batch.targets, batch.mask.offsets, batch.input_pos)
        assert {t.device.type for t in tensors} == {"meta"}
        assert batch.num_valid == 40


class TestDocumentMask:
    @pytest.fixture
    def batch_of(self, make_shards):
        def make(*rows):
            """The rows as one batch; 0 ends a document. The last row's last target is 3."""
            shards = make_shards("made", [token for row in rows for token in row] + [3])
            windows = Windows(shards, shards.train, len(rows[0]), document_mask=True, whole=True)
            return make_batch([windows.row(index) for index in range(len(rows))])

        return make

    def test_documents_do_not_see_each_other(self, batch_of):
        batch = batch_of([5, 6, 0, 7, 0, 0, 8, 9])  # 5 6 0 | 7 0 | 0 | 8 9
        document = [0, 0, 0, 1, 1, 2, 3, 3]
        for i in range(8):
            for j in range(8):
                assert bool(batch.mask.dense[0, i, j]) == (j <= i and document[i] == document[j])
        assert batch.mask.lengths == (3, 2, 1, 2)
        assert batch.input_pos.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]

    def test_what_an_end_token_would_predict_is_not_counted(self, batch_of):
        batch = batch_of([5, 0, 7, 8])
        assert batch.targets.tolist() == [[0, IGNORE, 8, 3]]
        assert batch.num_valid == 3
        assert batch.positions.tolist() == [0, 2, 3]

    @pytest.mark.parametrize("seq_len", range(1, 9))
    def test_a_document_that_stops_without_an_end_predicts_none_of_the_next(self, make_shards, seq_len):
        tokens = [5, 6, 7, 8, 0, 9, 10, 11, 12]  # 5 6 | 7 8 0 | 9 10 11 | 12
        shards = make_shards("made", tokens, breaks=[2, 8])
        for mask in (False, True):
            windows = Windows(shards, shards.train, seq_len, document_mask=mask, whole=False)
            rows = [windows.row(index) for index in range(windows.num_rows)]
            targets = np.concatenate([row.targets for row in rows])[:8]
            assert targets.tolist() == [6, IGNORE, 8, 0, IGNORE if mask else 9, 10, 11, IGNORE]
            assert np.concatenate([row.tokens for row in rows])[:8].tolist() == tokens[:8]
            if mask:
                wanted = {0, 2, 5, *range(0, 9, seq_len)}
                starts = np.cumsum([0, *(length for row in rows for length in row.lengths)])[:-1]
                assert {start for start in starts.tolist() if start < 8} == {start for start in wanted if start < 8}

    def test_rows_without_an_end_are_one_document(self, batch_of):
        batch = batch_of(*torch.arange(1, 13).reshape(2, 6).tolist())
        assert torch.equal(batch.mask.dense, torch.ones(2, 6, 6, dtype=torch.bool).tril())
        assert batch.input_pos.tolist() == [list(range(6))] * 2
        assert batch.num_valid == 12
        assert batch.positions is None

    def test_rows_do_not_mix(self, batch_of):
        batch = batch_of([1, 0, 2], [1, 2, 3])
        assert batch.input_pos.tolist() == [[0, 1, 0], [0, 1, 2]]
        assert batch.mask.lengths == (2, 1, 3)

    def test_a_row_that_ends_with_a_document_has_no_empty_one_behind_it(self, batch_of):
        assert batch_of([1, 2, 0]).mask.lengths == (3,)


class TestPlaces:
    def written(self, place):
        """The tokens that stand where a place says."""
        tokens = []
        for part in place.split(", and "):
            path, _, span = part.rpartition(", tokens ")
            first, last = (int(number.replace(",", "")) for number in span.split(" to "))
            tokens += np.fromfile(path, "<u2")[first : last + 1].tolist()
        return tokens

    @pytest.mark.parametrize("rank", [0, 1])
    def test_the_tokens_of_each_sequence_stand_there(self, sources, rank):
        data = batches(sources, rank=rank, world_size=2)
        expected = [
            [*tokens, target]
            for batch in data.step(4)
            for tokens, target in zip(batch.tokens.tolist(), batch.targets[:, -1].tolist(), strict=True)
        ]
        assert [self.written(place) for place in data.locate(4)] == expected

    def test_only_the_micro_batches_asked_for_are_named(self, sources):
        data = batches(sources)
        every = data.locate(7)
        assert len(every) == 12
        assert data.locate(7, {0}) == every[:5]
        assert data.locate(7, [2]) == every[10:]
        assert data.locate(7, (0, 2)) == every[:5] + every[10:]
        assert data.locate(7, []) == []

    def test_a_place_is_a_file_and_the_tokens_in_it(self, make_shards):
        made = make_shards("a", range(1, 3000), vocab_size=3000)
        (place,) = batches({"a": made}, [Phase("main", 1)], seq_len=2998, global_batch_size=1).locate(0)
        assert place == f"{made.directory}/train-00000.bin, tokens 0 to 2,998"

    def test_a_sequence_that_spans_files_names_both(self, make_shards):
        made = make_shards("a", range(30), shard_tokens=18)
        (place,) = batches({"a": made}, [Phase("main", 1)], seq_len=29, global_batch_size=1).locate(0)
        first, second = (made.directory / f"train-0000{index}.bin" for index in (0, 1))
        assert place == f"{first}, tokens 0 to 17, and {second}, tokens 0 to 11"


class TestOrderDigest:
    def run(self, data, start=0, stop=30, digest=""):
        for step in range(start, stop):
            digest = data.order_digest(digest, step)
        return digest

    def test_is_the_same_for_every_rank_world_and_micro_batch(self, sources):
        whole = self.run(batches(sources))
        assert len(whole) == 32
        for rank, world in ((0, 2), (1, 2), (3, 4)):
            assert self.run(batches(sources, rank=rank, world_size=world, micro_batch_size=1)) == whole

    def test_resumes_from_any_step(self, sources):
        whole = self.run(batches(sources))
        for cut in (1, 19, 20, 29):
            assert self.run(batches(sources), cut, digest=self.run(batches(sources), stop=cut)) == whole

    @pytest.mark.parametrize(
        "change",
        [
            {"seed": 4},
            {"seq_len": 9},
            {"skip": {"a": 1}},
            {"phases": [Phase("one", 20, {"a": 3, "b": 1}), PHASES[1]]},
            {"phases": [Phase("one", 21, {"a": 1, "b": 3}), Phase("two", 9, {"a": 1, "b": 1})]},
        ],
    )
    def test_another_order_has_another(self, sources, change):
        assert self.run(batches(sources, **change)) != self.run(batches(sources))

    def test_a_step_left_out_or_taken_twice_shows(self, sources):
        data = batches(sources)
        whole = self.run(data)
        assert self.run(data, 11, digest=self.run(data, stop=10)) != whole
        assert self.run(data, 9, digest=self.run(data, stop=10)) != whole

    def test_is_what_it_says(self, sources):
        data = batches(sources)
        order, windows = data.order.step(3)
        text = b"before\0a\0b\0" + b"".join(int(n).to_bytes(8, "little") for n in (*order, *windows))
        assert data.order_digest("before", 3) == xxhash.xxh3_128_hexdigest(text)


class TestResume:
    """Where a run is cut does not show in the batches that follow, down to masks and positions."""

    # 1,024 sequences make a block and 49 windows an epoch of a; 12 sequences a step.
    PHASES = (Phase("one", 100, {"a": 1, "b": 3}), Phase("two", 30, {"a": 1, "b": 1}))

    @pytest.fixture
    def packed(self, make_shards):
        """Documents of 3 to 7 tokens, so that windows of 8 begin and end inside documents."""
        rows = {name: [] for name in ("a", "b")}
        for name, count in (("a", 400), ("b", 1000)):
            for index in range(count):
                rows[name] += [index % 500 + 1] * (index % 5 + 2) + [0]
        return {
            "a": make_shards("a", rows["a"][:400], shard_tokens=130),
            "b": make_shards("b", rows["b"][:1000], shard_tokens=333),
        }

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(
        ("start", "where"),
        [(41, "an epoch"), (85, "a block"), (86, "a block"), (99, "a phase"), (100, "a phase"), (111, "a phase")],
    )
    def test_resumes_with_the_next_batch(self, packed, start, where, workers):
        data = batches(packed, self.PHASES, document_mask=True, num_workers=workers)
        drawn = data.order.samples_seen(start)
        assert drawn["a"] % 49 and drawn["b"] % 124 and start * 12 % 1024  # nothing is at its beginning
        whole = dict(batches(packed, self.PHASES, document_mask=True).iterate(0))
        after = dict(data.iterate(start))
        assert list(after) == list(range(start, 130))
        for step, got in after.items():
            for one, other in zip(got, whole[step], strict=True):
                assert one.num_valid == other.num_valid
                assert one.mask.lengths == other.mask.lengths
                for name in ("tokens", "targets", "input_pos"):
                    assert torch.equal(getattr(one, name), getattr(other, name)), (step, name, where)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_two_ranks_then_one_then_two_see_what_two_see(self, packed, workers):
        def rows_of(world, start, stop):
            parts = [
                batches(packed, self.PHASES, rank=rank, world_size=world, num_workers=workers).iterate(start)
                for rank in range(world)
            ]
            for step in range(start, stop):
                found = [next(part) for part in parts]
                assert [index for index, _ in found] == [step] * world
                yield [row for _, made in found for row in rows(made)]

        whole = list(rows_of(2, 0, 130))
        assert [*rows_of(2, 0, 41), *rows_of(1, 41, 105), *rows_of(2, 105, 130)] == whole


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

    def test_a_sentence_for_a_person_comes_through_as_it_is(self, sources):
        data = batches(sources, num_workers=2)
        sentence = "Shard a is damaged. Delete it"

        def step(i):
            raise UserError(sentence)

        data.step = step
        with pytest.raises(UserError) as caught:
            next(data.iterate(0))
        assert str(caught.value) == sentence

    def test_closing_ends_the_threads(self, sources):
        data = batches(sources, num_workers=2)
        good = data.step
        data.step = lambda i: (time.sleep(0.1 * i), good(i))[1]
        steps = data.iterate(0)
        next(steps)
        assert any(t.name.startswith("batches") for t in threading.enumerate())
        steps.close()
        assert not any(t.name.startswith("batches") for t in threading.enumerate())

    def test_the_end_of_the_run_ends_the_threads(self, sources):
        assert len(list(batches(sources, num_workers=2).iterate(0))) == 30
        assert not any(t.name.startswith("batches") for t in threading.enumerate())

    def test_closing_does_not_wait_for_a_thread_that_hangs(self, sources, monkeypatch):
        monkeypatch.setattr(module, "_PATIENCE", 0.01)
        data = batches(sources, num_workers=2)
        good, hung, release, left = data.step, threading.Event(), threading.Event(), []

        def step(i):
            if i == 2:
                left.append(threading.current_thread())
                hung.set()
                release.wait()
            return good(i)

        data.step = step
        steps = data.iterate(0)
        next(steps)
        hung.wait()
        steps.close()
        assert left[0].is_alive()
        assert left[0].daemon  # so the interpreter does not wait for it either
        release.set()
        left[0].join()

    def test_an_interrupt_while_waiting_for_a_thread_ends_at_once(self, make_shards):
        directory = make_shards("a", range(500)).directory
        code = f"""
import os, signal, threading
from pathlib import Path
from plmtune.data.batches import Batches, Phase
from plmtune.data.shards import Shards, open_windows
train, held_out = open_windows({{"a": Shards.open(Path({str(directory)!r}))}}, 8)
data = Batches(train, [Phase("main", 9)],
               global_batch_size=4, micro_batch_size=4, seed=1, num_workers=1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background ignore it
def step(i):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()
data.step = step
next(data.iterate())
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == -2, done.stderr
        assert "KeyboardInterrupt" in done.stderr


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
    def test_a_corpus_too_small_for_one_sequence_names_both_sizes(self, sources):
        with pytest.raises(UserError, match=r"Source a .* has 400 training tokens, too few for seq_len=400"):
            batches(sources, seq_len=400)

    def test_no_source(self):
        with pytest.raises(ValueError, match="at least one source"):
            batches({})
