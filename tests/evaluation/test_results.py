"""Result files: written, read back and checked."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import result, task

from plmtune.errors import UserError
from plmtune.evaluation import results


class TestFiles:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ("[]", "no result of plmtune eval"),
            ('{"format": "another"}', "no result of plmtune eval"),
            ('{"format": "plmtune evaluation", "version": 99}', "version 99"),
            ('{"format": "plmtune evaluation", "version": 1}', "key model"),
        ],
    )
    def test_what_is_no_result_is_said_to_be_none(self, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(UserError, match=said):
            results.load(tmp_path / "r.json")

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("status", "done", "status"),
            ("tasks", {"t": {"metrics": {"acc,none": {"value": "high"}}}}, "no finite number"),
            ("tasks", {"t": {"metrics": {"acc,none": {}}}}, "has no value"),
            ("tasks", {"t": []}, "has no metrics"),
            ("groups", {"g": {"metrics": {}, "tasks": "t"}}, "no list of names"),
            ("samples", {"t": [1]}, "no list of samples"),
            ("samples", {"t": [{"metrics": {}, "doc_hash": [], "prompt_hash": ""}]}, "without doc_hash"),
            ("tasks", {"t": {"metrics": {"acc,none": {"value": 10**400}}}}, "no finite number"),
        ],
    )
    def test_damage_is_named_by_its_key(self, tmp_path: Path, key: str, value: Any, said: str) -> None:
        (tmp_path / "r.json").write_text(json.dumps(result("m", {}) | {key: value}))
        with pytest.raises(UserError, match=said):
            results.load(tmp_path / "r.json")

    def test_nothing_half_written_is_left(self, tmp_path: Path) -> None:
        results.save(result("m", {"t": task([0, 1])}), tmp_path / "r.json")
        before = (tmp_path / "r.json").read_bytes()
        with pytest.raises(ValueError):
            results.save(result("m", {"t": task([0, 1])}, seconds=float("nan")), tmp_path / "r.json")
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]

    def test_a_sample_is_a_line_of_the_file(self, tmp_path: Path) -> None:
        results.save(result("m", {"t": task([0, 1, 1])}), tmp_path / "r.json")
        assert sum('"doc_hash"' in line for line in (tmp_path / "r.json").read_text().splitlines()) == 3

    def test_a_folder_stands_for_the_results_in_it(self, tmp_path: Path) -> None:
        for name in ("b", "a"):
            results.save(result(name, {}, model={"name": name, "digest": name}), tmp_path / f"{name}.json")
        found = results.load_all([tmp_path], log=print)
        assert [file.name for file in found] == ["a.json", "b.json"]
        assert [one["model"]["name"] for one in found.values()] == ["a", "b"]
        assert [file.name for file in results.load_all([tmp_path / "b.json", tmp_path], print)] == ["b.json", "a.json"]
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"has no \.json file"):
            results.load_all([tmp_path / "empty"], log=print)

    def test_a_file_given_twice_is_refused_however_it_is_written(self, tmp_path: Path) -> None:
        results.save(result("m", {}), tmp_path / "r.json")
        (tmp_path / "link.json").symlink_to("r.json")
        with pytest.raises(UserError, match=r"link\.json is given twice"):
            results.load_all([tmp_path / "r.json", tmp_path / "link.json"], log=print)

    def test_of_repeats_in_a_folder_only_the_newest_counts_and_it_is_said(self, tmp_path: Path) -> None:
        def put(name: str, hour: int, **changes: Any) -> None:
            results.save(result("m", {}, started=f"2025-03-17T{hour:02}:30:00Z", **changes), tmp_path / name)

        put("a.json", 12)
        put("b.json", 11)
        put("c.json", 13, status="partial")
        put("few.json", 10, settings={"limit": 2})
        put("other.json", 10, model={"name": "m", "digest": "1"})
        told: list[str] = []
        found = results.load_all([tmp_path], told.append)
        assert [file.name for file in found] == ["a.json", "few.json", "other.json"]
        assert len(told) == 2 and "b.json is left out: a.json" in told[0] and "c.json is left out: a.json" in told[1]
        every = sorted(tmp_path.iterdir())
        assert list(results.load_all(every, told.append)) == every, "what a person names is not left out"

    def test_a_missing_file_is_a_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError,
            match=r"There is no result .* Make results in evaluations/: plmtune eval CHECKPOINT --suite quick",
        ):
            results.load(tmp_path / "none.json")


def test_the_environment_says_what_was_measured_with() -> None:
    found = results.environment(torch.device("cpu"), torch.bfloat16)
    assert found["precision"] == "bfloat16" and found["device"] == "cpu" and found["device_name"]
    assert found["torch"] == torch.__version__ and found["lm_eval"] and found["threads"] == torch.get_num_threads()


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    """What lm-eval itself returns for a model that we know: two tasks in a group, one of texts, one of perplexity."""
    import datasets
    from lm_eval.api.group import AggMetricConfig, Group
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    class Known(LM):
        def loglikelihood(self, requests: Any) -> Any:  # prefers the answer "b"
            return [(-0.5 if request.args[1] == " b" else -1.0, False) for request in requests]

        def loglikelihood_rolling(self, requests: Any) -> Any:
            return [-2.0 * len(request.args[0]) for request in requests]

        def generate_until(self, requests: Any) -> Any:
            return [f"I say {request.args[0][-1]}. #### 4" for request in requests]

    def config(name: str, rows: list[dict[str, Any]], **more: Any) -> Any:
        data = {"test": datasets.Dataset.from_list(rows)}
        given = {"task": name, "test_split": "test", "custom_dataset": lambda **_: data, "num_fewshot": 0, **more}
        return ConfigurableTask(config={"metadata": {"version": 2.0}, **given})

    choice = {
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["a", "b"], "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    tasks = {
        "first": config("first", [{"q": f"q{i}", "gold": i % 2} for i in range(4)], **choice),
        "second": config("second", [{"q": f"r{i}", "gold": 1} for i in range(2)], **choice),
        "written": config(
            "written",
            [{"q": f"{i}", "answer": "4"} for i in range(5)],
            output_type="generate_until",
            doc_to_text="{{q}}",
            doc_to_target="answer",
            generation_kwargs={"until": ["\n"]},
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            filter_list=[
                {"name": "strict", "filter": [{"function": "regex", "regex_pattern": r"#### (\d)"},
                                              {"function": "take_first"}]},
                {"name": "loose", "filter": [{"function": "regex", "regex_pattern": r"(\d)"},
                                             {"function": "take_first"}]},
            ],
        ),
        "text": config(
            "text",
            [{"q": "one two"}, {"q": "three"}],
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{q}}",
            metric_list=[{"metric": "word_perplexity"}],
        ),
    }  # fmt: skip
    group = Group("both", aggregate_metric_list=[AggMetricConfig(metric="acc")], metadata={"version": 3})
    group.add(tasks["first"])
    group.add(tasks["second"])
    found = evaluate(Known(), {"tasks": tasks, "groups": {"both": group}}, limit=4, bootstrap_iters=10)
    assert found is not None
    return dict(found)


class TestCollect:
    def test_scores_are_lm_evals_own_with_their_errors_and_direction(self, raw: dict[str, Any]) -> None:
        tasks, _, _ = results.collect(raw)
        right = tasks["first"]["metrics"]["acc,none"]
        assert right == {"value": 0.5, "stderr": pytest.approx(math.sqrt(0.25 / 3)), "higher_is_better": True}
        assert set(tasks) == {"first", "second", "written", "text"}
        entry = tasks["written"]
        assert (entry["version"], entry["num_fewshot"], entry["samples"], entry["documents"]) == (2.0, 0, 4, 5)
        assert set(entry["metrics"]) == {"exact_match,strict", "exact_match,loose"}
        assert tasks["text"]["metrics"]["word_perplexity,none"]["higher_is_better"] is False

    def test_a_group_names_its_tasks_and_has_its_own_score(self, raw: dict[str, Any]) -> None:
        _, groups, _ = results.collect(raw)
        assert groups["both"]["tasks"] == ["first", "second"]
        assert groups["both"]["metrics"]["acc,none"]["value"] == pytest.approx(4 / 6)

    def test_a_document_is_one_row_with_the_metrics_of_all_filters(self, raw: dict[str, Any]) -> None:
        rows = results.collect(raw)[2]["written"]
        assert [row["id"] for row in rows] == [0, 1, 2, 3]
        assert rows[0]["metrics"] == {"exact_match,strict": 1.0, "exact_match,loose": 0.0}
        assert rows[0]["responses"] == ["I say 0. #### 4"]
        assert rows[0]["filtered"] == {"strict": ["4"], "loose": ["0"]}
        assert rows[0]["target"] == "4"

    def test_log_probabilities_are_pairs_and_perplexities_keep_their_words(self, raw: dict[str, Any]) -> None:
        samples = results.collect(raw)[2]
        assert samples["first"][0]["responses"] == [[-1.0, False], [-0.5, False]]
        assert samples["text"][0]["metrics"]["word_perplexity,none"] == [-14.0, 2]

    def test_the_first_three_prompts_are_kept(self, raw: dict[str, Any]) -> None:
        rows = results.collect(raw)[2]["first"]
        assert [row.get("prompt") for row in rows] == ["q0", "q1", "q2", None]

    def test_tasks_of_other_prompts_have_another_hash(self, raw: dict[str, Any]) -> None:
        tasks, _, _ = results.collect(raw)
        hashes = {entry["prompt_hash"] for entry in tasks.values()}
        assert len(hashes) == 4 and None not in hashes

    def test_what_comes_out_is_json_and_comes_back_as_it_was(self, raw: dict[str, Any], tmp_path: Path) -> None:
        tasks, groups, samples = results.collect(raw)
        whole = result("model", {}) | {"tasks": tasks, "groups": groups, "samples": samples}
        results.save(whole, tmp_path / "r.json")
        assert results.load(tmp_path / "r.json") == whole

    def test_a_number_that_is_not_finite_becomes_null(self, raw: dict[str, Any]) -> None:
        broken = raw | {"results": raw["results"] | {"first": {"acc,none": float("nan"), "acc_stderr,none": "N/A"}}}
        found = results.collect(broken)[0]["first"]["metrics"]["acc,none"]
        assert found["value"] is None and found["stderr"] is None
