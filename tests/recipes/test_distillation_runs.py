"""Runs that learn from a teacher: what they log, that they resume, and what they refuse."""

import contextlib
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from cli_runs import SMALL, ends_with, metrics, nothing_beside, refusal, start, stop_at, weights
from group import in_group
from safetensors.torch import load_file, save_file
from test_resuming import plmtune
from tiny_models import tiny_llama

from plmtune.errors import UserError
from plmtune.models.hf import load_model, save_model
from plmtune.quantization.quantize import quantize
from plmtune.registry import load
from plmtune.tokenizers.tokenizer_files import load_tokenizer
from plmtune.tokenizers.train_bpe import train_bpe

DISTIL = ("loss=forward_kl", "loss.temperature=2", "loss.cross_entropy_weight=0.25")


def logged(run: Path) -> list[dict[str, Any]]:
    return [entry for entry in metrics(run) if "loss" in entry]


def test_cross_entropy_and_divergence_are_logged_apart(place: Path, whole: Path) -> None:
    start("run_dir=run", *DISTIL, f"distillation.teacher={whole}")
    for entry in logged(place / "run"):
        expected = 0.25 * entry["cross_entropy"] + 0.75 * entry["divergence"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    # The teacher has the student's initial weights, trained by 12 steps.
    first, *_, last = logged(place / "run")
    assert last["divergence"] < first["divergence"]
    measured = [entry for entry in metrics(place / "run") if "validation_loss" in entry]
    assert measured[-1]["validation_loss"] < measured[0]["validation_loss"]


def test_a_model_that_starts_as_its_teacher_has_no_divergence(place: Path, whole: Path) -> None:
    start("run_dir=run", *DISTIL, f"distillation.teacher={whole}", f"init_from={whole}")
    assert abs(logged(place / "run")[0]["divergence"]) < 1e-5


def test_a_quantized_teacher_is_smaller_and_nearly_the_same(
    place: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_step = ("phases=[{name: main, steps: 1}]", f"init_from={whole}", f"distillation.teacher={whole}", *DISTIL)
    quantized = (*one_step, "distillation.quantization=int8")
    start("run_dir=beside", *quantized)
    assert "teacher       453.75 KiB" not in (said := capsys.readouterr().err) and "teacher   " in said
    start("run_dir=kept", *quantized, "distillation.top_k=8")
    start("run_dir=kept-whole", *one_step, "distillation.top_k=8")
    for run in ("beside", "kept"):  # the student is the teacher as it was
        assert 0 < logged(place / run)[0]["divergence"] < 1e-4
    assert len([*place.glob("runs/teacher/*")]) == 2  # the cache of one is not that of the other


@pytest.mark.parametrize("kept", [(), ("distillation.top_k=8",)])
def test_a_compressed_tokenizer_learns_from_the_original(place: Path, kept: tuple[str, ...]) -> None:
    train_bpe([path.read_text() for path in sorted(place.glob("corpus/*"))], 300).save(place / "bpe")
    start("run_dir=teacher", "tokenizer=file", "tokenizer.path=bpe", "phases=[{name: main, steps: 3}]")
    plmtune("tokenizer", "compress", "teacher", "corpus/0*.txt", "--vocab-size", "280", "--out", "small")
    keys = (*DISTIL, "distillation.teacher=teacher", *kept)
    start("run_dir=run", *keys, "tokenizer=file", "tokenizer.path=small", "init_from=small")
    # The student starts as the teacher's rows of the kept tokens, and the teacher's distribution is among them.
    assert abs(logged(place / "run")[0]["divergence"]) < (1e-4 if kept else 1e-6)
    assert "compressed from it" in refusal(*keys, "tokenizer=bundled")


def test_a_stopped_run_resumes_to_the_same_weights(place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (*DISTIL, f"distillation.teacher={whole}")
    start("run_dir=undisturbed", *keys)
    stop_at(monkeypatch, 5, "run_dir=run", *keys)
    plmtune("resume", "run")
    assert weights(place / "run") == weights(place / "undisturbed")
    assert metrics(place / "run") == metrics(place / "undisturbed")


def test_a_teacher_that_was_moved_is_named_where_it_is(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, place / "teacher")
    stop_at(monkeypatch, 5, "run_dir=run", *DISTIL, "distillation.teacher=teacher")
    (place / "teacher").rename(place / "moved")
    with pytest.raises(UserError, match="teacher"):
        plmtune("resume", "run")
    with pytest.raises(UserError, match="teacher"):
        plmtune("resume", "run", "distillation.teacher=null")
    plmtune("resume", "run", "distillation.teacher=moved")
    assert metrics(place / "run")[-1]["step"] == 12


def test_a_teacher_that_changed_meanwhile_is_refused(place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole, place / "teacher")
    stop_at(monkeypatch, 5, "run_dir=run", *DISTIL, "distillation.teacher=teacher")
    shutil.rmtree(place / "teacher/checkpoints/step-00000012")
    with pytest.raises(UserError, match="no longer holds the weights"):
        plmtune("resume", "run")


def distil_by_each_strategy(place: Path) -> dict[str, Any]:
    with contextlib.chdir(place), nothing_beside():
        for strategy in ("ddp", "fsdp"):
            keys = (*DISTIL, "distillation.teacher=teacher", f"runtime.strategy={strategy}")
            start(f"run_dir={strategy}", *keys)
            start(f"run_dir={strategy}-int8", *keys, "distillation.quantization=int8")
            start(f"run_dir={strategy}-kept", *keys, "distillation.top_k=8", f"distillation.cache={strategy}-cache")
    return {}


def test_two_processes_compute_the_losses_of_one(place: Path, whole: Path) -> None:
    (place / "teacher").symlink_to(whole)
    start("run_dir=one", *DISTIL, "distillation.teacher=teacher")
    start("run_dir=one-kept", *DISTIL, "distillation.teacher=teacher", "distillation.top_k=8")
    start("run_dir=one-int8", *DISTIL, "distillation.teacher=teacher", "distillation.quantization=int8")
    in_group(distil_by_each_strategy, 2, place)
    for strategy, kept in product(("ddp", "fsdp"), ("", "-int8", "-kept")):
        for alone, shared in zip(logged(place / f"one{kept}"), logged(place / f"{strategy}{kept}"), strict=True):
            for key in ("loss", "cross_entropy", "divergence"):
                assert shared[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-7)


class TestLayers:
    KEYS = (*DISTIL, "distillation.layers=[0,1]", "distillation.teacher_layers=[1,0]", "distillation.layers_weight=3")

    def test_the_mean_squared_difference_of_hidden_states_is_part_of_the_loss(self, place: Path, whole: Path) -> None:
        start("run_dir=run", *self.KEYS, f"distillation.teacher={whole}")
        for entry in logged(place / "run"):
            expected = 0.25 * entry["cross_entropy"] + 0.75 * entry["divergence"] + 3 * entry["hidden_difference"]
            assert entry["loss"] == pytest.approx(expected, rel=1e-5)
        first, *_, last = logged(place / "run")
        assert last["hidden_difference"] < first["hidden_difference"]

    def test_equal_layers_of_an_equal_model_have_no_difference(self, place: Path, whole: Path) -> None:
        keys = (*self.KEYS, "distillation.teacher_layers=[0,1]", "runtime.activation_checkpointing=full")
        start("run_dir=run", *keys, f"distillation.teacher={whole}", f"init_from={whole}")
        assert logged(place / "run")[0]["hidden_difference"] < 1e-9

    @pytest.mark.parametrize(
        "override, said",
        [
            ("distillation.layers=[0]", "equally many"),
            ("distillation.layers=[0,9]", "no layer 9"),
            ("distillation.top_k=4", "keeps no hidden states"),
            ("model.embed_dim=32", "have 32 numbers, and the teacher's 64"),
        ],
    )
    def test_what_does_not_pair_is_refused(self, place: Path, whole: Path, override: str, said: str) -> None:
        assert said in refusal(*self.KEYS, f"distillation.teacher={whole}", override)


class TestBadInput:
    def test_a_temperature_is_the_losses(self, place: Path) -> None:
        assert "Did you mean loss.temperature" in refusal("loss=jsd", "distillation.temperature=2")

    def test_a_loss_without_its_teacher(self, place: Path) -> None:
        assert "distillation.teacher=DIR" in refusal("loss=reverse_kl")

    def test_a_teacher_that_the_loss_does_not_read(self, place: Path, whole: Path) -> None:
        said = refusal(f"distillation.teacher={whole}")
        assert "cross_entropy has no teacher" in said and "loss=jsd" in said

    def test_a_teacher_of_another_tokenizer(self, place: Path, whole: Path) -> None:
        said = refusal(*DISTIL, f"distillation.teacher={whole}", "tokenizer=bundled")
        assert "its tokenizer (257 tokens) differs from this run's (4,096)" in said and "tokenizer=file" in said

    def test_a_teacher_with_fewer_rows_than_its_tokenizer_has_tokens(self, place: Path, whole: Path) -> None:
        save_model(tiny_llama(200), None, place / "short")
        load_tokenizer(next(whole.glob("checkpoints/step-00000012"))).save(place / "short")
        said = refusal(*DISTIL, "distillation.teacher=short")
        assert "it has 200 rows for the 257 tokens of its tokenizer" in said

    def test_a_teacher_that_is_quantized_on_disk(self, place: Path, whole: Path) -> None:
        model = load_model(next(whole.glob("checkpoints/step-00000012")))
        quantize(model, load("quantization", "int8")(model))
        save_model(model, None, place / "integers")
        load_tokenizer(next(whole.glob("checkpoints/step-00000012"))).save(place / "integers")
        keys = (*DISTIL, "distillation.teacher=integers")
        said = refusal(*keys, "distillation.quantization=int8")
        assert "the model is quantized already (tok_embeddings is int8). Leave distillation.quantization out" in said
        start("run_dir=run", *keys, f"init_from={whole}", "phases=[{name: main, steps: 1}]")
        assert 0 < logged(place / "run")[0]["divergence"] < 1e-3

    def test_quantization_without_a_teacher(self, place: Path) -> None:
        assert "key distillation.quantization: there is no teacher" in refusal("distillation.quantization=int8")

    @pytest.mark.parametrize("kept", [(), ("distillation.top_k=8",)])
    def test_a_teacher_whose_training_diverged(self, place: Path, whole: Path, kept: tuple[str, ...]) -> None:
        shutil.copytree(next(whole.glob("checkpoints/step-00000012")), place / "diverged")
        (place / "diverged/manifest.json").unlink()
        state = load_file(place / "diverged/model.safetensors")
        state["model.norm.weight"][3] = float("nan")
        save_file(state, place / "diverged/model.safetensors")
        said = refusal(*DISTIL, "distillation.teacher=diverged", *kept)
        assert "distillation.teacher=diverged: its weights are not finite (norm.weight)" in said
        assert not [*place.glob("runs/teacher/*/*.bin")]

    def test_rows_longer_than_the_teacher_reads(self, place: Path, whole: Path) -> None:
        said = refusal(*DISTIL, f"distillation.teacher={whole}", "seq_len=600", "model.max_seq_len=600")
        assert "512 tokens at once" in said

    def test_a_teacher_that_is_not_there(self, place: Path) -> None:
        assert "nowhere" in refusal(*DISTIL, "distillation.teacher=nowhere")


class TestTopK:
    KEYS = (*DISTIL, "distillation.teacher=teacher", "distillation.top_k=257", "micro_batch_size=2")

    @pytest.fixture
    def place(self, place: Path, whole: Path) -> Path:
        (place / "teacher").symlink_to(whole)
        return place

    def test_the_whole_vocabulary_trains_as_the_teacher_beside_it_does(self, place: Path) -> None:
        start("run_dir=kept", *self.KEYS)
        start("run_dir=beside", *self.KEYS, "distillation.top_k=null")
        for one, other in zip(logged(place / "kept"), logged(place / "beside"), strict=True):
            for key in ("loss", "cross_entropy", "divergence"):
                assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-5)  # fp16

    def test_later_runs_read_what_the_first_wrote(self, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
        keys = (*self.KEYS, "distillation.top_k=8")
        start("run_dir=first", *keys)
        assert "45 rows are computed" in capfd.readouterr().err
        start("run_dir=second", *keys)
        assert "are read from runs/teacher/" in capfd.readouterr().err
        assert weights(place / "first") == weights(place / "second")
        start("run_dir=longer", *keys, "phases=[{name: main, steps: 14}]")
        assert "7 rows are computed" in capfd.readouterr().err

    def test_a_teacher_of_another_config_is_another_teacher(
        self, place: Path, whole: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        directory = place / "changed"
        shutil.copytree(next(whole.glob("checkpoints/step-00000012")), directory)
        keys = (*self.KEYS, "distillation.teacher=changed", "distillation.top_k=8", "phases=[{name: main, steps: 1}]")
        start("run_dir=first", *keys)
        config = (directory / "config.json").read_text()
        assert "100000.0" in config
        (directory / "config.json").write_text(config.replace("100000.0", "5000.0"))
        (directory / "manifest.json").unlink()
        capfd.readouterr()
        start("run_dir=second", *keys)
        assert "rows are computed" in capfd.readouterr().err

    def test_a_multirun_computes_each_teachers_tokens_once(self, place: Path, capsys: Any) -> None:
        other = ("model.init_std=0.05", "phases=[{name: main, steps: 1}]")
        start("run_dir=other", *other)
        keys = (*SMALL, "phases=[{name: main, steps: 2}]", "loss=forward_kl", "loss.temperature=1,2")
        teachers = ("distillation.teacher=teacher,other", "distillation.top_k=8")
        assert ends_with("run", "-m", "pretrain", *keys, *teachers) == 0
        runs = sorted(path.parent for path in place.glob("runs/multirun/*/*/metrics.jsonl"))
        assert len({logged(run)[0]["divergence"] for run in runs}) == 4
        assert len({weights(run) for run in runs}) == 4
        parts = sorted(place.glob("runs/teacher/*/*.bin"))
        assert len(parts) == len({part.parent for part in parts}) == 2

    def test_a_stopped_run_resumes_to_the_same_weights(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = (*self.KEYS, "distillation.top_k=8")
        start("run_dir=undisturbed", *keys)
        stop_at(monkeypatch, 5, "run_dir=run", *keys)
        plmtune("resume", "run")
        assert weights(place / "run") == weights(place / "undisturbed")

    def test_a_damaged_part_is_computed_again(self, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
        keys = (*self.KEYS, "distillation.top_k=8")
        start("run_dir=first", *keys)
        (part,) = place.glob("runs/teacher/*/*.bin")
        data = bytearray(part.read_bytes())
        data[100] ^= 1
        part.write_bytes(data)
        capfd.readouterr()
        start("run_dir=second", *keys)
        assert "does not match its checksum" in capfd.readouterr().err
        assert weights(place / "first") == weights(place / "second")

    @pytest.mark.parametrize(
        "overrides, said",
        [
            (["loss=reverse_kl"], "whole distribution"),
            (["distillation.top_k=300"], "exceeds the vocabulary"),
            (
                ["loss=forward_kl", "distillation.cache=corpus/00.txt/cache"],
                "00.txt is a file, and the cache is a folder",
            ),
            (["distillation.teacher=null", "loss=cross_entropy"], "there is no teacher"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, place: Path, overrides: list[str], said: str) -> None:
        keys = [key for key in self.KEYS if not key.startswith("loss") or overrides[0] == "distillation.top_k=300"]
        assert said in refusal(*keys, *overrides)
