"""Why a runtime computes other numbers than its export holds: known mistakes are tried on our model, in memory.

A cause is named if our model with the same mistake agrees with the runtime. A difference that no trial explains is
reported as unexplained, with the nearest trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.export.contents import Contents, differing, settings_of
from plmtune.export.stored import weight_of
from plmtune.modules.attributes import with_attributes
from plmtune.modules.decoder import Decoder
from plmtune.modules.mla import MultiHeadLatentAttention
from plmtune.modules.norm import RMSNorm
from plmtune.modules.quantized import Format, Quantized

# A trial explains a difference that it reduces below this share.
_EXPLAINED = 1 / 3
# Beyond it a probability is zero for fp32, and its logarithm noise.
LOWEST = -80.0
# Defaults of programs for values that a file lacks.
_USUAL = {"norm.eps": (1e-5, 1e-6, 1e-8), "attention.rope_theta": (1e4, 1e5, 5e5, 1e6)}


@torch.inference_mode()
def log_probs(model: Decoder, ids: Sequence[int], last: int) -> Tensor:
    """`InferenceRuntime.log_probs` by our model."""
    hidden = model(torch.tensor([list(ids)], device=model.device), hidden=True)[0, -last:]
    return model.logits(hidden).log_softmax(-1).cpu()


def reported_only(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Both as log-probabilities, [n, v] in fp64, over the tokens that the runtime reports; the others are -inf."""
    reported = theirs > float("-inf")
    ours, theirs = (rows.double().masked_fill(~reported, float("-inf")).log_softmax(-1) for rows in (ours, theirs))
    return ours, theirs


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL divergence of theirs (Tensor), log-probabilities [n, v], from ours, in nats, over the reported tokens."""
    nats = 0.0
    for log_p, log_q in (reported_only(*rows) for rows in zip(ours.split(64), theirs.split(64), strict=True)):
        gaps = log_p.clamp(min=LOWEST) - log_q.clamp(min=LOWEST)
        nats += float((log_p.exp() * gaps).sum())
    return abs(nats) / len(ours)


def distance(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference of log-probabilities, [n, v], over the tokens that the other reports."""
    one, other = reported_only(one, other)
    reported = other > float("-inf")
    return float((one[reported].clamp(min=LOWEST) - other[reported].clamp(min=LOWEST)).abs().mean())


def find_cause(model: Decoder, ids: Sequence[int], theirs: Tensor) -> str:
    """Explain why a runtime gives `theirs` (Tensor), [n, v], and the model other numbers.

    Args:
        model: with the export's numbers, in fp32; changed during the trials and restored.
        ids: what was read; the rows of `theirs` follow its last n prefixes.
    """
    last = len(theirs)
    before = distance(log_probs(model, ids, last), theirs)
    tried = []
    for cause, mistake in _suspicions(model):
        with mistake():
            after = distance(log_probs(model, ids, last), theirs)
        if not after > before * _EXPLAINED:  # so that NaN, which a broken tensor may give in both, explains too
            return f"{cause} (the same in plmtune's model: mean difference {before:.2g} -> {after:.2g})."
        tried.append((after, cause))
    best = f"; the nearest was: {min(tried)[1]} ({before:.2g} -> {min(tried)[0]:.2g})" if tried else ""
    return (
        "The runtime computes something else than the export's numbers. No single mistake explains it: RoPE's pairs "
        f"and base, norms' eps, the order of rows and a tied head were each tried{best}."
    )


Suspicion = tuple[str, Callable[[], AbstractContextManager[None]]]


def _suspicions(model: Decoder) -> Iterator[Suspicion]:
    """Possible mistakes, the most specific first, and how our model makes them."""
    yield from _rope_suspicions(model)
    for key, values in _USUAL.items():
        held = settings_of(model).get(key)
        for value in values if held is not None else ():
            if value != held:
                said = f"the runtime takes {value:g} for {key}, which is {held:g}"
                yield said, partial(with_settings, model, {key: value})
    if not model.tied:
        said = "the runtime takes the embedding for the head, which in the checkpoint is a matrix of its own"
        yield said, partial(with_attributes, [model], tied=True)


def _rope_suspicions(model: Decoder) -> Iterator[Suspicion]:
    layers: list[Any] = list(model.layers)
    ropes = [layer.attention.rope for layer in layers if layer.attention.rope is not None]
    if not ropes:
        return
    width, _, _, interleaved = ropes[0].settings
    index = torch.arange(width)
    orders = {"neighbours": index.view(2, -1).T.flatten(), "halves": index.view(-1, 2).T.flatten()}
    sides = {"the rows of Q and K": ("q", "k"), "the rows of Q alone": ("q",), "the rows of K alone": ("k",)}
    said = {
        (True, "neighbours"): "RoPE's pairs: neighbours are turned in the checkpoint, halves in the export",
        (True, "halves"): "RoPE's pairs: {rows} were reordered as if halves were turned, though neighbours are",
        (False, "halves"): "RoPE's pairs: halves are turned in the checkpoint, and {rows} were not permuted for a "
        "runtime that turns neighbours",
        (False, "neighbours"): "RoPE's pairs: {rows} were permuted twice",
    }
    for order in orders:
        for rows, leaves in sides.items():
            words = said[interleaved, order].format(rows=rows)
            if "{rows}" not in said[interleaved, order] and len(leaves) == 1:
                words += f", for {rows}"
            yield words, partial(_with_rows_reordered, model, orders[order], leaves)


@contextmanager
def with_settings(model: Decoder, settings: Mapping[str, float]) -> Iterator[None]:
    layers: list[Any] = list(model.layers)
    with ExitStack() as stack:
        for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
            stack.enter_context(with_attributes([norm], eps=settings.get("norm.eps", norm.eps)))
        common = settings_of(model).get("attention.rope_theta")
        for rope in (layer.attention.rope for layer in layers if layer.attention.rope is not None):
            width, positions, theta, interleaved = rope.settings
            if theta == common:  # local layers may have a base of their own
                held = (width, positions, settings.get("attention.rope_theta", theta), interleaved)
                stack.enter_context(with_attributes([rope], settings=held))
        yield


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
def as_exported(model: Decoder, contents: Contents) -> Iterator[None]:
    """The model with the numbers and settings of an export, as far as they fit into it."""
    wrong = differing(contents.settings, settings_of(model))
    tensors: dict[str, Tensor | None] = dict.fromkeys(contents.tensors)
    with ExitStack() as stack:
        stack.enter_context(with_settings(model, {key: held for key, (held, _) in wrong.items() if key in _USUAL}))
        if tensors and not model.tied and "output.weight" not in tensors:
            stack.enter_context(with_attributes([model], tied=True))
        for name in contents.tensors:
            _put(stack, model, name, contents.tensors[name])
        for name in model.state_dict() if tensors else ():
            if name.endswith(".bias") and name not in tensors:
                _put(stack, model, name, torch.zeros_like(weight_of(model, name)))
        yield


def _put(stack: ExitStack, model: Decoder, name: str, numbers: Tensor) -> None:
    """Put numbers in the place of a tensor of the model, until the stack is closed; nothing, if they do not fit."""
    if weight_of(model, name).shape != numbers.shape:
        return
    if name == "output.weight" and model.tied:
        head = nn.Linear(numbers.shape[1], numbers.shape[0], bias=False)
        head.weight = nn.Parameter(numbers)
        stack.callback(delattr, model, "output")
        model.output = head
        stack.enter_context(with_attributes([model], tied=False))
        return
    owner, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    if isinstance(module, Quantized) and leaf == "weight":
        # Written out, and multiplied as it is: what rounds inputs is `with_rounded_inputs`.
        stack.enter_context(with_attributes([module], dense=numbers, format=Format(module.format.bits)))
    else:
        parameter = getattr(module, leaf)
        stack.callback(setattr, parameter, "data", parameter.data)
        parameter.data = numbers.to(parameter.device, parameter.dtype)
