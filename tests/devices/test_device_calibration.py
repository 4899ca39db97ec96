"""Calibration finds the rates that times were made from."""

import pytest
import torch

from plmtune.devices import calibrate, costs
from plmtune.devices.calibrate import SCHEMES, _fit, _rates, _Timing, build, small_decoders
from plmtune.devices.costs import ModelShape
from plmtune.devices.device import Device, Figure, KernelRate, RuntimeRates
from plmtune.devices.measure import read_bandwidth
from plmtune.devices.predict import decode_seconds
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component


def tiny() -> Decoder:
    attention = component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
    ffn = component("ffn", "squared_relu", hidden_dim=64)
    return plm(64, attention=attention, ffn=ffn, embed_dim=64, num_layers=2, num_heads=2, max_seq_len=4096)


class TestFit:
    def test_times_made_from_rates_give_these_rates_back(self) -> None:
        kernels = {
            "bf16": KernelRate(11e9, 0.0, 1e11),
            "int8": KernelRate(9e9, 4e-6, 1e11),
            "int4_g32": KernelRate(6e9, 8e-6, 1e11),
        }
        layers, cache = {"latent": 3e-4, "heads": 2e-4}, {"latent": 2e9, "heads": 7e9}
        true = RuntimeRates(kernels, layers, 0.0, cache, 1e11, 0.0, 0.0)
        zero, one = Figure(0.0, ""), Figure(1.0, "")
        device = Device("", "", zero, zero, one, one, zero, zero, rates={"plmtune": true})
        timings = []
        for make in small_decoders().values():
            with torch.device("meta"):
                model_shape = ModelShape.of(make())
            for scheme in SCHEMES:
                held = costs.weights(model_shape, "plmtune", scheme)
                for depth in (32, 3072):
                    seconds = decode_seconds(model_shape, device, "plmtune", held, depth)
                    timings.append(_Timing(model_shape, scheme, depth, seconds))
        found = _rates("plmtune", timings, timings, 10e9, 1e11)
        for name, kernel in kernels.items():
            assert found.kernels[name].weights == pytest.approx(kernel.weights, rel=1e-3)
            assert found.kernels[name].product == pytest.approx(kernel.product, rel=1e-3, abs=1e-9)
        assert found.layers == pytest.approx(layers, rel=1e-3)
        assert found.cache == pytest.approx(cache, rel=1e-3)
        assert found.error == 0.05

    def test_no_rate_is_negative(self) -> None:
        rows = [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0}, {"a": 3.0, "b": 1.0}]
        assert _fit(rows, ["a", "b"], [1.0, 3.0, 5.0])["b"] == 0.0  # b would be -1


class TestMachine:
    def test_memory_is_read_at_a_rate(self) -> None:
        assert 1e8 < read_bandwidth() < 1e13

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_what_is_timed_decodes(self, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PLMTUNE_KERNELS", "reference")
        times = calibrate._decode_times(calibrate.opened_zeros(build(tiny, scheme)), (2, 8))
        assert len(times) == 2 and min(times) > 0
