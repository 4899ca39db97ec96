"""A cut: which layers and units stay, and the smaller model that they make."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.models.assemble import meta_model
from plmtune.models.family import each_layer_type
from plmtune.modules.decoder import Decoder
from plmtune.pruning.groups import CHANNELS, SETTINGS, Group, Part, groups_of

T = TypeVar("T")

# Attributes of modules that a cut changes, or that `_fold_scales` makes up for.
_CHANGED = frozenset({
    "num_heads", "num_kv_heads", "kv_lora_rank", "q_lora_rank", "in_features", "out_features", "residual_scale",
})  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """The plan of a cut.

    Attributes:
        layers: numbers of those that stay, ascending.
        units: group name (of the model before) -> units that stay, ascending; a group that is not named stays whole.
    """

    layers: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def after(self, first: Cut) -> Cut:
        """This cut, which was made of the model that `first` gives, together with that one."""
        assert not first.units
        return Cut(
            tuple(first.layers[index] for index in self.layers),
            {_renumbered(name, dict(enumerate(first.layers))): kept for name, kept in self.units.items()},
        )

    def renumbered(self, by_group: Mapping[str, T]) -> dict[str, T]:
        """What is known by group of the model before, by group of the model after; of layers that go, nothing."""
        numbers = {old: new for new, old in enumerate(self.layers)}
        return {
            _renumbered(name, numbers): value
            for name, value in by_group.items()
            if _layer_of(name) is None or _layer_of(name) in numbers
        }


def apply_cut(model: Decoder, cut: Cut) -> Decoder:
    """The model that stays; the given one is not changed, and no memory is shared with it.

    Raises:
        UserError: if the model has a part whose structure is not known, or its registered component cannot make the
            layers that stay, as where their kinds follow a pattern that it has no setting for.
    """
    groups = groups_of(model)
    new = build_cut(model, cut)
    if hasattr(model, "score"):
        with torch.device("meta"):
            new.add_score_head()
    state = _cut_state(model, cut, groups)
    wanted = new.state_dict()
    for name in {*state, *wanted}:
        have, want = (tuple(held[name].shape) if name in held else None for held in (state, wanted))
        if have != want:
            raise UserError(
                f"{name}: the cut leaves {_shape(have)}, and the pruned {model.config['component']} has "
                f"{_shape(want)}: how this tensor is cut is not known."
            )
    _fold_scales(model, new, cut, state)
    new.load_state_dict(state, assign=True)
    new.source_keys = model.source_keys  # written only if they still describe the model
    return new.train(model.training)


def build_cut(model: Decoder, cut: Cut) -> Decoder:
    """The model of `apply_cut` on the meta device, without weights."""
    config = cut_config(model, cut)
    try:
        new = meta_model(config, "the pruned model")
    except ValueError as error:
        raise UserError(f"the pruned model is impossible: {error}.") from error
    _refuse_other_layers(model, new, cut)
    return new


def cut_config(model: Decoder, cut: Cut) -> dict[str, Any]:
    """The `config` of the model that stays: the old one with the settings that the cut changes, and no others."""
    config: dict[str, Any] = copy.deepcopy(model.config)
    groups = groups_of(model)
    for name, kept in cut.units.items():
        if len(kept) < groups[name].units:
            _set(config, SETTINGS[groups[name].kind], len(kept))
    attention = config.get("attention", {})
    if CHANNELS in cut.units:
        _keep_shortcut_width(config, model.embed_dim)
    width = getattr(cast(Any, model.layers[0]).attention, "head_dim", None)
    if width is not None and attention.get("head_dim", 0) is None and _default_width(config) != width:
        attention["head_dim"] = width
    first = f"layers.{cut.layers[0]}."
    if attention.get("num_kv_heads", 0) is None and {f"{first}heads", f"{first}kv_heads"} & {*cut.units}:
        # A default of its own, which follows from the number of query heads.
        kept_heads = cut.units.get(f"{first}kv_heads")
        attention["num_kv_heads"] = groups[f"{first}kv_heads"].units if kept_heads is None else len(kept_heads)
    if len(cut.layers) < len(model.layers):
        if config.get("layers"):
            kinds = each_layer_type(config)
            kept_kinds = [kinds[index] for index in cut.layers]
            config["num_layers"] = len(cut.layers)
            if each_layer_type(config) != kept_kinds:
                config["layers"] = kept_kinds
        _set(config, "num_layers", len(cut.layers))
    return config


def _keep_shortcut_width(config: dict[str, Any], embed_dim: int) -> None:
    """Change the reduction of augmented shortcuts so that they are as wide inside as at embed_dim."""
    shortcut = config.get("attention", {}).get("shortcut", {})
    if "reduction" not in shortcut:
        return
    width, after = embed_dim // shortcut["reduction"], config["embed_dim"]
    shortcut["reduction"] = after // width
    if not shortcut["reduction"] or after // shortcut["reduction"] != width:
        raise UserError(
            f"key model.embed_dim: the augmented shortcuts are {width} wide inside, and no "
            f"attention.shortcut.reduction gives that at {after}. Ask for a multiple of {width}."
        )


def _default_width(config: Mapping[str, Any]) -> int | None:
    """The width a head where head_dim is not given; None: heads do not divide the model's width."""
    width, rest = divmod(config["embed_dim"], config["num_heads"])
    return None if rest else width


def _set(config: dict[str, Any], setting: str, value: int) -> None:
    *above, last = setting.split(".")
    table = config
    for name in above:
        table = table.get(name, {})
    if last in table:
        table[last] = value
    elif setting != SETTINGS["kv_heads"]:  # mha has as many as query heads
        raise UserError(f"model {config['component']} has no setting {setting}, so that cannot be pruned.")


def _renumbered(name: str, numbers: Mapping[int, int]) -> str:
    """The name of a group or tensor with its layer's number replaced."""
    if (number := _layer_of(name)) is None:
        return name
    first, _, rest = name.split(".", 2)
    return f"{first}.{numbers[number]}.{rest}"


def _layer_of(name: str) -> int | None:
    """The layer that a group or tensor belongs to."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first in ("layers", "value_embeddings") and rest else None


def _cut_state(model: Decoder, cut: Cut, groups: Mapping[str, Group]) -> dict[str, Tensor]:
    """The tensors that stay, under the names of the model that stays."""
    numbers = {old: new for new, old in enumerate(cut.layers)}
    kept: dict[str, list[tuple[Part, int, Tensor]]] = {}
    state = model.state_dict()
    for name, units in cut.units.items():
        group = groups[name]
        if len(units) == group.units:
            continue
        for part in group.parts:
            kept.setdefault(part.tensor, []).append((part, group.units, torch.tensor(units)))
    found = {}
    for name, tensor in state.items():
        if (number := _layer_of(name)) is not None and number not in numbers:
            continue
        for part, units_before, stays in kept.get(name, ()):
            tensor = part.cut(tensor, units_before, stays)
        found[_renumbered(name, numbers)] = tensor.clone() if tensor is state[name] else tensor.contiguous()
    return found


def _fold_scales(old: Decoder, new: Decoder, cut: Cut, state: dict[str, Tensor]) -> None:
    """Change weights so that scales which follow from a size (Gemma's embedding, MiniCPM's residuals) keep their
    effect."""

    def scale_norm(name: str, factor: float) -> None:
        offset = 1.0 if getattr(new.get_submodule(name), "unit_offset", False) else 0.0
        state[f"{name}.weight"] = (state[f"{name}.weight"] + offset) * factor - offset
        if f"{name}.bias" in state:
            state[f"{name}.bias"] *= factor

    if (factor := old.embed_scale / new.embed_scale) != 1:
        for name in ("tok_embeddings.weight", "pos_embeddings.weight"):
            if name in state:
                state[name] *= factor
        if new.tied:  # the embedding is the vocabulary projection, too
            scale_norm("norm", 1 / factor)
    if (factor := old.logit_scale / new.logit_scale) != 1:
        scale_norm("norm", factor)
    for index, number in enumerate(cut.layers):
        factor = cast(Any, old.layers[number]).residual_scale / cast(Any, new.layers[index]).residual_scale
        if factor == 1:
            continue
        added = {
            "attention": ("o_proj.weight", "o_proj.bias", "shortcut.up"),
            "ffn": ("down_proj.weight", "down_proj.bias"),
        }
        for part, last in added.items():
            if getattr(new.layers[index], f"post_{part}_norm") is not None:
                scale_norm(f"layers.{index}.post_{part}_norm", factor)
                continue
            for key in last:
                if (name := f"layers.{index}.{part}.{key}") in state:
                    state[name] *= factor


def _refuse_other_layers(old: Decoder, new: Decoder, cut: Cut) -> None:
    """Refuse a model whose layers compute otherwise than those that stay."""
    if old.query_embeddings is not None and cut.layers[-1] != len(old.layers) - 1:
        raise UserError("the query layer, the last one, must stay: choose layers by depth.importance=skip, or keep it.")
    before, after = old.computation(), new.computation()
    for index, number in enumerate(cut.layers):
        names = [name for name in before if f"{name}.".startswith(f"layers.{number}.")]
        for name in names:
            theirs = after.get(f"layers.{index}" + name.removeprefix(f"layers.{number}"))
            if theirs is None or theirs[0] is not before[name][0]:
                raise _other_layer(name, index, "its kind of module", new)
            pair = before[name][1], theirs[1]
            changed = {key for key in {*pair[0], *pair[1]} - _CHANGED if _kind(key, pair[0]) != _kind(key, pair[1])}
            if theirs[2] != before[name][2]:
                changed.add("RoPE")
            if changed:
                raise _other_layer(name, index, min(changed), new)


def _kind(key: str, settings: Mapping[str, Any]) -> Any:
    """A module's setting; of the width of value embeddings, which KV heads have, whether there are any."""
    return bool(settings.get(key)) if key == "value_embed_width" else settings.get(key)


def _other_layer(name: str, index: int, what: str, new: Decoder) -> UserError:
    return UserError(
        f"{name} of the checkpoint would become layer {index} of the pruned model, and {what} would change there: the "
        f"layers of {new.config['component']} follow a pattern that its settings cannot say for the layers that stay. "
        "Choose others by depth.layers."
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"shape {list(shape)}"
