"""Calibration: the second moments of the inputs of a model's matrices, on text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from plmtune.modules.decoder import Decoder
from plmtune.quantization.schemes import EMBEDDING, HEAD, VALUES


@contextmanager
def inputs_seen(model: Decoder, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the context, call see(name, inputs [n, in]) for each product of the named modules.

    The inputs of the head are the model's normed hidden states, so that no logits need be computed. An embedding that
    is not tied has no product, nor have value embeddings.
    """
    head = EMBEDDING if model.tied else HEAD

    def before(name: str, _: Any, arguments: tuple[Tensor, ...]) -> None:
        see(name, arguments[0].detach().flatten(0, -2))

    def after(name: str, _: Any, __: Any, hidden: Tensor) -> None:
        see(name, hidden.detach().flatten(0, -2))

    with ExitStack() as stack:
        for name in names:
            if name == head:
                stack.callback(model.norm.register_forward_hook(partial(after, name)).remove)
            elif name != EMBEDDING and not name.startswith(VALUES):
                module = model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(partial(before, name)).remove)
        yield


@torch.no_grad()
def second_moments(model: Decoder, batches: Iterable[Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Mean of the squared inputs of each module, [in] in fp32, by its name.

    Args:
        model: unquantized.
        batches: token ids, [b, s], of text like that of the model's use; some tens of thousands of tokens suffice.
        names: of modules; an embedding that is not tied and value embeddings have no inputs and are left out.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0

    def see(name: str, x: Tensor) -> None:
        squares = x.float().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    with inputs_seen(model, names, see):
        for ids in batches:
            model(ids.to(model.device), hidden=True)
            tokens += ids.numel()
    if not tokens:
        raise ValueError("calibration needs at least one row of tokens")
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ValueError(f"the inputs of {name} are not finite on this text: the model's dtype overflows")
    return {name: total / tokens for name, total in sums.items()}
