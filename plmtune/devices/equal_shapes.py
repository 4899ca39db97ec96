"""Shapes of a model at equal parameters: other depths and widths whose FFN makes up for the difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from plmtune.devices.costs import ModelShape
from plmtune.devices.sweep import put, shape_of
from plmtune.errors import UserError
from plmtune.registry import Component, keys_of

LAYERS, WIDTH, HEADS, KV_HEADS, FFN = (
    "num_layers", "embed_dim", "num_heads", "attention.num_kv_heads", "ffn.hidden_dim"
)  # fmt: skip
FREE = (LAYERS, WIDTH, FFN)  # keys whose values can be given

_RANGE = 3  # depth and width lie within a third and three times the base's
_RATIOS = 2  # FFN to width: within half and twice the base's
_MEASURED = (64, 128)  # widths of an FFN that are counted, the others follow
_STEPS = 12  # depths that are tried on each side of the base's, at equal ratios


@dataclass(frozen=True)
class Shape:
    """One shape.

    Attributes:
        settings: key below ``model`` -> its value, for the keys that differ between shapes.
        model: the base with these settings.
        parameters: of the whole model, embedding included.
    """

    settings: dict[str, int]
    model: Component
    rows: int
    parameters: int

    @cached_property
    def costs(self) -> ModelShape:
        return shape_of({}, self.model, self.rows)

    @property
    def ratio(self) -> float | None:
        """Width of the FFN to that of the residual stream."""
        return self.settings[FFN] / self.settings[WIDTH] if FFN in self.settings else None

    @property
    def kv_heads(self) -> int:
        """Heads in the cache; the latent of MLA is no head."""
        layer: Any = self.costs.model.layers[0]
        return int(layer.attention.head_shapes()[1][0])

    @property
    def embedding_share(self) -> float:
        return 1 - self.costs.non_embedding_parameters / self.parameters

    def training_flops(self, seq_len: int) -> float:
        """Forward and backward FLOPs a token, as `training.estimate` counts them."""
        attention = sum(layer.prompt for layer in self.costs.attention)
        return 6.0 * sum(matrix.numel for matrix in self.costs.multiplied) + 3.0 * seq_len * attention


@dataclass(frozen=True)
class EqualShapes:
    """What was found.

    Attributes:
        base: the config's own shape.
        shapes: others within the tolerance, by depth and width.
        nearest: the one outside the tolerance that is nearest to it, if there are any.
        multiple: of which widths are multiples.
        head_dim: of queries, which all have.
    """

    base: Shape
    shapes: list[Shape]
    nearest: Shape | None
    multiple: int
    head_dim: int

    def spread(self, count: int) -> list[Shape]:
        """The base and so many shapes less one that lie far from each other in depth, width and ratio of the FFN."""
        left, chosen = list(self.shapes), [self.base]
        gaps = [_distance(shape, self.base) for shape in left]
        while left and len(chosen) < count:
            at = max(range(len(left)), key=lambda index: gaps[index])
            chosen.append(left.pop(at))
            gaps.pop(at)
            gaps = [min(gap, _distance(shape, chosen[-1])) for gap, shape in zip(gaps, left, strict=True)]
        return sorted(chosen, key=_order)


def _order(shape: Shape) -> tuple[int, ...]:
    return tuple(shape.settings.values())


def _distance(one: Shape, other: Shape) -> float:
    def place(shape: Shape) -> tuple[float, ...]:
        sizes = (shape.settings[LAYERS], shape.settings[WIDTH], shape.ratio or 1.0)
        return tuple(math.log(size) for size in sizes)

    return math.dist(place(one), place(other))


class _Counter:
    """Counts parameters from models of a few layers, as they are linear in depth and in the FFN's width."""

    def __init__(self, model: Component, rows: int) -> None:
        self.model, self.rows = model, rows
        # Each so-manieth layer has value embeddings, the last one always.
        self.every: int = model.settings["attention"].settings.get("value_embed") or 1
        self.found: dict[tuple[tuple[str, int], ...], tuple[int, int, int]] = {}

    def with_settings(self, settings: Mapping[str, int]) -> Component:
        model = self.model
        for key, value in settings.items():
            model = put(model, key.split("."), value)
        return model

    def line(self, settings: Mapping[str, int]) -> tuple[float, float]:
        """(a, b) for which a + b * hidden_dim is the number of parameters."""
        if FFN not in settings:
            return self.count(settings), 0.0
        low, high = (self.count({**settings, FFN: width}) for width in _MEASURED)
        slope = (high - low) / (_MEASURED[1] - _MEASURED[0])
        return low - slope * _MEASURED[0], slope

    def count(self, settings: Mapping[str, int]) -> int:
        key = tuple((name, value) for name, value in settings.items() if name != LAYERS)
        if key not in self.found:
            one, two, more = (
                shape_of({}, self.with_settings({**settings, LAYERS: layers}), self.rows).parameters
                for layers in (1, 2, self.every + 1)
            )
            self.found[key] = one, two - one, more - one - self.every * (two - one)
        one, layer, extra = self.found[key]
        num_layers = settings[LAYERS]
        return one + (num_layers - 1) * layer + (math.ceil(num_layers / self.every) - 1) * extra


def equal_shapes(
    model: Component,
    rows: int,
    *,
    tolerance: float,
    multiple: int | None = None,
    given: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EqualShapes:
    """Find shapes whose parameters are those of `model` within a share of them.

    Depth and width vary; the width of heads stays, and their number follows the width, as do the KV heads, whose number
    divides it. The FFN takes what parameters are left, between half and twice its ratio to the width. The
    vocabulary's matrices count.

    Args:
        model: the base.
        rows: of the vocabulary.
        tolerance: largest difference as a share of the base's parameters.
        multiple: widths are multiples of it; None: of the power of two that divides the base's, 64 at most.
        given: key (`FREE`) -> the only values to take.
        progress: gets (widths done, all widths).

    Raises:
        UserError: if the base cannot be built, or a given value cannot be taken.
    """
    given = dict(given or {})
    for key in (LAYERS, WIDTH, HEADS):
        if key not in keys_of("model", model.name):
            raise UserError(f"model {model.name} has no key {key}, which a sweep at equal parameters changes.")
    for key, values in given.items():
        if (bad := next((value for value in values if value < 1), None)) is not None:
            raise UserError(f"--sweep: model.{key}={bad} must be at least 1.")
    attention, ffn = model.settings["attention"], model.settings["ffn"]
    has_ffn = "hidden_dim" in keys_of("ffn", ffn.name)
    if FFN in given and not has_ffn:
        raise UserError(f"--sweep: model.ffn is {ffn.name}, which has no hidden_dim.")
    try:
        base_costs = shape_of({}, model, rows)
    except ValueError as error:
        raise UserError(f"key model: {error}.") from error
    first: Any = base_costs.model.layers[0]
    (heads, head_dim), (kv_heads, _), _ = first.attention.head_shapes()
    depth, width = base_costs.num_layers, base_costs.model.embed_dim
    base = {LAYERS: depth, WIDTH: width, HEADS: heads}
    if "num_kv_heads" in keys_of("attention", attention.name):
        base[KV_HEADS] = kv_heads
    if has_ffn:
        base[FFN] = _setting(ffn, "hidden_dim")
    wanted = base_costs.parameters
    multiple = multiple or min(width & -width, 64 if width >= 512 else 32)
    # Query heads a KV head; of one KV head all.
    group = heads // kv_heads if KV_HEADS in base and kv_heads > 1 else 1
    # Where heads share the width out, it is a multiple of theirs; else their number is rounded.
    shared = group * head_dim if heads * head_dim == width else None
    step = math.lcm(multiple, shared) if shared else multiple
    widths = given.get(WIDTH) or range(step * math.ceil(width / _RANGE / step), _RANGE * width + 1, step)
    tried = {round(depth * _RANGE ** (index / _STEPS)) for index in range(-_STEPS, _STEPS + 1)}
    depths = given.get(LAYERS) or sorted(tried - {0})

    counter = _Counter(model, rows)
    found: dict[tuple[int, ...], Shape] = {}
    nearest: Shape | None = None
    for done, embed_dim in enumerate(widths, 1):
        if embed_dim % step and WIDTH in given:
            raise UserError(
                f"--sweep: model.embed_dim={embed_dim} is no multiple of {step}, which heads of {head_dim} and "
                f"--multiple {multiple} ask for."
            )
        groups = embed_dim // shared if shared else max(1, round(heads * embed_dim / width / group))
        start = {WIDTH: embed_dim, HEADS: group * groups}
        if KV_HEADS in base:
            start[KV_HEADS] = 1 if kv_heads == 1 else groups
        try:
            for settings in _settings(counter, start, depths, given, base, wanted, multiple):
                shape = Shape(settings, counter.with_settings(settings), rows, counter.count(settings))
                off = abs(shape.parameters - wanted)
                if settings == base:
                    continue
                if off <= tolerance * wanted:
                    found[tuple(settings.values())] = shape
                elif nearest is None or off < abs(nearest.parameters - wanted):
                    nearest = shape
        except ValueError as error:  # a part that this width is too small for
            if WIDTH in given:
                raise UserError(f"--sweep: model.embed_dim={embed_dim}: {error}.") from error
        if progress is not None:
            progress(done, len(widths))
    shapes = sorted(found.values(), key=_order)
    return EqualShapes(Shape(base, model, rows, wanted), shapes, nearest, multiple, head_dim)


def _settings(
    counter: _Counter,
    start: Mapping[str, int],
    depths: Sequence[int],
    given: Mapping[str, Sequence[int]],
    base: Mapping[str, int],
    wanted: int,
    multiple: int,
) -> Iterator[dict[str, int]]:
    """The settings of one width at each depth, with the FFN that comes nearest to the wanted parameters."""
    for num_layers in depths:
        settings = {LAYERS: num_layers, **start}
        if FFN not in base:
            yield settings
        elif FFN in given:
            yield from ({**settings, FFN: hidden_dim} for hidden_dim in given[FFN])
        else:
            fixed, slope = counter.line({**settings, FFN: multiple})
            hidden_dim = multiple * max(1, round((wanted - fixed) / slope / multiple))
            if 1 / _RATIOS <= (hidden_dim / start[WIDTH]) / (base[FFN] / base[WIDTH]) <= _RATIOS:
                yield {**settings, FFN: hidden_dim}


def _setting(part: Component, key: str) -> int:
    """A setting of a component, or its default."""
    value: int = part.settings.get(key, keys_of(part.group, part.name)[key].default)
    return value
