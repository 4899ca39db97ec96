"""The recipe quantize: a directory that loads like any other, told how large it is and what it lost."""

import json
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from plmtune.recipes import quantize
from safetensors.torch import load_file, save_file
from tiny_models import tiny_plm
from tuning import stop_in

import plmtune
from plmtune.cli import cli
from plmtune.config import compose
from plmtune.errors import UserError
from plmtune.io.interruptible import Interruptible
from plmtune.models import text_loss
from plmtune.models.hf import save_model
from plmtune.modules.quantized import Quantized
from plmtune.quantization import sensitivity
from plmtune.quantization.schemes import int4
from plmtune.tokenizers.tokenizer_files import bundled

TEXT = "The quick brown fox jumps over the lazy dog. " * 80


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small model, and text of some thousand tokens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLMTUNE_KERNELS", "reference")
    tokenizer, mla = bundled(), {"qk_rope_head_dim": 16, "v_head_dim": 16}
    model = tiny_plm(tokenizer.vocab_size, mla=mla, hidden_dim=64, embed_dim=32, num_heads=2)
    save_model(model, None, tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(*overrides: str) -> float | None:
    own = ["checkpoint=base", "data=files", "data.paths=[text.txt]", "calibration_tokens=256", "test_tokens=256"]
    return quantize.main(compose.compose("quantize", (), [*own, "seq_len=32", "run_dir=out", *overrides]))


class TestNotFinite:
    def test_weights_are_refused_before_a_run_begins_and_numbers_that_overflow_are_not_written(
        self, folder: Path
    ) -> None:
        held = load_file(folder / "base/model.safetensors")
        held["model.norm.weight"][0] = torch.finfo(torch.float32).max  # finite; in bf16 it is not
        save_file(held, folder / "base/model.safetensors")
        with pytest.raises(UserError, match=r"not finite: model.norm.weight\. Nothing is written to out"):
            run("dtype=bf16", "calibration_tokens=0", "test_tokens=0")
        assert not list((folder / "out").glob("*.safetensors"))
        held["model.norm.weight"][0] = float("nan")
        save_file(held, folder / "base/model.safetensors")
        with pytest.raises(UserError, match=r"base: its weights are not finite \(norm.weight\).* Quantize an earlier"):
            run("run_dir=other")
        assert not (folder / "other").exists()


class TestOneModel:
    def test_the_directory_loads_like_any_other_and_says_what_it_lost(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        loss = run("quantization=int4")
        assert "text.txt" in (said := capsys.readouterr().out) and "256 tokens to calibrate on" in said
        report = json.loads((folder / "out" / "quantize.json").read_text())
        assert report["loss"] == loss
        assert report["bytes"] < report["bytes_before"]
        assert report["formats"]["layers.0.ffn.up_proj"] == "int4_g32"
        model, tokenizer = plmtune.load(folder / "out", "cpu")
        assert isinstance(model.get_submodule("layers.1.ffn.down_proj"), Quantized)
        assert model(torch.tensor([tokenizer.encode("The quick")])).isfinite().all()

    def test_8_bits_lose_less_than_4(self, folder: Path) -> None:
        eight, four = run("quantization=int8", "run_dir=eight"), run("quantization=int4", "run_dir=four")
        before = json.loads((folder / "four" / "quantize.json").read_text())["loss_before"]
        assert eight is not None and four is not None
        assert abs(eight - before) < abs(four - before)

    def test_a_rule_leaves_a_module_as_it_is(self, folder: Path) -> None:
        (folder / "mine.yaml").write_text('# rules\nquantization: {rules: {"*.down_proj": keep}}\n')
        own = ["quantization=int8", "checkpoint=base", "run_dir=out", "calibration_tokens=0", "test_tokens=0"]
        quantize.main(compose.compose("quantize", ["mine.yaml"], own))
        model, _ = plmtune.load(folder / "out", "cpu")
        assert isinstance(model.get_submodule("layers.0.ffn.down_proj"), torch.nn.Linear)
        assert isinstance(model.get_submodule("layers.0.ffn.up_proj"), Quantized)


class TestSensitivity:
    def test_a_budget_gives_a_mix_that_fits_it_and_what_is_drawn_is_what_is_printed(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        saved = []
        save = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
        run("quantization=int4", "sensitivity.budget=52%", "sensitivity.tokens=64")  # which cannot be spent unmeasured
        report = json.loads((folder / "out" / "quantize.json").read_text())
        assert report["scheme"]["component"] == "mixed"
        assert report["bytes"] <= 0.52 * report["bytes_before"]  # of files, with their headers
        assert len(set(report["formats"].values())) > 1
        assert (folder / "out" / "sensitivity.png").stat().st_size > 10_000
        said = capsys.readouterr().out
        panel = saved[0].axes[0]
        texts = " ".join(text.get_text() for text in panel.texts)
        (size,) = re.findall(r"^out: ([\d.]+ KiB), [\d.]+% of the ([\d.]+ KiB)", said, re.MULTILINE)
        perplexity = re.findall(r"perplexity ([\d.]+) -> ([\d.]+) on 248 tokens", said)[0]
        for place, bytes_, number in zip(("after", "before"), size, reversed(perplexity), strict=True):
            assert f"{place}: {bytes_}, perplexity {number}" in texts
        assert (
            "62 tokens to choose the mix on, 248 tokens to measure on" in said
            and panel.get_ylabel() == "perplexity on 248 tokens"
        )
        assert panel.get_xlabel() == "weights, KiB" and report["test_tokens"] == 248
        # What it proposes is a config that can be given again.
        again = compose.compose("quantize", ["out/mix.yaml"], [])
        assert again.quantization.name == "mixed"

    def test_the_rows_that_a_mix_is_chosen_by_are_others_than_the_loss_is_measured_on(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        numbers = " ".join(str(number**2) for number in range(3000))
        (folder / "text.txt").write_text(numbers, encoding="utf-8")
        own = {"measure": torch.empty(0), "loss": []}  # type: ignore[var-annotated]
        measure, loss = sensitivity.measure, text_loss.mean_loss

        def kept(model, plan, rows, *rest, **more):  # type: ignore[no-untyped-def]
            own["measure"] = rows
            return measure(model, plan, rows, *rest, **more)

        def seen(model, batches):  # type: ignore[no-untyped-def]
            own["loss"] = list(batches)
            return loss(model, own["loss"])

        monkeypatch.setattr(sensitivity, "measure", kept)
        monkeypatch.setattr(text_loss, "mean_loss", seen)
        run("quantization=int4", "sensitivity.budget=60%", "sensitivity.tokens=96")
        chosen, reported = own["measure"].tolist(), torch.cat(own["loss"]).tolist()
        assert (len(chosen), len(reported)) == (3, 8)
        assert not any(row in reported for row in chosen)
        assert json.loads((folder / "out/quantize.json").read_text())["sensitivity_tokens"] == 3 * 31
        # What is measured on does not depend on it, so that losses of several schemes are of one text.
        run("quantization=int4", "run_dir=plain")
        assert torch.cat(own["loss"]).tolist() == reported
        with pytest.raises(UserError, match=r"test_tokens \(256\) with sensitivity.tokens \(1,000,000\) are taken"):
            run("sensitivity.measure=true", "sensitivity.tokens=1000000", "run_dir=more")

    @pytest.mark.parametrize("share", [26, 26.5])
    def test_a_file_takes_no_byte_more_than_its_budget(self, folder: Path, share: float) -> None:
        spent = [f"sensitivity.budget={share}%", "sensitivity.tokens=64", "calibration_tokens=0"]
        run("quantization=int4", "dtype=fp32", *spent)
        files = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors"))
        whole = quantize.file_bytes(quantize.build_on_meta(folder / "base"), {}, torch.float32)
        assert whole == (folder / "base/model.safetensors").stat().st_size
        assert 0.98 * share / 100 * whole < files <= share / 100 * whole

    def test_a_mix_that_no_budget_allows_ends_the_search(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        true, asked = quantize.file_bytes, []

        def file_bytes(model: object, plan: dict[str, object], dtype: torch.dtype) -> int:
            asked.append(plan)
            return true(model, plan, dtype) + (1 << 30 if len(asked) > 2 else 0)

        monkeypatch.setattr(quantize, "file_bytes", file_bytes)
        with pytest.raises(UserError, match=r"budget: 60% is [\d,]+ bytes, and the smallest mix takes [\d,]+\."):
            run("quantization=int4", "sensitivity.budget=60%", "sensitivity.tokens=64", "calibration_tokens=0")

    def test_no_bytes_are_spent_for_nothing(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run("quantization=int8", "sensitivity.budget=99%", "sensitivity.tokens=64")
        report = json.loads((folder / "out" / "quantize.json").read_text())
        said = capsys.readouterr().out
        assert report["bytes"] < 0.7 * report["bytes_before"]
        assert "the mix for" in said and "(99.0%) takes" in said
        assert "more bytes would gain less than 0.0001 nats a token" in said

    def test_a_budget_below_the_smallest_scheme_is_refused_before_anything_is_read(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"budget: 5% is .* the scheme int4 takes .* \(\d\d\.\d%\) without a mix"):
            run("quantization=int4", "sensitivity.measure=true", "sensitivity.budget=5%")
        assert not (folder / "out").exists()

    @pytest.mark.parametrize(
        ("preset", "share"), [("plm_demo", 38), ("plm_20m", 31), ("plm_150m", 30), ("plm_1.8b", 30)]
    )
    def test_the_least_share_is_what_the_documentation_says(self, preset: str, share: int) -> None:
        cfg = compose.compose("pretrain", (), [f"model={preset}"])
        sizes = []
        for plan in (int4, lambda model: {}):
            with torch.device("meta"):
                model = compose.build("model", cfg.model, vocab_size=bundled().vocab_size)
            sizes.append(quantize.file_bytes(model, plan(model), torch.bfloat16))
        assert round(100 * sizes[0] / sizes[1]) == share


class TestResuming:
    SENSITIVITY = ("quantization=int4", "sensitivity.measure=true", "sensitivity.tokens=64")

    def command(self, *words: str) -> None:
        cli.main(list(words), standalone_mode=False)

    def stop_at(self, call: int, *overrides: str) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_in(patch, Interruptible, "stop_if_asked", call)
            run(*overrides)
        assert stopped.value.code == 75

    def test_a_stopped_one_starts_over_with_the_sensitivities_it_has(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        run(*self.SENSITIVITY, "run_dir=whole")
        self.stop_at(9, *self.SENSITIVITY)  # 2 batches before, 2 to calibrate, then a module each
        said = capfd.readouterr().err
        assert "SIGTERM: stopping" in said and "stopped; resume it with: plmtune resume out" in said
        assert json.loads((folder / "out/run.json").read_text())["status"] == "stopped"
        measured = len(json.loads((folder / "out/sensitivity.json").read_text())["modules"])
        assert measured == 4
        with pytest.raises(
            UserError, match=r"out is a run that was stopped, before it saved a model.*plmtune resume out"
        ):
            plmtune.load("out")
        again: list[str] = []
        whole = sensitivity.quantize_module
        monkeypatch.setattr(
            sensitivity,
            "quantize_module",
            lambda model, name, *more: (again.append(name), whole(model, name, *more))[1],
        )
        self.command("resume", "out")
        report, other = (json.loads((folder / name / "quantize.json").read_text()) for name in ("out", "whole"))
        assert len(set(again) - {"module"}) == len(report["formats"]) - measured  # that one is of its outputs
        assert report == other
        for name in ("model.safetensors", "config.json", "tokenizer.json", "manifest.json"):
            assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name

    def test_one_that_was_killed_while_it_wrote_is_no_model_and_is_written_again(self, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

            def dies(*given: object, **more: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(quantize.manifest, "write", dies)
            run("quantization=int8")
        assert (folder / "out/config.json").exists()
        with pytest.raises(UserError, match=r"out is a run that failed \(KeyboardInterrupt\), before it saved a model"):
            plmtune.load("out")
        self.command("resume", "out")
        plmtune.load("out")

    def test_a_finished_one_says_so(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        loss = run("quantization=int8")
        before = (folder / "out/run.json").read_bytes()
        self.command("resume", "out")
        assert run("quantization=int8", "resume=true") == loss
        assert capfd.readouterr().out.count("out is finished: there is nothing to resume.") == 2
        assert (folder / "out/run.json").read_bytes() == before

    def test_what_is_quantized_cannot_change(self, folder: Path) -> None:
        self.stop_at(1, "quantization=int8")
        with pytest.raises(UserError, match="was started with checkpoint=base, not out"):
            self.command("resume", "out", "checkpoint=out")

    def test_a_flipped_bit_in_it_is_found(self, folder: Path) -> None:
        run("quantization=int8")
        data = bytearray((folder / "out/model.safetensors").read_bytes())
        data[-3] ^= 1
        (folder / "out/model.safetensors").write_bytes(data)
        with pytest.raises(UserError, match=r"out/model.safetensors is damaged"):
            plmtune.load("out")


class TestMistakes:
    def test_nothing_to_quantize(self, folder: Path) -> None:
        with pytest.raises(UserError, match="no finished run under runs/ to quantize"):
            run("checkpoint=null")

    def test_a_quantized_model_is_not_quantized_again(self, folder: Path) -> None:
        run("quantization=int8")
        with pytest.raises(UserError, match="quantized already"):
            run("checkpoint=out", "run_dir=twice")
        assert not (folder / "twice").exists()

    def test_too_little_text(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"key data: the text has [\d,]+ tokens"):
            run("test_tokens=1000000")
        with pytest.raises(UserError, match="calibration_tokens: must be at least 0"):
            run("calibration_tokens=-1")

    def test_a_group_that_is_none(self, folder: Path) -> None:
        with pytest.raises(UserError, match="group_size must be a multiple of 16, not 20"):
            run("quantization=int4", "quantization.group_size=20")

    def test_a_directory_in_use_is_not_overwritten(self, folder: Path) -> None:
        run("quantization=int8")
        with pytest.raises(UserError, match="already holds a run"):
            run("quantization=int4")
