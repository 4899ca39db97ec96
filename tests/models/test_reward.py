from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from plmtune.errors import UserError
from plmtune.models.checkpoint_files import locate
from plmtune.models.hf import load_model, load_state, save_model
from plmtune.models.plm import plm
from plmtune.models.reward import head_scores, load_reward_model, score
from plmtune.modules.decoder import Decoder
from plmtune.registry import component


def tiny(tie_embeddings: bool = True, head: bool = True) -> Decoder:
    model = tiny_llama(50, hidden_dim=40, embed_dim=32, max_seq_len=24, tie_embeddings=tie_embeddings, init_std=0.3)
    if head:
        model.add_score_head()
    return model.eval()


def ids(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (length,), generator=generator).tolist() for length in lengths]


class TestScoreHead:
    def test_is_drawn_with_the_other_weights_from_one_generator(self) -> None:
        first, second = tiny(), tiny()
        for model in (first, second):
            model.init_weights(torch.Generator().manual_seed(3))
        assert torch.equal(first.score.weight, second.score.weight)
        assert first.score.weight.std() > 0

    def test_an_untied_vocabulary_projection_is_trained_no_more(self) -> None:
        model = tiny(tie_embeddings=False)
        hidden = model(torch.tensor(ids(5)), hidden=True)
        head_scores(model, hidden.flatten(0, 1), torch.tensor([4])).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize("tie_embeddings", [True, False])
    def test_is_saved_and_loaded_as_score_weight(self, tmp_path: Path, tie_embeddings: bool) -> None:
        model = tiny(tie_embeddings)
        save_model(model, None, tmp_path)
        assert "score.weight" in locate(tmp_path)
        again = load_model(tmp_path)
        assert torch.equal(again.score.weight, model.score.weight)
        assert score(again, ids(4, 9)) == score(model, ids(4, 9))

    def test_a_plm_keeps_it_too_and_its_config_names_a_model_for_classification(self, tmp_path: Path) -> None:
        attention = component("attention", "mla", kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
        model = plm(50, attention=attention, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=24)
        model.add_score_head()
        save_model(model, None, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["PLMForSequenceClassification"]
        assert score(load_reward_model(tmp_path), ids(7)) == pytest.approx(score(model, ids(7)), rel=1e-6)

    def test_begins_anew_where_a_language_model_is_what_training_starts_from(self, tmp_path: Path) -> None:
        base, model = tiny(head=False), tiny()
        save_model(base, None, tmp_path)
        nn.init.zeros_(model.tok_embeddings.weight)
        drawn = model.score.weight.clone()
        load_state(model, tmp_path)
        assert torch.equal(model.score.weight, drawn)
        assert torch.equal(model.tok_embeddings.weight, base.tok_embeddings.weight)

    def test_of_another_width_is_refused(self, tmp_path: Path) -> None:
        model = tiny()
        model.score = nn.Linear(32, 2, bias=False)
        save_model(model, None, tmp_path)
        with pytest.raises(UserError, match=r"score.weight has shape \[2, 32\], the model needs \[1, 32\]"):
            load_model(tmp_path)


class TestScores:
    def test_equal_those_of_transformers(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        model = tiny()
        save_model(model, None, tmp_path)
        theirs = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
        for sequence in ids(1, 6, 24):
            with torch.no_grad():
                expected = theirs(torch.tensor([sequence])).logits.item()
            assert score(model, [sequence])[0] == pytest.approx(expected, rel=1e-5)

    def test_come_in_the_order_of_the_sequences_whatever_stands_beside_them(self) -> None:
        model, sequences = tiny(), ids(3, 17, 1, 9, 24)
        alone = [score(model, [np.array(sequence, dtype=np.int32)])[0] for sequence in sequences]
        for batch_size in (1, 2, 16):
            assert score(model, sequences, batch_size=batch_size) == pytest.approx(alone, rel=1e-4, abs=1e-5)
        assert len(set(alone)) == 5
        assert score(model, []) == []

    def test_depend_on_the_last_token_and_all_before_it(self) -> None:
        model, (sequence,) = tiny(), ids(8)
        changed = [[*sequence[:-1], (sequence[-1] + 1) % 50], [(sequence[0] + 1) % 50, *sequence[1:]]]
        first, *others = score(model, [sequence, *changed])
        assert all(abs(other - first) > 1e-4 for other in others)

    def test_are_in_fp32_even_under_autocast(self) -> None:
        model = tiny()
        hidden = torch.randn(6, 32)
        plain = head_scores(model, hidden, torch.tensor([2, 5]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(head_scores(model, hidden, torch.tensor([2, 5])), plain)

    @pytest.mark.parametrize("length", [0, 25])
    def test_of_a_sequence_that_cannot_be_read_are_refused(self, length: int) -> None:
        with pytest.raises(ValueError, match=f"sequence 1 has {length} tokens; it must have 1 to 24"):
            score(tiny(), ids(3, length))

    def test_need_the_head(self, tmp_path: Path) -> None:
        model = tiny(head=False)
        save_model(model, None, tmp_path)
        with pytest.raises(UserError, match=r"no reward model: it has no tensor score\.weight"):
            load_reward_model(tmp_path)
        with pytest.raises(ValueError, match="no score head"):
            score(model, ids(3))
