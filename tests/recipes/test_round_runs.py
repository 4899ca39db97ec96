"""Pretraining in rounds: what later ones see, that runs resume exactly, and what they refuse."""

import contextlib
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import metrics, nothing_beside, refusal, start, stop_at, weights, write_corpus
from group import in_group
from safetensors.torch import load_file
from test_data_resume import order, rewind
from test_resuming import plmtune

from plmtune.errors import UserError
from plmtune.training import rounds, sequence_losses

# 26 sequences in `few`, of which round 1 sees 24; rounds of 8, 4 and 4 steps of 4 sequences.
ROUNDS = (
    "data=mix",
    "data.sources={few: {component: files, paths: [corpus/01.txt]}}",
    "+data.sources.many={component: files, paths: [corpus/1*.txt]}",
    "phases=[{name: one, steps: 5, mix: {few: 1}}, {name: two, steps: 3, mix: {few: 1, many: 2}}]",
    "multi_round={rounds: 3, keep: 0.5, temperature: 0.05}",
    "checkpoint={every: 2, keep: 0}",
    "validation={every: 0, tokens: 500}",
)


@pytest.fixture(scope="module", autouse=True)
def no_histograms() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "draw_losses", lambda *arguments, **keywords: None)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus_text: str, no_histograms: None) -> Path:
    """A directory with the corpus and a run that nothing disturbed, made once."""
    made = tmp_path_factory.mktemp("made")
    write_corpus(made, corpus_text)
    with contextlib.chdir(made), nothing_beside():
        start("run_dir=undisturbed", *ROUNDS)
    return made


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory; it has the prepared text and no losses."""
    shutil.copytree(made, tmp_path / "place", symlinks=True)
    shutil.rmtree(tmp_path / "place/runs/data/losses")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def undisturbed(place: Path) -> Path:
    return place / "undisturbed"


def equal(run: Path, other: Path) -> bool:
    return weights(run) == weights(other) and metrics(run) == metrics(other) and order(run) == order(other)


def drawn(run: Path, number: int) -> list[int]:
    return load_file(run / f"rounds/round-{number}.safetensors")["windows"].tolist()


def measured_by(monkeypatch: pytest.MonkeyPatch, *, then: Any = lambda count: None) -> list[int]:
    """Record the rows of each forward that measures losses."""
    sizes: list[int] = []
    original = sequence_losses.sequence_losses

    def recorded(model: Any, batch: Any, runtime: Any) -> torch.Tensor:
        sizes.append(len(batch.tokens))
        then(len(sizes))
        return original(model, batch, runtime)

    monkeypatch.setattr(sequence_losses, "sequence_losses", recorded)
    return sizes


def test_later_rounds_follow_in_one_schedule(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start("run_dir=run", *ROUNDS)
    said = capfd.readouterr().err
    logged = [entry for entry in metrics(place / "run") if "loss" in entry]
    assert [(e["round"], e["phase"]) for e in logged[::2]] == [
        *[(1, "one")] * 3, (1, "two"), *[(2, "round 2")] * 2, *[(3, "round 3")] * 2,
    ]  # fmt: skip
    assert logged[8]["lr"] == max(e["lr"] for e in logged) and logged[-1]["lr"] < logged[8]["lr"]  # stable till late
    assert re.search(
        r"round 2: 12 sequences of few drawn from 24 by loss: mean ([\d.]+) of the drawn, ([\d.]+) of all", said
    )
    assert "round 3: 4 sequences of many drawn from 8 by loss" in said
    assert "phase round 2: 4 steps" in said and "step 16/16" in said
    for number in (2, 3):
        windows = drawn(place / "run", number)
        assert max(Counter(windows[:12]).values()) == max(Counter(windows[12:]).values()) == 1
    assert drawn(place / "run", 2) != drawn(place / "run", 3)


def test_high_losses_are_drawn(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start("run_dir=run", *ROUNDS, "multi_round.temperature=0.001")
    means = re.findall(r"mean ([\d.]+) of the drawn, ([\d.]+) of all", capfd.readouterr().err)
    assert len(means) == 4 and all(float(of_drawn) > float(of_all) for of_drawn, of_all in means)


def test_a_uniform_draw_measures_nothing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start("run_dir=run", *ROUNDS, "multi_round={rounds: 2, draw: uniform, temperature: 1}")
    assert "12 sequences of few drawn from 24 at random" in capfd.readouterr().err
    assert not (place / "runs/data/losses").exists() and len(set(drawn(place / "run", 2)[:12])) == 12


@pytest.mark.parametrize(("step", "workers"), [(3, 0), (8, 2), (11, 2), (14, 0)])
def test_a_stopped_run_resumes_to_the_same_weights(
    place: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, step: int, workers: int
) -> None:
    stop_at(monkeypatch, step, "run_dir=run", f"num_workers={workers}", *ROUNDS)
    plmtune("resume", "run", f"num_workers={2 - workers}")
    assert equal(place / "run", undisturbed)


@pytest.mark.parametrize("killed", [True, False])
def test_a_run_stopped_while_it_measures_measures_the_rest(
    place: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    def end(count: int) -> None:
        if count == 5 and killed:
            raise RuntimeError("as a kill")
        if count == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(sequence_losses, "_FLUSH_SECONDS", 0)
        measured_by(patch, then=end)
        with pytest.raises(RuntimeError if killed else SystemExit):
            start("run_dir=run", *ROUNDS)
    assert sorted(path.name for path in (place / "run/checkpoints").glob("step-*"))[-1] == "step-00000008"
    with monkeypatch.context() as patch:
        rows = sum(measured_by(patch))
        sizes = measured_by(patch)
        plmtune("resume", "run")
    assert rows == 0 and sum(sizes) == 2 * 32 - (8 if killed else 10)
    assert equal(place / "run", undisturbed)


def test_a_kill_before_the_end_of_a_round_measures_nothing_again(
    place: Path, made: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "runs/data/losses", place / "runs/data/losses")
    shutil.copytree(undisturbed, place / "run")
    rewind(place / "run", 6)
    sizes = measured_by(monkeypatch)
    start("run_dir=run", "resume=true", *ROUNDS)
    assert sizes == [] and equal(place / "run", undisturbed)


def by_each_strategy(place: Path) -> dict[str, Any]:
    with contextlib.chdir(place), nothing_beside(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "draw_losses", lambda *arguments, **keywords: None)
        for strategy in ("ddp", "fsdp"):
            keys = (f"runtime.strategy={strategy}", f"preparation.directory={strategy}-data")
            start(f"run_dir={strategy}", *keys, *ROUNDS)
            rewind_on_first(Path(strategy), 10)
            start(f"run_dir={strategy}", *keys, "resume=true", *ROUNDS)
    return {}


def rewind_on_first(run: Path, step: int) -> None:
    if os.environ["RANK"] == "0":
        shutil.copytree(run, f"{run}-whole")
        rewind(run, step)


def test_two_processes_draw_what_one_does(place: Path, undisturbed: Path) -> None:
    in_group(by_each_strategy, 2, place)
    for strategy in ("ddp", "fsdp"):
        run = place / strategy
        assert order(run) == order(undisturbed)
        assert [drawn(run, number) for number in (2, 3)] == [drawn(undisturbed, number) for number in (2, 3)]
        for alone, shared in zip(metrics(undisturbed), metrics(run), strict=True):
            for key in {"loss", "validation_loss"} & {*alone, *shared}:
                assert shared[key] == pytest.approx(alone[key], rel=1e-5)
        assert equal(run, place / f"{strategy}-whole")


def test_a_branch_in_a_later_round_reads_what_follows_round_1(place: Path, undisturbed: Path) -> None:
    start("run_dir=branch", *ROUNDS[:3], "phases=[{name: decay, steps: 2, mix: {few: 1, many: 1}}]",
          f"init_from={undisturbed}/checkpoints/step-00000012", "scheduler.start=stable")  # fmt: skip
    states = [
        json.loads((run / f"checkpoints/step-{step:08}/state.json").read_text())["state"]
        for run, step in ((undisturbed, 8), (undisturbed, 12), (place / "branch", 2))
    ]
    assert states[0]["samples_seen"] == states[1]["samples_seen"] == states[2]["skip"] == {"few": 24, "many": 8}


@pytest.mark.parametrize("keys", [("distillation.top_k=8", "loss=forward_kl"), ("ema.decay=0.9", "document_mask=true")])
def test_a_teacher_an_average_and_a_mask_resume_in_a_later_round(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...]
) -> None:
    if "loss=forward_kl" in keys:
        keys = (*keys, f"distillation.teacher={whole}")
    start("run_dir=one", *ROUNDS, *keys)
    shutil.rmtree(place / "runs", ignore_errors=True)
    stop_at(monkeypatch, 9, "run_dir=other", *ROUNDS, *keys)
    plmtune("resume", "other")
    assert equal(place / "other", place / "one")


def test_the_plan_shows_rounds_and_the_cost_of_their_losses(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(*ROUNDS, dry_run=True)
    said = capsys.readouterr()
    assert "phase round 3: 512 tokens, 4 steps of 128 tokens (of round 1, drawn again)" in said.out + said.err
    assert "losses between rounds: forward passes over 2.05K tokens" in said.out + said.err


class TestBadInput:
    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("multi_round={rounds: 2, keep: 0.05}", "keep (0.05) of round 1's 12 steps is less than one global batch"),
            ("multi_round={rounds: 2, keep: 0}", "key multi_round.keep: must be above 0 and at most 1"),
            ("multi_round={rounds: 2, keep: 1.5}", "key multi_round.keep: must be above 0 and at most 1"),
            ("multi_round={rounds: 0}", "key multi_round.rounds: must be at least 1"),
            ("multi_round={rounds: 2, temperature: 0}", "key multi_round.temperature: must be above 0"),
            ("multi_round={rounds: 2, draw: hard}", "multi_round.draw"),
            ("multi_round.keep=0.3", "keep says what later rounds draw, and there is one round"),
            ("multi_round={rounds: 2, draw: uniform, temperature: 2}", "temperature (2) divides losses"),
        ],
    )
    def test_numbers_that_draw_nothing_are_refused(self, place: Path, override: str, said: str) -> None:
        assert said in refusal(override)
        assert not (place / "runs/pretrain").exists()

    @pytest.mark.parametrize("file", ["round-2.safetensors", "round-2.json"])
    def test_a_draw_that_is_damaged_is_refused_by_name(self, place: Path, undisturbed: Path, file: str) -> None:
        rewind(undisturbed, 10)
        path = undisturbed / "rounds" / file
        data = bytearray(path.read_bytes())
        data[-10] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"round-2.safetensors: the draw of round 2 cannot be used .* init_from="):
            plmtune("resume", "undisturbed")

    def test_the_draw_of_another_run_is_refused(self, place: Path, undisturbed: Path) -> None:
        start("run_dir=other", *ROUNDS, "seed=2")
        rewind(undisturbed, 10)
        for suffix in ("safetensors", "json"):
            shutil.copy(place / f"other/rounds/round-2.{suffix}", undisturbed / "rounds")
        with pytest.raises(UserError, match="another draw"):
            plmtune("resume", "undisturbed")

    def test_other_data_cannot_go_on_with_a_draw(self, place: Path, undisturbed: Path) -> None:
        rewind(undisturbed, 10)
        (place / "corpus/01.txt").write_text("another text " * 30)
        with pytest.raises(UserError, match=r"draw of round 2 cannot be used \(it was made of other data"):
            plmtune("resume", "undisturbed", "--allow-data-change")
