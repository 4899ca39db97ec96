"""Which architecture of GGUF a model is: the one whose keys, read again, describe the same computation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.io.untrusted import load_json
from plmtune.models.assemble import meta_model
from plmtune.models.gguf_architectures import ARCHITECTURES, Architecture
from plmtune.models.gguf_forms import FORMS, Form
from plmtune.models.gguf_keys import Metadata
from plmtune.modules.decoder import Decoder

_FORMAT = "GGUF's architecture"


@dataclass(frozen=True)
class Match:
    """How a model is written.

    Attributes:
        architecture: the one.
        keys: of it, without its name, in order.
        tensors: of the file besides the model's.
    """

    architecture: Architecture
    keys: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def match(config: Mapping[str, Any], form: Form | None = None) -> Match:
    """The architecture of a model's `config`.

    Args:
        form: an architecture that is not the model's own; None: its own.

    Raises:
        UserError: if GGUF has none, naming the part or the setting.
    """
    return _match(json.dumps(config, sort_keys=True), form)


def build(config: Mapping[str, Any], where: str) -> Decoder:
    """The model of a `config`, on the meta device."""
    try:
        return meta_model(config, where)
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise UserError(f"{where} describes no possible model: {str(error).splitlines()[0]}.") from error


@lru_cache(maxsize=16)
def _match(text: str, form: Form | None) -> Match:
    config = load_json(text)
    own, parts = config["component"], tuple(config[part]["component"] for part in ("attention", "ffn", "norm"))
    known = ARCHITECTURES if form is None else (FORMS[form],)
    fitting = [found for found in known if parts[0] in found.parts[0] and parts[1:] == tuple(found.parts[1:])]
    if not fitting and form is not None:
        attention, *others = FORMS[form].parts
        raise UserError(
            f"--as {form} is for a PLM: {' or '.join(attention)}, {', '.join(others)}. This model has "
            f"{', '.join(parts)}: leave --as out."
        )
    if not fitting:
        known_parts = {
            "attention": {name for f in ARCHITECTURES for name in f.parts[0]},
            "ffn": {f.parts[1] for f in ARCHITECTURES},
            "norm": {f.parts[2] for f in ARCHITECTURES},
        }
        for (kind, held), name in zip(known_parts.items(), parts, strict=True):
            if name not in held:
                shortcut = (config["attention"].get("shortcut") or {}).get("component", "none")
                also = "" if shortcut == "none" else f", nor attention.shortcut={shortcut}"
                raise UserError(f"GGUF has no architecture with {kind}={name}{also}. It has {', '.join(sorted(held))}.")
        has = "; ".join(f"{' or '.join(f.parts[0])}, {f.parts[1]}, {f.parts[2]} ({f.name})" for f in ARCHITECTURES)
        raise UserError(f"GGUF has no architecture with {', '.join(parts)}. It has {has}.")
    fitting.sort(key=lambda found: own != found.component and own not in found.also)
    model, causes = build(config, "config"), []
    config = model.config  # defaults written out
    for architecture in fitting:
        try:
            found = _written(architecture, config, model)
        except KeyError:
            continue  # it is for models with a setting that this one lacks
        except UserError as error:
            causes.append(str(error))
            continue
        if isinstance(found, Match):
            return found
        causes.append(found)
    raise UserError(causes[0])


def _written(architecture: Architecture, config: dict[str, Any], model: Decoder) -> Match | str:
    """The file's keys, or what they cannot say."""
    keys, tensors = architecture.write(config)
    state, name = model.state_dict(), architecture.name
    try:
        shapes = architecture.layout.shapes(config, state) | {key: tuple(held.shape) for key, held in tensors.items()}
    except ValueError as error:
        raise UserError(f"{_FORMAT} {name} cannot hold the model {config['component']}: {error}.") from error
    metadata = {f"{name}.{key}": value for key, value in keys.items()}
    read = Metadata("the model", name, metadata, shapes, tensors.__getitem__)
    settings = {"component": architecture.component, "vocab_size": config["vocab_size"]} | architecture.read(read)
    again = build(settings, "config")
    halves = architecture.layout.permuted
    ours, theirs = (dict(_facts(held, halves)) for held in (model, again))
    for fact in [*ours, *theirs]:
        if not _equal(ours.get(fact), theirs.get(fact)):
            where = "" if fact.count(".") < 3 else f" ({'.'.join(fact.split('.')[:2])})"
            short = fact.split(".", 2)[2] if where else fact
            return (
                f"{_FORMAT} {name} cannot hold the model {config['component']}: {short}{where} is "
                f"{_shown(ours.get(fact))}, in llama.cpp {_shown(theirs.get(fact))}."
            )
    return Match(architecture, keys, tensors)


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.60}"


def _facts(model: Decoder, halves: bool) -> Iterator[tuple[str, Any]]:
    """What decides the result, by name: of each module, in the order of the model."""
    for name, (kind, settings, rope, shapes) in model.computation().items():
        prefix = f"{name}." if name else ""
        yield f"{prefix}class", kind.__name__
        for key, value in settings.items():
            unlimited = key == "window" and value is not None and value >= model.max_seq_len
            if key != "init_std":
                yield prefix + key, None if unlimited else value
        for key, shape in shapes.items():
            yield prefix + key, shape
        if rope is not None:
            (dim, longest, theta, interleaved), scaling = rope
            plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            yield f"{prefix}rope_dim", dim
            yield f"{prefix}rope_interleaved", interleaved and not halves
            yield f"{prefix}rope_theta", theta
            for key, length in (("rope_scaling", 1), ("rope_scaling at the longest", longest)):
                scaled = plain if scaling is None else scaling.frequencies(plain, theta, scaling.key(length))
                yield prefix + key, tuple((scaled / plain).tolist())
            factor = 1.0 if scaling is None else scaling.attention_factor
            yield f"{prefix}rope_scaling.attention_factor", factor


def _equal(ours: Any, theirs: Any) -> bool:
    """Equal as the numbers of fp32 are."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(_equal(*pair) for pair in zip(ours, theirs, strict=True))
    if isinstance(ours, float) or isinstance(theirs, float):
        return None not in (ours, theirs) and math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)
