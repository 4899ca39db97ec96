"""code_eval gives what Hugging Face's metric gives, in a sandbox."""

import importlib
import itertools
import json
import math
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from plmtune.evaluation.code_eval import CodeRunner, missing, pass_at_k, protection
from plmtune.sandbox import NoSandbox, Result, execute, run_python

HUMAN_EVAL = Path(__file__).parents[3] / "shared/data/eval/HumanEval.jsonl"
RIGHT, WRONG = "def add(a, b): return a + b", "def add(a, b): return a - b"
TEST = "assert add(2, 3) == 5"


@pytest.fixture
def runner() -> CodeRunner:
    if lacking := missing():
        pytest.skip(f"there is no sandbox here: {lacking}")
    return CodeRunner(seconds=10)


def human_eval() -> list[dict[str, str]]:
    if not HUMAN_EVAL.exists():
        pytest.skip(f"{HUMAN_EVAL} is not there")
    return [json.loads(line) for line in HUMAN_EVAL.read_text().splitlines()]


def gold_and_wrong(rows: list[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """(tests, of each problem its solution and one that returns None)."""
    tests = [f"{row['test']}\ncheck({row['entry_point']})" for row in rows]
    return tests, [[row["prompt"] + row["canonical_solution"], row["prompt"] + "    return None\n"] for row in rows]


class TestPassAtK:
    @pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 1), (5, 2, 1), (5, 2, 3), (5, 4, 3), (5, 5, 5), (6, 3, 2)])
    def test_it_is_the_share_of_draws_that_hold_a_right_sample(self, n: int, c: int, k: int) -> None:
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))

    def test_it_is_the_paper_s_product(self) -> None:
        # 1 - prod_{i = n - c + 1}^{n} (1 - k / i), as the paper computes it
        assert pass_at_k(200, 7, 10) == pytest.approx(1 - math.prod(1 - 10 / i for i in range(194, 201)))

    def test_more_draws_than_samples_are_refused(self) -> None:
        with pytest.raises(ValueError, match="pass@3 needs k from 1 to the number of samples, which is 2"):
            pass_at_k(2, 1, 3)


class TestCompute:
    def test_it_has_the_metric_s_shape(self, runner: CodeRunner) -> None:
        scores, details = runner.compute([TEST, TEST], [[WRONG, RIGHT], [WRONG, WRONG]], k=[1, 2, 10])
        assert scores == {"pass@1": 0.25, "pass@2": 0.5}
        assert details[0] == [
            (0, {"task_id": 0, "passed": False, "result": "failed: AssertionError", "completion_id": 0}),
            (1, {"task_id": 0, "passed": True, "result": "passed", "completion_id": 1}),
        ]
        assert [fact["passed"] for _, fact in details[1]] == [False, False]

    def test_a_program_is_run_once(self, runner: CodeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        ran: list[str] = []
        monkeypatch.setattr(execute, "run_python", lambda code, **how: ran.append(code) or run_python(code, **how))
        first = runner.compute([TEST], [[RIGHT, RIGHT]])
        assert runner.compute([TEST], [[RIGHT, RIGHT]]) == first
        assert ran == [RIGHT]

    def test_an_interruption_ends_what_runs(self, runner: CodeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(code: str, **how: Any) -> Result:
            if code == RIGHT:
                raise KeyboardInterrupt
            return run_python(code, **how)

        monkeypatch.setattr(execute, "run_python", interrupted)
        runner.seconds = 600.0
        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            runner.run([(RIGHT, TEST), *((f"import time\ntime.sleep(600 + {n})", TEST) for n in range(9))])
        assert threading.active_count() == before

    def test_what_cannot_be_computed_is_refused(self) -> None:
        with pytest.raises(ValueError, match="there are 1 references, but predictions for 2 problems"):
            CodeRunner().compute([TEST], [[RIGHT], [RIGHT]])
        with pytest.raises(ValueError, match="problem 0 needs a list of at least one program"):
            CodeRunner().compute([TEST], [RIGHT])

    def test_a_machine_that_cannot_isolate_is_no_failure_of_the_program(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("plmtune.sandbox.execute.platform.system", lambda: "Darwin")
        with pytest.raises(NoSandbox, match="this is Darwin"):
            CodeRunner().compute([TEST], [[RIGHT]])


class TestInstalled:
    def test_evaluate_loads_it_by_its_name_while_it_lasts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        package = types.ModuleType("evaluate")
        package.load = lambda name, **settings: f"the hub's {name}"
        monkeypatch.setitem(sys.modules, "evaluate", package)
        runner = CodeRunner()
        with runner.installed():
            assert importlib.import_module("evaluate").load("code_eval") is runner
            assert importlib.import_module("evaluate").load("rouge") == "the hub's rouge"
        assert importlib.import_module("evaluate").load("code_eval") == "the hub's code_eval"

    def test_the_package_is_imported_only_for_other_metrics(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "evaluate.py").write_text("def load(name): return f'the hub has {name}'\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "evaluate", raising=False)
        with CodeRunner().installed():
            importlib.import_module("evaluate").load("code_eval")
        assert "evaluate" not in sys.modules
        with CodeRunner().installed():
            assert importlib.import_module("evaluate").load("rouge") == "the hub has rouge"
        assert sys.modules.pop("evaluate").load("code_eval") == "the hub has code_eval"

    def test_a_kept_reference_to_the_replacement_gets_the_package_s_metrics_afterwards(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "evaluate.py").write_text("def load(name): return f'the hub has {name}'\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "evaluate", raising=False)
        with CodeRunner().installed():
            kept = importlib.import_module("evaluate")
        assert kept.load("bleu") == "the hub has bleu"
        assert sys.modules.pop("evaluate").__file__ == str(tmp_path / "evaluate.py")

    def test_the_self_test_of_lm_eval_s_tasks_starts_no_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(execute, "run_python", None)
        scores, _ = CodeRunner().compute(["assert add(2, 3)==5"], [["def add(a,b): return a*b"]], k=[1])
        assert scores == {"pass@1": 0.0}


class TestProtection:
    def test_it_says_what_there_is_and_what_there_is_not(self) -> None:
        assert "no network" in protection("namespaces")
        assert "can read, change and delete your files" in protection("limits")
        assert "2 seconds" in protection("limits", 2.0)


class TestHumanEval:
    def test_a_few_solutions_pass_and_what_returns_none_fails(self, runner: CodeRunner) -> None:
        # 32, 38, 50: their tests call functions of the prompt too.
        rows = [row for row in human_eval() if row["task_id"].split("/")[1] in ("0", "12", "32", "38", "50", "107")]
        tests, programs = gold_and_wrong(rows)
        _, details = runner.compute(tests, programs)
        assert [[fact["passed"] for _, fact in each] for each in details.values()] == [[True, False]] * 6
