"""Quantization-aware training: a forward that computes what the quantized model will compute.

`insert_fake_quantize` replaces a model's layers by torchao's fake-quantized layers, with fake quantizers of our own:
torchao's have no integer zero points for weights of 4 bits, and ours equal `quantize.round_weight` bit for bit.
Gradients pass straight through the rounding (arXiv 1308.3432). Each group's range follows its weights, so no weight
lies more than half a step outside of it and no gradient is cut off; torchao's quantizers cut off the gradient of each
group's greatest number, which then learns nothing.

The parameters keep their names and stay fp32, so a checkpoint of a model in training is an ordinary one. Its
config.json names the scheme in the key `qat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.errors import UserError
from plmtune.models.assemble import component_config, component_from_config
from plmtune.models.checkpoint_files import CONFIG, checkpoint_directory, read_json, write_json
from plmtune.modules.attributes import with_attributes
from plmtune.modules.quantized import Format, round_inputs
from plmtune.modules.torchtune_layers import quiet
from plmtune.quantization.quantize import bounds
from plmtune.registry import Component

with quiet():
    from torchao.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear, FakeQuantizerBase

KEY = "qat"  # of config.json


def insert_fake_quantize(model: Any, formats: Mapping[str, Format]) -> None:
    """Replace layers of a decoder, so that it computes with the numbers of its quantized form.

    Args:
        model: changed in place; its parameters and their names stay. On the meta device nothing is allocated.
        formats: module name -> format, as a scheme returns it.
    """
    for name, format in formats.items():
        try:
            held: Any = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the model has no module {name!r:.200}") from None
        if not isinstance(held, nn.Linear | nn.Embedding):
            raise ValueError(f"{name}: a {type(held).__name__} cannot be quantized")
        width = held.weight.shape[1]
        if width % (format.group_size or width):
            raise ValueError(f"{name}: rows of {width} numbers cannot be divided into groups of {format.group_size}")
        # On meta, or a second weight would be allocated and drawn.
        with torch.device("meta"):
            if isinstance(held, nn.Linear):
                new: Any = FakeQuantizedLinear(held.in_features, held.out_features, held.bias is not None)
                new.bias = held.bias
                if format.dynamic:
                    new.activation_fake_quantizer = InputRounding()
            else:
                new = FakeQuantizedEmbedding(held.num_embeddings, held.embedding_dim)
        new.weight = held.weight
        new.weight_fake_quantizer = WeightRounding(format)
        model.set_submodule(name, new.train(model.training))
    head = formats.get("tok_embeddings" if model.tied else "output")
    if head is not None and head.dynamic and not hasattr(model, "score"):
        # The loss multiplies hidden states by the head's weight without calling the head: round the states before.
        model.norm.head_input = InputRounding()
        model.norm.register_forward_hook(lambda norm, inputs, out: norm.head_input(out))


class _StraightThrough(torch.autograd.Function):
    """Returns the rounded numbers; its gradient is that of the identity."""

    @staticmethod
    def forward(x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class WeightRounding(FakeQuantizerBase):
    """A matrix [out, in] -> the numbers of its stored form.

    In eval mode and inside `fake_quant_frozen` a weight is rounded only at its first use.
    """

    def __init__(self, format: Format) -> None:
        super().__init__()
        self.config = format
        self.enabled = True
        self.frozen = False
        self.cached: tuple[int, Tensor] | None = None  # the weight's version, its rounded form

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        out: Tensor = _StraightThrough.apply(weight, self._rounded(weight))
        return out

    def _rounded(self, weight: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or (self.training and not self.frozen):
            return round_as_stored(weight, self.config)
        # Fused optimizers write without a new version, but never in eval mode.
        if self.cached is None or self.cached[0] != weight._version:
            self.cached = weight._version, round_as_stored(weight, self.config)
        return self.cached[1]

    def train(self, mode: bool = True) -> WeightRounding:
        self.cached = None
        super().train(mode)
        return self


class InputRounding(FakeQuantizerBase):
    """Inputs [..., in] of a product, rounded to 8 bits token by token as `modules.quantized.round_inputs` does."""

    def __init__(self) -> None:
        super().__init__()
        self.config = "int8, a scale and a zero a token"  # what printing a model shows
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        with torch.no_grad():
            rounded = round_inputs(x)
        out: Tensor = _StraightThrough.apply(x, rounded)
        return out


@torch.no_grad()
def round_as_stored(weight: Tensor, format: Format) -> Tensor:
    """The numbers of the stored form of a matrix (Tensor), [out, in], in its dtype.

    Equal to `quantize.round_weight` and back, in a third of the time: a training step needs no integers.
    """
    low, high = bounds(format)
    groups = weight.float().unflatten(-1, (-1, format.group_size or weight.shape[-1]))  # [out, groups, size]
    least, most = torch.aminmax(groups, dim=-1, keepdim=True)
    least, most = least.clamp(max=0), most.clamp(min=0)
    smallest = torch.finfo(torch.float32).smallest_normal
    if format.symmetric:
        scale = (torch.maximum(-least, most) / ((high - low) / 2)).clamp(min=smallest)
    else:
        scale = ((most - least) / (high - low)).clamp(min=smallest)
        zero = (low - (least / scale).round()).clamp(low, high)
    scale = scale.bfloat16().float()
    q = (groups * (1 / scale)).round_()
    q = q.clamp_(low, high) if format.symmetric else q.add_(zero).clamp_(low, high).sub_(zero)
    return q.mul_(scale).flatten(-2).to(weight.dtype)


@contextmanager
def fake_quant_frozen(model: nn.Module) -> Iterator[None]:
    """Round each weight once for all forwards inside the context; no weight may change there."""
    found = [module for module in model.modules() if isinstance(module, WeightRounding)]
    try:
        with with_attributes(found, frozen=True):
            yield
    finally:
        for module in found:
            module.cached = None


def fake_quant_disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the context, compute with unrounded weights and inputs."""
    found = [module for module in model.modules() if isinstance(module, FakeQuantizerBase)]
    return with_attributes(found, enabled=False)


def scheme_settings(chosen: Component) -> dict[str, Any]:
    """A scheme as config.json stores it: its name and all its settings, with defaults."""
    return {key: value for key, value in component_config(chosen).items() if key != "qat"}


def write_scheme(directory: Path, scheme: Mapping[str, Any]) -> None:
    """Add the scheme to a model directory's config.json."""
    write_json(directory / CONFIG, read_json(directory, CONFIG) | {KEY: {"scheme": dict(scheme)}})


def read_scheme(checkpoint: str | Path) -> dict[str, Any] | None:
    """The scheme that a checkpoint was trained for, as `scheme_settings` returned it; None without one."""
    directory = checkpoint_directory(checkpoint)
    stored = read_json(directory, CONFIG).get(KEY) if (directory / CONFIG).exists() else None  # adapters have no config
    if stored is None:
        return None
    where = f"{directory / CONFIG}, key {KEY}"
    if not isinstance(stored, dict):
        raise UserError(f"{where}: must be a table with the key scheme, not {stored!r:.80}")
    return scheme_settings(component_from_config("quantization", stored.get("scheme"), f"{where}.scheme"))
