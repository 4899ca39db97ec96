"""Memory of activations, found by forwards of a few tokens that compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.overrides import TorchFunctionMode


def activation_bytes(
    model: nn.Module,
    micro_batch_size: int,
    seq_len: int,
    compute_dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    *,
    casts: bool = True,
) -> int:
    """Bytes that autograd keeps for the backward of the hidden states, found by forwards of a few tokens.

    Args:
        model: a Decoder on any device; its weights are not touched.
        activation_checkpointing: each layer keeps its input; one layer at a time holds the rest again.
        casts: autocast keeps a copy of each matrix in `compute_dtype`; FSDP2, which gathers in it, does not.
    """
    held: Any = model
    training = model.training
    model.eval()  # a Decoder checkpoints only in training; here both costs are taken apart
    device, tokens = _trial_device(held), micro_batch_size * seq_len

    def ids(rows: int) -> Tensor:
        return torch.zeros(rows, _TRIED, dtype=torch.long, device=device)

    def hidden(rows: int) -> Tensor:
        shape = rows, _TRIED, held.embed_dim
        return torch.empty(shape, dtype=compute_dtype, device=device, requires_grad=True)

    try:
        whole = _saved_bytes(model, ids, tokens, compute_dtype, casts, hidden=True)
        if not activation_checkpointing:
            return whole
        layers = [_saved_bytes(layer, hidden, tokens, compute_dtype, casts) for layer in held.layers]
        inputs = len(layers) * tokens * held.embed_dim * compute_dtype.itemsize
        return whole - sum(layers) + inputs + max(layers)
    finally:
        model.train(training)


_TRIED = 2  # tokens of a row; one alone is computed another way


def _trial_device(model: Any) -> torch.device:
    """The CPU, where a few tokens through layers of ours take no memory; the meta device, which imports sympy (half a
    CPU second), for models of enormous width and for modules that may compute with a whole matrix.
    """
    ours = all(type(m).__module__.startswith(("plmtune.modules.", "torch.nn.")) for m in model.modules())
    numbers = sum(sum(p.shape) for p in model.parameters())  # of a token, about
    return torch.device("cpu" if ours and numbers < 2**22 and model.max_seq_len <= 2**17 else "meta")


def _saved_bytes(
    module: nn.Module,
    inputs: Callable[[int], Tensor],
    tokens: int,
    dtype: torch.dtype,
    casts: bool,
    **settings: Any,
) -> int:
    """Bytes that a forward of so many tokens saves: a line through those of one row of tokens and of two.

    Args:
        inputs: (rows) -> the module's input for so many rows of _TRIED tokens.
    """
    # Autocast does not know the meta device: parameters in its dtype give the same activations, and the
    # copies that it would make of the matrices are added.
    ends = ("tok_embeddings.weight", "output.weight")  # one is only read, and the head's is the loss's
    matrices = sum(p.numel() for name, p in module.named_parameters() if p.ndim > 1 and name not in ends)
    copies = dtype.itemsize * matrices if casts and dtype != torch.float32 else 0
    one, two = (_saved_by_forward(module, inputs(rows), dtype, settings) for rows in (1, 2))
    return int(one + (tokens / _TRIED - 1) * (two - one)) + copies


def _saved_by_forward(module: nn.Module, x: Tensor, dtype: torch.dtype, settings: dict[str, Any]) -> int:
    """Bytes of the distinct storages that a forward saves; parameters and input left out."""
    state = {  # each of one number, shown in the parameter's shape
        name: torch.empty_strided(p.shape, [0] * p.ndim, dtype=dtype, device=x.device, requires_grad=p.requires_grad)
        for name, p in module.named_parameters()
    }
    own = {t.untyped_storage()._cdata for t in (*state.values(), x)}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no storage's address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor), _WithoutProducts():
        pack(functional_call(module, state, (x,), settings, tie_weights=True))  # the output is kept too
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


class _WithoutProducts(TorchFunctionMode):
    """Linear layers and attention without their work: what they save, and an output of the right shape.

    So weights need no memory, and attention keeps what the fused kernels do. On the meta device torch would keep all
    scores instead.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return _product(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def _product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _Product.apply(input, weight, bias)  # which takes no names


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return x.new_empty(*x.shape[:-1], weight.shape[0])


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, s, _ = q.shape
        out = q.new_empty(b, s, h, v.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(b, h, s, dtype=torch.float32))  # log-sum-exp of rows
        return out
