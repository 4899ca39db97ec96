"""Which neurons, heads, channels and latent numbers matter: by weights, by first-order Taylor, by activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from plmtune.losses.cross_entropy import cross_entropy
from plmtune.modules.decoder import Decoder
from plmtune.pruning.groups import Group
from plmtune.pruning.sizes import Sizes

Method = Literal["l1", "l2", "taylor", "activation"]
Scores = dict[str, Tensor]  # group name -> one number a unit


def importance(model: Decoder, groups: Mapping[str, Group], method: Method, batches: Iterable[Tensor]) -> Scores:
    """A number for each unit of each group, larger for what matters more.

    Args:
        method: l1: sum of |w| over the unit's matrices. l2: the root of the sum of w^2. taylor: sum of |w dL/dw| over
            the unit's parameters, summed over the batches (Molchanov, arXiv 1906.10771). activation: the L2 norm over
            a row's tokens of what the unit gives, summed over rows (Minitron, arXiv 2407.14679): of a neuron the
            input of down_proj, of a head that of o_proj, of a channel and of a latent number the output of its norms.
        batches: ids, [b, s], on the model's device; l1 and l2 read none.
    """
    if method == "taylor":
        return _taylor(model, groups, batches)
    if method == "activation":
        return _activations(model, groups, batches)
    state = model.state_dict()

    def size(group: Group) -> Tensor:
        found = torch.zeros(group.units)
        for part in group.parts:
            tensor = state[part.tensor].float()
            if tensor.ndim == 2:  # of norms and biases the numbers say little of what they do
                found += part.of_units(
                    _sums(tensor.abs() if method == "l1" else tensor.square(), part.dim), group.units
                )
        return found if method == "l1" else found.sqrt()

    return {name: size(group) for name, group in groups.items()}


def mean_loss(model: Decoder, ids: Tensor) -> Tensor:
    """The loss of a batch, nats a token, with its graph."""
    hidden = model(ids, hidden=True)[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    return cross_entropy()(hidden, model.head_weight, targets, **model.loss_settings) / len(targets)


def choose_units(groups: Mapping[str, Group], scores: Mapping[str, Tensor], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The units that stay in each group that shrinks: the best, and of KV heads the best with their query heads.

    Units of a group without scores, or of equal ones, stay from the first.
    """
    found: dict[str, tuple[int, ...]] = {}
    scores = {name: scores.get(name, torch.zeros(group.units)) for name, group in groups.items()}
    for name, group in groups.items():
        if group.kind == "heads" and sizes.kv_heads is not None:
            kv = groups[name.replace(".heads", ".kv_heads")]
            heads, kv_heads = _choose_heads(scores[name], scores[kv.name], sizes.heads, sizes.kv_heads)
            chosen = {name: heads, kv.name: kv_heads}
        elif group.kind == "kv_heads":
            continue
        else:
            chosen = {name: _best(scores[name], sizes.units(group.kind))}
        found |= {key: kept for key, kept in chosen.items() if len(kept) < groups[key].units}
    return found


def shares_that_stay(groups: Mapping[str, Group], sizes: Sizes) -> dict[str, float]:
    """The share of its units that stays, of each group that shrinks; of query heads, of those that a KV head serves."""
    found = {}
    for name, group in groups.items():
        share = sizes.units(group.kind) / group.units
        if group.kind == "heads" and sizes.kv_heads is not None:
            share *= groups[name.replace(".heads", ".kv_heads")].units / sizes.kv_heads
        found[name] = share
    return {name: share for name, share in found.items() if share < 1}


def _best(values: Tensor, count: int) -> tuple[int, ...]:
    order = values.sort(descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


def _choose_heads(heads: Tensor, kv: Tensor, num_heads: int, num_kv: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query heads and KV heads that stay: each KV head with the best of those that it serves."""
    group, per_kv = len(heads) // len(kv), num_heads // num_kv
    table = heads.view(len(kv), group)
    best = [_best(row, per_kv) for row in table]
    together = kv + torch.stack([row[list(kept)].sum() for row, kept in zip(table, best, strict=True)])
    kept_kv = _best(together, num_kv)
    return tuple(index * group + head for index in kept_kv for head in best[index]), kept_kv


def _sums(tensor: Tensor, dim: int) -> Tensor:
    """Sums over all dimensions but one."""
    others = [other for other in range(tensor.ndim) if other != dim]
    return (tensor.sum(others) if others else tensor).cpu()


def _taylor(model: Decoder, groups: Mapping[str, Group], batches: Iterable[Tensor]) -> Scores:
    found = {name: torch.zeros(group.units) for name, group in groups.items()}
    for ids in batches:
        model.zero_grad()
        mean_loss(model, ids).backward()
        products: dict[str, Tensor] = {}
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:  # a layer that no text reaches has none
                products[key] = (parameter.detach() * parameter.grad).abs()
        for name, group in groups.items():
            for part in group.parts:
                if part.tensor in products:
                    found[name] += part.of_units(_sums(products[part.tensor], part.dim), group.units)
    model.zero_grad()
    return found


@torch.no_grad()
def _activations(model: Decoder, groups: Mapping[str, Group], batches: Iterable[Tensor]) -> Scores:
    found = {name: torch.zeros(group.units) for name, group in groups.items()}

    def see(name: str, x: Tensor) -> None:
        """x (Tensor): [b, s, n], n a multiple of the units."""
        norms = x.float().square().sum(1)  # [b, n]
        found[name] += norms.view(len(norms), groups[name].units, -1).sum(2).sqrt().sum(0).cpu()

    with _seen(model, groups, see):
        for ids in batches:
            model(ids, hidden=True)
    return found  # of KV heads 0: what they give is what their query heads give


@contextmanager
def _seen(model: Decoder, groups: Mapping[str, Group], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the context, call see(group name, activations of its units) in each forward."""

    def before(name: str, _: Any, arguments: tuple[Tensor, ...]) -> None:
        see(name, arguments[0])

    def after(name: str, _: Any, __: Any, output: Tensor) -> None:
        see(name, output)

    with ExitStack() as stack:
        for name, group in groups.items():
            for norm in group.norms:
                stack.callback(model.get_submodule(norm).register_forward_hook(partial(after, name)).remove)
            if group.kind in ("neurons", "heads"):
                layer: Any = model.layers[cast(int, group.layer)]
                module = layer.ffn.down_proj if group.kind == "neurons" else layer.attention.o_proj
                stack.callback(module.register_forward_pre_hook(partial(before, name)).remove)
        yield
