"""What a runtime's own arithmetic does to a model: it rounds what it multiplies by, each type of matrix in its way.

llama.cpp turns the inputs of a matrix in F16 or BF16 to the same type, of the older quantized types to Q8_0 (blocks of
32 with a scale), of K-quants and IQ to Q8_K (blocks of 256). So the difference that this makes in our model is what two
right programs may differ by, on this model and this text, where any limit in nats would be too wide for one model and
too narrow for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import gelu

from plmtune.modules.attributes import with_attributes
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import QuantizedLinear, round_inputs

# Sums of hundreds of products in another order: 2^-18 of a number, where fp32 has 2^-24.
_LOST_BITS = 6


@contextmanager
def with_rounded_inputs(model: Decoder, kinds: Mapping[str, str]) -> Iterator[None]:
    """Round what each matrix is multiplied by, as a runtime does that has it in the type of `kinds`.

    Args:
        kinds: tensor's name -> its type; of a name that is not in it F32.
    """
    head = "tok_embeddings" if model.tied else "output"
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | QuantizedLinear) and name != "output":
                rounds = _rounding(kinds.get(f"{name}.weight", "F32"))
                stack.callback(module.register_forward_pre_hook(partial(_before, rounds)).remove)
        rounds = _rounding(kinds.get("output.weight", kinds.get(f"{head}.weight", "F32")))
        # The head's inputs are the normed hidden states.
        stack.callback(model.norm.register_forward_hook(partial(_after, rounds)).remove)
        if kinds:
            stack.enter_context(with_attributes([F], gelu=_gelu_of_f16))
        yield


def _gelu_of_f16(x: Tensor, approximate: str = "none") -> Tensor:
    """llama.cpp looks up what F16 gives for F16 on a CPU."""
    found: Tensor = gelu(x.half().float(), approximate=approximate).half().to(x.dtype)
    return torch.where(x.abs() < 10, found, gelu(x, approximate=approximate))


def _before(rounds: Callable[[Tensor], Tensor], module: nn.Module, inputs: Any) -> Any:
    return rounds(inputs[0]), *inputs[1:]


def _after(rounds: Callable[[Tensor], Tensor], module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return rounds(output)


def _rounding(kind: str) -> Callable[[Tensor], Tensor]:
    if kind in ("F16", "BF16"):
        dtype = torch.float16 if kind == "F16" else torch.bfloat16
        return lambda x: x.to(dtype).to(x.dtype)
    if "dynamic" in kind:
        return round_inputs
    if kind in ("F32", "F64") or kind.startswith("int"):
        return _as_summed
    blocks_of_256 = kind.endswith("_K") or (kind.startswith(("IQ", "TQ")) and kind != "IQ4_NL")
    return partial(_in_blocks, 256 if blocks_of_256 else 32)


def _as_summed(x: Tensor) -> Tensor:
    half, mask = 1 << (_LOST_BITS - 1), -(1 << _LOST_BITS)
    return ((x.float().contiguous().view(torch.int32) + half) & mask).view(torch.float32).to(x.dtype)


def _in_blocks(width: int, x: Tensor) -> Tensor:
    """x (Tensor), [..., n], as whole numbers up to 127 times a scale for each `width`."""
    rest = -x.shape[-1] % width
    blocks = F.pad(x, (0, rest)).unflatten(-1, (-1, width))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]
