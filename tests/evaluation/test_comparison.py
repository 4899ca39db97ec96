"""Whether one result is better than another: the statistics against scipy's, and when results can be paired."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from made_up import result, task

from plmtune.cli.compare import compare as command
from plmtune.errors import UserError
from plmtune.evaluation import results
from plmtune.evaluation.comparison import Difference, compare, holm, mcnemar, sign_flips
from plmtune.evaluation.comparison_plot import draw


@pytest.fixture(scope="module")
def stats() -> Any:
    from scipy import stats  # its import takes a second

    return stats


def difference(a: dict[str, Any], b: dict[str, Any], row: int = 0) -> Difference:
    found = compare([a, b])[row].differences[1]
    assert found is not None
    return found


def answers(seed: int, n: int = 60, right: float = 0.5) -> list[float]:
    return [float(x) for x in np.random.default_rng(seed).random(n) < right]


class TestStatistics:
    @pytest.mark.parametrize(("gained", "lost"), [(1, 0), (5, 2), (2, 5), (30, 50), (7000, 6800)])
    def test_mcnemar_is_twice_the_binomial_tail_of_the_documents_that_changed(self, gained: int, lost: int) -> None:
        n = gained + lost
        ways = tail = 1  # of k = 0
        for k in range(min(gained, lost)):
            ways = ways * (n - k) // (k + 1)
            tail += ways
        assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail / 2**n), rel=0, abs=1e-12)

    def test_nothing_changed_is_no_evidence(self) -> None:
        assert mcnemar(0, 0) == 1.0
        assert sign_flips(np.zeros(5)) == 1.0

    def test_few_sign_flips_are_all_tried_as_in_scipys_permutation_test(self, stats: Any) -> None:
        d = np.random.default_rng(0).normal(0.4, 1, 9)
        theirs = stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf)
        assert sign_flips(d) == pytest.approx(theirs.pvalue)

    def test_many_sign_flips_are_reproducible_and_agree_with_the_t_test(self, stats: Any) -> None:
        d = np.random.default_rng(1).normal(0.05, 1, 1000)
        assert sign_flips(d) == sign_flips(d)
        assert sign_flips(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.02)

    def test_holm_multiplies_the_smallest_by_all_and_never_turns_the_order(self) -> None:
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.6, 0.9]) == [1.0, 1.0]
        assert holm([]) == []

    def test_a_paired_error_is_that_of_the_mean_of_the_differences(self, stats: Any) -> None:
        a, b = answers(1), answers(2, right=0.6)
        found = difference(result("a", {"t": task(a)}), result("b", {"t": task(b)}))
        assert found.mean == pytest.approx(np.mean(b) - np.mean(a))
        assert found.stderr == pytest.approx(stats.sem(np.subtract(b, a)))
        assert (found.test, found.shared, found.paired) == ("McNemar", 60, True)

    def test_pairing_sees_what_separate_errors_hide(self) -> None:
        a = answers(3, n=200)
        b = [1.0 if i % 12 == 0 else x for i, x in enumerate(a)]  # a few more are right, and none is lost
        first = result("a", {"t": task(a)})
        paired = difference(first, result("b", {"t": task(b)}))
        apart = difference(first, result("b", {"t": task(b, asked="in other words")}))
        assert paired.mean == pytest.approx(apart.mean)
        assert paired.p is not None and apart.p is not None
        assert paired.p < 0.05 < apart.p

    def test_perplexities_are_compared_as_lm_eval_computes_them(self) -> None:
        rng = np.random.default_rng(5)
        words = rng.integers(20, 90, 50)
        log_probs = [-words * (3 + rng.normal(0, 0.3, 50)) for _ in range(2)]

        def weighed(which: int) -> dict[str, Any]:
            pairs = [[float(x), int(w)] for x, w in zip(log_probs[which], words, strict=True)]
            total = -float(log_probs[which].sum()) / float(words.sum())
            bits = task(pairs, metric="bits_per_byte,none", value=total / math.log(2))
            return result("m", {"text": task(pairs, metric="word_perplexity,none", value=math.exp(total)), "b": bits})

        a, b = weighed(0), weighed(1)
        found = difference(a, b)
        value = [one["tasks"]["text"]["metrics"]["word_perplexity,none"]["value"] for one in (a, b)]
        assert found.mean == pytest.approx(value[1] - value[0])
        again = []
        for _ in range(2000):  # the bootstrap, which needs no formula
            i = rng.integers(0, 50, 50)
            drawn = [math.exp(-x[i].sum() / words[i].sum()) for x in log_probs]
            again.append(drawn[1] - drawn[0])
        assert found.stderr == pytest.approx(np.std(again), rel=0.1)
        assert found.test == "sign flips" and difference(a, b, row=1).paired

    def test_all_tests_of_a_comparison_are_corrected_together(self) -> None:
        tasks = {f"t{i}": (answers(i), answers(i + 50, right=0.75)) for i in range(4)}
        a = result("a", {name: task(one) for name, (one, _) in tasks.items()})
        b = result("b", {name: task(other) for name, (_, other) in tasks.items()})
        found = [row.differences[1] for row in compare([a, b])]
        p = [one.p for one in found if one and one.p is not None]
        assert [one.corrected for one in found if one] == pytest.approx(holm(p))
        assert len(p) == 4 and max(p) > min(p)


class TestPairing:
    def test_a_result_with_itself_differs_in_nothing(self) -> None:
        same = result("a", {"t": task(answers(1))})
        found = difference(same, same)
        assert (found.mean, found.stderr, found.p) == (0.0, 0.0, 1.0)

    def test_only_what_both_were_asked_is_compared_where_limits_differ(self) -> None:
        a, b = answers(1, n=60), answers(2, n=40)
        found = difference(result("a", {"t": task(a)}), result("b", {"t": task(b)}))
        assert (found.shared, found.note) == (40, "of 60 and 40")
        assert found.mean == pytest.approx(np.mean(b) - np.mean(a[:40]))

    def test_other_prompts_are_compared_unpaired_and_it_is_said(self) -> None:
        a, b = result("a", {"t": task(answers(1))}), result("b", {"t": task(answers(2), asked="five shots, then q")})
        found = difference(a, b)
        assert not found.paired and found.test == "z" and "the prompts differ" in found.note
        errors = [one["tasks"]["t"]["metrics"]["acc,none"]["stderr"] for one in (a, b)]
        assert found.stderr == pytest.approx(math.hypot(*errors))

    def test_a_few_equal_prompts_are_no_sample_of_all(self) -> None:
        (entry, rows), (_, same_prompts) = task([0.0, 1.0] * 50, asked="five shots, then q"), task([1.0] * 100)
        a = result("a", {"t": task([1.0] * 50 + [0.0] * 50)})
        b = result("b", {"t": (entry, same_prompts[50:52] + rows[2:])})
        found = difference(a, b)
        assert not found.paired and found.mean == pytest.approx(0.0)
        assert found.note == "unpaired: only 2 documents have the same prompt"

    def test_equal_prompts_in_half_of_the_smaller_are_enough(self) -> None:
        (entry, rows), (_, others) = task([0.0, 1.0] * 10), task([0.0, 1.0] * 10, asked="other q")
        for equal, paired in ((10, True), (9, False)):
            b = result("b", {"t": (entry, rows[:equal] + others[equal:])})
            assert difference(result("a", {"t": task([1.0, 0.0] * 30)}), b).paired == paired

    def test_without_samples_only_scores_are_compared(self) -> None:
        a, b = result("a", {"t": task(answers(1))}), result("b", {"t": task(answers(2))}, samples={})
        assert "no samples" in difference(a, b).note

    def test_a_score_that_is_no_mean_of_its_samples_is_not_paired(self) -> None:
        f1 = [task([[1, 0], [0, 0], [1, 1]], metric="f1,none", value=value) for value in (0.6, 0.7)]
        found = difference(result("a", {"t": f1[0]}), result("b", {"t": f1[1]}))
        assert not found.paired and found.p is None and "no mean" in found.note
        assert found.mean == pytest.approx(0.1)

    def test_a_document_that_is_there_twice_counts_twice(self) -> None:
        entry, rows = task([0.0, 0.0, 1.0])
        rows = [{**row, "doc_hash": "d", "prompt_hash": "p"} for row in rows]
        twice = result("a", {"t": (entry, rows)})
        assert difference(twice, twice).shared == 3

    def test_a_group_is_paired_over_the_documents_of_its_tasks(self) -> None:
        def grouped(seed: int) -> dict[str, Any]:
            one, two = answers(seed, n=30), answers(seed + 1, n=50)
            entry, _ = task(one + two)
            tasks = {"one": task(one), "two": task(two)}
            return result("m", tasks, groups={"sum": {**entry, "tasks": ["one", "two"]}})

        rows = compare([grouped(1), grouped(11)])
        assert [row.line.task for row in rows] == ["sum"]
        found = rows[0].differences[1]
        assert found is not None and found.paired and found.shared == 80
        assert len(compare([grouped(1), grouped(11)], all_tasks=True)) == 3

    def test_tasks_of_one_result_alone_have_no_difference(self) -> None:
        rows = compare([result("a", {"t": task(answers(1))}), result("b", {"u": task(answers(1))})])
        assert [(row.line.task, row.differences) for row in rows] == [("t", (None, None)), ("u", (None, None))]


def ink(path: Path) -> tuple[tuple[int, ...], int]:
    """Size of a picture, and how many colours are in it."""
    from matplotlib.image import imread

    pixels = imread(path)
    return pixels.shape[:2], len(np.unique((pixels[::2, ::2, :3] * 15).astype(int).reshape(-1, 3), axis=0))


class TestPicture:
    def test_shares_and_perplexities_lie_in_panels_of_their_own(self, tmp_path: Path) -> None:
        share = result("a", {"t": task(answers(1))})
        both = result("a", {"t": task(answers(1)), "p": task([20.0, 25.0, 30.0], metric="word_perplexity,none")})
        draw(compare([share]), [share], tmp_path / "one.png")
        draw(compare([both]), [both], tmp_path / "two.png")
        assert ink(tmp_path / "two.png")[0][0] > 1.4 * ink(tmp_path / "one.png")[0][0]

    def test_differences_get_a_panel_where_there_are_some(self, tmp_path: Path) -> None:
        a, b = (result(name, {"t": task(answers(seed))}) for seed, name in enumerate("ab"))
        draw(compare([a]), [a], tmp_path / "one.png")
        draw(compare([a, b]), [a, b], tmp_path / "two.png")
        assert ink(tmp_path / "two.png")[0][1] > 1.3 * ink(tmp_path / "one.png")[0][1]
        assert ink(tmp_path / "two.png")[1] > ink(tmp_path / "one.png")[1]

    def test_an_interval_of_a_difference_of_shares_ends_at_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from matplotlib.axes import Axes

        ends = []
        original = Axes.errorbar

        def seen(panel: Any, x: Any, y: Any, **options: Any) -> Any:
            (low,), (high,) = options["xerr"]
            ends.extend([x - low, x + high])
            return original(panel, x, y, **options)

        monkeypatch.setattr(Axes, "errorbar", seen)
        a, b = result("a", {"t": task([0.0, 0.0])}), result("b", {"t": task([0.0, 1.0])})
        draw(compare([a, b]), [a, b], tmp_path / "x.png")
        assert max(ends) == pytest.approx(1.0) and min(ends) < -0.4

    def test_nothing_to_draw_is_said(self, tmp_path: Path) -> None:
        empty = result("a", {})
        with pytest.raises(UserError, match="no score to draw"):
            draw(compare([empty]), [empty], tmp_path / "x.png")
        assert not list(tmp_path.iterdir())


class TestCommand:
    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for seed, name in enumerate("ab"):
            results.save(result(name, {"t": task(answers(seed))}), tmp_path / f"{name}.json")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_prints_tables_and_draws_one_picture(self, place: Path) -> None:
        done = CliRunner().invoke(command, ["a.json", "b.json"], catch_exceptions=False)
        assert "A  a.json" in done.output and "differences to A" in done.output and "McNemar, 60 pairs" in done.output
        assert (place / "compare.png").read_bytes().startswith(b"\x89PNG")

    def test_json_is_for_programs_and_draws_only_when_asked(self, place: Path) -> None:
        done = CliRunner().invoke(command, ["a.json", "b.json", "--json"], catch_exceptions=False)
        found = json.loads(done.output)
        assert found["results"] == ["a.json", "b.json"] and found["rows"][0]["differences"][1]["test"] == "McNemar"
        assert not list(place.glob("*.png"))

    def test_a_result_is_never_overwritten_by_a_picture(self, place: Path) -> None:
        before = (place / "a.json").read_bytes()
        with pytest.raises(UserError, match=r"must end in \.png"):
            CliRunner().invoke(command, ["b.json", "--out", "a.json"], catch_exceptions=False)
        assert (place / "a.json").read_bytes() == before

    def test_a_picture_in_no_folder_is_refused_before_anything_is_shown(self, place: Path) -> None:
        with pytest.raises(UserError, match=r"--out none/x\.png: there is no folder none\."):
            CliRunner().invoke(command, ["a.json", "b.json", "--out", "none/x.png"], catch_exceptions=False)
