"""Activation checkpointing: which tensors of a layer the backward finds, and which it computes again.

none         what autograd saves.
full         each layer's input; the backward runs the layer's forward again (arXiv 1604.06174).
n            full for every n-th layer, none for the others.
selective    each layer's input, and the results of its matrix products and fused attention; the backward computes
             norms, activations and RoPE again, which cost little (arXiv 2205.05198, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, cast

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Kind = Literal["none", "full", "selective"]
Checkpointing = str | int  # a `Kind`, or n

# By their names without overloads. Attention: every kernel of scaled_dot_product_attention that is one operation, and
# variable-length flash. The last ones add up what processes of tensor parallelism have of a product.
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_scaled_mm"}
_ATTENTION = ("aten::_scaled_dot_product_", "torch_attn::_varlen_attn")
_SUMS = {"_c10d_functional::reduce_scatter_tensor", "_c10d_functional::all_reduce"}


def of_layer(how: Checkpointing, index: int) -> Kind:
    """How a layer is computed, by its number in the whole model: with n, layers 0, n, 2 n and so on are full.

    Not the last one of each n: the backward would compute it again while the n - 1 before it are whole.
    """
    if isinstance(how, str):
        assert how in ("none", "full", "selective"), how
        return cast(Kind, how)
    return "full" if index % how == 0 else "none"


def run_layer(how: Checkpointing, index: int, layer: Callable[..., Tensor], x: Tensor, **given: Any) -> Tensor:
    """The output of a `DecoderLayer`, [b, s, d], with what its backward needs kept as `how` says.

    Args:
        how: none where there is no backward.
        index: the layer's number in the whole model.
        x (Tensor): [b, s, d].
        given: keywords of the layer.
    """
    kind = of_layer(how, index)
    if kind == "full":
        output: Tensor = checkpoint(layer, x, use_reentrant=False, **given)
        return output
    # A compiled layer is one operation to what is around it, so products are distinguished inside.
    return layer(x, selective=True, **given) if kind == "selective" else layer(x, **given)


def keep_products(function: Callable[..., Tensor], x: Tensor, **given: Any) -> Tensor:
    """function(x, **given), which keeps x and the results of products for its backward, and computes the rest again."""
    output: Tensor = checkpoint(function, x, use_reentrant=False, context_fn=_contexts, **given)
    return output


def is_kept(op: Any, inputs: tuple[Any, ...], output: Any) -> bool:
    """Whether selective checkpointing keeps the result of an operation.

    A batched product that is larger than its factors, the scores of an attention without a fused kernel, is not: it
    grows with the square of the sequence.
    """
    kind = _kind(op)
    if kind == "batched":
        return bool(output.numel() <= sum(x.numel() for x in inputs if isinstance(x, Tensor)))
    return kind == "kept"


@cache
def _kind(op: Any) -> Literal["kept", "batched", "other"]:
    name = op.name().partition(".")[0]
    if name in ("aten::bmm", "aten::baddbmm"):
        return "batched"
    of_attention = name.startswith(_ATTENTION) and not name.endswith("_backward")
    return "kept" if of_attention or name in _PRODUCTS or name in _SUMS else "other"


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = is_kept(op, args, context.op_output)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = partial(create_selective_checkpoint_contexts, _policy)
