"""Rounding a model's weights to integers, in place, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plmtune.errors import UserError
from plmtune.models.hf import num_bytes
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, Quantized, QuantizedLinear, install
from plmtune.modules.torchtune_layers import quiet

with quiet():
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

# Numbers rounded at once: a whole vocabulary's matrix in fp32, with its intermediate results, would take gigabytes.
_CHUNK = 1 << 22

# Shares of a group's range that calibration tries. A wider range never helps; a narrower one clips more than its finer
# steps give back.
_SHRINK = tuple(1 - i / 40 for i in range(17))


@torch.no_grad()
def quantize(
    model: nn.Module,
    formats: Mapping[str, Format],
    *,
    second_moments: Mapping[str, Tensor] | None = None,
    scheme: Mapping[str, Any] | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> None:
    """Store matrices as integers. Each weight is freed as soon as its integers exist.

    Args:
        model: changed in place; its attribute `quantization` becomes the scheme, which config.json will name.
        formats: module name -> format.
        second_moments: module name -> mean of the squared inputs, [in] (`calibrate.second_moments`). With them each
            group gets the range with the least error of the products; without, the range of its weights.
        scheme: the scheme's name and settings.
        progress: wraps the iteration over the modules' names.
    """
    for name in progress(list(formats)):
        quantize_module(model, name, formats[name], second_moments.get(name) if second_moments else None)
    model.quantization = dict(scheme or {})  # type: ignore[assignment]


def file_bytes(model: Decoder, formats: Mapping[str, Format], dtype: torch.dtype) -> int:
    """Bytes of a model's files of weights, headers included: some modules in their formats, the rest in `dtype`.

    Args:
        model: on the meta device; changed to these formats.
    """
    install(model, formats)
    return num_bytes(model.to(dtype))


def quantize_module(model: nn.Module, name: str, format: Format, second_moments: Tensor | None = None) -> Quantized:
    """Replace one module by its quantized form and return that. See `quantize`."""
    held: Any = dict(model.named_modules()).get(name)
    install(model, {name: format})
    weight, bias = held.weight, getattr(held, "bias", None)
    new = model.get_submodule(name)
    assert isinstance(new, Quantized)
    fill(new, *round_weight(weight.detach(), format, second_moments, name=name), dtype=weight.dtype)
    if bias is not None:
        new.register_parameter("bias", bias)
    return new


def fill(module: Quantized, q: Tensor, scales: Tensor, zeros: Tensor | None, *, dtype: torch.dtype) -> None:
    """Set the numbers of an installed module.

    Args:
        q (Tensor): int8 [out, in], as `round_weight` gives it.
        scales (Tensor): bf16 [out, groups]. zeros (Tensor | None): int8 [out, groups].
        dtype: of the computation.
    """
    if module.format.bits == 4:
        pairs = (q + 8 if module.format.symmetric else q).to(torch.uint8).unflatten(-1, (-1, 2))
        q = pairs[..., 0] | pairs[..., 1] << 4
    module.weight, module.scales = q.contiguous(), scales.to(dtype)
    if zeros is not None:
        module.zeros = zeros


def round_weight(
    weight: Tensor, format: Format, second_moments: Tensor | None = None, *, name: str = "the weight"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers, scales and zeros of a matrix (Tensor), [out, in], by torchao's primitives. See `quantize`.

    Returns:
        q (int8 [out, in]; -128..127, -8..7, or 0..15 where there are zeros), scales (bf16 [out, groups]) and zeros
        (int8 [out, groups], or None of a symmetric format).
    """
    parts = []
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        wide = rows.float()
        if not wide.isfinite().all():
            raise UserError(
                f"{name}.weight holds numbers that are not finite (NaN or infinity), so it cannot be quantized. "
                "Its training diverged or its file is damaged: take an earlier checkpoint."
            )
        parts.append(_round_rows(wide, format, second_moments))
    q, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return q, scales, None if format.symmetric else zeros


def bounds(format: Format) -> tuple[int, int]:
    """Least and greatest integer of a format."""
    return (-128, 127) if format.bits == 8 else (-8, 7) if format.symmetric else (0, 15)


def _round_rows(w: Tensor, format: Format, moments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    low, high = bounds(format)
    block = (1, format.group_size or w.shape[1])
    mapping = MappingType.SYMMETRIC if format.symmetric else MappingType.ASYMMETRIC
    scales, zeros = choose_qparams_affine(
        w, mapping, block, torch.int8, low, high, scale_dtype=torch.float32, zero_point_dtype=torch.int8, keepdim=True
    )
    # The integers are chosen for the scales that will be stored, or the rounding of scales would be a second error.
    scales = scales.bfloat16().float()
    # With 8 bits the whole range is within a per mille of the best one.
    if moments is not None and format.bits == 4:
        scales, zeros = _search(w, scales, zeros, block, format, moments.to(w))
    q = quantize_affine(w, block, scales, zeros, torch.int8, low, high)
    return q, scales.bfloat16(), zeros


def _search(
    w: Tensor, scales: Tensor, zeros: Tensor, block: tuple[int, int], format: Format, moments: Tensor
) -> tuple[Tensor, Tensor]:
    """The scales and zeros, [out, groups], with the least sum of moment * (error of w)^2 over each group.

    This is the error of the product for independent inputs (as in llama.cpp's importance matrix).
    """
    low, high = bounds(format)
    groups, weights = w.unflatten(-1, (-1, block[1])), moments.unflatten(-1, (-1, block[1]))
    least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = torch.full_like(scales, torch.inf)
    best_scales, best_zeros = scales, zeros
    for shrink in _SHRINK:
        tried = (scales * shrink).bfloat16().float()
        candidates = [zeros]
        if not format.symmetric:
            # A range narrower than the numbers cuts off its lower end, its upper end, or some of both.
            at_low = (-least / tried).round().clamp(low, high)
            at_high = (high - most / tried).round().clamp(low, high)
            candidates = [zero.to(zeros) for zero in (at_low, ((at_low + at_high) / 2).round(), at_high)]
        # Equal to quantize_affine and back, in a fraction of the time: rounded once for all zeros.
        steps = (groups * (1 / tried)[..., None]).round_()
        for zero in candidates:
            floor = low - zero.to(w)[..., None]  # not in int8, which clamp would be slow with
            q = steps.clamp(floor, floor + (high - low))
            error = torch.addcmul(groups, q, tried[..., None], value=-1)
            cost = torch.einsum("ogk,gk->og", error.square_(), weights)
            better = cost < best
            best = torch.where(better, cost, best)
            best_scales, best_zeros = torch.where(better, tried, best_scales), torch.where(better, zero, best_zeros)
    return best_scales, best_zeros


@torch.no_grad()
def to_torchao(model: nn.Module) -> None:
    """Replace a model's quantized linear layers, in place, by layers that torch.export lowers and XNNPACK accepts.

    They become `nn.Linear` over `IntxUnpackedToInt8Tensor` of the same integers, scales and zeros, with inputs rounded
    to 8 bits where the format is dynamic.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedLinear):
            continue
        with torch.device("meta"):
            new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        new.register_parameter("weight", _parameter(module))
        new.register_parameter("bias", module.bias)
        model.set_submodule(name, new.train(module.training))


def _parameter(module: QuantizedLinear) -> nn.Parameter:
    """A module's weight as torchao's tensor, [out, in]."""
    q, scales = module.integers(), module.scales
    zeros: Any = torch.zeros_like(scales, dtype=torch.int8) if module.format.symmetric else module.zeros
    if not module.format.symmetric:
        q, zeros = q - 8, zeros - 8  # 0..15 there, -8..7 here: differences, and so the numbers, are the same
    tensor = IntxUnpackedToInt8Tensor(
        qdata=q,
        scale=scales,
        zero_point=zeros,
        target_dtype=getattr(torch, f"int{module.format.bits}"),
        block_size=(1, q.shape[1] // scales.shape[1]),
        dtype=scales.dtype,
        activation_quantization="int8_asym_per_token" if module.format.dynamic else None,
    )
    return nn.Parameter(tensor, requires_grad=False)
