"""Parts that a model adds to its checkpoint's: which are allowed, and that they change nothing at their start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import FAMILIES, make
from tiny_models import tiny_llama, tiny_plm

from plmtune.errors import UserError
from plmtune.models.added_parts import changed, with_added_parts
from plmtune.models.assemble import meta_model
from plmtune.models.hf import load_model, save_model
from plmtune.models.hf_config import read_model_config
from plmtune.registry import component
from plmtune.training.init_from import find_init_checkpoint

TOKENS = torch.arange(14).view(2, 7)


def start(base: Path, changes: dict[str, Any]) -> Any:
    """The changed model with the weights of a directory, as a run begins, and what was found."""
    config = changed(read_model_config(base), changes, "key init_changes")
    model = meta_model(config, "key init_changes")
    init = find_init_checkpoint(str(base), model, None, None)
    assert init is not None
    model = model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(5))
    init.load(model)
    return model.eval(), init


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    save_model(tiny_llama(61), None, tmp_path / "plain")
    return tmp_path / "plain"


class TestStart:
    @pytest.mark.parametrize("family", [*FAMILIES])
    @torch.no_grad()
    def test_logits_equal_the_checkpoints_in_every_family(self, family: str, tmp_path: Path) -> None:
        make(family, tmp_path)
        base = load_model(tmp_path).eval()
        changes: dict[str, Any] = {"ffn": "siaf", "attention": {"shortcut": {"component": "augmented", "reduction": 6}}}
        if base.config["attention"]["component"] == "gqa":
            changes["attention"]["value_embed"] = 1
        model, init = start(tmp_path, changes)
        assert torch.equal(model(TOKENS), base(TOKENS))
        assert len(init.added) == sum(1 for _ in model.parameters()) - sum(1 for _ in base.parameters())

    @torch.no_grad()
    def test_a_plm_gets_both_parts_of_pangu_pi(self, tmp_path: Path) -> None:
        save_model(tiny_plm(61), None, tmp_path)
        model, init = start(
            tmp_path, {"ffn": {"component": "siaf", "num_terms": 3}, "attention": {"shortcut": "augmented"}}
        )
        assert torch.equal(model(TOKENS), load_model(tmp_path).eval()(TOKENS))
        assert init.notes == [
            f"added to the model of {tmp_path}: attention.shortcut=augmented, ffn=siaf: 8 tensors of 1,036 numbers, "
            "which change nothing until they are trained"
        ]

    def test_every_added_part_trains(self, plain: Path) -> None:
        model, init = start(plain, {"ffn": "siaf", "attention": {"shortcut": "augmented", "value_embed": 1}})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for _ in range(2):  # D of a shortcut and the gate of values wait for what they feed
            model(TOKENS).logsumexp(2).square().sum().backward()
            optimizer.step()
        after = dict(model.named_parameters())
        assert not [name for name in init.added if torch.equal(after[name], before[name])]

    def test_a_model_with_the_parts_starts_from_its_own_checkpoint_without_notes(
        self, plain: Path, tmp_path: Path
    ) -> None:
        model, _ = start(plain, {"ffn": "siaf"})
        save_model(model, None, tmp_path / "with")
        again, init = start(tmp_path / "with", {})
        assert init.added == init.notes == []
        assert torch.equal(again(TOKENS), model(TOKENS))


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"ffn": "geglu"}, "key init_changes.ffn: geglu does not start equal to the checkpoint's swiglu"),
            ({"fnn": "siaf"}, "key init_changes.fnn: model llama has no such setting. Did you mean ffn?"),
            ({"ffn": {"component": "siaf", "hidden_dim": 100}}, "its model has ffn.hidden_dim=96, this run 100"),
            ({"ffn": {"component": "siaf", "base": "geglu"}}, "its model has ffn.base=swiglu, this run geglu"),
            ({"attention": {"shortcut": "long"}}, "shortcut has no component long. Known: augmented, none."),
            ({"ffn": 3}, "key init_changes.ffn: takes the name of a component or a table of settings, not 3"),
            ({"attention": {"rope_theta": 5.0}}, "its model has attention.rope_theta=100000.0, this run 5.0"),
            ({"num_layers": 3}, "its model has num_layers=2, this run 3"),
        ],
    )
    def test_a_change_that_is_no_added_part(self, plain: Path, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError) as caught:
            start(plain, changes)
        assert said in str(caught.value)

    def test_a_checkpoint_that_lacks_something_else(self, plain: Path) -> None:
        base = load_model(plain)
        state = {name: tensor for name, tensor in base.state_dict().items() if name != "layers.1.ffn.up_proj.weight"}
        save_model(state, base.config, plain)
        with pytest.raises(UserError, match=r"misses the tensor model\.layers\.1\.mlp\.up_proj\.weight that"):
            start(plain, {"ffn": "siaf"})

    def test_a_checkpoint_that_holds_the_added_part_beside_a_config_without_it(self, plain: Path) -> None:
        model, _ = start(plain, {"attention": {"shortcut": "augmented"}})
        save_model(model.state_dict(), load_model(plain).config, plain)
        with pytest.raises(
            UserError, match=r"holds the tensor model\.layers\.0\.self_attn\.shortcut\.\w+ \(and 3 more\)"
        ):
            start(plain, {"attention": {"shortcut": "augmented"}})

    def test_an_optimizer_state_without_the_parts(self, plain: Path) -> None:
        model = meta_model(changed(read_model_config(plain), {"ffn": "siaf"}, ""), "")
        with pytest.raises(UserError, match="no optimizer state of the added ffn=siaf"):
            find_init_checkpoint(str(plain), model, None, component("scheduler", "wsdc", start="decay"))


class TestWithAddedParts:
    def test_other_differences_stay(self, plain: Path) -> None:
        saved = read_model_config(plain)
        own = changed(saved, {"ffn": "siaf", "num_layers": 7}, "")
        expected, names = with_added_parts(saved, own)
        assert names == ["ffn=siaf"]
        assert expected == own | {"num_layers": 2}
