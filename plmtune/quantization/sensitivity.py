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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.atomic import replacing, writing
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, Quantized, install
from plmtune.quantization.calibrate import inputs_seen
from plmtune.quantization.quantize import fill, planned_bytes, round_weight
from plmtune.quantization.schemes import EMBEDDING, HEAD, KEEP, Plan, candidates

_VERSION = 1  # of the file, and of what its key hashes
_CHUNK = 512  # tokens whose logits are held at once
_TOP = 64  # predictions a token by which a divergence is taken; all others count as one
_BF16 = 2  # bytes of a number that is kept


@dataclass(frozen=True)
class Sensitivity:
    """What it costs to store one module in one format, all others as they are.

    Attributes:
        module: its name.
        format: by name.
        bytes: that it takes in this format; kept_bytes: as bf16.
        nats: by which the loss a token rises; on little text it may fall.
        divergence: KL from the unchanged model's predictions, nats a token.
        measured: by running the model. Otherwise both are those of the module's measured format times the ratio of
            the squared errors of its outputs, which is how a small error's cost grows.
    """

    module: str
    format: str
    bytes: int
    kept_bytes: int
    nats: float
    divergence: float
    measured: bool = True


class Found(list[Sensitivity]):
    """What was measured.

    Attributes:
        loss: of the unchanged model, nats a token.
        tokens: predictions that it was measured on.
        rest_bytes: of what is no candidate (norms, biases) in bf16.
    """

    def __init__(self, rows: Iterable[Sensitivity], *, loss: float, tokens: int, rest_bytes: int) -> None:
        super().__init__(rows)
        self.loss, self.tokens, self.rest_bytes = loss, tokens, rest_bytes


def widest(plan: Mapping[str, Format]) -> dict[str, Format]:
    """The same plan in 8 bits with a scale a row."""
    return {name: Format(8, dynamic=format.dynamic) for name, format in plan.items()}


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
    second_moments: Mapping[str, Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Found:
    """Quantize each module of a plan alone and see what the model then says.

    A module costs the layers from its own to the last: what comes before is computed once for all.

    Args:
        model: not quantized; it is as it was afterwards.
        plan: module name -> format to try. Where that has 4 bits, 8 are told too, by their error.
        rows: ids, [n, s], on the model's device; a few thousand tokens do.
        path: JSON that is written after each module, and gone on with if it is of the same model, plan and rows.
        second_moments: as for `quantize`.
        progress: is told (module, done, of how many).
    """
    kept, key = {}, ""
    if path is not None:
        key = _key(model, plan, rows, second_moments)
        kept = _read(path, key)
    shapes = candidates(model)
    reference = _Reference(model, rows)
    rest = planned_bytes(model, dict.fromkeys(shapes, Format(8)), torch.bfloat16) - sum(
        Format(8).num_bytes(shape) for shape in shapes.values()
    )
    found = Found([], loss=reference.loss, tokens=reference.tokens, rest_bytes=rest)
    order = sorted(plan, key=lambda name: (_layer(name) is not None, _layer(name) or 0))
    done = 0
    start = x = model.tok_embeddings(rows)  # what goes into `layer`
    layer = 0
    for name in order:
        if progress is not None:
            progress(name, done, len(plan))
        number = _layer(name)
        while number is not None and layer < number:
            x, layer = model.layers[layer](x), layer + 1
        measured = kept.get(name)
        if measured is None:
            seen: list[Tensor] = []
            if number is not None:  # its inputs, to tell what other formats would do to its outputs
                with inputs_seen(model, [name], lambda _, inputs, seen=seen: seen.append(inputs)):  # type: ignore[misc]
                    model.layers[number](x)
            moments = second_moments.get(name) if second_moments else None
            with _changed(model, name, plan[name], moments) as (held, changed):
                first, hidden = (number, x) if number is not None else (0, start)
                if name == EMBEDDING:
                    hidden = model.tok_embeddings(rows)
                nats, divergence = reference.compare(model, hidden, first, name == HEAD)
                measured = _rows(name, plan[name], shapes[name], nats, divergence, held, changed, seen, moments)
        found.extend(measured)
        done += 1
        if path is not None and name not in kept:
            _write(path, key, found)
    if progress is not None:
        progress("", done, len(plan))
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

    def compare(self, model: Decoder, x: Tensor, first: int, head_alone: bool) -> tuple[float, float]:
        """(rise of the loss, divergence), nats a token, of a changed model from what goes into layer `first`."""
        if head_alone:
            hidden = self.hidden
        else:
            for layer in model.layers[first:]:
                x = layer(x)
            hidden = model.norm(x)
        nats = divergence = 0.0
        for part, expected, (top, ids) in zip(_log_probs(model, hidden), self.targets, self.top, strict=True):
            nats -= float(part.gather(1, expected[:, None]).double().sum())
            now = part.gather(1, ids).double()
            # The tail as one prediction: what it hides of the divergence is what moves inside of it.
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
    held: Any = model.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    try:
        yield held, _quantized(model, name, held, format, moments)
    finally:
        setattr(model.get_submodule(parent), leaf, held)


def _quantized(model: nn.Module, name: str, held: Any, format: Format, moments: Tensor | None) -> Quantized:
    install(model, {name: format})
    new = model.get_submodule(name)
    assert isinstance(new, Quantized)
    fill(new, *round_weight(held.weight.detach(), format, moments, name=name), dtype=held.weight.dtype)
    if getattr(held, "bias", None) is not None:
        new.register_parameter("bias", held.bias)
    return new


def _rows(
    name: str,
    format: Format,
    shape: tuple[int, int],
    nats: float,
    divergence: float,
    held: Any,
    changed: Quantized,
    seen: list[Tensor],
    moments: Tensor | None,
) -> list[Sensitivity]:
    kept_bytes = shape[0] * shape[1] * _BF16
    rows = [Sensitivity(name, format.name, format.num_bytes(shape), kept_bytes, nats, divergence)]
    if format.bits == 4:
        eight = Format(8, dynamic=format.dynamic)
        alone = nn.Module()
        alone.module = held
        ratio = _error(held, _quantized(alone, "module", held, eight, moments), seen) / max(
            _error(held, changed, seen), torch.finfo(torch.float32).tiny
        )
        rows.append(
            Sensitivity(name, eight.name, eight.num_bytes(shape), kept_bytes, nats * ratio, divergence * ratio, False)
        )
    return rows


def _error(held: Any, changed: Any, seen: list[Tensor]) -> float:
    """Squared error of the outputs on the inputs seen, or of the weight where there are none."""
    if seen:
        return sum(float((held(x) - changed(x)).float().square().sum()) for x in seen)
    return float((held.weight - changed.dequantize()).float().square().sum())


def propose(model: nn.Module, found: Found, budget: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Format]:
    """The plan of at most `budget` bytes whose modules' divergences have about the least sum.

    Beginning with the smallest format of each module, bytes go where they save most a byte (the multiple-choice
    knapsack's relaxation; what it leaves of the budget is less than one module's next format).

    Args:
        model: that was measured, or its like on the meta device.
        found: what `measure` gave.
        budget: bytes of the weights' file.
        dtype: of what is kept.

    Raises:
        ValueError: if even the smallest formats exceed the budget.
    """
    shapes = candidates(model)
    options: dict[str, list[tuple[int, float, Format | None]]] = {}
    for row in found:
        options.setdefault(row.module, []).append((row.bytes, row.divergence, Format.parse(row.format)))
    for name, held in options.items():
        rows, width = shapes[name]
        held.append((rows * width * dtype.itemsize, 0.0, None))
    chosen = {name: min(held, key=lambda option: option[:2]) for name, held in options.items()}

    def plan() -> dict[str, Format]:
        return Plan({name: option[2] for name, option in chosen.items() if option[2] is not None})

    left = budget - planned_bytes(model, plan(), dtype)
    if left < 0:
        raise ValueError(f"the smallest formats take {budget - left:,} bytes, more than the budget of {budget:,}")
    while True:
        steps = [
            ((chosen[name][1] - option[1]) / (option[0] - chosen[name][0]), name, option)
            for name, held in options.items()
            for option in held
            if 0 < option[0] - chosen[name][0] <= left and option[1] < chosen[name][1]
        ]
        if not steps:
            return plan()
        _, name, option = max(steps, key=lambda step: step[:2])
        left -= option[0] - chosen[name][0]
        chosen[name] = option


def rules(plan: Mapping[str, Format], names: Iterable[str]) -> dict[str, str]:
    """A plan as the rules of `mixed`, as few as kinds of modules allow: the commonest format of all, then of each
    kind of module, then what differs.

    Args:
        names: of all candidates; those that the plan leaves out are kept.
    """
    wanted = {name: plan[name].name if name in plan else KEEP for name in names}
    kinds: dict[str, list[str]] = {}
    for name in wanted:
        kinds.setdefault(_kind(name), []).append(name)
    commonest = Counter(wanted.values()).most_common(1)[0][0]
    out = {"*": commonest}
    for kind, members in kinds.items():
        usual = Counter(wanted[name] for name in members).most_common(1)[0][0]
        if usual != commonest:
            out[kind] = usual
        out |= {name: wanted[name] for name in members if wanted[name] != usual}
    return out


def _kind(name: str) -> str:
    layer = _layer(name)
    return name if layer is None else name.replace(f"layers.{layer}.", "layers.*.", 1)


def write_rules(plan: Mapping[str, Format], names: Iterable[str], path: Path) -> None:
    """Write a plan as a config that `plmtune run` takes: the scheme `mixed` with its rules."""
    lines = [f'    "{pattern}": {format}' for pattern, format in rules(plan, names).items()]
    head = (
        f"# Use: plmtune run quantize {path.name} checkpoint=...\n"
        "defaults:\n  - override /quantization: mixed\n\nquantization:\n  rules:\n"
    )
    with writing(path) as temporary:
        temporary.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def _key(model: Decoder, plan: Mapping[str, Format], rows: Tensor, moments: Mapping[str, Tensor] | None) -> str:
    """Hash of all that the figures follow from."""
    import xxhash

    from plmtune.training.reference import model_digest

    digest = xxhash.xxh3_128(model_digest(model).encode())
    digest.update(json.dumps([_VERSION, {n: f.name for n, f in sorted(plan.items())}, list(rows.shape)]).encode())
    digest.update(rows.cpu().contiguous().numpy().tobytes())
    for name, values in sorted((moments or {}).items()):
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> dict[str, list[Sensitivity]]:
    """What an interrupted measuring has found already; nothing of a file that is not of this model, plan and text."""
    out: dict[str, list[Sensitivity]] = {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] == key:
            for row in content["modules"]:
                out.setdefault(row["module"], []).append(Sensitivity(**row))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return out


def _write(path: Path, key: str, found: Found) -> None:
    content = {
        "version": _VERSION,
        "key": key,
        "loss": found.loss,
        "tokens": found.tokens,
        "rest_bytes": found.rest_bytes,
        "modules": [asdict(row) for row in found],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
