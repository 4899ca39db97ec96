"""Which modules adapters belong to, and what their tensors are called, as the `peft` package has it.

A family whose files hold several of our matrices in one (Phi-3, GPT-2) has one adapter for all of them there, and one
for each in training. Those of training are stored with `peft_type` OWN_TYPE, which PEFT refuses, and `fused` makes
PEFT's of them, of the same product: A are the rows of all A, B has each B in its own rows and columns. The other way
round each of our matrices gets all of A and its own rows of B.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.errors import UserError
from plmtune.models.families import names_of
from plmtune.models.hf_config import hf_config
from plmtune.models.hf_names import SCORE, STANDARD, Names
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import adapted, adapter_parameters

OWN_TYPE = "PLMTUNE_LORA"  # of adapters whose tensors have our names in a family with fused matrices
PREFIX = "base_model.model."
_LEAVES = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def family_names(model: Decoder) -> Names:
    """The names of the files of a model's family."""
    return names_of(hf_config(model.config, model.dtype, source=model.source_keys or None))


def own_names(model: Decoder) -> Names:
    """The names that training stores adapters under: those of PEFT, where each tensor of the family is one of ours."""
    names = family_names(model)
    return names if names.one_to_one else STANDARD


def stored_parts(model: Decoder, names: Names) -> dict[str, tuple[Tensor, ...]]:
    """PEFT's name of each tensor of a model's adapters -> our tensors that it fills."""
    own = adapter_parameters(model)
    found = {}
    for theirs, ours in names.groups(f"{name}.weight" for name in adapted(model)).items():
        for leaf, their_leaf in _LEAVES.items():
            parts = [f"{part.removesuffix('weight')}{leaf}" for part in ours]
            if all(part in own for part in parts):
                name = f"{PREFIX}{theirs.removesuffix('weight')}{their_leaf}"
                found[name] = tuple(own[part].data for part in parts)
    return found | ({PREFIX + SCORE: (own[SCORE].data,)} if SCORE in own else {})


def held_modules(model: nn.Module, names: Names) -> dict[str, tuple[str, ...]]:
    """Each linear layer of the family's files -> ours that it holds."""
    linears = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or hasattr(module, "lora_a")) and name.startswith("layers.")
    ]
    return {
        theirs.removesuffix(".weight"): tuple(part.removesuffix(".weight") for part in ours)
        for theirs, ours in names.groups(linears).items()
    }


def target_modules(known: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """The shortest names by which PEFT finds the modules `chosen` and no others of `known`."""
    known, chosen = list(known), set(chosen)
    found = set()
    for name in chosen:
        leaf = name.rpartition(".")[2]
        found.add(leaf if all(other in chosen for other in known if _matches(other, leaf)) else name)
    return sorted(found)


def choose_modules(
    config: Mapping[str, Any], known: Iterable[str], names: Names, tensors: Iterable[str], where: Path
) -> list[str]:
    """The modules that an adapter_config.json means, as PEFT finds them.

    Args:
        known: the linear layers of the model.
        names: of the family, whose layers have numbers.
        tensors: names in the file of adapters. They say what a regular expression chose, which is not evaluated.

    Raises:
        UserError: if a key is none that can be read, or names a module that the model lacks.
    """
    known = list(known)
    named, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if isinstance(named, str) and named:
        if named == "all-linear" and not isinstance(excluded, str):
            return [name for name in known if not any(_matches(name, other) for other in excluded)]
        held = set(tensors)
        return [name for name in known if f"{PREFIX}{name}.lora_A.weight" in held]
    named = _names(named, "target_modules", where)
    lacking = next((name for name in named if not any(_matches(other, name) for other in known)), None)
    if lacking is not None:
        leaves = sorted({name.rpartition(".")[2] for name in known})
        raise UserError(f"{where}: target_modules names {lacking!r:.80}; the model has {', '.join(leaves)}.")
    if excluded:
        excluded = _names(excluded, "exclude_modules", where)
    layers = _layers(config, names, where)
    return [
        name
        for name in known
        if not any(_matches(name, other) for other in excluded)
        and (name in named or (layers is None or _layer(name, names) in layers))
        and any(_matches(name, other) for other in named)
    ]


def fused(
    state: Mapping[str, Tensor], config: Mapping[str, Any], model: Decoder, where: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Adapters of OWN_TYPE as PEFT has them: (tensors, adapter_config.json).

    Args:
        model: their base, which may be on the meta device.

    Raises:
        UserError: if DoRA has lengths of a part of a fused matrix alone.
    """
    names, rank, dora = family_names(model), config["r"], bool(config.get("use_dora"))
    modules = held_modules(model, names)
    prefixes = {
        part: PREFIX + STANDARD.hf(f"{part}.weight").removesuffix("weight")
        for held in modules.values()
        for part in held
    }
    there = {part for part, prefix in prefixes.items() if f"{prefix}lora_A.weight" in state}
    chosen = {theirs: parts for theirs, parts in modules.items() if there.intersection(parts)}
    most = max(len(parts) for parts in chosen.values())
    found = {name: tensor for name, tensor in state.items() if name.startswith(f"{PREFIX}score.")}
    for theirs, parts in chosen.items():
        if dora and not there.issuperset(parts):
            lacking = next(part for part in parts if part not in there)
            raise UserError(f"{where}: PEFT's DoRA needs all parts of {theirs}, and {lacking} has none. Merge instead.")
        layers: list[Any] = [model.get_submodule(part) for part in parts]
        like = state[f"{prefixes[next(part for part in parts if part in there)]}lora_A.weight"]
        a = like.new_zeros(rank * most, like.shape[1])
        b = like.new_zeros(sum(layer.out_features for layer in layers), rank * most)
        row = 0
        for index, (part, layer) in enumerate(zip(parts, layers, strict=True)):
            if part in there:
                columns = slice(index * rank, (index + 1) * rank)
                a[columns] = state[f"{prefixes[part]}lora_A.weight"]
                b[row : row + layer.out_features, columns] = state[f"{prefixes[part]}lora_B.weight"]
            row += layer.out_features
        found |= {f"{PREFIX}{theirs}.lora_A.weight": a, f"{PREFIX}{theirs}.lora_B.weight": b}
        if dora:
            lengths = torch.cat([state[f"{prefixes[part]}lora_magnitude_vector"] for part in parts])
            found[f"{PREFIX}{theirs}.lora_magnitude_vector"] = lengths
    # The weight alpha / r stays.
    return found, dict(config) | {
        "peft_type": "LORA",
        "r": rank * most,
        "lora_alpha": config["lora_alpha"] * most,
        "target_modules": target_modules(modules, chosen),
        "fan_in_fan_out": bool(names.transposed),
    }


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _names(named: Any, key: str, where: Path) -> list[str]:
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        raise UserError(f"{where}: {key} must be a list of names, not {named!r:.80}.")
    return named


def _layer(name: str, names: Names) -> int:
    return int(name.removeprefix(names.layers).partition(".")[0])


def _layers(config: Mapping[str, Any], names: Names, where: Path) -> set[int] | None:
    """The numbers of the layers that adapters are limited to; None: all."""
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return None
    numbers = chosen if isinstance(chosen, list) else [chosen]
    if not all(type(number) is int for number in numbers):
        raise UserError(f"{where}: layers_to_transform must be a list of whole numbers, not {chosen!r:.80}.")
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not all(isinstance(p, str) and re.fullmatch(r"\w+", p) for p in patterns):
        raise UserError(f"{where}: layers_pattern must be a list of names, not {patterns!r:.80}.")
    return set(numbers) if not patterns or names.layers.split(".")[-2] in patterns else set()
