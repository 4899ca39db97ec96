"""lm-eval's output in the form of result files."""

import math
from pathlib import Path
from typing import Any

import pytest
from made_up import result

from plmtune.evaluation import lm_eval_output, results


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
        tasks, _, _ = lm_eval_output.collect(raw)
        right = tasks["first"]["metrics"]["acc,none"]
        assert right == {"value": 0.5, "stderr": pytest.approx(math.sqrt(0.25 / 3)), "higher_is_better": True}
        assert set(tasks) == {"first", "second", "written", "text"}
        entry = tasks["written"]
        assert (entry["version"], entry["num_fewshot"], entry["samples"], entry["documents"]) == (2.0, 0, 4, 5)
        assert set(entry["metrics"]) == {"exact_match,strict", "exact_match,loose"}
        assert tasks["text"]["metrics"]["word_perplexity,none"]["higher_is_better"] is False

    def test_a_group_names_its_tasks_and_has_its_own_score(self, raw: dict[str, Any]) -> None:
        _, groups, _ = lm_eval_output.collect(raw)
        assert groups["both"]["tasks"] == ["first", "second"]
        assert groups["both"]["metrics"]["acc,none"]["value"] == pytest.approx(4 / 6)

    def test_a_document_is_one_row_with_the_metrics_of_all_filters(self, raw: dict[str, Any]) -> None:
        rows = lm_eval_output.collect(raw)[2]["written"]
        assert [row["id"] for row in rows] == [0, 1, 2, 3]
        assert rows[0]["metrics"] == {"exact_match,strict": 1.0, "exact_match,loose": 0.0}
        assert rows[0]["responses"] == ["I say 0. #### 4"]
        assert rows[0]["filtered"] == {"strict": ["4"], "loose": ["0"]}
        assert rows[0]["target"] == "4"

    def test_log_probabilities_are_pairs_and_perplexities_keep_their_words(self, raw: dict[str, Any]) -> None:
        samples = lm_eval_output.collect(raw)[2]
        assert samples["first"][0]["responses"] == [[-1.0, False], [-0.5, False]]
        assert samples["text"][0]["metrics"]["word_perplexity,none"] == [-14.0, 2]

    def test_the_first_three_prompts_are_kept(self, raw: dict[str, Any]) -> None:
        rows = lm_eval_output.collect(raw)[2]["first"]
        assert [row.get("prompt") for row in rows] == ["q0", "q1", "q2", None]

    def test_tasks_of_other_prompts_have_another_hash(self, raw: dict[str, Any]) -> None:
        tasks, _, _ = lm_eval_output.collect(raw)
        hashes = {entry["prompt_hash"] for entry in tasks.values()}
        assert len(hashes) == 4 and None not in hashes

    def test_what_comes_out_is_json_and_comes_back_as_it_was(self, raw: dict[str, Any], tmp_path: Path) -> None:
        tasks, groups, samples = lm_eval_output.collect(raw)
        whole = result("model", {}) | {"tasks": tasks, "groups": groups, "samples": samples}
        results.save(whole, tmp_path / "r.json")
        assert results.load(tmp_path / "r.json") == whole

    def test_a_number_that_is_not_finite_becomes_null(self, raw: dict[str, Any]) -> None:
        broken = raw | {"results": raw["results"] | {"first": {"acc,none": float("nan"), "acc_stderr,none": "N/A"}}}
        found = lm_eval_output.collect(broken)[0]["first"]["metrics"]["acc,none"]
        assert found["value"] is None and found["stderr"] is None
