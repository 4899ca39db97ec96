"""The recipe as a person runs it: it learns, on one process and on two, and it refuses what cannot be."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_runs import (
    SMALL,
    Run,
    ends_with,
    kill_at,
    metrics,
    nothing_beside,
    refusal,
    start,
    weights,
    write_corpus,
)
from group import in_group

from plmtune.config import typed_config
from plmtune.io.run_directory import read_record, state_of
from plmtune.tokenizers.tokenizer_files import load_tokenizer


class TestLearning:
    def test_loss_falls_and_the_run_leaves_what_it_promises(self, place: Path, curves: None, capfd: Any) -> None:
        score = start("run_dir=run", "phases=[{name: main, steps: 60}]", "optimizer.lr=3e-3",
                      "sample={prompt: 'Beau', max_new_tokens: 8}")  # fmt: skip
        entries = metrics(place / "run")
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        assert losses[-1] < 0.75 * losses[0]
        assert 0 < score < losses[0]
        for name in (
            "config.yaml",
            "run.json",
            "metrics.jsonl",
            "curves.png",
            "checkpoints/step-00000060/config.json",
        ):
            assert (place / "run" / name).is_file(), name
        assert json.loads((place / "run/run.json").read_text())["status"] == "finished"
        checkpoint = place / "run" / "checkpoints" / "step-00000060"
        saved = json.loads((checkpoint / "config.json").read_text())
        assert (saved["bos_token_id"], saved["eos_token_id"]) == (None, load_tokenizer(checkpoint).eos_id)
        last = [entry for entry in entries if "bits_per_byte" in entry][-1]
        assert 0.0 <= last["sparsity/0"] <= 1.0
        out = capfd.readouterr().out
        assert "Beau" in out and "curves.png" in out

    def test_bits_per_byte_are_nats_per_token_for_bytes(self, place: Path) -> None:
        start("run_dir=run", "preparation={holdout_by: tail, holdout: 0.1}")
        entry = [e for e in metrics(place / "run") if "bits_per_byte" in e][-1]
        # One byte a token, but for the end-of-text tokens, which cost nats and have no bytes.
        assert entry["bits_per_byte"] == pytest.approx(entry["validation_loss"] / 0.693147, rel=0.03)
        assert entry["bits_per_byte"] >= entry["validation_loss"] / 0.693148

    def test_two_runs_of_one_seed_are_byte_identical(self, place: Path, whole: Path) -> None:
        start("run_dir=again")
        assert weights(place / "again") == weights(whole)
        assert metrics(place / "again") == metrics(whole)
        start("run_dir=other", "seed=2")
        assert weights(place / "other") != weights(whole)

    def test_document_mask_and_micro_batches_give_the_same_loss(self, place: Path) -> None:
        start("run_dir=a", "document_mask=true", "micro_batch_size=4")
        start("run_dir=b", "document_mask=true", "micro_batch_size=1")
        for one, other in zip(metrics(place / "a"), metrics(place / "b"), strict=True):
            for key in ("loss", "validation_loss"):
                if key in one:
                    assert one[key] == pytest.approx(other[key], rel=1e-5)

    def test_without_a_holdout_there_is_no_validation(self, place: Path) -> None:
        start("run_dir=run", "preparation.holdout=0", "phases=[{name: main, steps: 2}]")
        assert not [entry for entry in metrics(place / "run") if "validation_loss" in entry]

    def test_phases_follow_each_other_in_one_schedule(self, place: Path) -> None:
        start(
            "run_dir=run", "data=mix",
            "data.sources={a: {component: files, paths: [corpus/0*.txt]}}",
            "+data.sources.b={component: files, paths: [corpus/1*.txt]}",
            "phases=[{name: one, steps: 4, mix: {a: 1}}, {name: two, tokens: 500, mix: {a: 1, b: 1}}]",
        )  # fmt: skip
        assert [e["phase"] for e in metrics(place / "run") if "phase" in e] == ["one"] * 4 + ["two"] * 4

    def test_a_decay_is_branched_from_a_stable_phase(self, place: Path) -> None:
        start("run_dir=stable", "scheduler={warmup: 2, decay: 4, constant: 0}")
        start("run_dir=branch", "init_from=stable/checkpoints/step-00000006", "scheduler.start=decay",
              "scheduler.constant=0", "phases=[{name: main, steps: 5}]")  # fmt: skip
        rates = [e["lr"] for e in metrics(place / "branch") if "lr" in e]
        assert rates == sorted(rates, reverse=True) and rates[0] > 2 * rates[-1]
        first = next(e["loss"] for e in metrics(place / "branch"))
        assert first < metrics(place / "stable")[0]["loss"]
        # It goes on as the stable run did: the same next tokens, the same moments, so the same loss to the digit.
        after = next(e for e in metrics(place / "stable") if e["step"] == 7)
        assert first == after["loss"]

    def test_starting_from_another_model_or_tokenizer_is_refused(self, place: Path) -> None:
        start("run_dir=first", "phases=[{name: main, steps: 2}]")
        said = refusal("init_from=first", "model.attention.rope_theta=10")
        assert "attention" in said and "first" in said and "model=null tokenizer=null" in said
        from plmtune.tokenizers.train_bpe import train_bpe

        train_bpe(["some text"], 260).save(place / "bpe")
        assert "init_from=first" in refusal("init_from=first", "tokenizer=file", "tokenizer.path=bpe")

    def test_model_and_tokenizer_are_those_of_where_it_starts_if_left_empty(self, place: Path) -> None:
        from plmtune.tokenizers.train_bpe import train_bpe

        train_bpe(["some text"], 260).save(place / "bpe")
        start("run_dir=first", "phases=[{name: main, steps: 1}]", "model.num_layers=1", "tokenizer=file",
              "tokenizer.path=bpe")  # fmt: skip
        start("run_dir=next", "init_from=first", "phases=[{name: main, steps: 1}]", "model=null", "tokenizer=null")
        of = [json.loads((checkpoint / "config.json").read_text()) for checkpoint in place.glob("*/checkpoints/step-*")]
        assert len(of) == 2 and of[0] == of[1] and of[0]["num_hidden_layers"] == 1
        assert refusal("model=null", "run_dir=other") == "key model: no component chosen. See: plmtune ls model"

    @pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw_8bit", marks=pytest.mark.slow)])
    def test_other_optimizers_resume_exactly(self, place: Path, optimizer: str) -> None:
        start("run_dir=whole", f"optimizer={optimizer}")
        shutil.copytree(place / "whole", place / "cut")
        for step in (12, 9):
            shutil.rmtree(place / f"cut/checkpoints/step-{step:08}")
        start("run_dir=cut", f"optimizer={optimizer}", "resume=true")
        assert weights(place / "cut") == weights(place / "whole")
        assert metrics(place / "cut") == metrics(place / "whole")


STRATEGIES = ("ddp", "fsdp")
# Options whose sums and names must not depend on the number of processes or of micro-batches.
OPTIONS = [
    "model=llama",
    "model.attention={num_kv_heads: 2, value_embed: 2}",
    "model.ffn.hidden_dim=64",
    "model.embed_dim=32",
    "model.num_layers=3",
    "model.num_heads=4",
    "loss.z_loss=0.01",
    "optimizer=muon",
    "optimizer.normuon_beta2=0.9",
    "optimizer.cautious=true",
    "optimizer.no_decay=[value_embeddings, tok_embeddings]",
    "phases=[{name: main, steps: 4}]",
    "checkpoint.every=0",
]


def train_by_each_strategy(place: Path) -> dict[str, Any]:
    with contextlib.chdir(place), nothing_beside():
        for strategy in STRATEGIES:
            start(f"run_dir={strategy}", f"runtime.strategy={strategy}")
            start(f"run_dir=options-{strategy}", f"runtime.strategy={strategy}", "micro_batch_size=1", *OPTIONS)
    return {}


class TestTwoProcesses:
    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory: pytest.TempPathFactory, corpus_text: str) -> Path:
        """The directory of runs of one configuration, named by their strategies."""
        place = tmp_path_factory.mktemp("strategies")
        write_corpus(place, corpus_text)
        in_group(train_by_each_strategy, 2, place)
        return place

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_losses_equal_one_process(self, trained: Path, whole: Path, strategy: str) -> None:
        for alone, shared in zip(metrics(whole), metrics(trained / strategy), strict=True):
            for key in ("loss", "validation_loss", "bits_per_byte", "grad_norm"):
                if key in alone:
                    assert shared[key] == pytest.approx(alone[key], rel=1e-6 if key != "grad_norm" else 1e-5)

    def test_so_do_those_with_value_embeddings_z_loss_and_normuon(self, trained: Path, place: Path) -> None:
        start("run_dir=one", "micro_batch_size=4", *OPTIONS)
        for strategy in STRATEGIES:
            for alone, shared in zip(metrics(place / "one"), metrics(trained / f"options-{strategy}"), strict=True):
                for key in ("loss", "validation_loss", "grad_norm"):
                    if key in alone:
                        assert shared[key] == pytest.approx(alone[key], rel=1e-6 if key != "grad_norm" else 1e-5)

    @pytest.mark.slow  # test_processes.py kills one rank of two and lets torchrun go on by default
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
    def test_a_kill_of_both_changes_nothing(self, place: Path, plmtune: Run, strategy: str) -> None:
        chosen = f"runtime.strategy={strategy}"
        two = plmtune("run", "pretrain", *SMALL, "run_dir=two", chosen, processes=2)
        assert two.returncode == 0, two.stderr
        kill_at(place, 7, "cut", chosen, processes=2)
        resumed = plmtune("resume", "cut", processes=2)
        assert resumed.returncode == 0, resumed.stderr
        assert metrics(place / "cut") == metrics(place / "two")
        assert weights(place / "cut") == weights(place / "two")


class TestBadInput:
    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("scheduler={warmup: 10, decay: 5, constant: 0}", ["warmup", "10", "5", "12"]),
            ("seq_len=513", ["seq_len", "513", "512"]),
            ("model.num_heads=0", ["model", "num_heads", "0"]),
            ("phases=[]", ["phases", "empty"]),
            ("phases=[{name: a}]", ["phases[0]", "tokens or steps"]),
            ("phases=[{name: a, tokens: lots}]", ["phases[0]", "lots"]),
            ("phases=[{name: a, steps: 2, mix: {filez: 1}}]", ["filez", "files"]),
            ("micro_batch_size=0", ["micro_batch_size"]),
            ("name=../../elsewhere", ["name", "elsewhere"]),
            ("checkpoint.best=validaton_loss", ["checkpoint.best", "validation_loss"]),
            ("runtime.timeout_minutes=-1", ["runtime.timeout_minutes", "-1"]),
            ("guard.patience=0", ["guard", "patience", "0"]),
            ("guard.spike_factor=0.5", ["guard", "spike_factor", "0.5"]),
            ("max_grad_norm=-1", ["max_grad_norm", "-1"]),
            ("optimizer.lr=-1", ["optimizer", "lr", "-1"]),
            ("checkpoint.keep=-1", ["checkpoint.keep", "-1"]),
            ("sample.temperature=-1", ["sample", "-1"]),
            ("data.paths=[nowhere]", ["nowhere"]),
            ("data.paths=[]", ["paths"]),
            ("init_from=corpus", ["corpus"]),
            ("runtime.device=tpu", ["tpu"]),
            ("resume=true", ["resume=true"]),
        ],
    )
    def test_ends_before_training_with_one_sentence(self, place: Path, override: str, parts: list[str]) -> None:
        said = refusal(override)
        for part in parts:
            assert part in said, said
        assert not list(place.glob("runs/*/*/metrics.jsonl"))

    @pytest.mark.parametrize(
        ("name", "content", "parts"),
        [
            ("empty.txt", b"", ["empty"]),
            ("latin.txt", "caf\xe9 ".encode("latin-1") * 50, ["latin.txt", "encoding"]),
            ("broken.jsonl", b'{"text": "fine"}\n{"text": \n', ["broken.jsonl", "2"]),
            ("short.txt", b"hi", ["32"]),
        ],
    )
    def test_unusable_files_are_named(self, place: Path, name: str, content: bytes, parts: list[str]) -> None:
        (place / name).write_bytes(content)
        said = refusal(f"data.paths=[{name}]")
        for part in parts:
            assert part in said, said
        assert not list((place / "runs").glob("data/*/manifest.json")) or "32" in parts

    def test_a_damaged_shard_is_named_and_no_run_begins(self, place: Path) -> None:
        start("run_dir=run", "phases=[{name: main, steps: 1}]")
        (shard,) = place.glob("runs/data/*/train-00000.bin")
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 0xFF
        shard.write_bytes(bytes(content))
        assert "train-00000.bin" in refusal("run_dir=again")
        assert not (place / "again").exists()

    def test_a_run_that_cannot_fit_is_refused_with_its_estimate(self, place: Path) -> None:
        said = refusal("model=plm", "model.num_layers=60", "model.embed_dim=16384")
        assert "--force" in said and "GiB" in said

    def test_exit_code_and_message_on_the_command_line(self, place: Path, capsys: Any) -> None:
        assert ends_with("run", "pretrain", *SMALL, "optimizer.lerning_rate=1") == 2
        error = capsys.readouterr().err
        assert error.strip().splitlines()[-1].startswith("plmtune: ")
        assert "Did you mean optimizer.lr?" in error and "Traceback" not in error


class TestCommands:
    def test_dry_run_prints_the_papers_numbers_and_makes_nothing(self, place: Path, capsys: Any) -> None:
        start("model=plm", "tokenizer=byte", "phases=[{name: general, tokens: 1650B}]", "force=true", dry_run=True)
        out = capsys.readouterr().out
        assert "1.65T tokens" in out and "GiB" in out
        assert not (place / "runs").exists()

    def test_a_job_that_does_not_fit_is_found_before_the_first_begins(self, place: Path, capsys: Any) -> None:
        steps, sizes = "phases=[{name: main, steps: 2}]", "micro_batch_size=1,1000000"
        sweep = ("run", "-m", "pretrain", *SMALL, steps, sizes, "global_batch_size=1000000")
        assert ends_with(*sweep) == 2
        assert "job 1 (micro_batch_size=1000000): " in (said := capsys.readouterr().err) and "does not fit here" in said
        assert not list(place.glob("runs/multirun/*"))

    def test_multirun_runs_each_value_in_its_own_directory_and_lists_them(self, place: Path, capsys: Any) -> None:
        steps = "phases=[{name: main, steps: 2}]"
        assert ends_with("run", "-m", "pretrain", *SMALL, steps, "optimizer.lr=1e-4,3e-4") == 0
        paths = place.glob("runs/multirun/*/*/config.yaml")
        rates = {typed_config.load_config(path).optimizer.settings["lr"] for path in paths}
        assert rates == {1e-4, 3e-4}
        table = capsys.readouterr().out.splitlines()[-3:]
        assert [row.split()[1] for row in table] == ["status", "finished", "finished"]
        assert [row.split()[-1] for row in table] == ["settings", "optimizer.lr=0.0001", "optimizer.lr=0.0003"]

    def test_a_copied_recipe_runs_from_its_own_file(self, place: Path, capsys: Any) -> None:
        assert ends_with("cp", "recipes/pretrain", "mine.py") == 0
        text = (place / "mine.py").read_text().replace('echo(f"curves: ', 'echo(f"MINE curves: ')
        (place / "mine.py").write_text(text)
        assert ends_with("run", "mine.py", *SMALL, "run_dir=run", "phases=[{name: main, steps: 2}]") == 0
        assert "MINE curves" in capsys.readouterr().out
        (place / "run/run.json").write_text((place / "run/run.json").read_text().replace('"finished"', '"stopped"'))
        assert ends_with("resume", "run") == 2
        assert "Resume it with: plmtune resume run --recipe mine.py" in capsys.readouterr().err

    def test_validate_checks_a_file_and_builds_nothing(self, place: Path, capsys: Any) -> None:
        assert ends_with("validate", "conf/plm_1.8b.yaml", "tokenizer=byte") == 2
        assert "There is no file data/english" in capsys.readouterr().err
        for name in ("english", "chinese", "code", "math"):
            (place / "data" / name).mkdir(parents=True)
            (place / "data" / name / "a.txt").write_text("a")
        assert ends_with("validate", "conf/plm_1.8b.yaml", "tokenizer=byte") == 0
        assert "valid" in capsys.readouterr().out and not (place / "runs").exists()


class TestFailures:
    @pytest.mark.parametrize("resumed", [False, True])
    def test_one_between_the_run_directory_and_the_first_step_is_noted(
        self, resumed: bool, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: Any, **options: Any) -> None:
            raise RuntimeError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr("plmtune.training.runtime.Runtime.distribute", fail)
            for options in [["run_dir=run"], ["run_dir=run", "resume=true"]][: 1 + resumed]:
                with pytest.raises(RuntimeError, match="no memory"):
                    start(*options)
        record = read_record(place / "run")
        assert (record["status"], record["reason"]) == ("failed", "RuntimeError: no memory")
        assert state_of(place / "run") == "failed"  # and its lock is free
        assert len(record["attempts"]) == 1 + resumed and all(one["ended"] for one in record["attempts"])
