"""Several whole models of one shape as one: averages of their weights, and sums of what each learned from one base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.models.adapters import load_model_tokenizer
from plmtune.models.unquantized import build_on_meta, load_finite
from plmtune.modules.decoder import Decoder

# (the models' tensors, the base's or None, a weight for each model) -> the merged tensor, all of one shape in fp32.
Method = Callable[[Sequence[Tensor], Tensor | None, Sequence[float]], Tensor]


def average(tensors: Sequence[Tensor], base: Tensor | None, weights: Sequence[float]) -> Tensor:
    """sum_i w_i t_i / sum_i w_i (model soups, arXiv 2203.05482)."""
    return sum_of(tensors, weights) / sum(weights)


def slerp(tensors: Sequence[Tensor], base: Tensor | None, weights: Sequence[float]) -> Tensor:
    """Spherical interpolation between two tensors, taken as vectors (Shoemake 1985).

    sin((1 - t) a) / sin(a) t_0 + sin(t a) / sin(a) t_1, with a the angle between them and t = w_1 / (w_0 + w_1); the
    average where they are parallel, opposite or zero.
    """
    one, other = tensors
    share = weights[1] / sum(weights)
    lengths = one.norm() * other.norm()
    cosine = float((one * other).sum() / lengths) if lengths > 0 else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-4:
        return average(tensors, base, weights)
    return (one * math.sin((1 - share) * angle) + other * math.sin(share * angle)) / math.sin(angle)


def task_arithmetic(tensors: Sequence[Tensor], base: Tensor | None, weights: Sequence[float]) -> Tensor:
    """base + sum_i w_i (t_i - base) (arXiv 2212.04089)."""
    assert base is not None
    return base + sum_of([tensor - base for tensor in tensors], weights)


def ties(density: float) -> Method:
    """base + the mean of the differences to it that were kept and agree in sign (TIES, arXiv 2306.01708).

    Of each difference the largest numbers are kept, a share `density` of a tensor; each place takes the sign of
    the weighted sum; and the weighted mean is over the differences with that sign.
    """

    def merge(tensors: Sequence[Tensor], base: Tensor | None, weights: Sequence[float]) -> Tensor:
        assert base is not None
        kept = [_largest(tensor - base, density) for tensor in tensors]
        sign = sum_of(kept, weights).sign()
        agreeing = [delta.where(delta.sign() == sign, 0) for delta in kept]
        total = sum_of([(delta != 0).float() for delta in agreeing], weights)
        return base + sum_of(agreeing, weights) / total.where(total > 0, 1)

    return merge


def sum_of(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _largest(delta: Tensor, density: float) -> Tensor:
    """The largest numbers by magnitude, others 0; of equal ones at the limit all are kept."""
    count = math.ceil(density * delta.numel())
    limit = delta.abs().flatten().kthvalue(delta.numel() - count + 1).values
    return delta.where(delta.abs() >= limit, 0)


@torch.no_grad()
def merge_models(
    directories: Sequence[Path], method: Method, weights: Sequence[float], base: Path | None = None
) -> Decoder:
    """Merge the models of some directories, tensor by tensor in fp32, into the first one's dtype.

    All models are in memory, each in the dtype of its file.

    Args:
        weights: one for each model.
        base: what the models were trained from; None for a method without one.

    Raises:
        UserError: if one has another shape or another tokenizer than the first, is quantized, or holds a number that
            is not finite, which a method that leaves numbers out would hide.
    """
    every = [*directories, *([base] if base else [])]
    for directory in every:
        build_on_meta(directory, "merge")
    read = [load_finite(directory, torch.device("cpu"), "merge", None) for directory in every]
    models, fingerprint = read[: len(directories)], load_model_tokenizer(directories[0]).fingerprint
    for directory, model in zip(every, read, strict=True):
        if load_model_tokenizer(directory).fingerprint != fingerprint:
            raise UserError(
                f"{directory} has another tokenizer than {directories[0]}, so their rows do not correspond. "
                "Merge models that were trained from one base."
            )
        _check_shape(directory, model, directories[0], models[0])
    states = [dict(model.named_parameters()) for model in read]
    for name, parameter in models[0].named_parameters():
        tensors = [state[name].float() for state in states]
        own, theirs = tensors[: len(models)], tensors[len(models) :]
        parameter.copy_(method(own, theirs[0] if theirs else None, weights))
    return models[0]


def _check_shape(directory: Path, model: Decoder, first: Path, expected: Decoder) -> None:
    ours, theirs = _shapes(model), _shapes(expected)
    for name in (*theirs, *ours):
        if ours.get(name) != theirs.get(name):
            there, here = (f"{list(s[name])}" if name in s else "absent" for s in (theirs, ours))
            raise UserError(f"{directory}: {name} is {here}, and in {first} {there}. Only models of one shape merge.")
    ours, theirs = _settings(model.config), _settings(expected.config)
    for key in (*theirs, *ours):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{directory} computes otherwise than {first}: {key} is {ours.get(key)}, and there {theirs.get(key)}. "
                "Merge models that were trained from one base."
            )


def _settings(config: Mapping[str, Any], prefix: str = "model.") -> dict[str, Any]:
    """The settings that decide what a model computes, by their keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _settings(value, f"{prefix}{key}.")
        elif prefix + key not in ("model.max_seq_len", "model.init_std"):
            found[prefix + key] = value
    return found


def _shapes(model: Decoder) -> Mapping[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
