"""Presets of published models have the published number of parameters."""

import pytest
import torch

from plmtune.cli.plan_report import published_rows
from plmtune.config.builtin import builtin_folder
from plmtune.config.compose import compose

PRESETS = {
    "plm_1.8b": (151936, 1_825_458_176),
    "qwen2.5_0.5b": (151936, 494_032_768),
    "qwen3_0.6b": (151936, 596_049_920),
    "llama3.2_1b": (128256, 1_235_814_400),
    "smollm2_135m": (49152, 134_515_008),
    "smollm2_360m": (49152, 361_821_120),
    "smollm2_1.7b": (49152, 1_711_376_384),
    "smollm3_3b": (128256, 3_075_098_624),
    "gemma3_270m": (262144, 268_098_176),
    "gemma3_1b": (262144, 999_885_952),
    "tinyllama_1.1b": (32000, 1_100_048_384),
    "gpt2": (50257, 124_439_808),
}


@pytest.mark.parametrize("name", PRESETS)
def test_has_the_published_parameters(name: str) -> None:
    rows, parameters = PRESETS[name]
    with torch.device("meta"):
        model = compose("pretrain", (), [f"model={name}"]).model(vocab_size=rows)
    assert model.num_parameters == parameters
    path = builtin_folder("conf") / "model" / f"{name}.yaml"
    if path.exists():  # else it is a component with its defaults
        vocabulary = "" if name == "plm_1.8b" else f", a vocabulary of {rows:,}"  # which its config chooses
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        assert f", exact: {parameters:,} parameters{vocabulary}" in first
        assert published_rows(name, [], []) == (rows if vocabulary else None)
        assert published_rows(name, [], ["tokenizer=byte"]) is None
