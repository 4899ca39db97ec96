"""What every model can do, for models with parts that are of no family of Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from own_models import OWN_PARTS, VOCABULARY, own_model
from torch import Tensor

from plmtune.export.lint import lint
from plmtune.models.hf import load_model, save_model
from plmtune.modules.segments import Segments
from plmtune.native.decoder import NativeDecoder

# What a refusal of another format names.
NAMED = {"query layer": "query_embeddings|pos_embeddings|gqa, gelu|gelu"}


def tokens(b: int, s: int) -> Tensor:
    return torch.randint(VOCABULARY, (b, s), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("part", OWN_PARTS)
class TestOwnParts:
    @torch.no_grad()
    def test_decoding_with_a_cache_equals_one_forward(self, part: str) -> None:
        model, ids = own_model(part), tokens(2, 9)
        cache = model.new_cache(2, 16)
        parts = [model(piece, cache=cache) for piece in ids.split((4, 3, 1, 1), dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_packed_and_padded_rows_are_those_of_each_text_alone(self, part: str) -> None:
        model, ids = own_model(part), tokens(2, 16)
        alone = torch.cat([model(piece) for piece in ids[:1].split((5, 1, 10), dim=1)], 1)
        positions = torch.tensor([[*range(5), 0, *range(10)], [*range(16)]])
        packed = model(ids, mask=Segments.of([(5, 1, 10), (16,)]), input_pos=positions)
        torch.testing.assert_close(packed[:1], alone, atol=1e-5, rtol=1e-5)
        padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids[1:]), 1)
        mask = torch.ones(20, 20, dtype=torch.bool).tril()[None] & (torch.arange(20) >= 4)
        mask[:, :4, 0] = True  # a query sees something
        found = model(padded, mask=mask, input_pos=(torch.arange(20) - 4).clamp(min=0)[None])
        torch.testing.assert_close(found[:, 4:], model(ids[1:]), atol=1e-5, rtol=1e-5)

    def test_every_parameter_has_a_gradient_with_checkpointing_or_without(self, part: str) -> None:
        gradients = []
        for checkpointing in ("none", "full", "selective"):
            model = own_model(part).train()
            model.activation_checkpointing = checkpointing
            model(tokens(2, 12)).square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
        for other in gradients[1:]:
            torch.testing.assert_close(gradients[0], other, atol=1e-5, rtol=1e-4)

    def test_a_saved_model_is_the_same(self, part: str, tmp_path: Path) -> None:
        model = own_model(part)
        save_model(model, None, tmp_path)
        again = load_model(tmp_path).eval()
        assert again.config == model.config and again.state_dict().keys() == model.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(again(tokens(2, 9)), model(tokens(2, 9)))

    def test_no_other_format_holds_it_and_each_names_the_part(self, part: str) -> None:
        model = own_model(part)
        for target in ("gguf", "hf", "executorch"):
            refused = [found.text for found in lint(model.config, target) if found.level == "refused"]
            named = NAMED.get(part, part.split()[0]).split("|")
            assert len(refused) == 1 and any(name in refused[0] for name in named), refused
        assert NativeDecoder().bind(model) is None
