"""metrics.jsonl is valid JSON whatever happens, and a resumed run's equals an undisturbed one's."""

from __future__ import annotations

import json
import resource

import pytest

from plmtune.io.metrics import MetricsFile, line, read


def write(path, first: int, last: int, *, start_step: int = 0) -> None:
    with MetricsFile(path, start_step=start_step) as file:
        for step in range(first, last):
            file.append(step, {"loss": 1 / step, "lr": 1e-3})
            if step % 2 == 0:
                file.append(step, {"validation_loss": 2 / step})


class TestLines:
    def test_one_object_a_line_with_the_step_first(self):
        assert line(7, {"loss": 1.5, "phase": "math"}) == '{"step": 7, "loss": 1.5, "phase": "math"}'

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_what_json_cannot_say_becomes_null_with_a_note(self, value):
        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        entry = json.loads(line(1, {"loss": value, "lr": 0.1}), parse_constant=refuse)
        assert entry == {"step": 1, "loss": None, "lr": 0.1, "not_finite": {"loss": str(value)}}

    def test_is_on_disk_before_the_file_is_closed(self, tmp_path):
        with MetricsFile(tmp_path / "metrics.jsonl") as file:
            file.append(1, {"loss": 2.0})
            assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


class TestFullDisk:
    def test_a_line_is_there_whole_or_not_at_all_and_is_not_lost(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        with MetricsFile(path) as file:
            file.append(1, {"loss": 2.0})
            whole = path.read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, unlimited[1]))
            try:
                for step in (2, 3):
                    with pytest.raises(OSError, match="File too large"):
                        file.append(step, {"loss": 2.0})
                    assert path.read_bytes() == whole
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            file.append(4, {"loss": 2.0})
        assert [entry["step"] for entry in read(path)] == [1, 2, 3, 4]


class TestResume:
    def test_lines_after_the_restored_step_are_written_once(self, tmp_path):
        write(tmp_path / "whole.jsonl", 1, 11)
        write(tmp_path / "resumed.jsonl", 1, 9)
        write(tmp_path / "resumed.jsonl", 7, 11, start_step=6)
        assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_a_line_torn_by_a_kill_is_dropped(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        write(path, 1, 4)
        whole = path.read_bytes()
        path.write_bytes(whole + b'\xff\n{"step": 4, "lo')
        assert [entry["step"] for entry in read(path)] == [1, 2, 2, 3]
        MetricsFile(path, start_step=4).close()
        assert path.read_bytes() == whole

    def test_a_fresh_start_in_the_same_place_begins_empty(self, tmp_path):
        write(tmp_path / "metrics.jsonl", 1, 4)
        MetricsFile(tmp_path / "metrics.jsonl", start_step=0).close()
        assert read(tmp_path / "metrics.jsonl") == []


class TestDamage:
    """What is no line of metrics is counted, with the first line and what is wrong there."""

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("garbage", "Expecting value"),
            ("[" * 100_000, "nested too deeply"),
            ("[1]", "no object with a step"),
            ('{"loss": 1}', "no object with a step"),
            ('{"step": true}', "no object with a step"),
            ('{"step": 3, "loss": "low"}', "its loss is no number"),
            ('{"step": 3, "loss": NaN}', "its loss is no number"),
            ('{"step": 3, "loss": 1e999}', "its loss is no number"),
            ("", "Expecting value"),
        ],
    )
    def test_of_a_line_is_said_and_the_others_are_read(self, tmp_path, text, why, caplog):
        path = tmp_path / "metrics.jsonl"
        path.write_text(f'{{"step": 1, "loss": 2.0}}\n{text}\n{{"step": 3, "loss": null, "phase": "a"}}\n')
        assert [entry["step"] for entry in read(path)] == [1, 3]
        assert f"{path}: 1 of 3 lines are no metrics and left out, the first of them line 2" in caplog.text
        assert why in caplog.text

    def test_a_file_that_is_gone_is_said_when_a_run_goes_on(self, tmp_path, caplog):
        MetricsFile(tmp_path / "metrics.jsonl", start_step=7).close()
        assert "metrics.jsonl is missing: what was logged up to step 7 is lost" in caplog.text
        caplog.clear()
        MetricsFile(tmp_path / "new.jsonl").close()
        assert not caplog.text
