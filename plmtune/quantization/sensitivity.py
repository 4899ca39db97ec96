"""The loss of each matrix of a model when it alone is stored in 4 or 8 bits.

The loss of one module is small beside the model's loss on a few thousand tokens, so two figures are kept: the
difference in loss, which is what counts and is noisy, and the divergence from the model's own predictions (KL), which
is nearly free of that noise and by which mixes are chosen (`plmtune.quantization.mixes`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from plmtune.io.atomic import write_atomically
from plmtune.io.untrusted import load_json
from plmtune.models.digest import model_digest
from plmtune.models.text_loss import CHUNK, log_probs, sum_of
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, Quantized
from plmtune.quantization.calibrate import inputs_seen
from plmtune.quantization.quantize import quantize_module
from plmtune.quantization.schemes import EMBEDDING, HEAD, VALUES, candidates

_VERSION = 1  # of the file and of its key
_TOP = 64  # predictions a token that a divergence counts singly; all others count as one


@dataclass(frozen=True)
class Sensitivity:
    """The cost of storing one module in one format while all others stay unquantized.

    Attributes:
        module: its name.
        format: by name.
        bytes: size in this format. kept_bytes: size unquantized.
        nats: rise of the loss a token; on little text it may fall.
        divergence: KL from the unchanged model's predictions, nats a token.
        wide_format: 8 bits, where the format has 4; else the format itself. wide_bytes: size in it.
        wide_divergence: the divergence times the ratio of the squared errors of the module's outputs, which is how the
            cost of a small error grows; the model does not run for it.
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


class Sensitivities(list[Sensitivity]):
    """Sensitivities of a model's modules.

    Attributes:
        loss: of the unchanged model, nats a token.
        tokens: predictions that it was measured on.
        others: names of matrices that stay unquantized.
    """

    def __init__(self, rows: Iterable[Sensitivity] = (), *, loss: float, tokens: int, others: Iterable[str]) -> None:
        super().__init__(rows)
        self.loss, self.tokens, self.others = loss, tokens, list(others)


@torch.no_grad()
def measure(
    model: Decoder,
    formats: Mapping[str, Format],
    rows: Tensor,
    path: Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    second_moments: Mapping[str, Tensor] | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Sensitivities:
    """Quantize each module alone and measure the model's loss and divergence.

    A module costs the layers from its own to the last: the layers before are computed once for all.

    Args:
        model: unquantized; unchanged afterwards.
        formats: module name -> format to try.
        rows: ids, [n, s], on the model's device; a few thousand tokens suffice.
        path: JSON that is written after each module; resumed from if it is of the same model, formats and rows.
        dtype: of the modules that stay unquantized.
        second_moments: as for `quantize`.
        progress: wraps the iteration over the modules' names.
    """
    key = _key(model, formats, rows, dtype, second_moments) if path is not None else ""
    kept = _read(path, key) if path is not None else {}
    shapes = candidates(model)
    unchanged = _Unchanged(model, rows)
    others = [name for name in shapes if name not in formats]
    found = Sensitivities(loss=unchanged.loss, tokens=unchanged.tokens, others=others)
    start = x = model.embed(rows)  # inputs of `layer`
    layer = 0
    for name in progress(sorted(formats, key=lambda name: (layer_of(name) is not None, layer_of(name) or 0))):
        if name in kept:
            found.append(kept[name])
            continue
        number, format, shape = layer_of(name), formats[name], shapes[name]
        seen: list[Tensor] = []
        if number is not None:
            while layer < number:
                x, layer = model.layers[layer](x, **model.of_tokens(layer, rows)), layer + 1
            with inputs_seen(model, [name], lambda _, inputs, seen=seen: seen.append(inputs)):  # type: ignore[misc]
                model.layers[number](x, **model.of_tokens(number, rows))
        moments = second_moments.get(name) if second_moments else None
        with _quantized_alone(model, name, format, moments) as (original, changed):
            first, hidden = (number, x) if number is not None else (0, start)
            if name == EMBEDDING:
                hidden = model.embed(rows)
            nats, divergence = unchanged.compare(model, hidden, first, head_alone=name == HEAD)
            wide = Format(8, dynamic=format.dynamic) if format.bits == 4 else format
            ratio = _error_ratio(original, changed, wide, seen, moments) if wide != format else 1.0
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
    return found


def layer_of(name: str) -> int | None:
    """The number of the layer that a module belongs to; None for the embedding and the head."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] in ("layers", VALUES.rstrip(".")) else None


class _Unchanged:
    """The unchanged model's loss on rows, and its most likely predictions with their log-probabilities."""

    def __init__(self, model: Decoder, rows: Tensor) -> None:
        self.rows, self.targets = rows, rows[:, 1:].flatten().split(CHUNK)
        self.tokens = rows[:, 1:].numel()
        self.hidden = model(rows, hidden=True)
        self.top: list[tuple[Tensor, Tensor]] = []
        nats = 0.0
        for part, expected in zip(log_probs(model, self.hidden), self.targets, strict=True):
            nats -= sum_of(part, expected)
            values, ids = part.topk(min(_TOP, part.shape[1]), dim=1)
            self.top.append((values.double(), ids))
        self.loss = nats / self.tokens

    def compare(self, model: Decoder, x: Tensor, first: int, *, head_alone: bool) -> tuple[float, float]:
        """(rise of the loss, divergence) of a changed model, nats a token.

        Args:
            x: inputs of the layer `first`.
            head_alone: nothing before the head has changed.
        """
        hidden = self.hidden
        if not head_alone:
            for number in range(first, len(model.layers)):
                x = model.layers[number](x, **model.of_tokens(number, self.rows))
            hidden = model.finish(x)
        nats = divergence = 0.0
        for part, expected, (top, ids) in zip(log_probs(model, hidden), self.targets, self.top, strict=True):
            nats -= sum_of(part, expected)
            now = part.gather(1, ids).double()
            # The tail counts as one prediction, which hides what moves inside of it.
            rest, rest_now = (
                (1 - values.exp().sum(1)).clamp(min=torch.finfo(torch.float32).eps) for values in (top, now)
            )
            divergence += float((top.exp() * (top - now)).sum() + (rest * (rest / rest_now).log()).sum())
        return nats / self.tokens - self.loss, max(divergence, 0.0) / self.tokens


@contextmanager
def _quantized_alone(
    model: nn.Module, name: str, format: Format, moments: Tensor | None
) -> Iterator[tuple[nn.Module, Quantized]]:
    """Quantize one module inside the context; yields the original and the quantized module."""
    original = model.get_submodule(name)
    try:
        yield original, quantize_module(model, name, format, moments)
    finally:
        model.set_submodule(name, original)


def _error_ratio(
    original: nn.Module, changed: Quantized, wide: Format, seen: list[Tensor], moments: Tensor | None
) -> float:
    """The squared error of the outputs in the wide format, over that of `changed`."""
    alone = nn.Module()
    alone.module = original
    error = _squared_error(original, quantize_module(alone, "module", wide, moments), seen)
    return error / max(_squared_error(original, changed, seen), torch.finfo(torch.float32).tiny)


def _squared_error(original: Any, changed: Any, seen: list[Tensor]) -> float:
    """Of the outputs on the inputs seen; of the weight where there are none."""
    if seen:
        return sum(float((original(x) - changed(x)).float().square().sum()) for x in seen)
    return float((original.weight - changed.dequantize()).float().square().sum())


def _key(
    model: Decoder,
    formats: Mapping[str, Format],
    rows: Tensor,
    dtype: torch.dtype,
    moments: Mapping[str, Tensor] | None,
) -> str:
    """Hash all inputs of the measurement."""
    digest = xxhash.xxh3_128(model_digest(model).encode())
    names = {name: format.name for name, format in sorted(formats.items())}
    digest.update(json.dumps([_VERSION, names, str(dtype), list(rows.shape)]).encode())
    digest.update(rows.cpu().contiguous().numpy().tobytes())
    for name, values in sorted((moments or {}).items()):
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> dict[str, Sensitivity]:
    """The modules that an interrupted measurement has finished; none of a file with another key."""
    try:
        content = load_json(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return {}
        return {row["module"]: Sensitivity(**row) for row in content["modules"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(path: Path, key: str, found: Sensitivities) -> None:
    content = {"key": key, **vars(found), "modules": [asdict(row) for row in found]}
    write_atomically(path, json.dumps(content, indent=1) + "\n")
