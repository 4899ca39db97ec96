"""What is given to Slurm."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_commands import install, only

from plmtune.errors import UserError
from plmtune.launch.slurm import minutes_of, refuse_without_slurm, settings_of, submit

pytest.importorskip("submitit")

COMMAND = ["run", "demo", "phases=[{name: main, steps: 9}]", "run_dir=runs/x", "resume=true"]
SUBMITTED = {"sbatch": 'echo "Submitted batch job 7"', "srun": ":"}


def script(tmp_path: Path) -> str:
    return (tmp_path / "runs/x/ranks/7_submission.sh").read_text()


class TestSubmit:
    @pytest.fixture(autouse=True)
    def slurm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        install(tmp_path, monkeypatch, **SUBMITTED)

    def submit(self, **settings: object) -> str:
        sizes = {"nodes": 2, "processes": 16, "minutes": 480} | settings
        return submit(COMMAND, Path("runs/x"), name="demo", **sizes)  # type: ignore[arg-type]

    def test_the_number_of_the_job_is_returned(self) -> None:
        assert self.submit() == "7"

    def test_each_task_runs_the_command_itself(self, tmp_path: Path) -> None:
        self.submit()
        (line,) = [line for line in script(tmp_path).splitlines() if line.startswith("srun")]
        assert shlex.split(line)[-len(COMMAND) - 1 :] == ["plmtune.launch.slurm_task", *COMMAND]
        assert sys.executable in line and not list(tmp_path.rglob("*.pkl"))

    def test_sizes_limits_and_resources_are_options_of_sbatch(self, tmp_path: Path) -> None:
        self.submit(gpus=True, cpus=4, memory_gb=1.5, partition="gpu", account="lab", stop_before=5,
                    sbatch={"reservation": "night"})  # fmt: skip
        lines = script(tmp_path).splitlines()
        for option in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=4", "mem=1536M", "time=480",
                       "partition=gpu", "account=lab", "signal=USR1@300", "reservation=night", "requeue"):  # fmt: skip
            assert f"#SBATCH --{option}" in lines

    def test_each_rank_writes_a_file_in_the_run_directory(self, tmp_path: Path) -> None:
        self.submit()
        assert f"--output {tmp_path}/runs/x/ranks/%j_%t_log.out" in script(tmp_path)

    def test_what_slurm_refuses_is_one_sentence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said = "sbatch: error: invalid partition specified: gpux"
        install(tmp_path, monkeypatch, sbatch=f"echo '{said}' >&2; exit 1")
        with pytest.raises(UserError, match=r"^Slurm refused the job: .*invalid partition specified: gpux"):
            self.submit(partition="gpux")


class TestRequeue:
    """The end of the batch script, run by bash with commands that answer as Slurm's would."""

    def end(
        self, place: Path, patch: pytest.MonkeyPatch, code: int, state: str, restarts: str = "0"
    ) -> tuple[int, bool]:
        """(exit code of the job, whether it was queued again) after srun has ended with `code`."""
        patch.chdir(place)
        answers = {**SUBMITTED, "srun": f"exit {code}", "squeue": f"echo {state}", "scontrol": ":"}
        bin = install(place, patch, **answers)
        submit(COMMAND, Path("runs/x"), name="demo", nodes=1, processes=2, minutes=60, requeues=3)
        patch.setenv("SLURM_JOB_ID", "7")
        patch.setenv("SLURM_RESTART_COUNT", restarts)
        done = subprocess.run(["bash", "runs/x/ranks/7_submission.sh"], check=False, capture_output=True)
        return done.returncode, (bin / "scontrol.given").exists()

    @pytest.mark.parametrize("code", [75, 138, 143])
    def test_a_run_that_a_signal_stopped_is_queued_again(
        self, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.end(tmp_path, monkeypatch, code, "RUNNING") == (code, True)

    @pytest.mark.parametrize("code", [0, 1, 2, 137])
    def test_a_run_that_ended_or_failed_is_not(
        self, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.end(tmp_path, monkeypatch, code, "RUNNING") == (code, False)

    def test_a_cancelled_job_is_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.end(tmp_path, monkeypatch, 75, "COMPLETING") == (75, False)

    def test_the_number_of_times_is_limited(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.end(tmp_path, monkeypatch, 75, "RUNNING", "3") == (75, False)


class TestMistakes:
    def test_a_machine_without_slurm_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        only(tmp_path, monkeypatch)
        with pytest.raises(UserError, match="Slurm is not installed here: there is no sbatch"):
            refuse_without_slurm()

    def test_an_installation_without_submitit_names_its_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install(tmp_path, monkeypatch, **SUBMITTED)
        monkeypatch.setitem(sys.modules, "submitit", None)
        with pytest.raises(UserError, match=r"submitit \(extra slurm\), which is not installed"):
            refuse_without_slurm()

    @pytest.mark.parametrize(("text", "minutes"), [("90m", 90), ("8h", 480), ("1d12h", 2160), ("2h30m", 150)])
    def test_times_have_units(self, text: str, minutes: int) -> None:
        assert minutes_of(text, "--time") == minutes

    @pytest.mark.parametrize("text", ["", "8", "8:00:00", "h", "0m", "-8h"])
    def test_a_time_without_is_refused(self, text: str) -> None:
        with pytest.raises(UserError, match="must be a time such as 90m"):
            minutes_of(text, "--time")

    def test_options_of_sbatch_are_keys_and_values(self) -> None:
        assert settings_of(["reservation=night", "--exclusive"]) == {"reservation": "night", "exclusive": True}
        with pytest.raises(UserError, match="KEY=VALUE"):
            settings_of(["two words"])
