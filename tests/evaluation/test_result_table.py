"""Tables of results."""

from pathlib import Path
from typing import Any

import pytest
from made_up import result, task

from plmtune.evaluation import result_table
from plmtune.io.tables import Table
from plmtune.io.terminal import wrap


def shown(*found: dict[str, Any], width: int = 120, **options: Any) -> str:
    return "\n".join(
        "\n".join(block.lines(width) if isinstance(block, Table) else wrap(block, width))
        for block in result_table.table(found, **options)
    )


class TestTable:
    def test_metrics_come_with_error_direction_and_filter(self) -> None:
        text = shown(result("m", {"gsm8k": task([0, 1, 1, 1], metric="exact_match,strict-match")}))
        assert "0.7500 ± 0.2500" in text
        assert "exact_match (strict-match) ↑" in text

    def test_two_results_stand_side_by_side_and_more_below_each_other(self) -> None:
        a, b = result("a", {"t": task([0, 1])}), result("b", {"t": task([1, 1])})
        row = next(line for line in shown(a, b).splitlines() if line.startswith("t "))
        assert "0.5000" in row and "1.0000" in row
        rows = [line for line in shown(a, b, result("c", {"t": task([0, 0])})).splitlines() if "±" in line]
        assert [line.split()[-4] for line in rows] == ["A", "B", "C"]

    def test_above_several_stands_what_each_is_and_two_fit_80_columns(self) -> None:
        long = result("pretrain-20250317-093000-step6", {"arc_challenge": task([0, 1])}, settings={"limit": 2})
        files = [Path("evaluations/base.json"), Path("evaluations/tuned.json")]
        lines = shown(long, long, files=files, width=80).splitlines()
        assert lines[0].rstrip() == "A  evaluations/base.json · limit 2 · 2025-03-17 09:30"
        assert lines[1].startswith("B  evaluations/tuned.json")
        assert lines[3].split() == ["task", "shots", "metric", "n", "A", "B"]
        assert any(line.split().count("±") == 2 for line in lines)
        assert shown(long, long).startswith("A  pretrain-20250317-093000-step6 · limit 2 · 2025-03-17 09:30")
        assert "·" not in shown(long)

    def test_a_group_hides_its_tasks_until_all_are_asked_for(self) -> None:
        entry, _ = task([0, 1])
        group = {"sum": {**entry, "tasks": ["one", "two"]}}
        whole = result("m", {"one": task([0, 0]), "two": task([1, 1]), "other": task([0, 1])}, groups=group)
        names = [line.split()[0] for line in shown(whole).splitlines() if "±" in line]
        assert names == ["sum", "other"]
        names = [line.split()[0] for line in shown(whole, all_tasks=True).splitlines() if "±" in line]
        assert names == ["sum", "one", "two", "other"]

    def test_what_failed_is_there_with_the_first_sentence_of_why(self) -> None:
        text = shown(result("m", {}, failed={"humaneval": "[no] data. Fetch it:\n  plmtune fetch"}))
        assert text.endswith("humaneval failed: [no] data.") and "etch" not in text
        text = shown(result("m", {}, failed={"humaneval": "no data" + " word" * 100}))
        assert "…" in text and text.count("word") < 20

    def test_counts_that_differ_are_all_shown(self) -> None:
        text = shown(result("a", {"t": task([0, 1])}), result("b", {"t": task([0, 1, 1])}))
        assert "2/3" in text

    @pytest.mark.parametrize(
        ("name", "step", "label"),
        [
            ("m", 100, "m, step 100"),
            ("run-step100", 100, "run-step100"),
            ("run-step1000", 100, "run-step1000, step 100"),
            ("step-00000100", 100, "step-00000100"),
            ("m", None, "m"),
        ],
    )
    def test_a_lone_result_has_its_models_name_and_says_the_step_once(
        self, name: str, step: int | None, label: str
    ) -> None:
        assert result_table.labels([result(name, {}, model={"name": name, "step": step})]) == [label]

    def test_a_group_that_holds_itself_ends(self) -> None:
        entry, _ = task([0, 1])
        loop = {"g": {**entry, "tasks": ["h"]}, "h": {**entry, "tasks": ["g"]}, "top": {**entry, "tasks": ["g"]}}
        assert "top" in shown(result("m", {}, groups=loop), all_tasks=True)
