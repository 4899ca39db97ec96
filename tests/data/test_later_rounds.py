from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from plmtune.data.order import BLOCK, Order, Phase, key_of
from plmtune.data.rounds import draw, gumbel, later_rounds

LOSSES = np.array([0.3, 1.7, 0.9, 2.2, 1.1])


def inclusion(losses, count, temperature):
    """The probability of each to be among `count` drawn one after the other, by going through all orders."""
    p = np.exp(losses / temperature)
    found = np.zeros(len(losses))
    for chosen in permutations(range(len(losses)), count):
        left, probability = p.sum(), 1.0
        for index in chosen:
            probability *= p[index] / left
            left -= p[index]
        found[list(chosen)] += probability
    return found


class TestDraw:
    @pytest.mark.parametrize(("count", "temperature"), [(2, 1.0), (3, 0.4)])
    def test_sets_have_the_probabilities_of_drawing_one_after_the_other(self, count, temperature):
        num = 1000
        windows = np.arange(5)
        drawn = Counter(
            int(w)
            for seed in range(num)
            for w in draw(windows, count, key=key_of(seed), losses=LOSSES, temperature=temperature)
        )
        expected = inclusion(LOSSES, count, temperature)
        for window, p in enumerate(expected):
            assert abs(drawn[window] / num - p) < 4 * np.sqrt(p * (1 - p) / num)

    def test_the_first_place_alone_has_the_softmax_by_chi_square(self):
        num = 1000
        first = Counter(int(draw(np.arange(5), 1, key=key_of("chi", s), losses=LOSSES)[0]) for s in range(num))
        expected = num * np.exp(LOSSES) / np.exp(LOSSES).sum()
        statistic = sum((first[i] - expected[i]) ** 2 / expected[i] for i in range(5))
        assert statistic < 18.5  # 4 degrees of freedom: p = 0.001

    def test_without_losses_all_are_equally_likely(self):
        num = 600
        drawn = Counter(int(w) for seed in range(num) for w in draw(np.arange(6) + 100, 2, key=key_of(seed)))
        assert sum((n - num / 3) ** 2 / (num / 3) for n in drawn.values()) < 20.5 and len(drawn) == 6

    def test_nothing_is_drawn_twice_and_a_whole_share_draws_all(self):
        windows = np.arange(0, 3000, 3)
        drawn = draw(windows, 700, key=1, losses=np.linspace(0, 9, 1000))
        assert len(set(drawn.tolist())) == 700 and np.isin(drawn, windows).all()
        assert sorted(draw(windows, 1000, key=1, losses=np.zeros(1000)).tolist()) == windows.tolist()
        assert draw(windows[:0], 0, key=1).tolist() == []

    def test_of_a_share_above_all_each_is_taken_equally_often_before_the_rest_is_drawn(self):
        losses = np.array([0.0, 0.0, 50.0, 0.0])
        drawn = draw(np.arange(4), 9, key=3, losses=losses)
        assert Counter(drawn.tolist()) == {0: 2, 1: 2, 2: 3, 3: 2}
        assert sorted(drawn[:4].tolist()) == sorted(drawn[4:8].tolist()) == [0, 1, 2, 3]

    def test_the_order_does_not_tell_the_losses(self):
        windows, losses = np.arange(4000), np.linspace(0, 4, 4000)
        drawn = draw(windows, 2000, key=5, losses=losses)
        assert abs(losses[drawn[:1000]].mean() - losses[drawn[1000:]].mean()) < 0.15
        assert losses[drawn].mean() > 2.5

    def test_a_low_temperature_takes_the_highest_losses(self):
        drawn = draw(np.arange(5), 2, key=5, losses=LOSSES, temperature=1e-3)
        assert sorted(drawn.tolist()) == [1, 3]

    def test_the_draw_does_not_change_between_versions(self):
        # A run that was begun before resumes with the draw that it keeps; a new one of equal weights draws the same.
        assert draw(np.arange(8), 4, key=key_of(1, "round 2", "stdlib"), losses=np.arange(8) / 2).tolist() == [
            7,
            3,
            5,
            0,
        ]

    def test_noise_is_of_the_gumbel_distribution(self):
        noise = np.sort(gumbel(np.arange(20_000), 9))
        distance = np.abs(np.exp(-np.exp(-noise)) - (np.arange(20_000) + 0.5) / 20_000).max()
        assert distance < 1.63 / np.sqrt(20_000)  # Kolmogorov-Smirnov: p = 0.01


class TestLaterRounds:
    def test_are_shares_of_the_steps_rounded_up(self):
        assert later_rounds(1, 0.5, 100) == []
        assert later_rounds(3, 0.5, 101) == [Phase("round 2", 51, round=2), Phase("round 3", 51, round=3)]
        assert later_rounds(2, 0.1, 30)[0].steps == 3
        assert later_rounds(2, 1.0, 7)[0].steps == 7

    def test_less_than_a_step_is_refused_with_both_numbers(self):
        with pytest.raises(ValueError, match=r"keep \(0.1\) of round 1's 9 steps .* keep=0.1112 or more"):
            later_rounds(2, 0.1, 9)


WINDOWS = {"a": 900, "b": 2000, "c": 50}  # c is seen 6 times in round 1, a not wholly


class TestOrder:
    def order(self, skip=None):
        phases = [Phase("one", 100, mix={"a": 1, "b": 1}), Phase("two", 300, mix={"b": 7, "c": 1})]
        return Order(WINDOWS, [*phases, *later_rounds(3, 0.5, 400)], global_batch_size=8, seed=1, skip=skip)

    def steps(self, order, steps):
        found = []
        for step in steps:
            sources, windows = order.step(step)
            found += [(order.names[s], int(w)) for s, w in zip(sources, windows, strict=True)]
        return found

    @pytest.mark.parametrize("skip", [None, {"a": 700, "b": 1999, "c": 20}])
    def test_the_first_round_is_known_without_its_steps(self, skip):
        order = self.order(skip)
        seen = set(self.steps(order, range(400)))
        told = {(name, int(w)) for name, each in zip(order.names, order.first_round(), strict=True) for w in each}
        assert told == seen
        assert all((np.diff(each) > 0).all() for each in order.first_round())

    @pytest.mark.parametrize(("skip", "steps"), [(0, 20), (100, 20), (100, 29), (100, 30), (200, 20), (199, 20)])
    def test_a_first_round_that_begins_within_an_epoch_may_not_sample_all(self, skip, steps):
        phases = [Phase("one", steps), *later_rounds(2, 0.5, steps)]
        order = Order({"s": 200}, phases, global_batch_size=10, seed=1, skip={"s": skip})
        assert order.first_round()[0].tolist() == sorted({w for _, w in self.steps(order, range(steps))})

    def test_a_later_round_samples_what_was_drawn_once_each_in_the_shares_of_round_1(self):
        order = self.order()
        assert order.known_steps == 400 and order.num_steps == 800
        before = Counter(name for name, _ in self.steps(order, range(400)))
        counts = order.counts(2)
        assert counts == [before[name] // 2 for name in order.names] and order.counts(3) == counts
        first = order.first_round()
        windows = [draw(each, n, key=key_of(i)) for i, (each, n) in enumerate(zip(first, counts, strict=True))]
        order.set_draw(2, windows)
        assert order.known_steps == 600
        seen = self.steps(order, range(400, 600))
        for name, drawn in zip(order.names, windows, strict=True):
            assert [w for source, w in seen if source == name] == drawn.tolist()  # in the draw's own order
        # Even a stretch of a block has each source's share.
        part = Counter(name for name, _ in seen[: BLOCK // 2])
        assert all(abs(part[name] - BLOCK / 2 * n / 1600) <= 2 for name, n in zip(order.names, counts, strict=True))

    def test_any_step_alone_is_that_of_the_whole(self):
        order = self.order()
        order.set_draw(2, [draw(w, n, key=1) for w, n in zip(order.first_round(), order.counts(2), strict=True)])
        whole = self.steps(order, range(600))
        assert self.steps(order, [599, 400, 401]) == whole[8 * 599 :] + whole[3200:3216]

    def test_later_rounds_see_no_further_samples(self):
        order = self.order({"b": 5})
        assert order.samples_seen(401) == order.samples_seen(800) == order.samples_seen(400)
        assert sum(order.samples_seen(400).values()) == 3205
