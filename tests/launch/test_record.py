"""The record of a launch."""

from pathlib import Path

import pytest

from plmtune.launch.record import RECORD, Launch, find_launches, read_launch


def test_a_launch_is_read_as_it_was_written(tmp_path: Path) -> None:
    launch = Launch("slurm", "7", 2, 16, ["run", "demo"])
    launch.write(tmp_path / "runs" / "demo")
    assert read_launch(tmp_path / "runs" / "demo") == launch and launch.launched.endswith("Z")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"backend": 1, "job": 2, "nodes": 1, "processes": 1}'])
def test_a_record_that_is_none_is_no_launch(text: str, tmp_path: Path) -> None:
    assert read_launch(tmp_path) is None
    (tmp_path / RECORD).write_text(text)
    assert read_launch(tmp_path) is None


def test_launches_without_a_run_are_found_and_those_of_runs_are_not(tmp_path: Path) -> None:
    for name in ("a/1", "a/2", "b"):
        Launch("slurm", "7", 1, 1, []).write(tmp_path / name)
    assert list(find_launches(tmp_path, [tmp_path / "a" / "2"])) == [tmp_path / "a" / "1", tmp_path / "b"]
