"""A sweep over a model's keys: what each architecture costs and reaches on a device. Nothing is trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from plmtune.config import compose, override_checks, typed_config
from plmtune.devices.costs import ModelShape
from plmtune.devices.device import Device
from plmtune.devices.predict import Prediction, predict
from plmtune.errors import UserError
from plmtune.registry import Component
from plmtune.tokenizers.tokenizer_files import QWEN2_ROWS

MOST = 20_000  # combinations; the thousands are seconds


@dataclass(frozen=True)
class Point:
    """One architecture.

    Attributes:
        settings: swept key -> value.
        parameters: of the whole model; non_embedding without the vocabulary's matrices.
    """

    settings: dict[str, str]
    parameters: int
    non_embedding: int
    prediction: Prediction


@dataclass
class Sweep:
    """What a sweep found.

    Attributes:
        points: the architectures that can be built.
        impossible: why not -> settings of those that cannot.
    """

    points: list[Point] = field(default_factory=list)
    impossible: dict[str, list[dict[str, str]]] = field(default_factory=dict)


def vocabulary(cfg: Any) -> int:
    """Rows of a config's vocabulary; Qwen2's, whose number is known, need not be at hand."""
    if cfg.tokenizer == Component("tokenizer", "qwen2", {"path": None}):
        return QWEN2_ROWS
    return int(compose.build("tokenizer", cfg.tokenizer).vocab_size)


def sweep(
    name: str,
    overlays: Sequence[str],
    overrides: Sequence[str],
    device: Device,
    *,
    scheme: str = "int4",
    runtime: str = "plmtune",
    context: int = 2048,
    prompt: int = 512,
    rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Predict every combination of the overrides that name several values.

    Args:
        name, overlays: a config, as `config.compose` takes it.
        overrides: Hydra's, of keys of the model: ``model.embed_dim=512,768``, ``model.num_layers=range(8,25,4)``,
            and of choices: ``model/ffn=swiglu,squared_relu``, ``tokenizer=qwen2,bundled``.
        rows: of the vocabulary; None: the tokenizer's.
        progress: gets (combinations done, all combinations).
    """
    plain, swept = override_checks.split_sweeps(overrides)
    for key in swept:
        if not (key == "tokenizer" or key.split(".")[0].split("/")[0] == "model"):
            raise UserError(f"--sweep: {key} is no key of the model, so it changes neither its size nor its speed.")
    if not swept:
        raise UserError(
            "--sweep: no key has several values. Write model.embed_dim=512,768 model.num_layers=range(8,25,4)"
        )
    total = math.prod(map(len, swept.values()))
    if total > MOST:
        raise UserError(f"--sweep: {total:,} combinations are more than {MOST:,}. Take fewer values.")
    # Choices of components change which keys there are, so each is composed; single keys are only put in.
    choices = [key for key in swept if "/" in key or key in ("model", "tokenizer")]
    keys = [key for key in swept if key not in choices]
    found, done = Sweep(), 0
    for chosen in itertools.product(*(swept[key] for key in choices)):
        cfg = compose.compose(name, overlays, [*plain, *chosen])
        if cfg.model is None:
            raise UserError(f"{name} names no model to sweep over. Choose one: model=plm")
        num_rows = rows or vocabulary(cfg)
        seen: dict[str, ModelShape | Exception] = {}
        values = {text: _value(cfg, text) for key in keys for text in swept[key]}
        for texts in itertools.product(*(swept[key] for key in keys)):
            settings = dict(text.partition("=")[::2] for text in (*chosen, *texts))
            try:
                model = cfg.model
                for text in texts:
                    value = values[text]
                    if isinstance(value, UserError):
                        raise value
                    model = put(model, text.partition("=")[0].split(".")[1:], value)
                shape = shape_of(seen, model, num_rows)
                reached = predict(shape, device, scheme=scheme, runtime=runtime, context=context, prompt=prompt)
                if context > shape.max_seq_len:
                    raise UserError(f"a context of {context:,} exceeds the model's max_seq_len ({shape.max_seq_len:,})")
            except (UserError, ValueError) as error:
                found.impossible.setdefault(str(error), []).append(settings)
            else:
                found.points.append(Point(settings, shape.parameters, shape.non_embedding_parameters, reached))
            done += 1
            if progress is not None:
                progress(done, total)
    return found


def _value(cfg: Any, text: str) -> Any:
    """What an override makes of its key, checked by the schema; an error where it cannot be."""
    try:
        changed: Any = typed_config.override(cfg, [text])
    except UserError as error:
        return error
    for name in text.partition("=")[0].split("."):
        changed = changed.settings[name] if isinstance(changed, Component) else getattr(changed, name)
    return changed


def put(held: Component, path: Sequence[str], value: Any) -> Component:
    name, *below = path
    return replace(held, settings=held.settings | {name: put(held.settings[name], below, value) if below else value})


def shape_of(seen: dict[str, ModelShape | Exception], model: Component, rows: int) -> ModelShape:
    """The shape of a model. Where its layers are equal it comes from one, which is built once: depth costs nothing."""
    attention = model.settings.get("attention")
    of_some_layers = isinstance(attention, Component) and attention.settings.get("value_embed")
    differ = of_some_layers or len(set(model.settings.get("layers") or ())) > 1  # types of layers: windows
    layers = None if differ else model.settings.get("num_layers")
    one = model if layers is None else replace(model, settings=model.settings | {"num_layers": min(layers, 1)})
    key = repr(one)
    if key not in seen:
        try:
            with torch.device("meta"):
                seen[key] = ModelShape.of(compose.build("model", one, vocab_size=rows))
        except (UserError, ValueError) as error:
            seen[key] = error
    found = seen[key]
    if isinstance(found, Exception):
        raise found
    return found if layers is None else found.repeated(layers)
