"""Predictions: right where public measurements are, and none where a model does not fit."""

from dataclasses import replace

import pytest
import torch

from plmtune.devices import costs
from plmtune.devices.costs import ModelShape
from plmtune.devices.device import Figure, KernelRate, RuntimeRates, load_device
from plmtune.devices.predict import decode_seconds, predict
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.registry import component


def qwen_like(rows: int, width: int, layers: int, heads: int, kv_heads: int, hidden: int) -> ModelShape:
    with torch.device("meta"):
        return ModelShape.of(
            llama(
                rows,
                embed_dim=width,
                num_layers=layers,
                num_heads=heads,
                attention=component("attention", "gqa", num_kv_heads=kv_heads),
                ffn=component("ffn", "swiglu", hidden_dim=hidden),
            )
        )


@pytest.fixture(scope="module")
def paper() -> ModelShape:
    with torch.device("meta"):
        return ModelShape.of(plm(151936))


class TestPublicMeasurements:
    """Raspberry Pi 5, llama.cpp, Q8_0."""

    @pytest.mark.parametrize(
        ("shape", "tokens_a_second"),
        [
            ((151936, 1536, 28, 12, 2, 8960), 5.79),  # Qwen2.5-1.5B
            ((49152, 2048, 24, 32, 32, 8192), 5.18),  # SmolLM2-1.7B
            ((151936, 2048, 36, 16, 2, 11008), 2.94),  # Qwen2.5-3B
        ],
    )
    def test_decode_on_a_pi5_is_within_5_percent(self, shape: tuple[int, ...], tokens_a_second: float) -> None:
        found = predict(
            qwen_like(*shape), load_device("pi5"), scheme="q8_0", runtime="llama.cpp", context=128, prompt=64
        )
        assert found.fits
        assert found.decode == pytest.approx(tokens_a_second, rel=0.05)


class TestMemory:
    def test_fit_comes_before_speed(self, paper: ModelShape) -> None:
        device = replace(load_device("pi5"), memory=Figure(2 * 2.0**30, "a smaller one"))
        found = predict(paper, device, scheme="bf16", context=128)
        assert not found.fits
        assert (found.decode, found.prefill, found.first_token) == (None, None, None)
        assert predict(paper, device, scheme="int4", runtime="plmtune", context=64, prompt=16).memory < found.memory

    def test_parts_add_up(self, paper: ModelShape) -> None:
        found = predict(paper, load_device("pi5"), scheme="int8", context=4096)
        assert found.memory == found.weights + found.cache + found.workspace + found.program
        assert found.cache == 144 * 2**20


class TestSpeed:
    def test_a_long_context_costs_llama_cpp_more(self, paper: ModelShape) -> None:
        def slowdown(runtime: str, scheme: str) -> float:
            short, long = (
                predict(paper, load_device("jetson_orin_nano"), scheme=scheme, runtime=runtime, context=context).decode
                for context in (128, 4096)
            )
            assert short is not None and long is not None
            return short / long

        assert slowdown("llama.cpp", "f16") > 1.25
        assert slowdown("plmtune", "bf16") < 1.1

    def test_a_calibrated_device_adds_up_its_own_rates(self, paper: ModelShape) -> None:
        rates = RuntimeRates(
            kernels={"bf16": KernelRate(1e10, 1e-6, 1e12)},
            layers={"latent": 1e-4},
            token=1e-3,
            cache={"latent": 5e9},
            attention=1e12,
            program=0.0,
            error=0.07,
        )
        device = replace(load_device("pi5"), rates={"plmtune": rates})
        found = predict(paper, device, scheme="bf16", context=1000)
        matrices = (1_825_458_176 - 32 * 4608 - 2048) * 2
        seconds = 1e-3 + matrices / 1e10 + 193e-6 + 32 * 1e-4 + 36_864_000 / 5e9
        assert found.decode == pytest.approx(1 / seconds)
        assert (found.calibrated, found.error) == (True, 0.07)

    @pytest.mark.parametrize("calibrated", [False, True])
    def test_a_cache_in_fp32_is_read_at_4_bytes_a_number(self, paper: ModelShape, calibrated: bool) -> None:
        device = load_device("h200")
        device = replace(device, compute=replace(device.compute, value=1e30))
        if calibrated:
            kernels = {form: KernelRate(1e12, 0.0, 1e12) for form in ("fp32", "bf16")}
            rates = RuntimeRates(kernels, {}, 0.0, {"latent": device.bandwidth.value}, 1e12, 0.0, 0.05)
            device = replace(device, rates={"plmtune": rates})
        for scheme, width in (("fp32", 4), ("bf16", 2)):
            held = costs.weights(paper, "plmtune", scheme)
            short, long = (decode_seconds(paper, device, "plmtune", held, context) for context in (0, 1000))
            read = costs.cache_bytes(paper, "plmtune", 1000, dtype_bytes=width)
            assert long - short == pytest.approx(read / device.bandwidth.value)

    def test_a_kernel_that_was_not_measured_widens_the_error(self, paper: ModelShape) -> None:
        rate = KernelRate(1e10, 0.0, 1e12)
        rates = RuntimeRates({"bf16": rate, "int8": rate}, {}, 0.0, {}, 1e12, 0.0, 0.05)
        device = replace(load_device("pi5"), rates={"plmtune": rates})
        assert predict(paper, device, scheme="int8").error == 0.05
        assert predict(paper, device, scheme="int4").error == 0.3

    def test_prompts_are_bound_by_compute(self, paper: ModelShape) -> None:
        slow = load_device("pi5")
        fast = replace(slow, compute=Figure(10 * slow.compute.value, "ten of them"))
        waits = [predict(paper, device, scheme="int8", prompt=2048).first_token for device in (slow, fast)]
        assert waits[0] is not None and waits[1] is not None
        assert waits[0] / waits[1] > 9
