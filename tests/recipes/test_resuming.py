"""What may change when a run goes on, what may not, and how it is known."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runs import SMALL, command, environment, metrics, refusal, start, stop_at, weights

from plmtune.cli import cli
from plmtune.config import compose, typed_config
from plmtune.errors import UserError
from plmtune.io import checksummed_json
from plmtune.io.manifest import digest
from plmtune.io.run_directory import RunDirectory


def plmtune(*arguments: str) -> None:
    """The command line, in this process."""
    cli.main(list(arguments), standalone_mode=False)


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        plmtune(*arguments)
    return str(caught.value)


def record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text()))


def damage(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.fixture
def begun(place: Path) -> Path:
    """A run that has begun and not trained: enough for what is refused before torch is imported."""
    RunDirectory.create(
        place / "run", typed_config.to_yaml(compose.compose("pretrain", (), SMALL)), ["plmtune"]
    ).close()
    return place / "run"


class TestOverrides:
    def test_free_keys_apply_and_are_noted_and_the_config_stays(
        self, place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, 6, "run_dir=run")
        before = (place / "run/config.yaml").read_bytes()
        plmtune("resume", "run", "checkpoint={every: 4, keep: 0}", "logger=tensorboard", "micro_batch_size=4")
        assert (place / "run/checkpoints/step-00000008").is_dir()
        assert (place / "run/tensorboard").is_dir()
        assert (place / "run/config.yaml").read_bytes() == before
        last = record(place / "run")["attempts"][-1]
        assert last["step"] == 6
        assert last["changed"] == {
            "checkpoint.every": [3, 4], "logger.component": ["jsonl", "tensorboard"], "micro_batch_size": [2, 4],
        }  # fmt: skip
        run, undisturbed = ([e["loss"] for e in metrics(path) if "loss" in e] for path in (place / "run", whole))
        assert run == pytest.approx(undisturbed, rel=1e-5)

    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("optimizer.lr=0.5", ["optimizer.lr=0.0003, not 0.5", "init_from=run"]),
            ("seed=2", ["seed=1, not 2", "decides what a run learns"]),
            ("model/ffn=swiglu", ["model.ffn"]),
            ("data.paths=[other]", ["data.paths", "--allow-data-change"]),
            ("init_from=other", ["init_from", "has begun"]),
            ("run_dir=other", ["run_dir", "has begun"]),
            ("checkpoint.evry=1", ["checkpoint.evry", "Did you mean checkpoint.every?"]),
            ("log_every=often", ["log_every", "often"]),
            ("logger=tensorbord", ["logger", "tensorbord", "tensorboard"]),
            ("checkpoint.every=1,2", ["checkpoint.every=1,2", "one value"]),
            ("~guard", ["~guard"]),
            ("more", ["more", "key=value"]),
        ],
    )
    def test_other_keys_are_refused_with_what_to_do(self, begun: Path, override: str, parts: list[str]) -> None:
        said = refused("resume", "run", override)
        for part in parts:
            assert part in said, said

    def test_the_same_command_with_another_config_names_the_key(self, begun: Path) -> None:
        said = refusal("run_dir=run", "optimizer.lr=0.5", "resume=true")
        assert "optimizer.lr" in said and "0.5" in said and "init_from" in said


class TestConfig:
    def test_one_that_was_changed_is_refused_by_name(self, begun: Path) -> None:
        damage(begun / "config.yaml", "lr: 0.0003", "lr: 0.0007")
        for said in (refused("resume", "run"), refusal("run_dir=run", "resume=true")):
            assert "run/config.yaml is not what the run began with" in said and "init_from=run" in said

    def test_a_lost_record_is_made_up_for_by_the_checkpoint(
        self, place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        stop_at(monkeypatch, 6, "run_dir=run")
        (place / "run/run.json").write_text('{"status"')
        plmtune("resume", "run")
        assert "run/run.json is missing or damaged: the checkpoint says" in caplog.text
        assert metrics(place / "run") == metrics(whole)
        assert weights(place / "run") == weights(whole)
        mended = record(place / "run")
        assert mended["config"] == digest(place / "run/config.yaml")
        assert mended["data"] == record(whole)["data"]

    @pytest.mark.parametrize("record_is", ["damaged", "missing"])
    def test_a_lost_record_does_not_let_other_things_pass(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, record_is: str
    ) -> None:
        stop_at(monkeypatch, 3, "run_dir=run")
        if record_is == "damaged":
            (place / "run/run.json").write_bytes(b"\xff\x00")
        else:
            (place / "run/run.json").unlink()
        (place / "corpus/00.txt").write_text("another text")
        assert "source files has changed" in refused("resume", "run")
        damage(place / "run/config.yaml", "lr: 0.0003", "lr: 0.0007")
        assert "run/config.yaml is not what the run began with, says its checkpoint" in refused(
            "resume", "run", "--allow-data-change"
        )

    def test_a_fingerprint_that_was_garbled_in_the_record_stops_nothing(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, 3, "run_dir=run")
        seen = record(place / "run")["data"]["files"]
        damage(place / "run/run.json", seen, seen[::-1])
        plmtune("resume", "run")
        assert record(place / "run")["data"]["files"] == seen

    def test_without_any_record_a_run_resumes_and_warns(self, begun: Path, caplog: pytest.LogCaptureFixture) -> None:
        (begun / "run.json").unlink()
        plmtune("resume", "run")
        assert "nothing says what config and data the run began with" in caplog.text

    def test_the_newest_run_is_passed_over_if_its_config_was_changed(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        stop_at(monkeypatch, 3)
        (run,) = place.glob("runs/pretrain/[0-9]*")
        damage(run / "config.yaml", "lr: 0.0003", "lr: 0.0007")
        assert "no unfinished run" in refusal("resume=true")
        assert "Skipped: " in caplog.text


class TestFromAnotherDirectory:
    def test_relative_paths_are_those_of_where_the_run_began(
        self, place: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, 6)
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        monkeypatch.chdir(elsewhere)
        plmtune("resume", str(place / "runs/pretrain/newest"))
        assert weights(place / "runs/pretrain/latest") == weights(whole)
        assert not list(elsewhere.iterdir())

    def test_a_copy_of_everything_uses_what_is_around_it(
        self, place: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, 6)
        copy = tmp_path_factory.mktemp("elsewhere") / "copy"
        shutil.copytree(place, copy, symlinks=True)
        (place / "corpus/00.txt").write_text("another text")
        monkeypatch.chdir(copy)
        plmtune("resume")
        assert weights(copy / "runs/pretrain/latest") == weights(whole)
        assert not (place / "runs/pretrain/latest").exists()


class TestData:
    def test_other_text_is_refused_or_noted(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        stop_at(monkeypatch, 5, "run_dir=run")
        before = record(place / "run")["data"]["files"]
        (place / "corpus/00.txt").write_text("another text")
        said = refused("resume", "run")
        assert "the text of source files has changed" in said and "--allow-data-change" in said
        assert len(record(place / "run")["attempts"]) == 1
        stop_at(monkeypatch, 8, "run_dir=run", "resume=true", "allow_data_change=true")
        assert "source files has changed since the run began; resuming all the same" in caplog.text
        now = record(place / "run")
        assert now["data"]["files"] != before
        assert now["attempts"][-1]["changed_data"] == {"files": [before, now["data"]["files"]]}
        assert now["attempts"][-1]["step"] == 5
        plmtune("resume", "run")  # what it saw last is its data now
        assert [e["step"] for e in metrics(place / "run") if "loss" in e] == list(range(1, 13))

    def test_sources_that_are_new_or_gone_are_named(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = ["data=mix", "data.sources={a: {component: files, paths: [corpus/0*.txt]}, "
                             "b: {component: files, paths: [corpus/1*.txt]}}"]  # fmt: skip
        then = ["data=mix", "data.sources={a: {component: files, paths: [corpus/0*.txt]}, "
                            "c: {component: files, paths: [corpus/2*.txt]}}"]  # fmt: skip
        stop_at(monkeypatch, 3, "run_dir=run", *first)
        assert "data.sources" in refusal("run_dir=run", "resume=true", *then)
        start("run_dir=run", "resume=true", "allow_data_change=true", *then)
        changed = record(place / "run")["attempts"][-1]["changed_data"]
        assert changed.keys() == {"b", "c"}
        assert changed["b"][1] is None and changed["c"][0] is None

    def shard(self, place: Path) -> Path:
        (found,) = place.glob("runs/data/files-*/train-00000.bin")
        return found

    def vouch(self, shard: Path) -> None:
        """Let the manifest say that the shard is what it should be, as no accident would."""
        path = shard.with_name("manifest.json")
        content = checksummed_json.loads(path.read_bytes())
        content["splits"]["train"]["shards"][0]["xxh3"] = digest(shard)
        path.write_bytes(checksummed_json.dumps(content))

    @pytest.mark.parametrize(
        ("kind", "part"),
        [("truncated", "is truncated"), ("garbled", "is damaged"), ("swapped", "is damaged"), ("replaced", "changed")],
    )
    def test_shards_that_are_not_what_they_were_are_named(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, kind: str, part: str
    ) -> None:
        stop_at(monkeypatch, 3, "run_dir=run")
        shard = self.shard(place)
        data = bytearray(shard.read_bytes())
        if kind == "truncated":
            shard.write_bytes(data[:-2])
        elif kind == "garbled":
            data[len(data) // 2] ^= 1
            shard.write_bytes(data)
        elif kind == "swapped":  # another corpus's shard of the same size
            shard.write_bytes(data[::-1])
        else:  # a whole other directory in its place, that vouches for itself
            shard.write_bytes(data[1000:] + data[:1000])
            self.vouch(shard)
        before = (place / "run/run.json").read_bytes()
        said = refused("resume", "run")
        assert part in said, said
        assert ("source files" if kind == "replaced" else shard.name) in said
        assert (place / "run/run.json").read_bytes() == before

    @pytest.mark.slow
    def test_ids_beyond_the_vocabulary_are_named_on_the_command_line(self, place: Path) -> None:
        start("run_dir=first", "phases=[{name: main, steps: 1}]")
        shard = self.shard(place)
        data = bytearray(shard.read_bytes())
        data[400:402] = (60_000).to_bytes(2, "little")
        shard.write_bytes(data)
        self.vouch(shard)
        done = subprocess.run(
            command("run", "pretrain", *SMALL, "run_dir=run"),
            cwd=place, env=environment(), capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        said = done.stderr.strip().splitlines()[-1]
        assert re.match(r"plmtune: Shard .*train-00000\.bin holds id 60000 at token 200, beyond the vocabulary", said)
        assert not (place / "run").exists()


class TestTwoOnOneDirectory:
    @pytest.mark.parametrize("words", [["resume", "run"], ["run", "pretrain", "run_dir=run"]])
    def test_the_second_is_refused_before_torch_is_imported(self, begun: Path, words: list[str]) -> None:
        code = (
            "import sys; from plmtune.cli import cli; from plmtune.errors import UserError\n"
            "try: cli.main(sys.argv[1:], standalone_mode=False)\n"
            "except UserError as error: print(error, 'torch' in sys.modules)"
        )
        with RunDirectory.open(begun) as run:
            before = run.record()
            done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
            said = f"run is in use by process {before['attempts'][-1]['pid']}"
            assert done.stdout.startswith(said) and done.stdout.strip().endswith("False"), done.stdout
            assert run.record() == before
            assert said in refusal("run_dir=run", "resume=true")  # by whichever road it comes


class TestCheckpointsThatAreGone:
    @pytest.mark.parametrize("how", ["removed", "a link to nowhere"])
    def test_a_run_does_not_begin_again_unasked_and_keeps_its_metrics(self, place: Path, how: str) -> None:
        start("run_dir=run", "phases=[{name: main, steps: 4}]")
        shutil.rmtree(place / "run/checkpoints")
        if how != "removed":
            (place / "run/checkpoints").symlink_to("/nowhere")
        before = (place / "run/metrics.jsonl").read_text()
        said = refusal("run_dir=run", "phases=[{name: main, steps: 4}]", "resume=true")
        assert "run/checkpoints" in said and "disk" in said
        assert (place / "run/metrics.jsonl").read_text() == before

    def test_a_new_run_does_not_count_other_checkpoints_as_its_own(self, place: Path) -> None:
        start("run_dir=run", "phases=[{name: main, steps: 3}]")
        (place / "run/config.yaml").unlink()
        assert "holds checkpoints" in refusal("run_dir=run", "phases=[{name: main, steps: 3}]")


class TestLinks:
    def test_a_run_knows_others_by_their_own_directories(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        start("phases=[{name: main, steps: 1}]")
        first = (place / "runs/pretrain/latest").resolve().name
        own = ["run_dir=next", "init_from=runs/pretrain/latest", "data.paths=[runs/pretrain/latest/text]"]
        shutil.copytree(place / "corpus", place / "runs/pretrain/latest/text")
        stop_at(monkeypatch, 2, *own)
        saved = typed_config.load_config(place / "next/config.yaml")
        assert saved.init_from == f"runs/pretrain/{first}"
        assert saved.data.settings["paths"] == (f"runs/pretrain/{first}/text",)
        stop_at(monkeypatch, 4, *own, "resume=true")  # the same command again
        (place / "runs/pretrain/latest").unlink()
        (place / "runs/pretrain/other").mkdir()
        (place / "runs/pretrain/latest").symlink_to("other")
        assert "data.paths" in refusal(*own, "resume=true")
        start(*own[:2], f"data.paths=[runs/pretrain/{first}/text]", "resume=true")  # its origin is what it was


class TestInitFrom:
    def test_a_damaged_checkpoint_is_refused_or_passed_over(
        self, place: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        start("run_dir=first", "phases=[{name: main, steps: 6}]")
        file = place / "first/checkpoints/step-00000006/model.safetensors"
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)
        assert "model.safetensors is damaged" in refusal("init_from=first/checkpoints/step-00000006")
        start("run_dir=second", "init_from=first", "phases=[{name: main, steps: 2}]")
        assert "step-00000003 instead" in caplog.text
