"""Packing: rows that are full, and a loss that does not know of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plmtune.data.batches import IGNORE, Batches, Phase, make_batch
from plmtune.data.packing import Example, PackedRows, fit, pack
from plmtune.data.rows import Refused
from plmtune.losses.cross_entropy import cross_entropy
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component


def example(length: int, trained: int = 2, name: str = "a") -> Example:
    """`length` distinct ids, of which the last `trained` count."""
    ids = np.arange(1, length + 1, dtype=np.int32) + 100 * ord(name[0])
    return Example(ids, np.arange(length) >= length - trained, f"{name}.jsonl, line {length}")


def conversations(count: int, longest: int, vocab_size: int = 90, seed: int = 0) -> list[Example]:
    """Lengths that are mostly short, as in real data, and answers in several places."""
    draw = np.random.default_rng(seed)
    made = []
    for index in range(count):
        length = int(np.clip(draw.lognormal(np.log(longest / 4), 0.7), 4, longest))
        trained = draw.random(length) < 0.5
        trained[-1] = True
        made.append(Example(draw.integers(1, vocab_size, length, dtype=np.int32), trained, f"made, row {index}"))
    return made


class TestPack:
    def test_no_row_holds_more_than_it_takes(self) -> None:
        lengths = np.random.default_rng(1).integers(1, 101, 2000)
        assert np.bincount(pack(lengths, 100), weights=lengths).max() <= 100

    @pytest.mark.parametrize(
        ("lengths", "rows"),
        [([6, 7, 3, 4], 2), ([5, 2, 3, 9, 1], 2), ([8, 1, 1, 5, 5], 2), ([4, 3, 4, 3, 3, 3], 2), ([10, 10, 10], 3)],
    )
    def test_what_fills_a_row_exactly_is_found(self, lengths: list[int], rows: int) -> None:
        assert np.bincount(pack(np.array(lengths), 10), weights=lengths).tolist() == [10.0] * rows

    def test_one_that_would_need_its_like_is_not_taken_twice(self) -> None:
        # 4 leaves 6, and there is a single 3.
        assert np.bincount(pack(np.array([4, 3]), 10), weights=[4, 3]).tolist() == [7.0]

    def test_a_row_mixes_long_and_short(self) -> None:
        lengths = np.array([len(e.tokens) for e in conversations(3000, 512)])
        rows = pack(lengths, 2048)
        spread = np.median([lengths[rows == row].std() for row in range(rows.max())])
        assert spread > 0.8 * lengths.std()  # decreasing best fit: 0.15

    def test_lengths_like_those_of_conversations_fill_99_percent(self) -> None:
        lengths = np.array([len(e.tokens) for e in conversations(3000, 512)])
        rows = pack(lengths, 512)
        assert lengths.sum() / ((rows.max() + 1) * 512) > 0.99


class TestPackedRows:
    def test_every_example_is_in_one_row_whole(self) -> None:
        examples = conversations(200, 64)
        packed = PackedRows(examples, 64, seed=1)
        found = [e.place for index in range(packed.num_rows) for e in packed.examples(index)]
        assert sorted(found) == sorted(e.place for e in examples)
        for index in range(packed.num_rows):
            row, start = packed.row(index), 0
            for member in packed.examples(index):
                end = start + len(member.tokens)
                assert row.tokens[start:end].tolist() == member.tokens.tolist()
                start = end

    def test_targets_are_the_trained_tokens_of_the_same_example(self) -> None:
        first, second = example(4, trained=2, name="a"), example(5, trained=5, name="b")
        packed = PackedRows([first, second], 11, seed=1)
        row = packed.row(0)
        a, b = first.tokens.tolist(), second.tokens.tolist()
        assert row.tokens.tolist() == [*a, *b, 0, 0]
        # a's last token would predict b's first, which has none before it in its own conversation.
        assert row.targets.tolist() == [IGNORE, a[2], a[3], IGNORE, *b[1:], IGNORE, IGNORE, IGNORE]
        assert row.lengths == (4, 5, 2)
        assert packed.num_trained == 6
        batch = make_batch([row])
        assert batch.input_pos is not None
        assert batch.input_pos.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]]
        assert batch.positions is not None
        assert batch.positions.tolist() == [1, 2, 4, 5, 6, 7]
        assert batch.num_valid == 6

    def test_a_full_row_has_no_padding(self) -> None:
        assert PackedRows([example(4), example(6)], 10, seed=1).row(0).lengths == (4, 6)

    def test_one_seed_gives_the_same_rows_and_another_others(self) -> None:
        def places(seed: int) -> list[str]:
            packed = PackedRows(conversations(100, 32), 64, seed)
            return [packed.locate(index) for index in range(packed.num_rows)]

        assert places(1) == places(1)
        assert places(1) != places(2)

    def test_a_place_names_every_conversation_of_the_row(self) -> None:
        assert PackedRows([example(4), example(5)], 9, seed=1).locate(0) == "a.jsonl, line 4; a.jsonl, line 5"

    def test_is_described_by_what_it_holds(self) -> None:
        said = PackedRows([example(4), example(6)], 20, seed=1).describe()
        assert said == "2 conversations of 10 tokens (4 trained), rows 50.0% full"

    @pytest.mark.parametrize("length", [0, 11])
    def test_an_example_that_no_row_takes_is_refused_with_its_place(self, length: int) -> None:
        with pytest.raises(
            ValueError, match=rf"line {length} has {length} tokens, and a row takes 1 to seq_len \(10\)"
        ):
            PackedRows([example(4), example(length)], 10, seed=1)

    def test_nothing_makes_no_rows(self) -> None:
        packed = PackedRows([], 10, seed=1)
        assert packed.num_rows == packed.num_tokens == 0
        assert "0 conversations" in packed.describe()


def fitted(examples: list[Example], seq_len: int, truncation: Any) -> tuple[list[Example], Refused, Refused]:
    left_out, cut = Refused(), Refused()
    return fit(examples, seq_len, truncation, left_out, cut), left_out, cut


class TestFit:
    def test_what_is_too_long_is_dropped_and_counted_with_its_place(self) -> None:
        kept, left_out, cut = fitted([example(4), example(12), example(11), example(10)], 10, "drop")
        assert [len(e.tokens) for e in kept] == [4, 10]
        assert left_out.counts == {"is longer than seq_len (10 tokens)": 2}
        assert left_out.first == {"is longer than seq_len (10 tokens)": "a.jsonl, line 12"}
        assert len(cut) == 0

    def test_what_is_too_long_is_cut_where_an_answer_is_left(self) -> None:
        kept, left_out, cut = fitted([example(12, trained=5), example(13, trained=3)], 10, "right")
        assert [e.tokens.tolist() for e in kept] == [example(12).tokens[:10].tolist()]
        assert kept[0].trained.sum() == 3
        assert cut.first == {"is cut at 10 tokens (seq_len)": "a.jsonl, line 12"}
        assert left_out.first == {"has no answer within its first 10 tokens (seq_len)": "a.jsonl, line 13"}

    @pytest.mark.parametrize("truncation", ["drop", "right"])
    def test_one_with_nothing_to_train_on_is_left_out(self, truncation: Any) -> None:
        only_first = Example(np.arange(3, dtype=np.int32), np.array([True, False, False]), "there")
        kept, left_out, _ = fitted([example(4, trained=0), only_first, example(4)], 10, truncation)
        assert len(kept) == 1
        assert left_out.counts == {"has no answer to train on": 2}


PLM = component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)


def models() -> dict[str, Decoder]:
    sizes: dict[str, Any] = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 64, "init_std": 0.15}
    torch.manual_seed(0)
    return {
        "plm": plm(96, attention=PLM, ffn=component("ffn", "squared_relu", hidden_dim=128), **sizes),
        "llama": llama(
            96,
            attention=component("attention", "gqa", num_kv_heads=2),
            ffn=component("ffn", "swiglu", hidden_dim=96),
            **sizes,
        ),
    }


@pytest.fixture(params=["plm", "llama"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return models()[request.param]


class TestLoss:
    def packed(self, model: Decoder, examples: list[Example], seq_len: int, micro_batch_size: int) -> Tensor:
        loss, total = cross_entropy(chunk_rows=64), torch.zeros(())
        rows = PackedRows(examples, seq_len, seed=1)
        for first in range(0, rows.num_rows, micro_batch_size):
            last = min(first + micro_batch_size, rows.num_rows)
            batch = make_batch([rows.row(index) for index in range(first, last)])
            hidden = model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)
            hidden, targets = batch.counted(hidden)
            total = total + loss(hidden, model.head_weight, targets)
        return total

    def alone(self, model: Decoder, examples: list[Example]) -> Tensor:
        """The definition: each conversation by itself, its trained tokens' -log p added up."""
        total = torch.zeros(())
        for one in examples:
            ids = torch.from_numpy(one.tokens).long()
            log_p = model(ids[None])[0].log_softmax(-1)
            trained = torch.from_numpy(one.trained)[1:]
            total = total - log_p[:-1].gather(1, ids[1:, None])[:, 0][trained].sum()
        return total

    @pytest.mark.parametrize("seq_len", [64, 150], ids=["rows as long as the context", "longer ones"])
    def test_packed_equals_each_alone_with_its_gradients(self, model: Decoder, seq_len: int) -> None:
        examples = conversations(40, 64)
        parameters = list(model.parameters())
        packed, alone = self.packed(model, examples, seq_len, 3), self.alone(model, examples)
        torch.testing.assert_close(packed, alone, atol=0, rtol=1e-5)
        pairs = zip(torch.autograd.grad(packed, parameters), torch.autograd.grad(alone, parameters), strict=True)
        for ours, theirs in pairs:
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()

    @torch.no_grad()
    def test_another_conversation_in_the_row_changes_nothing(self, model: Decoder) -> None:
        a, b, c = conversations(3, 20, seed=4)
        losses = []
        for other in (b, c):
            rows = PackedRows([a, other], 48, seed=1)
            batch = make_batch([rows.row(0)])
            hidden = model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)[0]
            members = [e.place for e in rows.examples(0)]
            start = 0 if members[0] == a.place else len(other.tokens)
            losses.append(hidden[start : start + len(a.tokens)])
        torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)


class TestBatches:
    """Packed rows have the order, the resume and the slices of token windows."""

    PHASES = (Phase("general", 6, {"a": 1}), Phase("domain", 4, {"a": 1, "b": 3}))

    def batches(self, **changes: Any) -> Batches:
        train = {n: PackedRows(conversations(60, 32, seed=s), 64, seed=1) for s, n in enumerate("ab")}
        held_out = {"b": PackedRows(conversations(9, 32, seed=5), 64, seed=1)}
        settings: dict[str, Any] = {"global_batch_size": 4, "micro_batch_size": 2, "seed": 3}
        phases = changes.pop("phases", self.PHASES)
        return Batches(train, phases, validation=held_out, **(settings | changes))

    def test_any_step_comes_as_it_would_from_the_start(self) -> None:
        whole = dict(self.batches().iterate())
        for start, workers in ((1, 0), (5, 2), (9, 0)):
            for step, got in self.batches(num_workers=workers).iterate(start):
                for one, other in zip(got, whole[step], strict=True):
                    assert torch.equal(one.tokens, other.tokens)
                    assert torch.equal(one.targets, other.targets)

    def test_ranks_slice_one_step(self) -> None:
        whole = [row for batch in self.batches().step(7) for row in batch.tokens.tolist()]
        parts = [self.batches(rank=rank, world_size=2).step(7) for rank in (0, 1)]
        assert [row for part in parts for batch in part for row in batch.tokens.tolist()] == whole

    def test_every_held_out_target_is_there_once_whatever_the_number_of_ranks(self) -> None:
        wanted = sum(int(e.trained[1:].sum()) for e in conversations(9, 32, seed=5))
        for world in (1, 2, 4):
            parts = [list(self.batches(rank=r, world_size=world).validation()) for r in range(world)]
            assert len({len(part) for part in parts}) == 1
            assert sum(batch.num_valid for part in parts for batch in part) == wanted

    def test_rows_that_only_fill_a_rank_up_add_nothing_to_the_loss(self, model: Decoder) -> None:
        data = self.batches(rank=3, world_size=4)
        *_, batch = data.validation()
        assert batch.num_valid == 0
        hidden = model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)
        counted, targets = batch.counted(hidden)
        loss = cross_entropy()(counted, model.head_weight, targets)
        assert loss.item() == 0
        loss.backward()

    @pytest.mark.parametrize("world", [1, 2, 4])
    def test_epochs_train_on_every_target_so_often_whatever_the_number_of_ranks(self, world: int) -> None:
        targets = sum(int(e.trained[1:].sum()) for seed in (0, 1) for e in conversations(60, 32, seed=seed))
        num_rows = sum(self.batches().order.windows.tolist())
        phase = Phase.over(3, num_rows, 16)
        ranks = [self.batches(phases=(phase,), global_batch_size=16, rank=r, world_size=world) for r in range(world)]
        assert (3 * num_rows) % 16 % 4  # the last step divides among no ranks
        count = 0
        for step in range(phase.steps):
            parts = [data.step(step) for data in ranks]
            assert len({len(part) for part in parts}) == 1
            count += sum(batch.num_valid for part in parts for batch in part)
        assert count == 3 * targets
        assert ranks[0].epochs() == {"a": 3.0, "b": 3.0}

    def test_places_name_the_conversations_of_each_row(self) -> None:
        data = self.batches()
        places = data.locate(2)
        assert len(places) == 4
        assert all("made, row" in place for place in places)

    def test_the_description_counts_conversations_and_epochs(self) -> None:
        said = self.batches().describe()
        assert "a: 60 conversations of" in said
        assert "% full, seen" in said
