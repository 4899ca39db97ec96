"""``plmtune launch``: what it refuses before anything is started, and what it records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from in_process import run as run_plmtune
from slurm_commands import install

RUN = ["run", "demo", "model=plm_tiny", "tokenizer=byte", "data=files", "data.paths=[a.txt]", "seq_len=32",
       "global_batch_size=4", "phases=[{name: main, steps: 3}]"]  # fmt: skip


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text of a person " * 400)
    return lambda *words: run_plmtune(monkeypatch, capsys, "launch", *words)


def slurm(place: Path, patch: pytest.MonkeyPatch) -> None:
    install(place, patch, sbatch='echo "Submitted batch job 7"', srun=":", squeue="echo '7|PENDING|Resources|'")


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["slurn", *RUN], "there is no command slurn. Did you mean slurm?"),
            (["local", "--processes", "2", "eval", "x"], "write run NAME [FILE.yaml] [KEY=VALUE] at the end, not eval"),
            (["local", "--processes", "2"], "write run NAME [FILE.yaml] [KEY=VALUE] at the end."),
            (["local", *RUN], "--processes is missing, and there is no GPU"),
            (["local", "--processes", "0", *RUN], "--processes: must be at least 1"),
            (["local", "--processes", "2", "run", "-m", "demo", "seed=1,2"], "starts one run"),
            (["local", "--processes", "2", *RUN, "--dry-run"], "--dry-run needs one process"),
            (["local", "--processes", "2", "run", "pretran"], "There is no config pretran"),
            (["local", "--processes", "2", *RUN, "optimizer.lrr=1"], "optimizer.lrr"),
            (["local", "--processes", "3", *RUN], "4 sequences do not divide among 3 processes"),
            (["local", "--processes", "2", *RUN, "runtime.strategy=none"], "cannot train one model on 2 processes"),
            (["local", "--processes", "2", "run", "quantize"], "runs in one process"),
            (["slurm", "--nodes", "2", "--processes", "3", "--time", "1h", *RUN], "do not divide among --nodes 2"),
            (["slurm", "--processes", "2", "--time", "8", *RUN], "must be a time such as 90m"),
            (["slurm", "--processes", "2", "--time", "2m", *RUN], "--stop-before 2m must be shorter than --time 2m"),
            (
                ["kubernetes", "--processes", "2", "--image", "i", "--volume", "v", "--write", "x.txt", *RUN],
                ".yaml file",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_is_one_sentence(self, words: list[str], said: str, launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        code, _, err = launch(*words)
        assert code == 2 and said in err and "Traceback" not in err, err

    def test_slurm_that_is_not_installed_is_named(self, launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        code, _, err = launch("slurm", "--processes", "2", "--time", "1h", *RUN)
        assert code == 2 and "Slurm is not installed here: there is no sbatch on the PATH" in err

    def test_a_launch_inside_of_torchrun_is_refused(self, launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        code, _, err = launch("local", "--processes", "2", *RUN)
        assert code == 2 and "not under torchrun or another launch" in err

    def test_a_config_is_refused_before_a_job_is_submitted(
        self, launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("submitit")
        slurm(tmp_path, monkeypatch)
        code, _, err = launch("slurm", "--processes", "3", "--time", "1h", *RUN)
        assert code == 2 and "do not divide among 3 processes" in err
        assert not (tmp_path / "bin/sbatch.given").exists() and not (tmp_path / "runs/demo").exists()


def test_a_job_is_submitted_recorded_and_shown_in_the_queue(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    slurm(tmp_path, monkeypatch)
    code, out, err = launch("slurm", "--processes", "2", "--time", "1h", *RUN, "run_dir=runs/x")
    assert code == 0 and "Job 7 is queued: runs/x" in out, err
    record = json.loads((tmp_path / "runs/x/launch.json").read_text())
    assert record["job"] == "7" and record["command"] == [*RUN, "run_dir=runs/x", "resume=true"]
    _, out, _ = run_plmtune(monkeypatch, capsys, "runs")
    assert "runs/x" in out and "not begun" in out and "job 7: queued (Resources)" in out


def test_a_task_is_written_and_nothing_is_submitted(launch: Any, tmp_path: Path) -> None:
    words = ["--nodes", "2", "--processes", "4", "--accelerators", "H100", "--write", "task.yaml"]
    code, out, err = launch("skypilot", *words, *RUN)
    assert code == 0 and "sky jobs launch task.yaml" in out, err
    task = yaml.safe_load((tmp_path / "task.yaml").read_text())
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:2"


def test_data_of_another_machine_is_not_looked_for_with_no_check(launch: Any, tmp_path: Path) -> None:
    words = ["kubernetes", "--processes", "2", "--image", "i", "--volume", "v", "--write", "job.yaml"]
    elsewhere = [word.replace("a.txt", "there.txt") for word in RUN]
    assert launch(*words, *elsewhere)[0] == 2
    code, _, err = launch(*words, "--no-check", *elsewhere)
    assert code == 0 and (tmp_path / "job.yaml").is_file(), err
