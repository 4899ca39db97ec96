from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmtune.data.order import BLOCK, Order, Phase, key_of, num_samples, permute, quotas, show_mix


def order(windows, phases, batch=8, seed=1):
    return Order(windows, phases, global_batch_size=batch, seed=seed)


def everything(run):
    """All sequences of a run as [(source, window)]."""
    found = []
    for step in range(run.num_steps):
        sources, windows = run.step(step)
        found += [(run.names[s], int(w)) for s, w in zip(sources, windows, strict=True)]
    return found


class TestPermute:
    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 1024, 70_001])
    def test_is_a_bijection(self, n):
        assert sorted(permute(np.arange(n), n, key=7).tolist()) == list(range(n))

    def test_one_index_at_a_time_gives_the_same_as_all_at_once(self):
        whole = permute(np.arange(300), 300, key=3)
        assert [int(permute(np.array([i]), 300, key=3)[0]) for i in range(300)] == whole.tolist()

    def test_other_keys_give_other_orders(self):
        orders = {tuple(permute(np.arange(50), 50, key=key_of("seed", k)).tolist()) for k in range(100)}
        assert len(orders) == 100

    def test_works_at_sizes_that_no_array_could_hold(self):
        n = 10**15
        image = permute(np.arange(1000), n, key=1)
        assert len(set(image.tolist())) == 1000
        assert image.min() >= 0
        assert image.max() < n

    def test_looks_random(self):
        # Neighbours land far apart: their mean distance in a random order of n is n / 3.
        image = permute(np.arange(10_000), 10_000, key=5)
        assert abs(np.abs(np.diff(image)).mean() / 10_000 - 1 / 3) < 0.02
        places = np.array([permute(np.array([0]), 16, key=key_of(k))[0] for k in range(1600)])
        assert np.bincount(places, minlength=16).min() > 60  # 100 expected in each

    def test_the_order_does_not_change_between_versions(self):
        # A changed order would silently break the resumption of every run that was begun before.
        assert permute(np.arange(8), 8, key=key_of(1, "stdlib", 0)).tolist() == [6, 1, 3, 0, 2, 5, 4, 7]


class TestQuotas:
    def test_are_nearest_to_the_weights(self):
        assert quotas([0.5, 0.3, 0.2], 10) == [5, 3, 2]
        assert quotas([1, 1, 1], 1024) == [342, 341, 341]
        assert quotas([0.75, 0.25], 32) == [24, 8]

    def test_the_smallest_weight_still_gets_one(self):
        assert quotas([1e6, 1e-6, 0.0], 1024) == [1023, 1, 0]
        assert quotas([1000.0] + [1e-9] * 1023, 1024) == [1] * 1024

    def test_where_there_are_too_few_the_largest_weights_get_one(self):
        assert quotas([0.1, 0.4, 0.0, 0.3, 0.2], 2) == [0, 1, 0, 1, 0]

    @given(
        st.lists(st.floats(0, 1e9), min_size=1, max_size=30).filter(any),
        st.integers(1, 10**15),
    )
    def test_equal_largest_remainders_written_naively(self, weights, total):
        counts = quotas(weights, total)
        assert sum(counts) == total
        shares = [Fraction(str(weight)) for weight in weights]
        exact = [share * total / sum(shares) for share in shares]
        if all(wanted >= 1 for wanted in exact if wanted):
            floors = [int(wanted) for wanted in exact]
            by_rest = sorted(range(len(exact)), key=lambda index: floors[index] - exact[index])
            for index in by_rest[: total - sum(floors)]:
                floors[index] += 1
            assert counts == floors
        elif sum(map(bool, weights)) <= total:
            assert [bool(count) for count in counts] == [bool(weight) for weight in weights]


def a_phase(draw, name, sources):
    """A phase by weights, by size, or short: at least as many sequences as sources, for batches of `sources`."""
    weight = st.one_of(st.just(0), st.floats(1e-6, 1), st.integers(1, 1000))
    mix = draw(st.dictionaries(st.sampled_from(sources), weight, min_size=1).filter(lambda m: any(m.values())))
    return Phase(name, draw(st.integers(1, 9)), draw(st.sampled_from([mix, {}])))


@st.composite
def runs(draw):
    """An order of some sources over some phases, whose steps are smaller or larger than a block."""
    sources = [f"s{index}" for index in range(draw(st.integers(1, 5)))]
    sizes = {name: draw(st.integers(1, 700)) for name in sources}
    phases = [a_phase(draw, f"p{index}", sources) for index in range(draw(st.integers(1, 3)))]
    batch = draw(st.one_of(st.integers(5, 40), st.integers(300, 1500)))
    return order(sizes, phases, batch, draw(st.integers(0, 99))), sizes


class TestShares:
    @settings(max_examples=20, deadline=None)
    @given(runs())
    def test_what_is_said_of_any_run_is_what_it_draws(self, made):
        run, sizes = made
        source, window = (np.concatenate(drawn) for drawn in zip(*map(run.step, range(run.num_steps)), strict=True))
        is_of = source == np.arange(len(run.names))[:, None]
        before = np.pad(is_of.cumsum(axis=1), ((0, 0), (1, 0)))
        for step in range(run.num_steps + 1):
            drawn = before[:, step * run.global_batch_size]
            assert run.samples_seen(step) == dict(zip(run.names, drawn.tolist(), strict=True))
        first = 0
        for index, phase in enumerate(run.phases):
            stop = first + phase.steps * run.global_batch_size
            counted = (before[:, stop] - before[:, first]).tolist()
            weights = [(phase.mix or sizes).get(name, 0) for name in run.names]
            assert counted == quotas(weights, stop - first)
            assert list(run.shares(index).values()) == [count / (stop - first) for count in counted]
            assert [bool(count) for count in counted] == [bool(weight) for weight in weights]
            first = stop
        for name, mine in zip(run.names, is_of, strict=True):
            size, windows = sizes[name], window[mine].tolist()
            for first in range(0, len(windows), size):
                epoch = windows[first : first + size]
                assert len({*epoch}) == len(epoch)
                assert len(epoch) < size or sorted(epoch) == list(range(size))

    def test_a_long_phase_is_drawn_in_the_memory_of_a_block(self):
        run = order(dict.fromkeys("abc", 10**12), [Phase("main", 10**12, {"a": 0.5, "b": 0.3, "c": 1e-9})], 1024)
        drawn = run.samples_seen(7 * 10**11)
        sources, _ = run.step(7 * 10**11)
        counted = Counter(run.names[source] for source in sources.tolist())
        assert run.samples_seen(7 * 10**11 + 1) == {name: drawn[name] + counted[name] for name in "abc"}
        assert drawn["a"] / sum(drawn.values()) == pytest.approx(0.625)
        assert run.shares(0)["c"] == pytest.approx(1.25e-9, rel=1e-6)

    def test_each_step_is_near_its_share(self):
        run = order(dict.fromkeys("abc", 500), [Phase("main", 400, {"a": 0.5, "b": 0.25, "c": 0.25})], 32)
        counts = np.array([np.bincount(run.step(step)[0], minlength=3) for step in range(400)])
        assert np.abs(counts - [16, 8, 8]).max() <= 3

    def test_a_share_that_is_drawn_otherwise_than_asked_is_shown_with_both(self):
        assert show_mix({"a": 3, "b": 1}, 32) == "a 75.0%, b 25.0%"
        assert show_mix({"b": 0.02, "a": 0.98}, 16) == "a 93.8% instead of 98.0%, b 6.2% instead of 2.0%"
        assert show_mix({"a": 1, "b": 1e-6}, 10**9) == "a 100.0%, b 0.0001%"
        assert show_mix({}, 32) == ""


class TestOrder:
    def test_each_window_is_seen_exactly_once_per_epoch(self):
        seen = everything(order({"a": 40}, [Phase("main", 15)]))
        for epoch in range(3):
            assert sorted(w for _, w in seen[epoch * 40 : (epoch + 1) * 40]) == list(range(40))

    def test_another_epoch_has_another_order(self):
        seen = [w for _, w in everything(order({"a": 40}, [Phase("main", 10)]))]
        assert seen[:40] != seen[40:]

    def test_another_seed_has_another_order(self):
        runs = [everything(order({"a": 40}, [Phase("main", 5)], seed=seed)) for seed in (1, 2)]
        assert runs[0] != runs[1]

    def test_a_step_does_not_depend_on_what_was_asked_before(self):
        windows, phases = {"a": 300, "b": 70}, [Phase("one", 200, {"a": 1, "b": 2}), Phase("two", 200)]
        forwards, asked = order(windows, phases), order(windows, phases)
        expected = [forwards.step(s) for s in range(400)]
        for step in [399, 3, 250, 199, 200, 0, 3]:
            for got, want in zip(asked.step(step), expected[step], strict=True):
                assert got.tolist() == want.tolist()

    def test_the_batch_size_does_not_change_the_order_inside_a_phase(self):
        windows, mix = {"a": 300, "b": 70}, {"a": 1, "b": 2}
        small = everything(order(windows, [Phase("main", 600, mix)], batch=4))
        large = everything(order(windows, [Phase("main", 75, mix)], batch=32))
        assert small == large

    def test_steps_larger_than_a_block_are_whole(self):
        batch = 3 * BLOCK + 5
        windows = {"a": 10_000}
        seen = everything(order(windows, [Phase("main", 3)], batch=batch))
        assert len(set(seen)) == 3 * batch

    def test_every_block_is_near_the_shares_of_its_phase(self):
        mixes = [{"a": 0.75, "b": 0.25}, {"a": 0.1, "b": 0.9}]
        phases = [Phase(str(i), 2 * BLOCK // 8, mix) for i, mix in enumerate(mixes)]
        names = [name for name, _ in everything(order({"a": 500, "b": 500}, phases))]
        for block, share in enumerate([0.75, 0.75, 0.1, 0.1]):
            counted = names[block * BLOCK : (block + 1) * BLOCK].count("a")
            assert abs(counted / BLOCK - share) <= 1 / BLOCK

    def test_an_epoch_continues_across_phases_that_end_inside_a_block(self):
        phases = [Phase("one", 37, {"a": 1, "b": 3}), Phase("two", 51, {"a": 2, "b": 1}), Phase("three", 80)]
        seen = everything(order({"a": 97, "b": 203}, phases))
        for name, count in (("a", 97), ("b", 203)):
            windows = [w for n, w in seen if n == name]
            assert len(windows) > 2 * count
            assert sorted(windows[:count]) == list(range(count))
            assert sorted(windows[count : 2 * count]) == list(range(count))

    def test_drawn_counts_what_is_drawn(self):
        run = order({"a": 97, "b": 203}, [Phase("one", 37, {"a": 1, "b": 3}), Phase("two", 151)])
        names = [name for name, _ in everything(run)]
        assert run.drawn.tolist() == [names.count("a"), names.count("b")]

    def test_an_empty_mix_weighs_sources_by_size(self):
        names = [n for n, _ in everything(order({"a": 100, "b": 300}, [Phase("main", BLOCK // 8)]))]
        assert names.count("a") == BLOCK // 4

    def test_the_order_in_which_sources_are_named_does_not_matter(self):
        one = everything(order({"a": 100, "b": 300}, [Phase("main", 20, {"a": 1, "b": 1})]))
        other = everything(order({"b": 300, "a": 100}, [Phase("main", 20, {"b": 1, "a": 1})]))
        assert one == other

    def test_steps_beyond_the_run_are_refused(self):
        with pytest.raises(IndexError, match="step 5 of 5"):
            order({"a": 10}, [Phase("main", 5)]).step(5)


def by_epochs(windows, epochs, batch=8, seed=1):
    return order(windows, [Phase.over(epochs, sum(windows.values()), batch)], batch, seed)


class TestEpochs:
    def test_over_no_rows_are_refused(self):
        with pytest.raises(ValueError, match=r"no source has a whole window \(a, b\)"):
            by_epochs({"a": 0, "b": 0}, 1)

    def test_sequences_are_counted_up_to_a_short_last_step(self):
        run = by_epochs({"a": 10, "b": 3}, 1.5)
        assert [run.num_samples_seen(step) for step in range(run.num_steps + 1)] == [0, 8, 16, 20]
        mixed = order({"a": 10}, [Phase("one", 2), Phase("two", 1)], 8)
        assert [mixed.num_samples_seen(step) for step in range(4)] == [0, 8, 16, 24]

    @pytest.mark.parametrize("seed", range(60))
    def test_every_row_of_every_source_is_drawn_so_often(self, seed):
        drawn = np.random.default_rng(seed)
        sizes = drawn.integers(1, 700, size=drawn.integers(1, 5)).tolist()
        epochs = float(drawn.choice([drawn.integers(1, 5), drawn.uniform(0.01, 4)]))
        batch = int(drawn.integers(1, 1500))
        windows = {f"s{index}": size for index, size in enumerate(sizes)}
        run = by_epochs(windows, epochs, batch, seed)
        seen = everything(run)
        total = sum(sizes)
        assert len(seen) == num_samples(epochs, total)
        assert run.num_steps == -(-len(seen) // batch)
        every = sorted((name, row) for name, size in windows.items() for row in range(size))
        for first in range(0, len(seen) // total * total, total):
            assert sorted(seen[first : first + total]) == every
        rest = seen[len(seen) // total * total :]
        assert len(set(rest)) == len(rest)
        for step in range(0, run.num_steps + 1, max(1, run.num_steps // 3)):
            names = [name for name, _ in seen[: step * batch]]
            assert run.samples_seen(step) == {name: names.count(name) for name in windows}
        assert run.drawn.tolist() == [sum(name == one for name, _ in seen) for one in run.names]

    def test_one_source_is_drawn_in_the_order_of_a_mix(self):
        assert everything(by_epochs({"a": 40}, 3)) == everything(order({"a": 40}, [Phase("main", 15)]))

    def test_sources_are_shuffled_together(self):
        names = [name for name, _ in everything(by_epochs({"a": 500, "b": 1500}, 1))]
        assert all(90 < names[first : first + 500].count("a") < 160 for first in range(0, 2000, 500))

    def test_the_last_step_holds_what_is_left(self):
        run = by_epochs({"a": 5, "b": 6}, 2)
        assert [len(run.step(step)[0]) for step in range(run.num_steps)] == [8, 8, 6]
        assert run.shares(0) == {"a": 5 / 11, "b": 6 / 11}

    def test_of_a_part_of_an_epoch_the_shares_are_those_that_are_drawn(self):
        run = by_epochs({"a": 5, "b": 6}, 0.5)
        names = [name for name, _ in everything(run)]
        assert run.shares(0) == {name: names.count(name) / 6 for name in "ab"}


class TestRefused:
    @pytest.mark.parametrize(
        ("mix", "message"),
        [
            ({"wki": 1.0}, "names wki, which is no source. Did you mean wiki?"),
            ({"wiki": -1.0, "code": 2.0}, "weight of wiki is -1.0"),
            ({"wiki": float("nan")}, "weight of wiki is nan"),
            ({"wiki": 0.0, "code": 0.0}, "all weights of its mix are 0"),
        ],
    )
    def test_mixes_that_cannot_be_name_the_phase(self, mix, message):
        with pytest.raises(ValueError, match=f"phase late: .*{message}"):
            order({"wiki": 10, "code": 10}, [Phase("early", 1), Phase("late", 1, mix)])

    def test_a_phase_without_steps(self):
        with pytest.raises(ValueError, match="phase main has 0 steps"):
            order({"a": 10}, [Phase("main", 0)])

    def test_a_run_without_phases(self):
        with pytest.raises(ValueError, match="at least one phase"):
            order({"a": 10}, [])

    def test_more_sources_than_the_phase_has_sequences(self):
        mix = {"a": 5, "b": 0.1, "c": 1, "d": 0.2, "e": 0}
        with pytest.raises(ValueError, match=r"phase main: .* 4 sources, more than .* \(2\), .* drawn from b, d"):
            order(dict.fromkeys(mix, 5), [Phase("main", 1, mix)], 2)
        assert len(everything(order(dict.fromkeys(mix, 5), [Phase("main", 1, mix)], 4))) == 4
        names = [f"s{i}" for i in range(BLOCK + 1)]
        mixed = order(dict.fromkeys(names, 5), [Phase("main", 2, dict.fromkeys(names, 1.0))], 600)
        assert len({name for name, _ in everything(mixed)}) == BLOCK + 1

    def test_drawing_from_a_source_without_a_window(self):
        with pytest.raises(ValueError, match="source b has no whole window"):
            order({"a": 10, "b": 0}, [Phase("main", 200, {"a": 1, "b": 1})])
