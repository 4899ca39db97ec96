"""Preference training, on pairs and in rounds, as a person drives it."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import command, environment, kill_all, metrics, weights
from safetensors.torch import load_file
from tuning import PREFERENCE, refusal, run, stop_in

import plmtune
from plmtune.errors import UserError
from plmtune.inference.batching import BatchedGenerator
from plmtune.models.hf import save_model
from plmtune.models.reward import load_reward_model
from plmtune.preference.rounds.chains import Journal
from plmtune.preference.rounds.rounds import Rounds

ROUNDS = [
    "rounds=2",
    "prompts_per_round=6",
    "reward=vowels",
    "chat.holdout=0.1",
    "generation={turns: 2, max_new_tokens: 8, batch_size: 3}",
    "selection.rules=[]",
    "seq_len=128",
]


# Prints whether oneDNN has bf16, and the first loss of each preference loss.
FIRST_LOSSES = """
import json, torch
from cli_runs import metrics, nothing_beside
from pathlib import Path
from tuning import run

has_bf16, found = torch.ops.mkldnn._is_mkldnn_bf16_supported(), {}
with nothing_beside():
    for loss in () if has_bf16 else ("dpo", "ipo", "kto", "aries"):
        run("dpo", f"loss={loss}", f"run_dir={loss}", "runtime.precision=bf16", "data.max_rows=4", "chat.holdout=0",
            "seq_len=128", "validation.every=0", "checkpoint.every=0", "optimizer.lr=1e-9")
        found[loss] = next(entry["loss"] for entry in metrics(Path(loss)) if "loss" in entry)
print(json.dumps([has_bf16, found]))
"""
ONLY_THE_NEWEST = "checkpoint={every: 1, keep: 1, best: null}"


def assert_near(run: Path, other: Path) -> None:
    """Two runs learned the same, up to rounding."""
    ours, theirs = (load_file(newest(place) / "model.safetensors") for place in (run, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


def newest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def recipe() -> Any:
    return importlib.import_module("plmtune.recipes.preference").Preference


def losses(place: Path) -> list[dict[str, Any]]:
    return [entry for entry in metrics(place) if "loss" in entry]


class TestLearning:
    def test_the_chosen_answers_win(self, base: Path) -> None:
        run("dpo", "run_dir=r", "epochs=4", "optimizer.lr=3e-3")
        entries = losses(base / "r")
        assert entries[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is its reference
        assert entries[0]["logratio_margin"] == pytest.approx(0, abs=1e-3)
        assert entries[-1]["loss"] < 0.4
        assert entries[-1]["accuracy"] == 1
        last = [entry for entry in metrics(base / "r") if "validation_loss" in entry][-1]
        assert last["validation/accuracy"] == 1  # the rejected answers are all alike

    def test_aries_begins_at_its_loss_of_the_reference_and_learns_in_every_context(self, base: Path) -> None:
        run("aries", "run_dir=r", "epochs=3", "optimizer.lr=3e-3", "seq_len=128", "loss.alpha=0.5")
        entries = losses(base / "r")
        assert entries[0]["loss"] == pytest.approx(0.5 * math.log(2) + 0.5 * 0.5, abs=1e-4)
        for context in ("", "given_rejected/", "given_chosen/"):
            assert entries[-1][f"{context}logratio_margin"] > 1

    @pytest.mark.parametrize(
        ("recipe", "loss", "start", "precision"),
        [
            ("dpo", "dpo", math.log(2), "fp32"),
            ("dpo", "dpo", math.log(2), "bf16"),
            pytest.param("dpo", "ipo", 1 / (2 * 0.1) ** 2, "fp32", marks=pytest.mark.slow),
            ("dpo", "ipo", 1 / (2 * 0.1) ** 2, "bf16"),
            pytest.param("dpo", "kto", 1.0, "fp32", marks=pytest.mark.slow),
            ("dpo", "kto", 1.0, "bf16"),
            pytest.param("aries", "aries", 0.5 * math.log(2) + 0.5 * 0.5, "fp32", marks=pytest.mark.slow),
            ("aries", "aries", 0.5 * math.log(2) + 0.5 * 0.5, "bf16"),
        ],
    )
    def test_a_model_that_does_not_move_stays_at_the_loss_of_its_reference(
        self, base: Path, recipe: str, loss: str, start: float, precision: str
    ) -> None:
        settings = ["loss.alpha=0.5"] if loss == "aries" else ["loss.beta=0.1"]
        run(
            recipe,
            f"loss={loss}",
            "run_dir=r",
            "optimizer.lr=1e-15",  # no weight changes
            "seq_len=128",
            "micro_batch_size=3",
            "data.max_rows=20",
            "chat.holdout=0.2",
            f"runtime.precision={precision}",
            *settings,
        )
        entries = metrics(base / "r")
        losses = [entry[name] for entry in entries for name in ("loss", "validation_loss") if name in entry]
        assert losses == pytest.approx([start] * len(losses), rel=1e-4)
        h = [
            entry[name]
            for entry in entries
            for name in ("logratio_margin", "validation/logratio_margin")
            if name in entry
        ]
        assert h == pytest.approx([0.0] * len(h), abs=1e-6 if precision == "bf16" else 1e-4)

    def test_the_first_losses_are_those_of_the_reference_without_bf16_units(self, base: Path) -> None:
        hidden = {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(
            [sys.executable, "-c", FIRST_LOSSES], env=os.environ | hidden, capture_output=True, text=True, check=True
        )
        has_bf16, found = json.loads(done.stdout.splitlines()[-1])
        if has_bf16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            pytest.skip("ONEDNN_MAX_CPU_ISA=AVX2 hides nothing from oneDNN on this machine")
        theory = {"dpo": math.log(2), "ipo": 25.0, "kto": 1.0, "aries": 0.2 * math.log(2) + 0.8 * 2 * 0.25}
        assert found == pytest.approx(theory, abs=1e-3)

    @pytest.mark.parametrize("loss", ["ipo", "simpo", "kto"])
    def test_every_loss_trains(self, base: Path, loss: str) -> None:
        run("dpo", f"loss={loss}", "run_dir=r", "epochs=2", "optimizer.lr=3e-3")
        entries = losses(base / "r")
        assert entries[-1]["loss"] < entries[0]["loss"]

    def test_a_reward_model_comes_from_the_same_recipe(self, base: Path) -> None:
        run("dpo", "loss=bradley_terry", "run_dir=r", "epochs=3", "optimizer.lr=3e-3")
        assert losses(base / "r")[-1]["accuracy"] == 1
        model = load_reward_model(base / "r")
        assert model.score.weight.abs().sum() > 0

    def test_adapters_are_measured_against_their_base(self, base: Path) -> None:
        run("dpo", "peft=lora", "run_dir=r", "epochs=2", "optimizer.lr=1e-2")
        entries = losses(base / "r")
        assert entries[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert entries[-1]["loss"] < entries[0]["loss"]

    def test_micro_batches_change_nothing(self, base: Path) -> None:
        for size in (1, 8):
            run("dpo", "loss=kto", f"run_dir=r{size}", f"micro_batch_size={size}", "seq_len=64", "data.max_rows=20")
        one, eight = losses(base / "r1"), losses(base / "r8")
        assert [e["loss"] for e in one] == pytest.approx([e["loss"] for e in eight], rel=1e-5)


class TestReference:
    def test_a_second_run_reads_what_the_first_has_computed(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run("dpo", "run_dir=a", "data.max_rows=12")
        monkeypatch.delattr("plmtune.preference.reference._compute")
        run("dpo", "run_dir=b", "data.max_rows=12")
        assert metrics(base / "a") == metrics(base / "b")
        with pytest.raises(NameError):
            run("dpo", "run_dir=c", "seq_len=80", "data.max_rows=12")  # other rows

    def test_lost_numbers_are_computed_again_from_the_first_model(
        self, base: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = undisturbed("dpo")
        with monkeypatch.context() as patch:
            stop_in(patch, recipe(), "train_step", 3)
            with pytest.raises(SystemExit):
                run("dpo", "run_dir=cut")
        for path in (base / "runs" / "reference").iterdir():
            path.unlink()
        run("dpo", "run_dir=cut", "resume=true")
        assert weights(base / "cut") == weights(whole)

    def test_a_run_over_a_part_of_the_pairs_computes_that_part(self, base: Path) -> None:
        run("dpo", "run_dir=r", "epochs=0.3")
        assert losses(base / "r")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)

    def test_another_model_in_the_origins_place_is_refused(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            stop_in(patch, recipe(), "train_step", 3)
            with pytest.raises(SystemExit):
                run("dpo", "run_dir=cut")
        for path in (base / "runs" / "reference").iterdir():
            path.unlink()
        model, _ = plmtune.load(base / "base")
        model.norm.weight.data *= 1.01
        save_model(model, None, base / "base")
        with pytest.raises(UserError, match="no longer holds the weights"):
            run("dpo", "run_dir=cut", "resume=true")
        assert not list((base / "runs" / "reference").iterdir())

    @pytest.mark.parametrize("precision", ["bf16", "fp32"])
    def test_a_resume_in_other_batches_says_that_bf16_needs_other_numbers(
        self, base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], precision: str
    ) -> None:
        words = ["dpo", "run_dir=cut", "optimizer.lr=1e-15", "chat.holdout=0", f"runtime.precision={precision}"]
        words += ["data.max_rows=20"]
        with monkeypatch.context() as patch:
            stop_in(patch, recipe(), "train_step", 3)
            with pytest.raises(SystemExit):
                run(*words)
        capfd.readouterr()
        kept, origin = sorted((base / "runs" / "reference").iterdir()), base / "base"
        if precision == "bf16":
            origin.rename(base / "gone")
            with pytest.raises(UserError, match="there is no file or directory base"):
                run(*words, "resume=true", "micro_batch_size=1")
            (base / "gone").rename(origin)
            capfd.readouterr()
        run(*words, "resume=true", "micro_batch_size=1")
        said = " ".join(capfd.readouterr().err.split())
        if precision == "fp32":  # its pairs share forwards of a fixed size
            assert "reference: log-probabilities read from runs/reference" in said
            assert sorted((base / "runs" / "reference").iterdir()) == kept
        else:
            assert "(in bf16 they depend on micro_batch_size and the number of processes)" in said
            assert "computed again from init_from" in said
        h = [entry["logratio_margin"] for entry in losses(base / "cut")]
        assert h == pytest.approx([0.0] * len(h), abs=1e-6 if precision == "bf16" else 1e-4)


class TestResuming:
    @pytest.mark.parametrize("extra", [(), ("peft=lora", "peft.dropout=0.1")])
    def test_a_stopped_run_resumes_bit_by_bit(
        self, base: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...]
    ) -> None:
        whole = undisturbed("dpo", *extra)
        with monkeypatch.context() as patch:
            stop_in(patch, recipe(), "train_step", 3)
            with pytest.raises(SystemExit) as stopped:
                run("dpo", "run_dir=cut", *extra)
        assert stopped.value.code == 75
        run("dpo", "run_dir=cut", "resume=true", *extra)
        assert weights(base / "cut") == weights(whole)
        assert metrics(base / "cut") == metrics(whole)


class TestRounds:
    def test_each_round_writes_judges_chooses_and_trains(self, base: Path) -> None:
        run("aries", *ROUNDS, "run_dir=r")
        for number in (1, 2):
            place = base / "r" / "rounds" / f"{number:02}"
            told = [json.loads(line) for line in (place / "chains.jsonl").read_text().splitlines()]
            assert len(told) == 6
            assert all(len(chain["answers"]) == 2 for chain in told)
            for line in (place / "pairs.jsonl").read_text().splitlines():
                pair = json.loads(line)
                chain = next(chain for chain in told if chain["prompt"] == pair["prompt"])
                rewards = {answer["text"]: answer["reward"] for answer in chain["answers"]}
                assert rewards[pair["chosen"]] > rewards[pair["rejected"]]
        measured = [entry for entry in metrics(base / "r") if "direct" in entry]
        assert [entry["after_round"] for entry in measured] == [0, 1, 2]
        assert all("refined" in entry for entry in measured)
        assert {entry["round"] for entry in losses(base / "r")} == {1, 2}

    @pytest.mark.parametrize(
        ("method", "call"),
        [
            ("train_step", 1),
            ("make_pairs", 2),
            pytest.param("evaluate", 2, marks=pytest.mark.slow),
            pytest.param("train_stage", 2, marks=pytest.mark.slow),
        ],
    )
    def test_a_stopped_round_resumes_to_the_same_result(
        self, base: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, method: str, call: int
    ) -> None:
        whole = undisturbed("aries", *ROUNDS)
        with monkeypatch.context() as patch:
            stop_in(patch, recipe() if method.startswith("train") else Rounds, method, call)
            with pytest.raises(SystemExit):
                run("aries", *ROUNDS, "run_dir=cut")
        run("aries", *ROUNDS, "run_dir=cut", "resume=true")
        assert rounds_of(base / "cut") == rounds_of(whole)
        assert weights(base / "cut") == weights(whole)
        assert metrics(base / "cut") == metrics(whole)

    @pytest.mark.parametrize(
        "extra", [(), ("micro_batch_size=1",), pytest.param(("peft=lora",), marks=pytest.mark.slow)]
    )
    def test_a_second_round_resumes_without_its_references_numbers(
        self, base: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...]
    ) -> None:
        peft = [text for text in extra if text.startswith("peft")]
        whole = undisturbed("aries", *ROUNDS, *peft)
        self.stop_in_round_2(monkeypatch, *peft)
        for path in (base / "runs" / "reference").iterdir():
            path.unlink()
        run("aries", *ROUNDS, "run_dir=cut", "resume=true", *extra, ONLY_THE_NEWEST)
        kept = sorted((base / "runs" / "reference").glob("*.json"))
        theirs = {path.name for path in (whole.parent / "runs" / "reference").glob("*.json")}
        assert len(kept) == 1 and kept[0].name in theirs  # the same numbers: the key is of all that they follow from
        if "micro_batch_size=1" in extra:
            assert_near(base / "cut", whole)
        else:
            assert weights(base / "cut") == weights(whole)
            assert metrics(base / "cut") == metrics(whole)

    @pytest.mark.slow
    @pytest.mark.parametrize("lost", [False, True])
    def test_a_second_round_resumes_with_another_number_of_processes(
        self, base: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, lost: bool
    ) -> None:
        whole = undisturbed("aries", *ROUNDS)
        self.stop_in_round_2(monkeypatch)
        cache = base / "runs" / "reference"
        before = {path.name: path.read_bytes() for path in cache.iterdir()}
        for path in cache.iterdir():
            if lost:
                path.unlink()
        done = subprocess.run(
            command("resume", "--import", "tuning", "cut", processes=2),
            cwd=base, env=with_rewards(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert all(path.read_bytes() == before[path.name] for path in cache.iterdir())
        assert_near(base / "cut", whole)

    def stop_in_round_2(self, monkeypatch: pytest.MonkeyPatch, *extra: str) -> None:
        with monkeypatch.context() as patch:
            stop_in(patch, recipe(), "train_step", 3)
            with pytest.raises(SystemExit):
                run("aries", *ROUNDS, "run_dir=cut", ONLY_THE_NEWEST, *extra)
        kept = sorted(path.name for path in Path("cut/checkpoints").glob("step-*"))
        assert kept == ["step-00000002", "step-00000003"]  # the first is what the round is measured against

    def test_of_another_model_in_the_last_rounds_place_the_run_says_so(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.stop_in_round_2(monkeypatch)
        shutil.rmtree(base / "runs" / "reference")
        shutil.rmtree(base / "cut/checkpoints/step-00000002")
        with pytest.raises(UserError, match=r"round 2's reference are no longer in .*step-00000002 has no manifest"):
            run("aries", *ROUNDS, "run_dir=cut", "resume=true", ONLY_THE_NEWEST)

    def test_answers_that_were_written_before_a_death_are_kept(
        self, base: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = undisturbed("aries", *ROUNDS)
        with monkeypatch.context() as patch:
            add, kept = Journal.add, list[Any]()

            def dies(self: Any, *answer: Any) -> None:
                add(self, *answer)
                kept.append(answer[:2])
                if len(kept) == 11:  # in the second of three evaluations and rounds
                    raise KeyboardInterrupt

            patch.setattr(Journal, "add", dies)
            with pytest.raises(KeyboardInterrupt):
                run("aries", *ROUNDS, "run_dir=cut")
            again = list[Any]()
            patch.setattr(Journal, "add", lambda self, *answer: (again.append(answer[:2]), add(self, *answer))[1])
            run("aries", *ROUNDS, "run_dir=cut", "resume=true")
        num_held, per_round, turns = 4, 6, 2
        assert len(kept) + len(again) == (3 * num_held + 2 * per_round) * turns  # none twice
        assert rounds_of(base / "cut") == rounds_of(whole)
        assert weights(base / "cut") == weights(whole)
        assert metrics(base / "cut") == metrics(whole)

    def test_answers_are_drawn_without_deterministic_algorithms(
        self, base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        drawing, training = set[bool](), set[bool]()

        def noting(owner: Any, method: str, found: set[bool]) -> None:
            whole = getattr(owner, method)

            def noted(*given: Any) -> Any:
                found.add(torch.are_deterministic_algorithms_enabled())
                return whole(*given)

            monkeypatch.setattr(owner, method, noted)

        noting(BatchedGenerator, "_advance", drawing)
        noting(recipe(), "train_step", training)
        try:
            run("aries", *ROUNDS, "rounds=1", "run_dir=r", "runtime.deterministic=true")
        finally:
            torch.use_deterministic_algorithms(False)
        assert (drawing, training) == ({False}, {True})
        said = capfd.readouterr().err
        assert said.index("evaluation before round 1: 4 held-out") < said.index("evaluation after round 1: 4 held-out")

    @pytest.mark.slow
    def test_a_round_killed_while_it_writes_answers_repeats_none(self, base: Path) -> None:
        arguments = [
            "run",
            "--import",
            "tuning",
            "aries",
            *PREFERENCE,
            *ROUNDS,
            "generation.max_new_tokens=24",
            "prompts_per_round=20",
            "rounds=1",
        ]
        kept = [
            text
            for text in arguments
            if text not in ("chat.holdout=0.2", "seq_len=96", "prompts_per_round=6", "rounds=2")
        ]
        subprocess.run(command(*kept, "run_dir=whole"), cwd=base, env=with_rewards(), check=True, capture_output=True)
        for _ in range(2):
            go_on = ["resume=true"] if (base / "cut").exists() else []
            process = subprocess.Popen(
                command(*kept, "run_dir=cut", *go_on), cwd=base, env=with_rewards(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            journal = base / "cut" / "rounds" / "01" / "answers-00000.jsonl"
            before = len(journal.read_text().splitlines()) if journal.exists() else 0
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if journal.exists() and len(journal.read_text().splitlines()) > before + 3:
                    break
                time.sleep(0.002)
            kill_all(process)
        subprocess.run(
            command(*kept, "run_dir=cut", "resume=true"), cwd=base, env=with_rewards(), check=True, capture_output=True
        )
        assert rounds_of(base / "cut") == rounds_of(base / "whole")
        assert weights(base / "cut") == weights(base / "whole")


def with_rewards() -> dict[str, str]:
    """An environment in which --import finds the reward of these tests."""
    return {**environment(), "PYTHONPATH": str(Path(__file__).parent)}


def rounds_of(place: Path) -> dict[str, str]:
    """What every file of the rounds says."""
    folder = place / "rounds"
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestMistakes:
    def test_equal_answers_are_counted_with_the_first_place(self, base: Path) -> None:
        path = base / "pairs.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[4]["rejected"] = rows[4]["chosen"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = refusal("dpo")
        assert "pairs.jsonl, line 5" in said
        assert "chat.skip_bad=true" in said
        assert not (base / "runs").exists()

    def test_columns_that_nothing_reads_are_counted(self, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
        path = base / "pairs.jsonl"
        rows = [json.loads(line) | {"id": number} for number, line in enumerate(path.read_text().splitlines())]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run("dpo", "run_dir=r", "global_batch_size=32", "epochs=0.1")
        assert "preferences: columns not used: id (40 rows)" in " ".join(capfd.readouterr().err.split())

    def test_a_prompt_longer_than_the_context_is_said_before_training(self, base: Path) -> None:
        said = refusal("dpo", "seq_len=16")
        assert "None of the pairs can be trained on" in said
        assert "pairs.jsonl, line 1" in said

    def test_conversations_are_no_pairs(self, base: Path) -> None:
        assert "holds conversations; this run takes pairs" in refusal(
            "dpo", "data=conversations", "data.paths=[talk.jsonl]"
        )

    def test_a_loss_over_tokens_belongs_elsewhere(self, base: Path) -> None:
        assert "cross_entropy is not for this recipe, which takes aries" in refusal("dpo", "loss=cross_entropy")

    def test_a_round_without_pairs_says_why(self, base: Path) -> None:
        said = refusal("aries", *ROUNDS, "selection.margin=200")
        assert "no pair was chosen from 6 chains" in said
        assert "selection.margin" in said

    def test_an_unknown_rule_is_named_with_the_nearest(self, base: Path) -> None:
        assert "not_empty" in refusal("aries", *[t for t in ROUNDS if "rules" not in t], "selection.rules=[not_emtpy]")

    @pytest.mark.parametrize(
        ("number", "said"),
        [
            ("batch_size=0", "key generation.batch_size: must be at least 1 and at most 16,777,216, not 0"),
            ("turns=0", "key generation.turns: must be at least 1, not 0"),
            ("max_new_tokens=0", "key generation.max_new_tokens: must be at least 1, not 0"),
            ("top_p=0", "key generation.top_p: must be above 0 and at most 1, not 0"),
            ("top_p=1.5", "key generation.top_p: must be above 0 and at most 1, not 1.5"),
            ("min_p=2", "key generation.min_p: must be at least 0 and at most 1, not 2"),
            ("repetition_penalty=0", "key generation.repetition_penalty: must be above 0 and at most 100, not 0"),
            ("stop=[a,'']", "one of its texts is empty"),
        ],
    )
    def test_impossible_numbers_of_generation_are_said_before_a_directory_is_there(
        self, base: Path, number: str, said: str
    ) -> None:
        assert said in refusal("aries", *ROUNDS, f"generation.{number}", "run_dir=r")
        assert not (base / "r").exists()
