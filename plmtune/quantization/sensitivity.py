"""What each matrix of a model loses in 4 or 8 bits by itself, and the mix of formats that a budget of bytes is best
spent on.

What a module loses is small beside the model's loss on a few thousand tokens, so two figures are kept: the difference
in loss, which is what one wants to know and is noisy, and the divergence from the model's own predictions (KL), which
is nearly free of that noise and is what mixes are chosen by.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plmtune.io.atomic import atomic_write
from plmtune.io.figures import COLOURS, finish, new_figure
from plmtune.io.untrusted import load_json
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, Quantized
from plmtune.quantization.calibrate import inputs_seen
from plmtune.quantization.quantize import quantize_module
from plmtune.quantization.schemes import EMBEDDING, HEAD, KEEP, candidates
from plmtune.units import byte_unit, show_bytes

_VERSION = 1  # of the file, and of what its key hashes
_CHUNK = 512  # tokens whose logits are held at once
_TOP = 64  # predictions a token by which a divergence is taken; all others count as one
_FLOOR = 1e-7  # a divergence below it is drawn as it
# Nats a token that are not worth a byte: a mix that loses no more in all stays as it is, whatever is left to spend.
NEGLIGIBLE = 1e-4
_MIXES, _PROPOSED, _MEASURED = COLOURS[:3]


@dataclass(frozen=True)
class Sensitivity:
    """What it costs to store one module in one format, all others as they are.

    Attributes:
        module: its name.
        format: by name.
        bytes: that it takes in this format; kept_bytes: as it is.
        nats: by which the loss a token rises; on little text it may fall.
        divergence: KL from the unchanged model's predictions, nats a token.
        wide_format: 8 bits, where the format has 4; else the format itself. wide_bytes: that it takes in it.
        wide_divergence: not by running the model, but the divergence times the ratio of the squared errors of the
            module's outputs, which is how the cost of a small error grows.
    """

    module: str
    format: str
    bytes: int
    kept_bytes: int
    nats: float
    divergence: float
    wide_format: str
    wide_bytes: int
    wide_divergence: float


class Found(list[Sensitivity]):
    """What was measured, module by module.

    Attributes:
        loss: of the unchanged model, nats a token.
        tokens: predictions that it was measured on.
        others: names of matrices that the plan keeps as they are.
    """

    def __init__(self, rows: Iterable[Sensitivity] = (), *, loss: float, tokens: int, others: Iterable[str]) -> None:
        super().__init__(rows)
        self.loss, self.tokens, self.others = loss, tokens, list(others)


class Option(NamedTuple):
    """One way to store a module."""

    bytes: int
    divergence: float
    format: str


@torch.no_grad()
def loss(model: Decoder, batches: Iterable[Tensor]) -> float:
    """Nats a token of rows of text, each token given those before it in its row.

    Args:
        batches: ids, [b, s].
    """
    nats, tokens = 0.0, 0
    for ids in batches:
        log_probs, targets = _log_probs(model, model(ids, hidden=True)), ids[:, 1:].flatten()
        for part, expected in zip(log_probs, targets.split(_CHUNK), strict=True):
            nats -= float(part.gather(1, expected[:, None]).double().sum())
        tokens += len(targets)
    return nats / tokens if tokens else math.nan


@torch.no_grad()
def measure(
    model: Decoder,
    plan: Mapping[str, Format],
    rows: Tensor,
    path: Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    second_moments: Mapping[str, Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Found:
    """Quantize each module of a plan alone and see what the model then says.

    A module costs the layers from its own to the last: what comes before is computed once for all.

    Args:
        model: not quantized; it is as it was afterwards.
        plan: module name -> format to try.
        rows: ids, [n, s], on the model's device; a few thousand tokens do.
        path: JSON that is written after each module, and gone on with if it is of the same model, plan and rows.
        dtype: of what will be kept.
        second_moments: as for `quantize`.
        progress: is told (module, done, of how many).
    """
    kept, key = {}, ""
    if path is not None:
        key = _key(model, plan, rows, dtype, second_moments)
        kept = _read(path, key)
    shapes = candidates(model)
    reference = _Reference(model, rows)
    others = [name for name in shapes if name not in plan]
    found = Found(loss=reference.loss, tokens=reference.tokens, others=others)
    start = x = model.tok_embeddings(rows)  # what goes into `layer`
    layer = 0
    for done, name in enumerate(sorted(plan, key=lambda name: (_layer(name) is not None, _layer(name) or 0))):
        if progress is not None:
            progress(name, done, len(plan))
        if name in kept:
            found.append(kept[name])
            continue
        number, format, shape = _layer(name), plan[name], shapes[name]
        seen: list[Tensor] = []
        if number is not None:
            while layer < number:
                x, layer = model.layers[layer](x), layer + 1
            with inputs_seen(model, [name], lambda _, inputs, seen=seen: seen.append(inputs)):  # type: ignore[misc]
                model.layers[number](x)
        moments = second_moments.get(name) if second_moments else None
        with _changed(model, name, format, moments) as (held, changed):
            first, hidden = (number, x) if number is not None else (0, start)
            if name == EMBEDDING:
                hidden = model.tok_embeddings(rows)
            nats, divergence = reference.compare(model, hidden, first, head_alone=name == HEAD)
            wide = Format(8, dynamic=format.dynamic) if format.bits == 4 else format
            ratio = _ratio(held, changed, wide, seen, moments) if wide != format else 1.0
        found.append(
            Sensitivity(
                module=name,
                format=format.name,
                bytes=format.num_bytes(shape),
                kept_bytes=math.prod(shape) * dtype.itemsize,
                nats=nats,
                divergence=divergence,
                wide_format=wide.name,
                wide_bytes=wide.num_bytes(shape),
                wide_divergence=divergence * ratio,
            )
        )
        if path is not None:
            _write(path, key, found)
    if progress is not None:
        progress("", len(plan), len(plan))
    return found


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


class _Reference:
    """The unchanged model's loss on rows, and its likeliest predictions with their probabilities."""

    def __init__(self, model: Decoder, rows: Tensor) -> None:
        self.targets = rows[:, 1:].flatten().split(_CHUNK)
        self.tokens = rows[:, 1:].numel()
        self.hidden = model(rows, hidden=True)
        self.top: list[tuple[Tensor, Tensor]] = []
        nats = 0.0
        for part, expected in zip(_log_probs(model, self.hidden), self.targets, strict=True):
            nats -= float(part.gather(1, expected[:, None]).double().sum())
            values, ids = part.topk(min(_TOP, part.shape[1]), dim=1)
            self.top.append((values.double(), ids))
        self.loss = nats / self.tokens

    def compare(self, model: Decoder, x: Tensor, first: int, *, head_alone: bool) -> tuple[float, float]:
        """(rise of the loss, divergence), nats a token, of a changed model from what goes into layer `first`."""
        hidden = self.hidden
        if not head_alone:
            for layer in model.layers[first:]:
                x = layer(x)
            hidden = model.norm(x)
        nats = divergence = 0.0
        for part, expected, (top, ids) in zip(_log_probs(model, hidden), self.targets, self.top, strict=True):
            nats -= float(part.gather(1, expected[:, None]).double().sum())
            now = part.gather(1, ids).double()
            # The tail as one prediction: what that hides of the divergence is what moves inside of it.
            rest, rest_now = (
                (1 - values.exp().sum(1)).clamp(min=torch.finfo(torch.float32).eps) for values in (top, now)
            )
            divergence += float((top.exp() * (top - now)).sum() + (rest * (rest / rest_now).log()).sum())
        return nats / self.tokens - self.loss, max(divergence, 0.0) / self.tokens


def _log_probs(model: Decoder, hidden: Tensor) -> Iterator[Tensor]:
    """fp32 log-probabilities of what follows each token but a row's last, [_CHUNK, v] at a time."""
    for part in hidden[:, :-1].flatten(0, 1).split(_CHUNK):
        yield model.logits(part).log_softmax(-1)


@contextmanager
def _changed(
    model: nn.Module, name: str, format: Format, moments: Tensor | None
) -> Iterator[tuple[nn.Module, Quantized]]:
    """Store one module in integers while the context lasts; gives the module as it was and as it is."""
    held = model.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    try:
        yield held, quantize_module(model, name, format, moments)
    finally:
        setattr(model.get_submodule(parent), leaf, held)


def _ratio(held: nn.Module, changed: Quantized, wide: Format, seen: list[Tensor], moments: Tensor | None) -> float:
    """By how much less the wide format changes a module's outputs, squared, than what it was changed to."""
    alone = nn.Module()
    alone.module = held
    error = _error(held, quantize_module(alone, "module", wide, moments), seen)
    return error / max(_error(held, changed, seen), torch.finfo(torch.float32).tiny)


def _error(held: Any, changed: Any, seen: list[Tensor]) -> float:
    """Squared error of the outputs on the inputs seen, or of the weight where there are none."""
    if seen:
        return sum(float((held(x) - changed(x)).float().square().sum()) for x in seen)
    return float((held.weight - changed.dequantize()).float().square().sum())


def propose(found: Found, budget: int) -> dict[str, str]:
    """Rules for `mixed` by which the modules measured take at most `budget` bytes, with about the least divergence.

    Each module begins in its smallest format, and bytes go where they save most a byte: the multiple-choice knapsack's
    relaxation, which falls short of the best mix by less than one module's step. No more are spent than it takes to
    lose less than `NEGLIGIBLE`.

    Args:
        found: what `measure` gave.
        budget: bytes of the modules measured; what else a model holds is not in it.

    Raises:
        ValueError: if even the smallest formats exceed the budget.
    """
    for chosen in _mixes(_options(found), budget):
        if sum(option.divergence for option in chosen.values()) < NEGLIGIBLE:
            break
    return _as_rules({name: option.format for name, option in chosen.items()} | dict.fromkeys(found.others, KEEP))


def predict(found: Found, rules: Mapping[str, str]) -> float:
    """The divergence, nats a token, that a mix of `propose` is predicted to have: the sum of its modules'."""
    return sum(option.divergence for option in _chosen(_options(found), rules).values())


def _chosen(options: Mapping[str, list[Option]], rules: Mapping[str, str]) -> dict[str, Option]:
    formats = {name: [f for pattern, f in rules.items() if fnmatchcase(name, pattern)][-1] for name in options}
    return {name: next(o for o in held if o.format == formats[name]) for name, held in options.items()}


def _options(found: Found) -> dict[str, list[Option]]:
    """Of each module what it may become, the smallest first."""
    return {
        row.module: sorted(
            {
                Option(row.bytes, row.divergence, row.format),
                Option(row.wide_bytes, row.wide_divergence, row.wide_format),
                Option(row.kept_bytes, 0.0, KEEP),
            }
        )
        for row in found
    }


def _mixes(options: Mapping[str, list[Option]], budget: float = math.inf) -> Iterator[dict[str, Option]]:
    """Mixes from the smallest to the largest that the budget takes, each one module's step from that before."""
    chosen = {name: held[0] for name, held in options.items()}
    left = budget - sum(option.bytes for option in chosen.values())
    if left < 0:
        raise ValueError(f"the smallest formats take {budget - left:,} bytes, more than the budget of {budget:,}")
    while True:
        yield dict(chosen)
        steps = [
            ((now.divergence - option.divergence) / (option.bytes - now.bytes), name, option)
            for name, now in chosen.items()
            for option in options[name]
            if 0 < option.bytes - now.bytes <= left and option.divergence < now.divergence
        ]
        if not steps:
            return
        _, name, option = max(steps)
        left -= option.bytes - chosen[name].bytes
        chosen[name] = option


def _as_rules(wanted: Mapping[str, str]) -> dict[str, str]:
    """Formats of modules in as few rules as their kinds allow: the commonest of all, then of each kind of module,
    then what differs."""
    kinds: dict[str, list[str]] = {}
    for name in wanted:
        kinds.setdefault(_kind(name), []).append(name)
    commonest = Counter(wanted.values()).most_common(1)[0][0]
    out = {"*": commonest}
    for kind, members in kinds.items():
        counts = Counter(wanted[name] for name in members)
        usual = max(counts, key=lambda format: (counts[format], format == commonest))
        if usual != commonest:
            out[kind] = usual
        out |= {name: wanted[name] for name in members if wanted[name] != usual}
    return out


def _kind(name: str) -> str:
    layer = _layer(name)
    return name if layer is None else name.replace(f"layers.{layer}.", "layers.*.", 1)


class Measured(NamedTuple):
    """A whole model that was run: bytes of its weights, and its loss in nats a token."""

    bytes: int
    loss: float


def draw(
    found: Found,
    path: Path,
    before: Measured,
    after: Measured,
    *,
    tokens: int,
    rules: Mapping[str, str] | None = None,
) -> None:
    """Draw size against perplexity, and what each module loses, as a PNG.

    The perplexity of a mix is predicted: that of `before`, times e to the sum of its modules' divergences.

    Args:
        found: what `measure` gave.
        path: where to.
        before, after: the model as it was, and as it was written.
        tokens: predictions by which these two were measured.
        rules: the mix that was chosen, as `propose` gives it.
    """
    from matplotlib.colors import LogNorm

    layers = 1 + max((_layer(row.module) or 0 for row in found), default=0)
    kinds = list(dict.fromkeys(_kind(row.module) for row in found))
    figure = new_figure(9, 5.6 + 0.3 * len(kinds))
    sizes, grid = figure.subplots(2, 1, height_ratios=[4.4, 1 + 0.3 * len(kinds)])
    names = _draw_sizes(sizes, found, before, after, tokens, rules)

    table = [[math.nan] * layers for _ in kinds]
    for row in found:
        table[kinds.index(_kind(row.module))][_layer(row.module) or 0] = max(row.divergence, _FLOOR)
    mesh = grid.imshow(table, aspect="auto", cmap="viridis", norm=LogNorm(), interpolation="nearest")
    grid.set_yticks(range(len(kinds)), [kind.removeprefix("layers.*.") for kind in kinds], fontsize=8)
    grid.set_xticks(range(0, layers, -(-layers // 16)))
    grid.set_xlabel("layer (embedding and head: at the left)")
    grid.set_title(f"divergence of each module stored alone as planned, on {found.tokens:,} tokens", fontsize=10)
    figure.colorbar(mesh, ax=grid, label="nats a token", pad=0.01, fraction=0.03)
    for panel in (sizes, grid):
        panel.spines[["top", "right"]].set_visible(False)
    finish(figure, path, labels={sizes: names})


def _draw_sizes(
    panel: Any, found: Found, before: Measured, after: Measured, tokens: int, rules: Mapping[str, str] | None
) -> list[tuple[str, float, float]]:
    """Bytes against perplexity: mixes from the smallest to none, uniform ones, and what was run. Returns the names of
    points.
    """
    options = _options(found)
    fixed = before.bytes - sum(row.kept_bytes for row in found)
    size, unit = byte_unit(before.bytes)

    def place(chosen: Mapping[str, Option]) -> tuple[float, float]:
        nats = before.loss + sum(option.divergence for option in chosen.values())
        return (fixed + sum(option.bytes for option in chosen.values())) / size, math.exp(nats)

    line = [place(chosen) for chosen in _mixes(options)]
    panel.plot(*zip(*line, strict=True), color=_MIXES, linewidth=1.5, label="best mixes, predicted")
    uniform = {
        "all as planned": {row.module: Option(row.bytes, row.divergence, row.format) for row in found},
        "all in 8 bits": {row.module: Option(row.wide_bytes, row.wide_divergence, row.wide_format) for row in found},
    }
    names = []
    for label, model in {"before": before, "after": after}.items():
        x, y = model.bytes / size, math.exp(model.loss)
        panel.plot(x, y, color=_MEASURED, marker="X", markersize=8, linestyle="none")
        names.append((f"{label}: {show_bytes(model.bytes, before.bytes)}, perplexity {y:.2f}", x, y))
    for label, chosen in uniform.items():
        x, y = place(chosen)
        panel.plot(x, y, color=_MIXES, marker="o", markersize=5, linestyle="none")
        names.append((label, x, y))
    if rules is not None:
        x, y = place(_chosen(options, rules))
        panel.plot(x, y, color=_PROPOSED, marker="*", markersize=13, linestyle="none", label="the mix, predicted")
    panel.plot([], [], color=_MIXES, marker="o", markersize=5, linestyle="none", label="all alike, predicted")
    panel.plot([], [], color=_MEASURED, marker="X", markersize=8, linestyle="none", label="measured")
    panel.set_xlabel(f"weights, {unit}")
    panel.set_ylabel(f"perplexity on {tokens:,} tokens")
    panel.margins(x=0.1, y=0.15)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return names


def _key(
    model: Decoder, plan: Mapping[str, Format], rows: Tensor, dtype: torch.dtype, moments: Mapping[str, Tensor] | None
) -> str:
    """Hash of all that the figures follow from."""
    import xxhash

    from plmtune.preference.reference import model_digest

    digest = xxhash.xxh3_128(model_digest(model).encode())
    formats = {name: format.name for name, format in sorted(plan.items())}
    digest.update(json.dumps([_VERSION, formats, str(dtype), list(rows.shape)]).encode())
    digest.update(rows.cpu().contiguous().numpy().tobytes())
    for name, values in sorted((moments or {}).items()):
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> dict[str, Sensitivity]:
    """What an interrupted measuring has found already; nothing of a file that is not of this model, plan and text."""
    try:
        content = load_json(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return {}
        return {row["module"]: Sensitivity(**row) for row in content["modules"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(path: Path, key: str, found: Found) -> None:
    content = {
        "key": key,
        "loss": found.loss,
        "tokens": found.tokens,
        "others": found.others,
        "modules": [asdict(row) for row in found],
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
