"""How fast and how large a model will be on a device, from its shape alone.

A decoded token reads each matrix once, and the cache:

    seconds = sum over forms of weights (bytes / rate + products * cost of a call)
            + cache bytes / rate
            + layers * overhead + overhead

A device of a YAML file has one rate for all bytes; where attention over the cache is more work than reading (MLA's
absorbed decoding, 1 latent for all heads), its FLOPs count instead. A calibrated one has a rate for each form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from plmtune.devices import costs
from plmtune.devices.costs import ModelShape, Weights
from plmtune.devices.device import Device, KernelRate, RuntimeRates


@dataclass(frozen=True)
class Prediction:
    """The predicted speed and size of a model on a device.

    Attributes:
        context: tokens in the cache, for decode and memory; prompt: those read for the first token.
        file: bytes of the weights on disk.
        weights, cache, workspace, program: bytes in memory; `memory` is their sum, `available` what the device has.
        first_token: seconds until a prompt's first token; None where the model does not fit, as are all speeds.
        prefill, decode: tokens a second.
        error: relative, of decode; a time to first token may be off by twice that.
        calibrated: the speeds are of this runtime's kernels, measured on this device.
    """

    device: str
    runtime: str
    scheme: str
    context: int
    prompt: int
    file: int
    weights: int
    cache: int
    workspace: int
    program: int
    available: int
    error: float
    calibrated: bool
    first_token: float | None = None
    prefill: float | None = None
    decode: float | None = None

    @property
    def memory(self) -> int:
        return self.weights + self.cache + self.workspace + self.program

    @property
    def peak(self) -> int:
        """What the system shows at most: plmtune copies its file from a mapping, whose pages are given back."""
        mapped = self.file if self.runtime == "plmtune" else 0
        return self.program + self.weights + max(mapped, self.cache + self.workspace)

    @property
    def fits(self) -> bool:
        return self.memory <= self.available

    @property
    def is_bound(self) -> bool:
        """Whether decode is at most what memory allows: how near a kernel comes was not measured there."""
        return self.runtime == "plmtune" and not self.calibrated


def predict(
    model_shape: ModelShape,
    device: Device,
    *,
    scheme: str,
    runtime: str = "plmtune",
    context: int = 2048,
    prompt: int = 512,
) -> Prediction:
    """Predict one model in one scheme of a runtime, such as int4 or q8_0, one text at a time.

    Args:
        context: tokens in the cache.
        prompt: tokens that are read before the first is written; at most the context counts.
    """
    held = costs.weights(model_shape, runtime, scheme)
    prompt = min(prompt, context)
    rates = device.rates.get(runtime)
    found = Prediction(
        device=device.key,
        runtime=runtime,
        scheme=scheme,
        context=context,
        prompt=prompt,
        file=held.file,
        weights=held.memory,
        cache=costs.cache_bytes(model_shape, runtime, context, dtype_bytes=held.cached),
        workspace=costs.workspace_bytes(model_shape, runtime, prompt, context),
        program=int(rates.program) if rates else costs.PROGRAM[runtime],
        available=int(device.available),
        error=_error(device, runtime, rates, held),
        calibrated=rates is not None,
    )
    if not found.fits:  # weights would be read from the disk for each token
        return found
    seconds = prompt_seconds(model_shape, device, runtime, held, prompt)
    return replace(
        found,
        first_token=seconds,
        prefill=prompt / seconds,
        decode=1 / decode_seconds(model_shape, device, runtime, held, context),
    )


def decode_seconds(model_shape: ModelShape, device: Device, runtime: str, held: Weights, context: int) -> float:
    """Seconds of one token after `context` others."""
    rates = device.rates.get(runtime)
    cache = costs.cache_bytes(model_shape, runtime, context, dtype_bytes=held.cached)
    if rates is None:
        reading = sum(held.read.values()) / device.bandwidth.value
        attending = costs.attention_flops(model_shape, runtime, context) / device.compute.value
        over_cache = max(cache / device.bandwidth.value, attending)
        return reading + over_cache + model_shape.num_layers * device.layer.value + device.token.value
    seconds = rates.token
    for form, size in held.read.items():
        rate = kernel_rate(rates, form)
        seconds += size / rate.weights + held.products[form] * rate.product
    for attention in model_shape.attention:
        kind, share = cache_kind(attention, runtime), cache_share(attention, runtime, held.cached) * context
        seconds += share / rates.cache.get(kind, device.bandwidth.value) + rates.layers.get(kind, device.layer.value)
    return seconds


def prompt_seconds(model_shape: ModelShape, device: Device, runtime: str, held: Weights, prompt: int) -> float:
    """Seconds to read a prompt, whose products are bound by compute, or by reading where it is short."""
    rates = device.rates.get(runtime)
    attention = costs.prompt_attention_flops(model_shape, prompt, runtime)
    # Only the last token's logits are wanted.
    flops = {form: 2.0 * prompt * numbers for form, numbers in held.numbers.items()}
    flops[held.head] += 2.0 * model_shape.head.numel
    if rates is None:
        work = (sum(flops.values()) + attention) / device.compute.value
        reading = sum(held.read.values()) / device.bandwidth.value
        return max(work, reading) + model_shape.num_layers * device.layer.value + device.token.value
    seconds = rates.token + attention / rates.attention
    for form, work in flops.items():
        rate = kernel_rate(rates, form)
        seconds += max(work / rate.compute, held.read[form] / rate.weights) + held.products[form] * rate.product
    return seconds + sum(rates.layers.get(cache_kind(a, runtime), device.layer.value) for a in model_shape.attention)


def cache_kind(attention: costs.Attention, runtime: str) -> str:
    """Which of a runtime's rates a layer's cache is read at."""
    return attention.kind if runtime == "plmtune" else "heads"


def cache_share(attention: costs.Attention, runtime: str, number: int) -> int:
    """Bytes of one layer's cache for each token, at so many bytes a number."""
    return number * (attention.latent if runtime == "plmtune" else attention.expanded)


def _bits(form: str) -> float:
    digits = "".join(ch for ch in form.lower().replace("int8_dynamic_", "").partition("_g")[0] if ch.isdigit())
    return float(digits[:2] if digits[:2] in ("16", "32") else digits[:1] or 16)


def kernel_rate(rates: RuntimeRates, form: str) -> KernelRate:
    """The measured rate of a form, or of the one with the nearest number of bits."""
    if form in rates.kernels:
        return rates.kernels[form]
    family = [name for name in rates.kernels if ("dynamic" in name) == ("dynamic" in form)] or list(rates.kernels)
    return rates.kernels[min(family, key=lambda name: abs(_bits(name) - _bits(form)))]


def _error(device: Device, runtime: str, rates: RuntimeRates | None, held: Weights) -> float:
    if rates is None:
        # Rates of YAML files are what llama.cpp reaches; PyTorch, eager, comes less near to what memory allows.
        return min(device.error.value * (1 if runtime == "llama.cpp" else 2), 0.6)
    # A kernel that was not measured itself is taken from its neighbour: that is no better than a data sheet.
    known = all(form in rates.kernels for form in held.read)
    return rates.error if known else max(rates.error, 0.3)
