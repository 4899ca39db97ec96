"""Devices are files that say where each figure is from, and mistakes in them are sentences."""

from dataclasses import replace
from pathlib import Path

import pytest

from plmtune.devices.device import KernelRate, RuntimeRates, builtin_devices, load_device, save_device
from plmtune.errors import UserError

GOOD = """
name: mine
memory_gib: {value: 4, source: the label}
system_gib: {value: 1, source: free}
bandwidth_gb_s: {value: 10, source: a stopwatch}
compute_gflop_s: {value: 50, source: a stopwatch}
layer_us: {value: 0, source: none}
error: {value: 0.2, source: a guess}
"""


def refusal(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_device(str(path))
    return str(caught.value)


class TestShipped:
    def test_each_reads_and_every_figure_names_its_source(self) -> None:
        assert {"pi5", "jetson_orin_nano", "jetson_orin_nx", "oneplus_12", "macbook_air_m3", "h200"} <= set(
            builtin_devices()
        )
        for name in builtin_devices():
            device = load_device(name)
            figures = (device.memory, device.system, device.bandwidth, device.compute, device.layer, device.error)
            assert all(len(figure.source) > 5 for figure in figures), name
            assert 0 < device.available < device.memory.value

    def test_an_unknown_one_is_asked_about(self) -> None:
        with pytest.raises(UserError, match=r"There is no device pi4; .* Did you mean pi5"):
            load_device("pi4")


class TestFiles:
    def test_figures_come_in_si_units(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(GOOD)
        device = load_device(str(tmp_path / "mine.yaml"))
        assert (device.key, device.available, device.bandwidth.value) == ("mine", 3 * 2**30, 10e9)

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            ("value: 10,", "value: fast,", "key bandwidth_gb_s: must be a number, not 'fast'"),
            ("value: 10,", "value: -1,", "key bandwidth_gb_s: must be above 0, not -1"),
            ("value: 10,", "value: .inf,", "key bandwidth_gb_s: must be above 0, not inf"),
            ("{value: 10, source: a stopwatch}", "10", "must be {value: NUMBER, source: WHERE IT IS FROM}, not 10"),
            ("source: a stopwatch", "source: ''", "says no source"),
            ("bandwidth_gb_s", "bandwith_gb_s", "no such key. Did you mean bandwidth_gb_s"),
            ("layer_us: {value: 0, source: none}", "", "the key layer_us is missing"),
            ("value: 1,", "value: 5,", "the system keeps 5 GiB of 4"),
            ("value: 0.2", "value: 20", "key error: must be at least 0 and below 1, not 20"),
            ("name: mine", "name: 3", "key name: must be the device's name"),
        ],
    )
    def test_mistakes_name_key_and_value(self, tmp_path: Path, old: str, new: str, says: str) -> None:
        assert says in refusal(tmp_path, GOOD.replace(old, new, 1))

    def test_rates_without_a_key_are_refused(self, tmp_path: Path) -> None:
        assert "rates.plmtune: must have the keys" in refusal(tmp_path, GOOD + "rates: {plmtune: {error: 0.1}}")

    def test_what_is_saved_is_read_back(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(GOOD)
        device = load_device(str(tmp_path / "mine.yaml"))
        rates = RuntimeRates(
            kernels={"bf16": KernelRate(9e9, 0.0, 4e10), "int4_g32": KernelRate(5e9, 3e-6, 2e10)},
            layers={"latent": 2e-4},
            token=1e-3,
            cache={"latent": 8e9},
            attention=1e10,
            program=3e8,
            error=0.1,
        )
        save_device(replace(device, rates={"plmtune": rates}), tmp_path / "mine.yaml")
        read = load_device(str(tmp_path / "mine.yaml"))
        assert replace(read, rates={}) == device
        found = read.rates["plmtune"]
        assert vars(found.kernels["int4_g32"]) == pytest.approx(vars(rates.kernels["int4_g32"]))
        assert (found.layers["latent"], found.token, found.cache["latent"]) == pytest.approx((2e-4, 1e-3, 8e9))
        assert (found.attention, found.program, found.error) == pytest.approx((1e10, 3e8, 0.1), rel=1e-4)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
