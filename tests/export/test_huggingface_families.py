"""Every family leaves as transformers reads it, and its verification compares what the family adds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import FAMILIES, SIZES, config_of, make
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from plmtune.export import verify as verifying
from plmtune.export.contents import read_contents
from plmtune.export.diagnosis import log_probs
from plmtune.export.huggingface import export_hf
from plmtune.export.lint import lint
from plmtune.export.report import Report
from plmtune.export.runtimes import open_runtime
from plmtune.models.families import by_model_type
from plmtune.models.hf import load_model
from plmtune.models.hf_config import hf_config
from plmtune.modules.quantized import Quantized
from plmtune.quantization.quantize import quantize
from plmtune.registry import component
from plmtune.tokenizers import tokenizer_files

# One of each model_type.
ONE_EACH = sorted({model_type: name for name, (model_type, _) in reversed(FAMILIES.items())}.values())
bundled = cache(tokenizer_files.bundled)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of a family with the vocabulary of the bundled tokenizer, made once."""
    held: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in held:
            directory = tmp_path_factory.mktemp("families") / name
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(SIZES, "vocab_size", bundled().vocab_size)
                make(name, directory)
            bundled().save(directory)
            held[name] = directory
        return held[name]

    return get


def exported(checkpoint: Path, directory: Path) -> Path:
    export_hf(load_model(checkpoint), bundled(), directory, dtype=torch.float32)
    return directory


def edit(directory: Path, **keys: Any) -> None:
    (directory / "manifest.json").unlink(missing_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_gives_the_same_log_probabilities(name: str, checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint(name)
    model = load_model(source).eval()
    assert [finding for finding in lint(model.config, "hf") if finding.level == "refused"] == []
    exported(source, tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    ids = torch.randint(3, 4000, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    with open_runtime(tmp_path / "out", exact=True) as runtime:
        assert runtime.name == "transformers"
        ids = ids[: runtime.context]
        torch.testing.assert_close(runtime.log_probs(ids, len(ids)), log_probs(model, ids, len(ids)), atol=2e-4, rtol=0)
    contents, report = read_contents(tmp_path / "out", model), Report("", "", "", "", 0)
    verifying._compare_contents(report, model, contents, "out", "float32")
    assert report.passed and len(contents.tensors) >= len(model.state_dict()) and contents.computation


@pytest.mark.parametrize("name", ONE_EACH)
def test_transformers_takes_the_width_that_a_config_names_or_it_is_of_no_family(name: str, tmp_path: Path) -> None:
    """Pruning gives widths that are no multiple of the heads, which some classes of transformers refuse."""
    make(name, tmp_path)
    config: Any = load_model(tmp_path).config
    if config["attention"]["component"] == "gqa":
        config["attention"]["head_dim"] = config["attention"]["head_dim"] or config["embed_dim"] // config["num_heads"]
    config["embed_dim"] = next(width for width in (45, 46) if width % config["num_heads"])
    keys = hf_config(config, torch.float32)
    known = keys["model_type"] in by_model_type()
    if known and by_model_type()[keys["model_type"]].in_transformers:
        AutoConfig.for_model(**keys)
    assert known or any(found.level == "refused" for found in lint(config, "hf"))
    assert known == (name not in ("gemma2", "gemma3", "arcee", "gpt2", "stablelm"))


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_verification_passes(name: str, checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint(name)
    exported(source, tmp_path / "out")
    report = verifying.verify(tmp_path / "out", source, kind="fp32", positions=40)
    assert report.passed, str(report)
    assert report.runtime == "transformers"


@pytest.mark.parametrize(
    ("name", "key", "value", "named"),
    [
        ("mistral", "sliding_window", 8, "attention.window"),
        ("gemma2", "final_logit_softcapping", 20.0, "logit_soft_cap"),
        ("gemma2", "query_pre_attn_scalar", 10, "attention.scale"),
        ("smollm3", "no_rope_layers", [1, 1, 1, 1], "rope"),
        ("qwen3", "rope_scaling", {"rope_type": "linear", "factor": 2.0}, "attention.rope_scaling"),
        ("gpt2", "activation_function", "gelu", "approximate"),
    ],
)
def test_a_setting_that_was_changed_is_named(
    name: str, key: str, value: Any, named: str, checkpoint: Any, tmp_path: Path
) -> None:
    out = exported(checkpoint(name), tmp_path / "out")
    edit(out, **{key: value})
    if "rope" in key:
        edit(out, rope_parameters=value if key == "rope_scaling" else {"rope_type": "default", "rope_theta": 1e4})
    report, model = Report("", "", "", "", 0), load_model(checkpoint(name))
    verifying._compare_contents(report, model, read_contents(out, model), "out", "float32")
    wrong = {check.name: check.cause for check in report.checks if not check.passed}
    assert list(wrong) == ["settings: that differ"] and named in str(wrong)


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_a_part_of_a_fused_matrix_that_differs_is_named(name: str, checkpoint: Any, tmp_path: Path) -> None:
    out = exported(checkpoint(name), tmp_path / "out")
    (out / "manifest.json").unlink(missing_ok=True)
    state = load_file(out / "model.safetensors")
    fused = next(key for key in state if "qkv" in key or "c_attn.weight" in key)
    keys_rows = state[fused] if name == "phi3" else state[fused].t()
    keys_rows[48:64] *= 2
    save_file(state, out / "model.safetensors", {"format": "pt"})
    report, model = Report("", "", "", "", 0), load_model(checkpoint(name))
    verifying._compare_contents(report, model, read_contents(out, model), "out", "float32")
    wrong = {check.name: check.cause for check in report.checks if not check.passed}
    assert list(wrong) == ["tensors: that differ"] and "layers.0.attention.k_proj.weight" in str(wrong)


def test_keys_of_the_source_stay_and_ids_are_the_tokenizers(checkpoint: Any, tmp_path: Path) -> None:
    edit(checkpoint("gemma3"), cache_implementation="hybrid", bos_token_id=7)
    keys = json.loads((exported(checkpoint("gemma3"), tmp_path / "out") / "config.json").read_text())
    source = json.loads((checkpoint("gemma3") / "config.json").read_text())
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert {key: keys.get(key) for key in source if key not in ids} == {
        key: value for key, value in source.items() if key not in ids
    }
    assert keys["bos_token_id"] == bundled().bos_id != 7
    assert config_of("gemma3").model_type == keys["model_type"] and "plmtune" not in keys


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
@torch.no_grad()
def test_integers_are_written_out_fused(name: str, checkpoint: Any, tmp_path: Path) -> None:
    model = load_model(checkpoint(name)).eval()
    quantize(model, component("quantization", "int8")(model=model))
    assert any(isinstance(part, Quantized) for part in model.modules())
    export_hf(model, bundled(), tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(20, 40)[None]
    torch.testing.assert_close(load_model(tmp_path / "out").eval()(ids), model(ids), atol=1e-3, rtol=1e-3)
