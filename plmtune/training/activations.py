"""Bytes of activations that a training step keeps between forward and backward, found by forwards of a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from plmtune.modules.checkpointing import Checkpointing, is_kept, of_layer


@dataclass(frozen=True)
class _Saved:
    """Bytes of one forward.

    Attributes:
        saved: what autograd saves.
        products: what selective checkpointing keeps.
        input: of the input, if autograd does not save it.
    """

    saved: float
    products: float = 0.0
    input: float = 0.0


def activation_bytes(
    model: nn.Module,
    micro_batch_size: int,
    seq_len: int,
    compute_dtype: torch.dtype = torch.float32,
    activation_checkpointing: Checkpointing = "none",
    *,
    casts: bool = True,
) -> int:
    """Most bytes at once that the backward of the hidden states needs.

    With checkpointing, a layer that is computed again holds all that autograd saves of it, beside what the layers
    before it keep.

    Args:
        model: a Decoder on any device; its weights are not touched.
        casts: autocast keeps a copy of each matrix in `compute_dtype`; FSDP2, which gathers in it, does not.
    """
    held: Any = model
    training = model.training
    model.eval()  # a Decoder checkpoints only in training; here both costs are taken apart
    device, tokens = _trial_device(held), micro_batch_size * seq_len
    ids = torch.zeros(2, _TRIED, dtype=torch.long, device=device)
    hidden = torch.empty(2, _TRIED, held.embed_dim, dtype=compute_dtype, device=device)
    kinds = [of_layer(activation_checkpointing, index) for index in held.numbered_layers]
    try:
        outside = _saved(model, ids, tokens, compute_dtype, casts, hidden=True).saved
        kept, at_work = [], []  # of each layer: from its forward to its backward, and besides in its backward
        for kind, (index, layer) in zip(kinds, held.numbered_layers.items(), strict=True):
            if "full" not in kinds and "selective" not in kinds:
                break
            given = held.of_tokens(index, ids.to(held.device))
            given = {name: hidden.new_empty(x.shape) for name, x in given.items()}
            found = _saved(layer, hidden, tokens, compute_dtype, casts, **given)
            outside -= found.saved
            of_kind = {
                "none": (found.saved, 0.0),
                "full": (found.input, found.saved),
                # Recomputing takes the products, and what autograd saves is there then.
                "selective": (found.input + found.products, max(0.0, found.saved - found.products)),
            }
            kept.append(of_kind[kind][0])
            at_work.append(of_kind[kind][1])
        before = accumulate(kept)
        return int(outside + max((sum(both) for both in zip(before, at_work, strict=True)), default=0.0))
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


def _saved(module: nn.Module, inputs: Tensor, tokens: int, dtype: torch.dtype, casts: bool, **settings: Any) -> _Saved:
    """What a forward of so many tokens saves: a line through those of one row of `inputs` and of both."""
    # Autocast does not know the meta device: parameters in its dtype give the same activations, and the
    # copies that it would make of the matrices are added.
    ends = (
        "tok_embeddings.",
        "value_embeddings.",
        "query_embeddings.",
        "output.",
    )  # some are only read, and the head's is the loss's
    matrices = sum(p.numel() for name, p in module.named_parameters() if p.ndim > 1 and not name.startswith(ends))
    copies = dtype.itemsize * matrices if casts and dtype != torch.float32 else 0

    def first(x: Any, rows: int) -> Any:
        return x[:rows].clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x

    tried = [(first(inputs, rows), {key: first(x, rows) for key, x in settings.items()}) for rows in (1, 2)]
    one, two = (vars(_saved_by_forward(module, x, dtype, given)) for x, given in tried)
    found = {part: one[part] + (tokens / _TRIED - 1) * (two[part] - one[part]) for part in one}
    return _Saved(**found | {"saved": found["saved"] + copies})


def _saved_by_forward(module: nn.Module, x: Tensor, dtype: torch.dtype, settings: dict[str, Any]) -> _Saved:
    """Bytes of the distinct storages that a forward saves; parameters and inputs left out."""
    state = {  # each of one number, shown in the parameter's shape
        name: torch.empty_strided(p.shape, [0] * p.ndim, dtype=dtype, device=x.device, requires_grad=p.requires_grad)
        for name, p in module.named_parameters()
    }
    given = [held for held in settings.values() if isinstance(held, Tensor)]
    own = {_storage(t) for t in (*state.values(), x, *given)}
    saved: dict[int, Tensor] = {}  # holds the tensors, so that no storage's address is used twice
    products: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(_storage(tensor), tensor)
        return tensor

    def keep(*results: Any) -> None:
        products.update({_storage(t): t for t in results if isinstance(t, Tensor)})

    def size(kept: dict[int, Tensor]) -> int:
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)

    hooks = saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.enable_grad(), hooks, _OtherProducts(keep), _WithoutProducts(keep):
        output = functional_call(module, state, (x,), settings, tie_weights=True)
    if x.dtype == torch.long:  # a whole model, whose output the loss takes
        pack(output)
    unsaved = x.untyped_storage().nbytes() if x.is_floating_point() and _storage(x) not in saved else 0
    return _Saved(size(saved), size(products), unsaved)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _OtherProducts(TorchDispatchMode):
    """Calls `keep` with the results of products that no linear layer makes and selective checkpointing keeps."""

    def __init__(self, keep: Callable[..., None]) -> None:
        super().__init__()
        self.keep = keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if is_kept(func, args, output):
            self.keep(*output if isinstance(output, tuple | list) else (output,))
        return output


class _WithoutProducts(TorchFunctionMode):
    """Linear layers and attention without their work: what they save, and an output of the right shape.

    So weights need no memory, and attention keeps what the fused kernels do. On the meta device torch would keep all
    scores instead. Calls `keep` with their results.
    """

    def __init__(self, keep: Callable[..., None]) -> None:
        super().__init__()
        self.keep = keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            output = _product(*args, **(kwargs or {}))
            self.keep(output)
            return output
        if func is nn.functional.scaled_dot_product_attention:
            output, sums = _FusedAttention.apply(*args[:3])
            self.keep(output, sums)
            return output
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
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        b, h, s, _ = q.shape
        out = q.new_empty(b, s, h, v.shape[3]).transpose(1, 2)
        sums = q.new_empty(b, h, s, dtype=torch.float32)  # logarithms of each row's sum
        ctx.save_for_backward(q, k, v, out, sums)
        return out, sums
