"""Why an export gives other numbers than its checkpoint: each suspicion is tried on the checkpoint, in memory.

A cause is named when, with the same mistake made in our model, the difference to the export all but vanishes. Nothing
here is a guess: what no trial explains is said to be unexplained, with what was seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.export.contents import Contents, bits_of, differing, settings_of
from plmtune.modules.attention import MultiHeadLatentAttention
from plmtune.modules.decoder import Decoder
from plmtune.modules.norm import RMSNorm
from plmtune.modules.peft import effective_weight
from plmtune.modules.quantized import Quantized, QuantizedEmbedding

# A trial explains a difference that it brings below this share. What rounding leaves is rarely that much of a mistake.
_EXPLAINED = 1 / 3
# How far a matrix may be off, as a share of its norm: about three times what normally distributed weights are. Norms
# and biases are never rounded further than to 16 bits.
_ROUNDING = {"F32": 1e-6, "F16": 2e-3, "BF16": 0.01}
_ROUNDING_OF_BITS = {8: 0.02, 6: 0.06, 5: 0.12, 4: 0.25, 3: 0.5, 2: 0.9}
_VECTOR = 0.01
# A right file's numbers, of 4 bits or more, are 0.992 to 1.003 times the checkpoint's, by `_slope`.
_SLOPE = 0.02
# Beyond it a probability is zero for fp32, and its logarithm noise.
_LOWEST = -80.0


@torch.inference_mode()
def log_probs(model: Decoder, ids: Sequence[int], last: int) -> Tensor:
    """Our model's answer to what `Runtime.log_probs` is asked."""
    hidden = model(torch.tensor([list(ids)], device=model.device), hidden=True)[0, -last:]
    return model.logits(hidden).log_softmax(-1).cpu()


def distance(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference of log-probabilities, [n, v]."""
    return float((one.clamp(min=_LOWEST) - other.clamp(min=_LOWEST)).abs().double().mean())


def find_cause(model: Decoder, ids: Sequence[int], theirs: Tensor, contents: Contents) -> str:
    """Say why a runtime gives `theirs` (Tensor), [n, v], where the model gives something else.

    Args:
        model: the checkpoint's, in fp32; changed while suspicions are tried, and put back.
        ids: what was read; the rows of `theirs` follow its last n prefixes.
        contents: of the export.
    """
    last = len(theirs)
    before = distance(log_probs(model, ids, last), theirs)
    tried = []
    for cause, mistake in _suspicions(model, contents):
        with mistake():
            after = distance(log_probs(model, ids, last), theirs)
        if not after > before * _EXPLAINED:  # so that NaN, which a broken tensor may give in both, explains too
            return f"{cause} (the same in plmtune's model: mean difference {before:.2g} -> {after:.2g})."
        tried.append((after, cause))
    best = f"; the nearest was: {min(tried)[1]} ({before:.2g} -> {min(tried)[0]:.2g})" if tried else ""
    return (
        "No single mistake explains it: RoPE's pairs and base, norms' eps, the order of rows, a tied head and the "
        f"tensors that could be read were each tried on the checkpoint{best}."
    )


Suspicion = tuple[str, Callable[[], AbstractContextManager[None]]]


def _suspicions(model: Decoder, contents: Contents) -> Iterator[Suspicion]:
    """What may have gone wrong, the most particular first, and how it is done to our model."""
    wrong = differing(contents.settings, settings_of(model))
    usable = {key: held for key, (held, _) in wrong.items() if key in ("norm.eps", "attention.rope_theta")}
    for keys in [[key] for key in usable] + ([list(usable)] if len(usable) > 1 else []):
        said = " and ".join(f"{key} is {wrong[key][0]:g} in the export, {wrong[key][1]:g} here" for key in keys)
        yield said, partial(_with_settings, model, {key: usable[key] for key in keys})
    yield from _rope_suspicions(model)
    if not model.tied:
        said = "the export takes the embedding for the head, which in the checkpoint is a matrix of its own"
        yield said, partial(_with_tied_head, model)
    suspects = suspect_tensors(model, contents)
    if suspects:
        said = "; ".join(f"{name}: {what}" for name, what in list(suspects.items())[:4])
        more = f" (and {len(suspects) - 4} more tensors)" if len(suspects) > 4 else ""
        yield f"The export holds other numbers. {said}{more}", partial(with_tensors, model, contents, list(suspects))
    if contents.tensors and contents.kind not in ("F32", "F64"):
        said = (
            f"The export holds the checkpoint's numbers as well as {contents.kind} can, and it is this rounding that "
            "moves the model: take a type of more bits, or train with quantization.qat=true"
        )
        yield said, partial(with_tensors, model, contents, list(contents.tensors))


def _rope_suspicions(model: Decoder) -> Iterator[Suspicion]:
    attention: Any = model.layers[0].attention
    width, _, _, interleaved = attention.rope.settings
    pairs = torch.arange(width).view(-1, 2)
    halves = torch.arange(width).view(2, -1)
    to_neighbours, to_halves = halves.T.flatten(), pairs.T.flatten()
    said = {
        (True, "neighbours"): "RoPE's pairs: neighbours are turned in the checkpoint, halves in the export",
        (True, "halves"): "RoPE's pairs: {rows} were reordered as if halves were turned, though neighbours are",
        (False, "halves"): "RoPE's pairs: halves are turned in the checkpoint, and {rows} were not permuted for a "
        "runtime that turns neighbours",
        (False, "neighbours"): "RoPE's pairs: {rows} were permuted twice",
    }
    for order, index in (("neighbours", to_neighbours), ("halves", to_halves)):
        for rows, leaves in (
            ("the rows of Q and K", ("q", "k")),
            ("the rows of Q alone", ("q",)),
            ("the rows of K alone", ("k",)),
        ):
            words = said[interleaved, order].format(rows=rows)
            if "{rows}" not in said[interleaved, order] and len(leaves) == 1:
                words += f", for {rows}"
            yield words, partial(_with_rows_reordered, model, index, leaves)


@contextmanager
def _with_settings(model: Decoder, settings: dict[str, float]) -> Iterator[None]:
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    layers: list[Any] = list(model.layers)
    ropes = [layer.attention.rope for layer in layers]
    kept = [norm.eps for norm in norms], [rope.settings for rope in ropes]
    try:
        for norm in norms:
            norm.eps = settings.get("norm.eps", norm.eps)
        for rope in ropes:
            width, positions, theta, interleaved = rope.settings
            rope.settings = (width, positions, settings.get("attention.rope_theta", theta), interleaved)
        yield
    finally:
        for norm, eps in zip(norms, kept[0], strict=True):
            norm.eps = eps
        for rope, held in zip(ropes, kept[1], strict=True):
            rope.settings = held


@contextmanager
def _with_rows_reordered(model: Decoder, index: Tensor, leaves: Sequence[str]) -> Iterator[None]:
    """The outputs of the projections are reordered, which works for integers as for floats."""
    with ExitStack() as stack:
        layers: list[Any] = list(model.layers)
        for attention in [layer.attention for layer in layers]:
            latent = isinstance(attention, MultiHeadLatentAttention)
            for leaf in leaves:
                module = attention.q_proj if leaf == "q" else attention.kv_a_proj if latent else attention.k_proj
                if not latent:
                    group = attention.head_dim
                elif leaf == "q":
                    group = attention.qk_nope_head_dim + attention.qk_rope_head_dim
                else:
                    group = attention.kv_lora_rank + attention.qk_rope_head_dim
                hook = module.register_forward_hook(partial(_reordered, group=group, index=index))
                stack.callback(hook.remove)
        yield


def _reordered(module: nn.Module, inputs: Any, output: Tensor, *, group: int, index: Tensor) -> Tensor:
    """A forward hook: the last numbers of each group of the output (Tensor), [..., n], in another order."""
    kept, turned = output.unflatten(-1, (-1, group)).split((group - len(index), len(index)), dim=-1)
    return torch.cat((kept, turned[..., index]), dim=-1).flatten(-2)


@contextmanager
def _with_tied_head(model: Decoder) -> Iterator[None]:
    model.tied = True
    try:
        yield
    finally:
        model.tied = False


def suspect_tensors(model: Decoder, contents: Contents) -> dict[str, str]:
    """{our name: what is wrong with it} of the export's tensors that are further off than rounding takes them."""
    found = {}
    for name, theirs in contents.tensors.items():
        ours, kind = _weight(model, name), contents.kinds.get(name, contents.kind)
        if ours.shape != theirs.shape:
            found[name] = f"it is {list(theirs.shape)}, not {list(ours.shape)}"
            continue
        error = float((theirs - ours).norm() / ours.norm().clamp(min=1e-30))
        if not error <= (limit := min(_rounding(kind), _VECTOR if ours.ndim == 1 else math.inf)):
            found[name] = _relation(theirs, ours) or f"off by {error:.1%} of its norm, where {kind} allows {limit:.2g}"
            continue
        # Rounding errs to both sides, so however coarse it is, a factor shows.
        slope = _slope(theirs, ours)
        if limit <= _ROUNDING_OF_BITS[4] and ours.any() and not abs(slope - 1) <= _SLOPE:
            found[name] = f"it is about {slope:.3g} times the checkpoint's"
    return found


def _slope(theirs: Tensor, ours: Tensor) -> float:
    """By what theirs (Tensor) are larger than ours, by least squares, outliers apart, since some types clip them."""
    usual = ours * (ours.abs() <= 1.5 * ours.square().mean().sqrt())
    return float((theirs * usual).sum() / usual.square().sum().clamp(min=1e-30))


def _rounding(kind: str) -> float:
    """How far rounding to this kind may take a matrix, as a share of its norm; infinite where it is not known."""
    bits = bits_of(kind)
    return _ROUNDING.get(kind, _ROUNDING_OF_BITS.get(bits or 0, math.inf))


def _relation(theirs: Tensor, ours: Tensor) -> str:
    """What was done to a tensor, where it is one of the usual mistakes; empty: none of them."""
    if not torch.isfinite(theirs).all():
        return "it holds numbers that are not finite"
    if not theirs.any():
        return "all its numbers are zero"
    scale = ours.norm() * theirs.norm()
    if (theirs * ours).sum() > 0.9999 * scale and abs(float(theirs.norm() / ours.norm()) - 1) > _VECTOR:
        return f"it is {float(theirs.norm() / ours.norm()):.4g} times the checkpoint's"
    if ours.ndim == 2 and ours.shape[0] == ours.shape[1] and (theirs.T * ours).sum() > 0.99 * scale:
        return "it is transposed"
    if (theirs * ours).sum() < -0.99 * scale:
        return "its sign is turned"
    return ""


def _weight(model: Decoder, name: str) -> Tensor:
    """The numbers of one of our tensors, [out, in] or [n], fp32; of a tied head, the embedding's."""
    if name == "output.weight" and model.tied:
        name = "tok_embeddings.weight"
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    weight = effective_weight(module) if isinstance(module, Quantized) and leaf == "weight" else getattr(module, leaf)
    return weight.detach().float().cpu()


@contextmanager
def with_tensors(model: Decoder, contents: Contents, names: Sequence[str]) -> Iterator[None]:
    """The export's numbers in place of ours."""
    with ExitStack() as stack:
        for name in names:
            if _weight(model, name).shape != (theirs := contents.tensors[name]).shape:
                continue
            module_name, _, leaf = name.rpartition(".")
            if name == "output.weight" and model.tied:
                head = nn.Linear(theirs.shape[1], theirs.shape[0], bias=False)
                head.weight = nn.Parameter(theirs)
                model.output, model.tied = head, False
                stack.callback(_tie_again, model)
                continue
            module: Any = model.get_submodule(module_name)
            if isinstance(module, Quantized) and leaf == "weight":
                _swap(stack, model, module_name, _floating(module, theirs))
                continue
            parameter = getattr(module, leaf)
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = theirs.to(parameter.device, parameter.dtype)
        yield


def _floating(module: Quantized, weight: Tensor) -> nn.Module:
    new: nn.Linear | nn.Embedding
    if isinstance(module, QuantizedEmbedding):
        new = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
    else:
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        new.weight = nn.Parameter(weight)
        new.register_parameter("bias", getattr(module, "bias", None))
    return new


def _swap(stack: ExitStack, model: Decoder, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    stack.callback(setattr, model.get_submodule(parent), leaf, model.get_submodule(name))
    setattr(model.get_submodule(parent), leaf, new)


def _tie_again(model: Decoder) -> None:
    del model.output
    model.tied = True
