"""Result files: written, read back and checked."""

import json
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
