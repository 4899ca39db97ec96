"""Models with fewer tokens compute the same logits of those that are left, in every family."""

from pathlib import Path

import pytest
import torch
from made_families import FAMILIES, make
from transformers import AutoModelForCausalLM

from plmtune.errors import UserError
from plmtune.models.hf import load_model, save_model
from plmtune.models.hf_config import read_model_config
from plmtune.models.kept_rows import keep_rows, named_ids, renumbered, row_parameters
from plmtune.modules.quantized import Format, install

KEPT = [0, 1, 2, 5, 7, 8, 40, 41, 77, 100]
# One of each model_type, and one tied.
TYPES = list({model_type: name for name, (model_type, _) in reversed(FAMILIES.items())}.values())


@pytest.mark.parametrize("name", [*TYPES, "llama-untied-wide", "phi4-mini"])
def test_logits_of_kept_tokens_stay(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "whole")
    model = load_model(tmp_path / "whole").eval()
    row, others = row_parameters(model.config, name)
    ids = torch.tensor([[3, 9, 1, 2, 6, 4, 4, 0]])
    with torch.no_grad():
        before = model(torch.tensor(KEPT)[ids])
    assert sum(p.numel() for p in model.parameters()) == 101 * row + others
    keep_rows(model, KEPT)
    assert sum(p.numel() for p in model.parameters()) == len(KEPT) * row + others
    with torch.no_grad():
        torch.testing.assert_close(model(ids), before[..., KEPT], rtol=0, atol=2e-5)
    source = model.source_keys
    model.source_keys = renumbered(source, {old: new for new, old in enumerate(KEPT)}) | {"vocab_size": len(KEPT)}
    save_model(model, None, tmp_path / "kept")
    assert read_model_config(tmp_path / "kept") == model.config
    again = load_model(tmp_path / "kept").eval()
    assert again.source_keys.keys() == source.keys()
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_transformers_reads_the_result(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "whole")
    model = load_model(tmp_path / "whole").eval()
    keep_rows(model, KEPT)
    model.source_keys = model.source_keys | {"vocab_size": len(KEPT)}
    save_model(model, None, tmp_path / "kept")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32).eval()
    ids = torch.tensor([[3, 9, 1, 2, 6, 4, 4, 0]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=2e-5)


class TestMistakes:
    def test_a_quantized_model_is_refused(self, tmp_path: Path) -> None:
        make("llama", tmp_path)
        model = load_model(tmp_path)
        install(model, {"tok_embeddings": Format.parse("int8")})
        with pytest.raises(UserError, match="compress the checkpoint that was quantized"):
            keep_rows(model, [0])


NEW = {5: 0, 7: 1, 9: 2}


class TestIds:
    def test_ids_of_tokens_get_their_new_ones(self) -> None:
        keys = {"bos_token_id": 5, "eos_token_id": [7, 9], "pad_token_id": None, "hidden_size": 9, "top_k": 5}
        assert renumbered(keys, NEW) == keys | {"bos_token_id": 0, "eos_token_id": [1, 2]}
        assert named_ids(keys) == {5, 7, 9}

    def test_an_id_of_a_row_that_is_gone_becomes_null(self) -> None:
        assert renumbered({"pad_token_id": 12, "suppress_tokens": [5, 12]}, NEW) == {
            "pad_token_id": None,
            "suppress_tokens": [0],
        }
