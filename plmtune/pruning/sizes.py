"""The sizes of a model that pruning changes, and those that are asked for, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from plmtune.errors import UserError
from plmtune.modules.decoder import Decoder
from plmtune.pruning.groups import SETTINGS, Kind, groups_of


@dataclass(frozen=True)
class Sizes:
    """Layers, and units of each group by kind; None: the model has no such group."""

    num_layers: int
    channels: int
    neurons: int
    heads: int
    kv_heads: int | None
    kv_rank: int | None
    q_rank: int | None

    def named(self) -> dict[str, int]:
        """The sizes by the settings of a model's config: num_layers, embed_dim, ffn.hidden_dim, ..."""
        kinds = {SETTINGS[cast(Kind, kind)]: n for kind, n in asdict(self).items() if kind != "num_layers"}
        return {name: n for name, n in {"num_layers": self.num_layers, **kinds}.items() if n is not None}

    def units(self, kind: Kind) -> int:
        """Units of a group."""
        found: int = getattr(self, kind)
        return found


def sizes_of(model: Decoder) -> Sizes:
    """The sizes of a model, whose layers must be of one size.

    Raises:
        UserError: if they are not.
    """
    found: dict[str, int] = {}
    for group in groups_of(model).values():
        if found.setdefault(group.kind, group.units) != group.units:
            raise UserError(
                f"layer {group.layer} has {group.units} {group.kind} and layer 0 has {found[group.kind]}: layers of "
                "several sizes cannot be pruned."
            )
    counts: Any = {kind: found.get(kind) for kind in SETTINGS}
    return Sizes(num_layers=len(model.layers), **counts)


def resolve(before: Sizes, asked: Mapping[str, int | None]) -> Sizes:
    """The sizes after pruning.

    Args:
        before: of the checkpoint.
        asked: setting -> size; None: as before. KV heads that are not given go whole, with their query heads.

    Raises:
        UserError: for what the model does not have, sizes that grow, and heads that do not divide.
    """
    have = before.named()
    wanted = {name: size for name, size in asked.items() if size is not None}
    for name, size in wanted.items():
        if name not in have:
            raise UserError(f"key model.{name}: this model has no such setting. What can be pruned: {_listed(before)}.")
        if size > have[name]:
            raise UserError(
                f"key model.{name}: {size:,} exceeds the checkpoint's {have[name]:,}. Pruning only removes."
            )
    sizes: dict[str, int | None] = asdict(before)
    kinds = {setting: kind for kind, setting in SETTINGS.items()}
    sizes |= {str(kinds.get(name, name)): size for name, size in wanted.items()}
    if before.kv_heads is not None:
        sizes |= _heads(before.heads, before.kv_heads, wanted)
    after = Sizes(**cast(Any, sizes))
    if after == before:
        raise UserError(
            f"key model: nothing is to be pruned. Give smaller sizes, as model.num_layers=2. Now: {_listed(before)}."
        )
    return after


def asked_sizes(sizes: Mapping[str, int | None], layers: Sequence[int], before: Sizes) -> dict[str, int | None]:
    """The sizes that are asked for, by setting, where layers that are to stay count.

    Args:
        sizes: setting -> size; None: it is not given.
        layers: numbers of those that stay, ascending; empty: they are not given.

    Raises:
        UserError: if the two disagree, or a layer does not exist.
    """
    asked = dict(sizes)
    if layers:
        if asked["num_layers"] not in (None, len(layers)):
            raise UserError(
                f"key depth.layers: names {len(layers)} layers, and model.num_layers is {asked['num_layers']}. "
                "Leave one out."
            )
        if layers[-1] >= before.num_layers:
            raise UserError(
                f"key depth.layers: there is no layer {layers[-1]}: the checkpoint has layers 0 to "
                f"{before.num_layers - 1}."
            )
        asked["num_layers"] = len(layers)
    return asked


def methods(
    importance: str, depth_importance: str | None, layers: Sequence[int], before: Sizes, after: Sizes
) -> tuple[str | None, str | None]:
    """How layers and units are chosen, by the keys importance, depth.importance and depth.layers; None: all stay."""
    depth = "hand" if layers else depth_importance or ("mask" if importance == "mask" else "skip")
    goes = after.num_layers < before.num_layers
    shrinks = replace(after, num_layers=before.num_layers) != before
    return depth if goes else None, importance if shrinks else None


def _heads(heads: int, kv_heads: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """Query and KV heads after pruning; each KV head keeps equally many of the query heads that it serves."""
    group = heads // kv_heads
    new_kv = wanted.get("attention.num_kv_heads")
    new = wanted.get("num_heads", heads if new_kv is None else new_kv * group)
    if new_kv is None:
        if new % group:
            raise UserError(
                f"key model.num_heads: {new} is no multiple of {group}, the query heads that share a KV head "
                f"({heads} / {kv_heads}). Give one, or model.attention.num_kv_heads as well."
            )
        new_kv = new // group
    if new % new_kv or new // new_kv > group:
        raise UserError(
            f"key model.num_heads: {new} query heads over {new_kv} KV heads, and each KV head of the checkpoint serves "
            f"{group}: num_heads must be num_kv_heads times at most {group}."
        )
    return {"heads": new, "kv_heads": new_kv}


def refuse_too_much(before: int, after: int, *, force: bool) -> str:
    """Refuse a cut of more than a third of the parameters; the reason as a sentence where `force` allows it, else "".

    Raises:
        UserError: with both numbers.
    """
    share = 1 - after / before
    if 3 * (before - after) <= before:
        return ""
    said = (
        f"this cut removes {share:.1%} of the parameters ({before:,} -> {after:,}), more than a third: importance is "
        "measured at the whole model and holds near it alone, so a smaller cut, training and a second cut lose less"
    )
    if not force:
        raise UserError(f"key model: {said}. Ask for larger sizes, or set force=true.")
    return f"force=true: {said}"


def _listed(sizes: Sizes) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.named().items())
