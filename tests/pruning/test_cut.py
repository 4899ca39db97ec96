"""Cuts of every family, against the whole model with what was cut zeroed or skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import FAMILIES, make
from torch import Tensor

from plmtune.errors import UserError
from plmtune.models.adapters import load_model
from plmtune.models.hf import save_model
from plmtune.models.llama import llama
from plmtune.models.minicpm import minicpm
from plmtune.models.pangu_alpha import pangu_alpha
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.pruning.cut import Cut, apply_cut
from plmtune.pruning.depth import layers_by_rises, rises_without
from plmtune.pruning.groups import CHANNELS, groups_of
from plmtune.pruning.masked import masked
from plmtune.registry import component

IDS = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(4))


def _made(build: Callable[..., Decoder], **settings: Any) -> Decoder:
    model = build(101, embed_dim=48, num_layers=4, num_heads=6, max_seq_len=64, **settings).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _plm() -> Decoder:
    mla = component("attention", "mla", kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)
    return _made(plm, attention=mla, ffn=component("ffn", "squared_relu", hidden_dim=72))


def _minicpm() -> Decoder:
    gqa = component("attention", "gqa", num_kv_heads=2)
    return _made(minicpm, attention=gqa, ffn=component("ffn", "swiglu", hidden_dim=72), base_dim=10)


def _value_embeddings() -> Decoder:
    gqa = component("attention", "gqa", num_kv_heads=2, value_embed=2)
    return _made(llama, attention=gqa, ffn=component("ffn", "swiglu", hidden_dim=72))


def _shortcuts() -> Decoder:
    gqa = component("attention", "gqa", num_kv_heads=2, shortcut=component("shortcut", "augmented", reduction=24))
    return _made(llama, attention=gqa, ffn=component("ffn", "siaf", hidden_dim=72))


def _latent_shortcuts() -> Decoder:
    shortcut = component("shortcut", "augmented", num_shortcuts=3, reduction=24)
    sizes = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
    mla = component("attention", "mla", shortcut=shortcut, **sizes)
    return _made(plm, attention=mla, ffn=component("ffn", "squared_relu", hidden_dim=72))


def _scaled_shortcuts() -> Decoder:
    gqa = component("attention", "gqa", num_kv_heads=2, shortcut=component("shortcut", "augmented", reduction=24))
    return _made(minicpm, attention=gqa, ffn=component("ffn", "siaf", hidden_dim=72, base="gelu"), base_dim=10)


def _query_layer() -> Decoder:
    gqa = component("attention", "gqa", num_kv_heads=6, rope=False, bias=True)
    return _made(pangu_alpha, attention=gqa, ffn=component("ffn", "gelu", hidden_dim=72))


BUILT = {
    "plm": _plm,
    "minicpm": _minicpm,
    "value embeddings": _value_embeddings,
    "shortcuts": _shortcuts,
    "MLA with shortcuts": _latent_shortcuts,
    "scaled shortcuts": _scaled_shortcuts,
    "query layer": _query_layer,
}
NAMES = [*FAMILIES, *BUILT]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    if request.param in BUILT:
        return BUILT[request.param]()
    make(request.param, tmp_path)
    return load_model(tmp_path, "cpu", torch.float32).eval()


def without(count: int, *cut: int) -> tuple[int, ...]:
    return tuple(index for index in range(count) if index not in cut)


def close(cut: Decoder, naive: Tensor) -> None:
    with torch.no_grad():
        logits = cut(IDS)
    scale = naive.abs().max()
    torch.testing.assert_close(logits / scale, naive / scale, rtol=0, atol=3e-6)


def zeroed(model: Decoder, names: dict[str, tuple[int, ...]]) -> Decoder:
    """A copy in which columns of some projections are zero: name of the module -> columns."""
    copied = copy.deepcopy(model)
    for name, columns in names.items():
        copied.get_submodule(name).weight.data[:, list(columns)] = 0
    return copied


class TestEveryFamily:
    def test_what_is_cut_counts_for_nothing_and_what_stays_is_unchanged(self, model: Decoder, tmp_path: Path) -> None:
        count = len(model.layers)
        groups = groups_of(model)
        # Nothing is cut: the same bytes.
        same = apply_cut(model, Cut(tuple(range(count))))
        save_model(model, None, tmp_path / "before")
        save_model(same, None, tmp_path / "after")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
        # Neurons.
        units = {name: without(72, 3, 70) for name in groups if name.endswith(".neurons")}
        naive = zeroed(model, {f"layers.{i}.ffn.down_proj": (3, 70) for i in range(count)})
        close(apply_cut(model, Cut(tuple(range(count)), units)), naive(IDS))
        # Heads, of grouped ones a whole group.
        attention: Any = model.layers[0].attention
        kv = getattr(attention, "num_kv_heads", attention.num_heads)
        if kv > 1:
            group = attention.num_heads // kv
            gone = tuple(range(group, 2 * group))
            units = {name: without(6, *gone) for name in groups if name.endswith(".heads")}
            units |= {name: without(kv, 1) for name in groups if name.endswith(".kv_heads")}
            width = attention.o_proj.in_features // attention.num_heads
            columns = tuple(range(gone[0] * width, (gone[-1] + 1) * width))
            naive = zeroed(model, {f"layers.{i}.attention.o_proj": columns for i in range(count)})
            close(apply_cut(model, Cut(tuple(range(count)), units)), naive(IDS))
        # A layer.
        skipped = copy.deepcopy(model)
        skipped.layers[0].forward = lambda x, **_: x  # type: ignore[method-assign,assignment]
        close(apply_cut(model, Cut(tuple(range(1, count)))), skipped(IDS))

    def test_a_cut_of_everything_at_once_is_the_model_masked_by_0_and_1(self, model: Decoder, tmp_path: Path) -> None:
        units = {}
        for name, group in groups_of(model).items():
            gone = (1, 4) if group.units > 6 else ()
            if group.kind == "heads" and not hasattr(model.layers[0].attention, "num_kv_heads"):
                gone = (0, 2)
            units[name] = without(group.units, *gone)
        cut = Cut(tuple(range(1, len(model.layers))), units)
        masks = {name: torch.zeros(groups_of(model)[name].units) for name in units}
        for name, kept in units.items():
            masks[name][list(kept)] = 1
        masks["layers"] = torch.ones(len(model.layers))
        masks["layers"][0] = 0
        with masked(model, lambda: masks):
            naive = model(IDS)
        small = apply_cut(model, cut)
        close(small, naive)
        # It loads like any other.
        save_model(small, None, tmp_path / "small")
        close(load_model(tmp_path / "small", "cpu", torch.float32).eval(), naive)
        settings = {key: small.config[key] for key in ("embed_dim", "num_layers")}
        assert settings == {"embed_dim": 46, "num_layers": len(model.layers) - 1}
        kept_same = ("component", "vocab_size", "max_seq_len", "tie_embeddings", "norm")
        assert all(small.config[key] == model.config[key] for key in kept_same)


def _layer_norm(x: Tensor, norm: Any, kept: list[int]) -> Tensor:
    part = x[..., kept]
    centred = part - part.mean(-1, keepdim=True)
    found = torch.zeros_like(x)
    found[..., kept] = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight[kept]
    found[..., kept] += norm.bias[kept]
    return found


def _rms_norm(x: Tensor, norm: Any, kept: list[int]) -> Tensor:
    part = x[..., kept]
    found = torch.zeros_like(x)
    weight = norm.weight[kept] + float(norm.unit_offset)
    found[..., kept] = part / (part.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight
    return found


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "minicpm", "qwen3", "deepseek_v3"])
def test_channels_are_cut_as_if_zeroed_and_left_out_of_norms(name: str, tmp_path: Path) -> None:
    if name not in BUILT:
        make(name, tmp_path)
    whole = BUILT[name]() if name in BUILT else load_model(tmp_path, "cpu", torch.float32).eval()
    kept = list(without(48, 0, 13, 14))
    small = apply_cut(whole, Cut(tuple(range(len(whole.layers))), {CHANNELS: tuple(kept)}))
    norms = ("norm", "attention_norm", "ffn_norm", "post_attention_norm", "post_ffn_norm")
    naive = _layer_norm if name == "gpt2" else _rms_norm
    for module_name, module in whole.named_modules():
        if module_name.rpartition(".")[2] in norms:
            module.forward = lambda x, norm=module: naive(x, norm, kept)  # type: ignore[method-assign]
    close(small, whole(IDS))


class TestPatterns:
    def cut(self, name: str, directory: Path, *layers: int) -> Decoder:
        make(name, directory)
        return apply_cut(load_model(directory, "cpu", torch.float32).eval(), Cut(layers))

    def test_kinds_of_layers_follow_the_layers_that_stay(self, tmp_path: Path) -> None:
        small = self.cut("smollm3", tmp_path, 0, 3)
        assert small.config["layers"] == ["global", "nope"]
        assert [layer.attention.rope is None for layer in small.layers] == [False, True]

    def test_a_pattern_that_still_fits_stays_as_it_is(self, tmp_path: Path) -> None:
        make("ministral", tmp_path)
        whole = load_model(tmp_path, "cpu", torch.float32)
        assert apply_cut(whole, Cut((0, 1))).config["layers"] == whole.config["layers"]

    def test_a_component_whose_layers_no_setting_describes_is_refused_by_name(self, tmp_path: Path) -> None:
        make("smollm3", tmp_path)
        whole = load_model(tmp_path, "cpu", torch.float32)
        whole.layers[1].attention.window = 9  # as a component of a user's own might set it
        with pytest.raises(
            UserError, match=r"layers.1.attention of the checkpoint would become layer 0.* window would"
        ):
            apply_cut(whole, Cut((1, 3)))
        assert len(apply_cut(whole, Cut((0, 2, 3))).layers) == 3


class TestShortcuts:
    def test_they_are_as_wide_inside_as_before(self) -> None:
        model = _shortcuts()  # 48 / 24 = 2 wide
        small = apply_cut(model, Cut((0, 1, 2, 3), {CHANNELS: without(48, *range(7))}))
        assert small.config["attention"]["shortcut"]["reduction"] == 41 // 2
        assert small.layers[0].attention.shortcut.down.shape == (4, 41)

    def test_a_width_that_no_reduction_gives_is_refused(self) -> None:
        model = _made(
            llama,
            attention=component("attention", "gqa", shortcut=component("shortcut", "augmented", reduction=2)),
            ffn=component("ffn", "swiglu", hidden_dim=72),
        )
        said = r"key model.embed_dim: .* are 24 wide inside, and no .*reduction gives that at 47. Ask for a multiple"
        with pytest.raises(UserError, match=said):
            apply_cut(model, Cut((0, 1, 2, 3), {CHANNELS: without(48, 1)}))


class TestUnknownParts:
    def test_a_tensor_that_no_group_knows_is_refused_where_the_cut_changes_its_shape(self) -> None:
        model = _plm()
        model.layers[0].ffn.shift = torch.nn.Parameter(torch.zeros(72))
        neurons = {f"layers.{i}.neurons": without(72, 1) for i in range(4)}
        with pytest.raises(UserError, match=r"layers.0.ffn.shift: the cut leaves shape \[72\], .* has no such tensor"):
            apply_cut(model, Cut((0, 1, 2, 3), neurons))

    def test_an_attention_of_an_unknown_structure_is_refused_by_its_class(self) -> None:
        model = _plm()
        model.layers[2].attention = torch.nn.Identity()
        with pytest.raises(UserError, match=r"layers.2.attention is a Identity: which of its parameters"):
            groups_of(model)


class TestQueryLayer:
    def test_it_is_not_cut(self) -> None:
        with pytest.raises(UserError, match="the query layer, the last one, must stay"):
            apply_cut(_query_layer(), Cut((0, 1, 2), {}))

    def test_no_run_of_layers_that_may_be_skipped_holds_it(self) -> None:
        rises = rises_without(_query_layer(), [IDS], 2)
        assert set(rises) == {(0, 1), (1, 1), (2, 1), (0, 2), (1, 2)}
        assert layers_by_rises(rises, 4, 1) == (3,)
