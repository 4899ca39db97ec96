"""``plmtune runs``: every run is listed with how it stands, in tables that fit."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import begin_run, run, save_small

from plmtune.cli import cli
from plmtune.cli.checkpoints import _find
from plmtune.cli.runs_comparison import compared_table
from plmtune.cli.runs_table import reasons, table
from plmtune.errors import UserError
from plmtune.io import manifest
from plmtune.io.run_comparison import Score, read_rows, set_score
from plmtune.io.run_directory import RunDirectory
from plmtune.io.run_summary import differing_settings, find_runs, summarize
from plmtune.io.signals import EXIT_STOPPED
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.training.init_from import init_checkpoint_directory


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs that ended in every way, and one that runs."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/pretrain")
    with begin_run(folder / "20260101-000000", 1200):
        pass
    with pytest.raises(UserError), begin_run(folder / "20260101-000001", 7):
        raise UserError("The disk is full. Make room.")
    with pytest.raises(SystemExit), begin_run(folder / "20260101-000002", 300, lr=0.2):
        raise SystemExit(EXIT_STOPPED)
    begin_run(folder / "20260101-000003").close()  # as the kernel does for a process that dies
    with begin_run(folder / "20260101-000004", 12):
        yield tmp_path


class TestRuns:
    def test_each_is_listed_with_its_state(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = run(monkeypatch, capsys, "runs", "--json")
        assert code == 0
        listed = json.loads(out)
        assert [one["status"] for one in listed] == ["finished", "failed", "stopped", "killed", "running"]
        assert [one["step"] for one in listed] == [1200, 7, 300, None, 12]
        assert [one["loss"] for one in listed[:2]] == [4.5, 4.993]
        assert (listed[0]["bits_per_byte"], listed[0]["parameters"], listed[0]["steps"]) == (2.25, 1_430_000, 1200)
        assert listed[1]["reason"] == "The disk is full. Make room."
        assert all(one["seconds"] is not None for one in listed)

    @pytest.mark.parametrize("width", [60, 80, 120])
    def test_the_table_fits_and_keeps_paths_states_times_and_settings(self, place: Path, width: int) -> None:
        paths = find_runs(Path("runs"))
        found = [summarize(path) for path in paths]
        assert reasons(found) == [f"{paths[1]}: The disk is full"]
        lines = table(found, differing_settings(paths)).lines(width)
        assert all(len(line) <= width for line in lines)
        words = " ".join(lines).split()
        assert {*map(str, paths), "finished", "failed", "stopped", "killed", "running", "time"} <= {*words}
        assert words.count("optimizer.lr=0.1") == 4 and words.count("optimizer.lr=0.2") == 1

    def test_the_step_of_the_newest_checkpoint_stands_beside_the_last_one_that_was_logged(self, place: Path) -> None:
        for step in (100, 200):
            manifest.step_path(Path("runs/pretrain/20260101-000002/checkpoints"), step).mkdir(parents=True)
        found = [summarize(path) for path in find_runs(Path("runs"))]
        assert [(one.step, one.saved_step) for one in found][1:4] == [(7, None), (300, 200), (None, None)]
        assert table(found).lines()[3].split()[5:7] == ["300/1,200", "200"]

    def test_a_pipe_gets_all_of_it(self, place: Path) -> None:
        paths = find_runs(Path("runs"))
        rows = table([summarize(path) for path in paths], differing_settings(paths)).lines()[1:]
        wanted = [str(paths[0]), "finished", "pretrain", "plm", "1.43M", "1,200/1,200", "4.5000", "2.2500"]
        assert rows[0].split()[:8] == wanted and rows[0].endswith("optimizer.lr=0.1")
        assert rows[2].endswith("optimizer.lr=0.2")

    def test_what_cannot_be_read_leaves_gaps_and_stops_nothing(self, place: Path) -> None:
        bad = place / "runs/pretrain/20260101-000000"
        (bad / "config.yaml").write_text("[: {")
        (bad / "metrics.jsonl").write_bytes(b"\xff\x00\n[1]\n")
        one = summarize(bad)
        assert (one.status, one.recipe, one.step) == ("finished", "", None)
        (bad / "run.json").write_text("{")
        assert summarize(bad).status == "unknown"

    def test_the_same_run_is_not_listed_by_its_links(self, place: Path) -> None:
        assert {path.name for path in Path("runs/pretrain").iterdir()} >= {"newest", "latest"}
        assert len(find_runs(Path("runs"))) == 5
        assert find_runs(Path("runs/pretrain/latest")) == [Path("runs/pretrain/latest")]

    @pytest.mark.parametrize(
        ("directory", "part"), [("nowhere", "There is no directory nowhere"), ("empty", "no runs")]
    )
    def test_without_runs_it_says_so(
        self,
        place: Path,
        directory: str,
        part: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        Path("empty").mkdir()
        code, _, err = run(monkeypatch, capsys, "runs", directory)
        assert code == 2 and part in err


class TestComparing:
    """Runs of a sweep: three shapes that finished, and one that was killed."""

    @pytest.fixture
    def sweep(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        # Latent attention and a squared-ReLU FFN of bytes; the last one has no checkpoint.
        config = (
            "recipe: pretrain\ntokenizer: {component: byte}\nmodel: {component: plm, num_layers: %d, embed_dim: %d,"
            " num_heads: 2, max_seq_len: 64}\n"
        )
        for number, (layers, width) in enumerate([(1, 64), (2, 48), (3, 32), (4, 32), (5, 16)]):
            found = RunDirectory.create(Path("a" if number < 2 else "b") / str(number), config % (layers, width), ["x"])
            found.update(parameters=1000 + number, num_steps=9)
            found.metrics.write_text(
                json.dumps({"step": 9, "tokens": 900, "validation_loss": 3 - layers / 8, "bits_per_byte": layers})
                + "\n"
            )
            if number == 4:
                found.close()
            else:
                with found:
                    pass
        return tmp_path

    def test_shows_scores_speeds_and_correlations_and_writes_files(
        self, sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("runs", "a", "b", "--device", "pi5", "--sort", "speed:desc")
        code, out, _ = run(monkeypatch, capsys, *words, "--csv", "runs.csv", "--plot", "runs.png")
        assert code == 0
        assert "Predicted decode on Raspberry Pi 5, 8 GB: int4 in plmtune, 64 tokens of context" in out
        lines = out.splitlines()
        rows = [line.split() for line in lines if line.startswith(("a/", "b/"))]
        assert [row[0] for row in rows] == ["a/0", "a/1", "b/2", "b/3", "b/4"]
        assert rows[4][1] == "killed" and rows[1][2:5] == ["2", "x", "48"]
        assert "4 finished runs. Left out: 1 run not finished." in out
        assert ["model.num_layers", "-1.000", "4"] in [line.split() for line in lines]
        assert ["predicted", "tokens/s", "+1.000", "4"] in [line.split() for line in lines]
        assert "the fastest first: 1 x 64, 2 x 48, 3 x 32, 4 x 32" in out
        assert len(Path("runs.csv").read_text().splitlines()) == 6
        assert Path("runs.png").read_bytes().startswith(b"\x89PNG")

    def test_json_has_the_same(
        self, sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("runs", "a", "b", "--score", "bits_per_byte", "--filter", "layers<=4", "--json")
        code, out, _ = run(monkeypatch, capsys, *words)
        found = json.loads(out)
        assert code == 0 and found["score"] == {"key": "bits_per_byte", "lower_is_better": True}
        assert [one["score"] for one in found["runs"]] == [1, 2, 3, 4]
        assert found["runs"][1]["differing"] == {"model.num_layers": 2, "model.embed_dim": 48}
        assert found["correlations"]["runs"] == 4 and found["device"] is None

    def test_without_a_validation_speeds_are_shown_all_the_same(
        self, sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for path in sweep.glob("*/*/metrics.jsonl"):
            path.write_text('{"step": 9, "loss": 1.0}\n')
        code, out, _ = run(monkeypatch, capsys, "runs", "a", "--device", "pi5")
        assert code == 0 and "No rank correlations with validation_loss: 0 runs finished with a score" in out

    @pytest.mark.parametrize("width", [60, 100])
    def test_the_table_fits(self, sweep: Path, width: int) -> None:
        rows = read_rows(find_runs(sweep))
        set_score(rows, Score.parse("bits_per_byte"))
        lines = compared_table(rows, Score.parse("bits_per_byte"), None)[0].lines(width)
        assert all(len(line) <= max(width, len(str(sweep)) + 4) for line in lines)
        assert "bits_per_byte" in " ".join(lines)

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("--score", "bits_per_bite"), "Did you mean bits_per_byte?"),
            (("--device", "pi6"), "There is no device pi6"),
            (("--device", "pi5", "--scheme", "int9"), "no scheme int9"),
            (("--device", "pi5", "--context", "999"), "takes 64 tokens at most"),
            (("--scheme", "int8"), "--scheme counts with --device"),
            (("--filter", "layers>9"), "it holds for none of 5 runs"),
            (("--csv", "runs.txt"), "must be a .csv file"),
            (("--plot", "runs.png", "--filter", "status=killed"), "no run is finished and has validation_loss"),
        ],
    )
    def test_mistakes_are_sentences(
        self,
        sweep: Path,
        words: tuple[str, ...],
        says: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        before = sorted(sweep.iterdir())
        code, _, err = run(monkeypatch, capsys, "runs", ".", *words)
        assert code == 2 and says in err and "Traceback" not in err
        assert sorted(sweep.iterdir()) == before


class TestARunWithoutAModel:
    @pytest.mark.parametrize(
        ("number", "parts"),
        [
            (0, ["is a finished run, and its checkpoints are gone"]),
            (
                1,
                ["failed at step 7 of 1,200 (The disk is full. Make room.)", "Resume it: plmtune resume runs/pretrain"],
            ),
            (2, ["was stopped at step 300 of 1,200, before it saved a model", "plmtune resume runs/pretrain"]),
            (3, ["was killed, before it saved a model", "plmtune resume runs/pretrain"]),
            (4, ["is running at step 12 of 1,200 and has saved no model yet"]),
        ],
    )
    @pytest.mark.parametrize("read", [checkpoint_directory, init_checkpoint_directory, _find])
    def test_says_how_it_stands(self, place: Path, number: int, parts: list[str], read: Callable[[Any], Any]) -> None:
        with pytest.raises(UserError) as caught:
            read(Path(f"runs/pretrain/20260101-00000{number}"))
        for part in parts:
            assert part in str(caught.value)

    def test_where_none_has_finished_the_newest_is_named(self, place: Path) -> None:
        Path("runs/pretrain/latest").unlink()
        with pytest.raises(UserError, match=r"no run in runs/pretrain has finished. The newest is running at step 12"):
            checkpoint_directory("runs/pretrain/latest")
        Path("runs/pretrain/latest").symlink_to("gone")
        with pytest.raises(UserError, match=r"runs/pretrain/latest leads to gone, which was removed"):
            checkpoint_directory("runs/pretrain/latest")


class TestReadingARunThatDidNotFinish:
    @pytest.mark.parametrize(
        ("number", "said"),
        [(0, ""), (1, "failed at step 7"), (2, "was stopped at step 300"), (3, "was killed"), (4, "")],
    )
    @pytest.mark.parametrize("read", [checkpoint_directory, init_checkpoint_directory])
    def test_which_checkpoint_is_used_is_said_once(
        self, place: Path, number: int, said: str, read: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = Path(f"runs/pretrain/20260101-00000{number}")
        manifest.write(save_small(manifest.step_path(run / "checkpoints", 5)), 5, {})
        for _ in range(2):
            assert read(run) == run / "checkpoints/step-00000005"
        read(run / "checkpoints/step-00000005")  # named by itself: nothing is to be said
        err = " ".join(capsys.readouterr().err.split())
        if said:
            at = " of 1,200" if "step" in said else ""
            wanted = f"{run} {said}{at}: using its checkpoint of step 5. Resume it: plmtune resume {run}"
            assert err == wanted
        else:
            assert err == ""


class TestResumeWithoutAName:
    def test_the_newest_unfinished_run_is_taken(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, err = run(monkeypatch, capsys, "resume", "log_every=5")
        assert err.startswith("resuming runs/pretrain/20260101-000003\n") and code == 2  # its config is none

    def test_several_processes_are_to_name_it(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from plmtune.cli import cli

        monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
        with pytest.raises(UserError, match="Name the run to resume"):
            cli.main(["resume"], standalone_mode=False)

    def test_a_finished_run_says_how_to_train_further(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, _ = run(monkeypatch, capsys, "resume", "runs/pretrain/latest")
        path = "runs/pretrain/20260101-000000"
        assert code == 0 and out.startswith(f"{path} is finished: there is nothing to resume.")
        assert out.strip().endswith(f"plmtune run pretrain model=plm init_from={path}")


@pytest.mark.parametrize("command", ["runs", "card"])
@pytest.mark.parametrize("damage", ["gone", "garbage"])
def test_metrics_that_are_gone_or_garbage_are_said(
    command: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with begin_run(Path("one"), 100) as found:
        directory = save_small(found.path / "checkpoints/step-00000100")
        manifest.write(directory, 100, {})
        found.metrics.write_text("garbage\n" * 3)
        if damage == "gone":
            found.metrics.unlink()
    cli.main([command, "one"], standalone_mode=False)
    assert ("metrics.jsonl is missing" if damage == "gone" else "3 of 3 lines are no metrics") in caplog.text
