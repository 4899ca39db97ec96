"""Fine-tuning for quantization: what is trained, what is saved, and how a run goes on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import metrics, weights
from plmtune.recipes.preference import Preference
from plmtune.recipes.sft import Sft
from safetensors import safe_open
from tuning import refusal, run, stop_in

from plmtune.models.assemble import component_from_config
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.models.hf import load_model
from plmtune.quantization import qat
from plmtune.quantization.quantize import quantize
from plmtune.tokenizers.tokenizer_files import load_tokenizer

QAT = ["quantization=int4", "quantization.qat=true", "quantization.embedding=int4_g32"]
SHORT = ["phases=[{name: main, steps: 2}]", "validation.every=0", "checkpoint={every: 0}"]


class TestSft:
    def test_a_checkpoint_is_a_plain_model_that_loses_nothing_when_it_is_quantized(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipes = kept(monkeypatch, Sft, "train")
        measured = run("sft", "run_dir=out", *SHORT, *QAT)
        saved = checkpoint_directory("out")
        assert shapes(saved) == shapes(base / "base")
        scheme = qat.read_scheme("out")
        assert scheme is not None and scheme["component"] == "int4" and scheme["embedding"] == "int4_g32"
        keys = json.loads((saved / "config.json").read_text())
        assert keys.pop("qat") == {"scheme": scheme}
        eos = load_tokenizer(saved).eos_id
        ids = {"eos_token_id": eos, "pad_token_id": eos}
        assert keys == json.loads((base / "base" / "config.json").read_text()) | ids
        model = load_model(saved)
        recipe = recipes[0][0]
        recipe.model = recipe.trained = model  # the same validation, by the checkpoint
        unrounded = recipe.validate()["validation_loss"]
        quantize(model, component_from_config("quantization", scheme, "")(model=model))
        assert recipe.validate()["validation_loss"] == pytest.approx(measured, abs=1e-4)
        assert abs(unrounded - measured) > 1e-3

    @pytest.mark.slow
    def test_a_stopped_run_resumes_bit_by_bit(
        self, base: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Path]
    ) -> None:
        whole = undisturbed("sft", *QAT)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_in(patch, Sft, "train_step", 3)
            run("sft", "run_dir=out", *QAT)
        assert stopped.value.code == 75
        run("sft", "run_dir=out", "resume=true", *QAT)
        assert weights(base / "out") == weights(whole) and metrics(base / "out") == metrics(whole)

    def test_scheme_and_adapters_do_not_go_together(self, base: Path) -> None:
        assert "frozen under adapters" in refusal("sft", "run_dir=out", "peft=lora", *QAT)
        assert not (base / "out").exists()

    def test_an_impossible_scheme_is_refused(self, base: Path) -> None:
        said = refusal("sft", "run_dir=out", *QAT, "quantization.group_size=24")
        assert said == "key quantization: group_size must be a multiple of 16, not 24" and not (base / "out").exists()


class TestPreference:
    def test_the_reference_is_the_plain_model_and_the_policy_is_rounded(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps = kept(monkeypatch, Preference, "train_step")
        run("dpo", "run_dir=out", "validation.every=0", "checkpoint={every: 0}", "epochs=0.2", *QAT)
        plain = load_model("base")
        with torch.no_grad():
            recipe, _, _, reference = steps[0]
            for batch in recipe.data.all():
                torch.testing.assert_close(reference[batch.index], recipe.scorer(batch, plain).view(-1, 2))
        first = next(entry["loss"] for entry in metrics(base / "out") if "loss" in entry)
        assert abs(first - math.log(2)) > 1e-4  # what DPO gives while policy and reference are one
        assert qat.read_scheme("out") is not None


def kept(monkeypatch: pytest.MonkeyPatch, recipe: Any, method: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of a method, the recipe first."""
    found: list[tuple[Any, ...]] = []
    whole = getattr(recipe, method)

    def keeping(*arguments: Any) -> Any:
        found.append(arguments)
        return whole(*arguments)

    monkeypatch.setattr(recipe, method, keeping)
    return found


def shapes(directory: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(directory / "model.safetensors", "pt") as opened:
        names = opened.keys()
        return {name: (opened.get_slice(name).get_shape(), opened.get_slice(name).get_dtype()) for name in names}
