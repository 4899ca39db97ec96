from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_comparisons import batches, comparisons

from plmtune.errors import UserError
from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, MISMATCHED
from plmtune.preference.comparisons import Comparison


def indices(micro_batches):
    return [index for batch in micro_batches for index in batch.index.tolist()]


class TestOrder:
    def test_each_epoch_sees_each_pair_once_in_an_order_of_its_own(self):
        data = batches(global_batch_size=23, epochs=3)
        orders = [[data.comparisons[i].pair for i in indices(data.step(step))] for step in range(3)]
        assert data.num_steps == 3
        assert all(sorted(order) == sorted([*range(23)] * 3) for order in orders)
        drawn = [data._pairs(step).tolist() for step in range(3)]
        assert all(sorted(order) == list(range(23)) for order in drawn)
        assert all(one != other for one, other in pairwise(drawn))

    def test_all_comparisons_of_a_pair_are_in_one_step(self):
        data = batches()
        for step in range(data.num_steps):
            found = sorted(indices(data.step(step)))
            assert found == sorted(i for p in data._pairs(step) for i in range(3 * p, 3 * p + 3))
        assert [sum(batch.num_pairs for batch in data.step(step)) for step in range(5)] == [5, 5, 5, 5, 3]

    @pytest.mark.parametrize("epochs", [1, 2, 3])
    def test_each_pair_is_seen_so_often_and_the_last_step_takes_what_is_left(self, epochs):
        data = batches(epochs=epochs)
        drawn = [pair for step in range(data.num_steps) for pair in data._pairs(step).tolist()]
        assert sorted(drawn) == sorted([*range(23)] * epochs)

    def test_a_step_is_the_same_whatever_was_asked_before(self):
        data = batches(epochs=2)
        fresh = {step: batches(epochs=2).step(step) for step in range(data.num_steps)}
        for step in (3, 0, 7, 3):
            for one, other in zip(data.step(step), fresh[step], strict=True):
                assert torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask)
        gone_on = [(step, indices(made)) for step, made in data.iterate(4)]
        assert gone_on == [(step, indices(fresh[step])) for step in range(4, data.num_steps)]

    @pytest.mark.parametrize("micro", [1, 2, 50])
    @pytest.mark.parametrize("world", [1, 2, 3, 8])
    def test_ranks_and_micro_batches_divide_the_same_pairs(self, world, micro):
        whole = batches()
        for step in range(whole.num_steps):
            parts = [batches(rank=rank, world_size=world, micro_batch_size=micro).step(step) for rank in range(world)]
            assert sorted(indices(batch for part in parts for batch in part)) == sorted(indices(whole.step(step)))
            assert len({len(part) for part in parts}) == 1, "ranks meet in each forward"
            loads = [sum(batch.num_tokens for batch in part) for part in parts]
            assert max(loads) - min(loads) <= max(c.num_tokens for c in whole.comparisons)
            for part in parts:
                assert all(batch.tokens.shape[0] <= micro and batch.tokens.shape[1] <= 64 for batch in part)
            digests = {batches(rank=r, world_size=world).order_digest("x", step) for r in range(world)}
            assert digests == {whole.order_digest("x", step)}

    def test_a_rank_without_work_has_an_empty_batch(self):
        data = comparisons(1, (DIRECT,))
        parts = [batches(data, rank=rank, world_size=2, global_batch_size=1).step(0) for rank in range(2)]
        assert [[batch.num_pairs for batch in part] for part in parts] == [[1], [0]]

    def test_ranks_get_equally_many_tokens_not_comparisons(self):
        sizes = [50, *[10] * 5]
        data = [
            Comparison(DIRECT, np.full(size - 2, 1, np.int32), np.array([i], np.int32), np.array([9], np.int32), i, "")
            for i, size in enumerate(sizes)
        ]
        parts = [batches(data, global_batch_size=6, rank=rank, world_size=2).step(0) for rank in range(2)]
        assert [sum(batch.num_tokens for batch in part) for part in parts] == [50, 50]

    def test_the_seed_decides_the_order_and_the_digest_tells(self):
        assert batches(seed=4)._pairs(0).tolist() != batches(seed=3)._pairs(0).tolist()
        digests = {batches(seed=seed).order_digest(before, 1) for seed in (3, 4) for before in ("", "a")}
        assert len(digests) == 4

    def test_mismatched_comparisons_come_first_and_by_themselves(self):
        made = batches(comparisons(kinds=(DIRECT, MISMATCHED))).step(0)
        kl_only = [batch.kl_only for batch in made]
        assert kl_only == sorted(kl_only, reverse=True)
        assert kl_only[0] and not kl_only[-1]
        assert all((kind == MISMATCHED) == batch.kl_only for batch in made for kind in batch.kind.tolist())

    def test_ranks_agree_on_what_is_kl_only(self):
        data = [c for c in comparisons(kinds=(DIRECT, MISMATCHED)) if c.kind == DIRECT or c.pair == 0]
        parts = [batches(data, global_batch_size=23, rank=rank, world_size=2).step(0) for rank in range(2)]
        assert len({tuple(batch.kl_only for batch in part) for part in parts}) == 1
        assert sorted(batch.kind.tolist() for part in parts for batch in part if batch.kl_only) == [[], [MISMATCHED]]

    def test_pairs_that_no_step_takes_need_no_reference(self):
        data = batches(epochs=0.5, holdout=0.2)
        asked = {index for batch in data.all() for index in batch.index.tolist()}
        taken = {index for step in range(data.num_steps) for batch in data.step(step) for index in batch.index.tolist()}
        held_out = {index for batch in data.validation() for index in batch.index.tolist()}
        assert asked == taken | held_out
        assert len(asked) < len(data.comparisons)

    @pytest.mark.parametrize(("epochs", "steps"), [(1.0, 5), (0.5, 3), (2, 10), (0.01, 1)])
    def test_epochs_decide_the_number_of_steps(self, epochs, steps):
        assert batches(epochs=epochs).num_steps == steps

    def test_a_batch_may_hold_more_pairs_than_there_are(self):
        data = batches(comparisons(3, (DIRECT,)), global_batch_size=8, epochs=3)
        assert sorted([*indices(data.step(0)), *indices(data.step(1))]) == sorted([0, 1, 2] * 3)
        assert sorted(indices(batches(comparisons(3, (DIRECT,)), global_batch_size=8).step(0))) == [0, 1, 2]

    def test_places_name_the_rows_of_the_micro_batches_asked_for(self):
        data = batches(comparisons(kinds=(DIRECT, GIVEN_CHOSEN, MISMATCHED)), micro_batch_size=1)
        made = [batch for batch in data.step(1) if not batch.kl_only]
        for number, batch in enumerate(made):
            assert set(data.locate(1, [number])) == {data.comparisons[i].place for i in batch.index.tolist()}
        assert sorted(data.locate(1)) == sorted(f"pairs.jsonl, line {p + 1}" for p in data._pairs(1))

    def test_a_step_past_the_end_is_an_error(self):
        with pytest.raises(IndexError, match="step 5 of 5"):
            batches().step(5)


class TestHoldout:
    @pytest.mark.parametrize("world", [1, 3])
    def test_held_out_pairs_are_never_trained_on_and_measured_once(self, world):
        ranks = [batches(holdout=0.2, epochs=3, rank=rank, world_size=world) for rank in range(world)]
        held = [i for data in ranks for i in indices(data.validation())]
        assert len(held) == len(set(held)) == 3 * 5
        trained = {i for data in ranks for step in range(data.num_steps) for i in indices(data.step(step))}
        assert trained == set(range(69)) - set(held)
        assert len({len(list(data.validation())) for data in ranks}) == 1
        assert ranks[0].num_pairs == (18, 5)

    def test_the_same_pairs_are_held_out_for_any_seed_and_order(self):
        data = comparisons()
        turned = [c for number in reversed(range(23)) for c in data if c.pair == number]
        prompts = [
            {made.comparisons[i].prompt.tobytes() for i in indices(made.validation())}
            for made in (batches(data, holdout=0.2), batches(turned, holdout=0.2, seed=9))
        ]
        assert prompts[0] == prompts[1]

    def test_a_prompt_never_stands_on_both_sides(self):
        base = comparisons(40, (DIRECT,))
        data = [Comparison(DIRECT, base[i // 4].prompt, c.chosen, c.rejected, i, "") for i, c in enumerate(base)]
        made = batches(data, holdout=0.1)
        held = set(indices(made.validation()))
        assert len(held) == 4
        assert not {data[i].prompt.tobytes() for i in held} & {
            data[i].prompt.tobytes() for i in range(40) if i not in held
        }

    def test_a_share_above_zero_holds_out_something(self):
        assert batches(holdout=0.001).num_pairs == (22, 1)
        assert batches(holdout=0.0).num_pairs == (23, 0)
        assert list(batches().validation()) == []

    def test_pairs_of_one_single_prompt_are_all_trained_on(self):
        base = comparisons(4, (DIRECT,))
        data = [Comparison(DIRECT, base[0].prompt, c.chosen, c.rejected, i, "") for i, c in enumerate(base)]
        assert batches(data, holdout=0.5).num_pairs == (4, 0)


class TestAll:
    @pytest.mark.parametrize("world", [1, 2, 5])
    def test_gives_every_comparison_once_over_all_ranks(self, world):
        ranks = [list(batches(holdout=0.2, rank=rank, world_size=world).all()) for rank in range(world)]
        assert sorted(i for made in ranks for i in indices(made)) == list(range(69))
        assert len({len(made) for made in ranks}) == 1

    def test_rows_are_nearly_full(self):
        made = list(batches(comparisons(200)).all())
        assert sum(batch.num_tokens for batch in made) / sum(batch.tokens.numel() for batch in made) > 0.97

    @given(
        world=st.integers(1, 3),
        micro=st.integers(1, 3),
        step=st.integers(1, 40),
        epochs=st.sampled_from([0.4, 1.0, 2.5]),
        holdout=st.sampled_from([0.0, 0.2]),
        kinds=st.sampled_from([(DIRECT,), (DIRECT, MISMATCHED), (DIRECT, GIVEN_REJECTED, GIVEN_CHOSEN)]),
    )
    @settings(max_examples=30, deadline=None)
    def test_as_trained_they_are_the_first_epochs_own_batches(self, world, micro, step, epochs, holdout, kinds):
        changes = {"micro_batch_size": micro, "global_batch_size": step, "epochs": epochs, "holdout": holdout}
        ranks = [
            batches(comparisons(23, kinds), as_trained=True, world_size=world, rank=rank, **changes)
            for rank in range(world)
        ]
        usual = batches(comparisons(23, kinds), **changes)
        assert {i for data in ranks for i in indices(data.all())} == set(indices(usual.all()))
        assert len({len(list(data.all())) for data in ranks}) == 1
        for data in ranks:
            every = list(data.all())
            held = list(data.validation())
            trained = every[: len(every) - len(held)]
            own = [batch for number in range(data.num_steps) for batch in data.step(number)][: len(trained)]
            for batch, again in zip([*own, *held], every, strict=True):
                assert torch.equal(batch.tokens, again.tokens) and torch.equal(batch.index, again.index)


class TestRefusals:
    def test_no_pair_at_all_is_a_sentence(self):
        with pytest.raises(UserError, match="no preference pair to train on"):
            batches([])

    def test_describe_gives_the_size(self):
        text = batches(holdout=0.2, epochs=2).describe()
        assert "18 pairs" in text and "5 held out" in text and "8 steps of 5 pairs" in text
        assert "global_batch_size" not in text
        text = batches(holdout=0.2, global_batch_size=40, epochs=40 / 18).describe()
        assert "18 pairs, seen 2.22 times" in text and text.endswith("\n1 step of 40 pairs (fewer pairs than "
               "global_batch_size: each is seen 2.22 times in a step)")  # fmt: skip
