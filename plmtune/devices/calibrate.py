"""This machine as a device: the speed of its memory, its matrix products and each runtime's kernels.

Small decoders of both attentions, with random weights, decode in each form of weights at a few depths of cache. Their
times are sums of the terms that `devices.predict` adds up, so a least-squares fit without negative
terms gives its rates.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from scipy.optimize import nnls

from plmtune.devices import costs
from plmtune.devices.costs import ModelShape
from plmtune.devices.device import Device, Figure, KernelRate, RuntimeRates
from plmtune.devices.measure import READ_BYTES, read_bandwidth
from plmtune.devices.predict import cache_kind, cache_share
from plmtune.errors import UserError
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.runtimes import open_runtime
from plmtune.export.runtimes.pytorch import PyTorchRuntime
from plmtune.inference.kernel_choice import prepack
from plmtune.io import provenance
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.attention_kernels import attend
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Quantized, install
from plmtune.registry import Component, component
from plmtune.tokenizers.tokenizer_files import byte
from plmtune.training.determinism import measure_seconds
from plmtune.training.machine import available_memory, peak_flops
from plmtune.units import show_number_of

SCHEMES = ("bf16", "int8", "int4")
GGUF_KINDS = ("F16", "Q8_0", "Q4_0")
_DEPTHS = (32, 1024, 3072)
_GGUF_DEPTHS = (32, 512)  # llama.cpp has to read what is in its cache
_PROMPT = 128
_STEPS = 5
# Bounds of fitted speeds: a format of few bytes could come out as free or as endless.
_FASTEST, _SLOWEST = 4.0, 0.02  # of the measured bandwidth


@dataclass(frozen=True)
class _Timing:
    """One measured decode."""

    model_shape: ModelShape
    scheme: str
    depth: int
    seconds: float


def small_decoders() -> dict[str, Callable[[], Decoder]]:
    """The decoders that are timed: both attentions, wide and deep, 30 to 60 million parameters."""

    def make(family: Callable[..., Decoder], rows: int, dim: int, layers: int, heads: int, hidden: int) -> Decoder:
        if family is plm:
            attention = component(
                "attention", "mla", kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
            )
        else:
            attention = component("attention", "gqa", num_kv_heads=4 if layers > 3 else 8)
        return family(
            rows,
            attention=attention,
            ffn=component("ffn", "squared_relu" if family is plm else "swiglu", hidden_dim=hidden),
            embed_dim=dim,
            num_layers=layers,
            num_heads=heads,
            max_seq_len=4096,
        )

    return {
        "plm, deep": partial(make, plm, 8192, 768, 8, 8, 3072),
        "plm, wide": partial(make, plm, 24576, 1024, 3, 16, 4096),
        "llama, deep": partial(make, llama, 8192, 768, 8, 12, 2048),
        "llama, wide": partial(make, llama, 24576, 1024, 3, 16, 2816),
    }


def calibrate(*, with_llama_cpp: bool = True, log: Callable[[str], None] = lambda text: None) -> Device:
    """Measure the CPU of this machine, with as many threads as torch uses now; a minute or so.

    Args:
        with_llama_cpp: measure llama.cpp too, where it is installed.
        log: gets a line for each step.
    """
    threads = torch.get_num_threads()
    shown = show_number_of(threads, "thread")
    title = f"{provenance.device_name(torch.device('cpu'))}, {shown}"
    measured = f"measured by plmtune bench --calibrate, torch {torch.__version__}, {shown}"
    log("reading memory")
    bandwidth = read_bandwidth()
    log("multiplying matrices")
    compute = peak_flops(torch.device("cpu"), torch.bfloat16)
    rates = {"plmtune": _ours(bandwidth, log)}
    if with_llama_cpp and (found := _llama_cpp(bandwidth, compute, threads, log)) is not None:
        rates["llama.cpp"] = found
    total = psutil.virtual_memory().total
    return Device(
        key="here",
        name=title,
        memory=Figure(float(total), f"psutil, {platform.system()}"),
        system=Figure(max(float(total - available_memory(torch.device("cpu"))), 0.0), "in use when it was calibrated"),
        bandwidth=Figure(bandwidth, f"{measured}: a sum over {READ_BYTES >> 20} MiB"),
        compute=Figure(compute, f"{measured}: a product of square matrices in bf16"),
        layer=Figure(statistics.fmean(rates["plmtune"].layers.values()), f"{measured}: fitted"),
        error=Figure(max(found.error for found in rates.values()), f"{measured}: what the fit leaves"),
        rates=rates,
    )


def build(make: Callable[[], Decoder], scheme: str) -> Decoder:
    """A decoder with random weights in one of our schemes, prepacked as by `plmtune.load`."""
    with torch.device("meta"):
        model = make()
        if scheme not in costs.FLOATS:
            install(model, Component("quantization", scheme)(model=model))
    model = model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, Quantized):
            module.weight.random_(0, 127)
            module.scales.fill_(2**-10)
            if hasattr(module, "zeros"):
                module.zeros.fill_(8)
    model = model.to(torch.float32 if scheme == "fp32" else torch.bfloat16).eval()
    prepack(model)
    return model


def opened_zeros(model: Decoder) -> PyTorchRuntime:
    """A model opened with a cache of zeros."""
    opened = PyTorchRuntime(model, max(_DEPTHS) + 1)
    for layer in opened.cache.layers:
        for buffer in layer:
            buffer.zero_()
    return opened


def _decode_times(opened: PyTorchRuntime, depths: Sequence[int]) -> list[float]:
    """Seconds of one token at each depth of a cache of zeros."""
    taken = []
    for depth in (depths[0], *depths):  # the first warms up
        opened.cache.length, opened.newest = depth, 0
        taken.append(opened.timed_steps(1))
    return taken[1:]


def _ours(bandwidth: float, log: Callable[[str], None]) -> RuntimeRates:
    held: list[tuple[ModelShape, str, PyTorchRuntime]] = []
    for name, make in small_decoders().items():
        with torch.device("meta"):
            model_shape = ModelShape.of(make())
        for scheme in SCHEMES:
            log(f"plmtune: {name}, {scheme}")
            held.append((model_shape, scheme, opened_zeros(build(make, scheme))))
    # In turns, so that other work on the machine affects all models.
    taken: list[list[list[float]]] = [[] for _ in held]
    for number in range(_STEPS):
        log(f"plmtune: round {number + 1} of {_STEPS}")
        for times, (_, _, opened) in zip(taken, held, strict=True):
            times.append(_decode_times(opened, _DEPTHS))
    timings = [
        _Timing(model_shape, scheme, depth, statistics.median(found))
        for times, (model_shape, scheme, _) in zip(taken, held, strict=True)
        for depth, found in zip(_DEPTHS, zip(*times, strict=True), strict=True)
    ]
    log("plmtune: prompts")
    prompts = [
        _Timing(model_shape, scheme, _PROMPT, min(opened.timed([0] * _PROMPT, 1).prompt for _ in range(2)))
        for model_shape, scheme, opened in held
    ]
    # FLOP/s of causal attention over a prompt of 1,024 tokens.
    heads, tokens, width = 8, 1024, 64
    with torch.inference_mode():
        q, k, v = (torch.zeros(1, heads, tokens, width, dtype=torch.bfloat16) for _ in range(3))
        best = min(measure_seconds(lambda: attend(q, k, v, None, 1.0), q.device) for _ in range(3))
    return _rates("plmtune", timings, prompts, bandwidth, heads * tokens * tokens * 2 * width / best)


def _llama_cpp(bandwidth: float, compute: float, threads: int, log: Callable[[str], None]) -> RuntimeRates | None:
    """Its rates through files that we write; None where it is not installed."""
    timings: list[_Timing] = []
    prompts: list[_Timing] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in small_decoders().items():
            model = make()
            model_shape = ModelShape.of(model)
            for kind in GGUF_KINDS:
                log(f"llama.cpp: {name}, {kind}")
                path = Path(folder) / f"{kind}.gguf"
                write_gguf(model, byte(), path, kind=kind)
                try:
                    opened = open_runtime(path, threads=threads, context=max(_GGUF_DEPTHS) + 4 * _STEPS)
                except UserError as error:
                    log(f"llama.cpp is left out: {error}")
                    return None
                with opened:
                    for depth in _GGUF_DEPTHS:
                        taken = opened.timed([1] * depth, _STEPS)
                        timings.append(_Timing(model_shape, kind.lower(), depth, taken.token))
                    prompts.append(_Timing(model_shape, kind.lower(), depth, taken.prompt))
                path.unlink()
    return _rates("llama.cpp", timings, prompts, bandwidth, compute)


def _rates(
    runtime: str, timings: Sequence[_Timing], prompts: Sequence[_Timing], bandwidth: float, attention: float
) -> RuntimeRates:
    """Fit what `predict.decode_seconds` adds up to the times, each weighted by its own, so that errors are relative."""
    rows: list[dict[tuple[str, str], float]] = []
    columns: dict[tuple[str, str], None] = {}
    for timing in timings:
        held = costs.weights(timing.model_shape, runtime, timing.scheme)
        # A token's cost beside its layers is a fraction of a layer's and cannot be fitted apart from them.
        row: dict[tuple[str, str], float] = {}
        for form, size in held.read.items():
            row["weights", form] = size / bandwidth
            if form.lower() not in (*costs.FLOATS, "f16"):  # a plain product's call is in the layers' overhead
                row["product", form] = float(held.products[form])
        for part in timing.model_shape.attention:
            kind = cache_kind(part, runtime)
            row["layer", kind] = row.get(("layer", kind), 0.0) + 1.0
            read = cache_share(part, runtime, held.cached) * timing.depth
            row["cache", kind] = row.get(("cache", kind), 0.0) + read / bandwidth
        rows.append(row)
        columns |= dict.fromkeys(row)
    found = _fit(rows, list(columns), [timing.seconds for timing in timings])
    for column in columns:
        if column[0] in ("weights", "cache"):
            found[column] = min(max(found[column], 1 / _FASTEST), 1 / _SLOWEST)
    errors = [
        abs(sum(found[column] * amount for column, amount in row.items()) / timing.seconds - 1)
        for row, timing in zip(rows, timings, strict=True)
    ]
    compute = _compute(runtime, prompts, attention)
    return RuntimeRates(
        kernels={
            form: KernelRate(bandwidth / found[what, form], found.get(("product", form), 0.0), compute[form])
            for what, form in columns
            if what == "weights"
        },
        layers={kind: found[what, kind] for what, kind in columns if what == "layer"},
        token=0.0,
        cache={kind: bandwidth / found[what, kind] for what, kind in columns if what == "cache"},
        attention=attention,
        program=costs.PROGRAM[runtime],
        error=max(float(np.quantile(errors, 0.9)), 0.05),  # what nine of ten fitted times stay within
    )


def _compute(runtime: str, prompts: Sequence[_Timing], attention: float) -> dict[str, float]:
    """FLOP/s of products with many rows, by form."""
    rows: list[dict[str, float]] = []
    columns: dict[str, None] = {}
    seconds: list[float] = []
    for timing in prompts:
        held = costs.weights(timing.model_shape, runtime, timing.scheme)
        row = {form: 2.0 * timing.depth * numbers for form, numbers in held.numbers.items() if numbers}
        over = costs.prompt_attention_flops(timing.model_shape, timing.depth) / attention
        rows.append(row)
        columns |= dict.fromkeys(held.numbers)
        seconds.append(max(timing.seconds - over, timing.seconds / 2))
    found = _fit(rows, list(columns), seconds)
    slowest = max(found.values())
    # A form of the head alone, of which a prompt needs one row, has no work to be fitted from.
    return {form: 1 / (found[form] or slowest) for form in columns}


def _fit(rows: Sequence[dict[Any, float]], columns: list[Any], seconds: Sequence[float]) -> dict[Any, float]:
    """Least squares of relative errors without negative coefficients."""
    matrix = np.array([[row.get(column, 0.0) for column in columns] for row in rows]) / np.array(seconds)[:, None]
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    solved, _ = nnls(matrix / scale, np.ones(len(seconds)))
    return {column: float(value) for column, value in zip(columns, solved / scale, strict=True)}
