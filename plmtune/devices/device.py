"""Devices: what one can hold and how fast it reads and multiplies. A YAML file each, whose figures name their source.

A device that was calibrated (`devices.calibrate`) has `rates` besides: what each runtime's kernels reach on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plmtune.config.names import name_hint
from plmtune.config.rules import read_yaml
from plmtune.errors import UserError, did_you_mean
from plmtune.io.atomic import write_atomically
from plmtune.ranges import NOT_NEGATIVE, SHARE, Range

_GIB, _GIGA, _MICRO = 2.0**30, 1e9, 1e-6
_ABOVE_0 = Range(above=0)
# key -> (field of Device, its unit in SI, its range, whether it is required)
_FIGURES = {
    "memory_gib": ("memory", _GIB, _ABOVE_0, True),
    "system_gib": ("system", _GIB, NOT_NEGATIVE, True),
    "bandwidth_gb_s": ("bandwidth", _GIGA, _ABOVE_0, True),
    "compute_gflop_s": ("compute", _GIGA, _ABOVE_0, True),
    "layer_us": ("layer", _MICRO, NOT_NEGATIVE, True),
    "token_us": ("token", _MICRO, NOT_NEGATIVE, False),
    "error": ("error", 1.0, SHARE, True),
    "training_gflop_s": ("training", _GIGA, _ABOVE_0, False),
    "training_mfu": ("mfu", 1.0, Range(above=0, most=1), False),
}
# key -> (field of RuntimeRates or KernelRate, its unit in SI); speeds, whose keys end in _s, must be above 0
_RUNTIME = {
    "layer_us": ("layers", _MICRO),
    "token_us": ("token", _MICRO),
    "cache_gb_s": ("cache", _GIGA),
    "attention_gflop_s": ("attention", _GIGA),
    "program_mib": ("program", 2.0**20),
    "error": ("error", 1.0),
}
_KERNEL = {"weight_gb_s": ("weights", _GIGA), "product_us": ("product", _MICRO), "compute_gflop_s": ("compute", _GIGA)}


@dataclass(frozen=True)
class Figure:
    """A number in SI units (bytes, bytes/s, FLOP/s, seconds) and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class KernelRate:
    """What a runtime's products with weights of one form (bf16, int4_g32, Q8_0, ...) reach, measured.

    Attributes:
        weights: bytes/s of a product of one row.
        product: seconds that a call costs besides.
        compute: FLOP/s of a product of many rows.
    """

    weights: float
    product: float
    compute: float


@dataclass(frozen=True)
class RuntimeRates:
    """What a runtime reaches, measured.

    Attributes:
        kernels: form of the weights -> what products with them reach.
        layers: kind of attention ("latent", "heads") -> seconds a layer and token, besides products and cache.
        token: seconds a token besides.
        cache: kind of attention -> bytes/s of reading the cache.
        attention: FLOP/s of attention over a prompt.
        program: bytes that the process takes before there is a model.
        error: relative, of decode times, as the fit leaves it.
    """

    kernels: dict[str, KernelRate]
    layers: dict[str, float]
    token: float
    cache: dict[str, float]
    attention: float
    program: float
    error: float


@dataclass(frozen=True)
class Device:
    """A machine that models run on.

    Attributes:
        key: the name it is asked for by.
        memory, system: bytes that it has, and bytes that its system uses.
        bandwidth: bytes/s that a decode reads weights at, which is below the data sheet's.
        compute: FLOP/s that a prompt is read at.
        layer, token: seconds a layer and a token, besides reading.
        error: relative, of predicted decode speed.
        training, mfu: bf16 FLOP/s of its data sheet, and the share of it that training is taken to reach.
        rates: runtime -> what was measured; empty where the device was not calibrated.
    """

    key: str
    name: str
    memory: Figure
    system: Figure
    bandwidth: Figure
    compute: Figure
    layer: Figure
    error: Figure
    token: Figure = Figure(0.0, "none known")
    training: Figure | None = None
    mfu: Figure | None = None
    rates: dict[str, RuntimeRates] = field(default_factory=dict)

    @property
    def available(self) -> float:
        """Bytes that a process may take."""
        return self.memory.value - self.system.value


def builtin_devices() -> list[str]:
    """Names of the devices that come with plmtune."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load_device(name: str) -> Device:
    """Read a device by name (``pi5``) or from a file (``mine.yaml``)."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such file. Write one with plmtune bench --calibrate {name}.")
    else:
        path = Path(__file__).parent / f"{name}.yaml"
        if name not in builtin_devices():
            near = name_hint(name, builtin_devices())
            raise UserError(f"There is no device {name}; a file of your own is given as FILE.yaml.{near}")
    return _parse(read_yaml(path), path)


def _parse(content: Mapping[str, Any], path: Path) -> Device:
    known = ["name", *_FIGURES, "rates"]
    for key in content:
        if key not in known:
            raise UserError(f"{path}, key {key}: a device has no such key.{did_you_mean(str(key), known)}")
    title = content.get("name")
    if not isinstance(title, str) or not title.strip():
        raise UserError(f"{path}, key name: must be the device's name, not {title!r:.80}.")
    figures: dict[str, Figure] = {}
    for key, (_, unit, rule, needed) in _FIGURES.items():
        if key not in content:
            if needed:
                raise UserError(f"{path}: the key {key} is missing. Write {key}: {{value: NUMBER, source: WHERE}}.")
            continue
        figures[key] = _figure(content[key], unit, rule, f"{path}, key {key}")
    memory, system = figures["memory_gib"], figures["system_gib"]
    if system.value >= memory.value:
        raise UserError(
            f"{path}, key system_gib: the system keeps {system.value / _GIB:g} GiB of {memory.value / _GIB:g}, so that "
            "nothing is left for a model."
        )
    if ("training_gflop_s" in figures) != ("training_mfu" in figures):
        raise UserError(f"{path}: training_gflop_s and training_mfu go together; only one of them is there.")
    rates = content.get("rates", {})
    if not isinstance(rates, dict):
        raise UserError(f"{path}, key rates: must map runtimes to what they reach, not {rates!r:.80}.")
    return Device(
        key=path.stem,
        name=title,
        **{_FIGURES[key][0]: figure for key, figure in figures.items()},
        rates={name: _runtime_rates(found, f"{path}, key rates.{name}") for name, found in rates.items()},
    )


def _figure(found: Any, unit: float, rule: Range, where: str) -> Figure:
    if not isinstance(found, dict) or set(found) != {"value", "source"}:
        raise UserError(f"{where}: must be {{value: NUMBER, source: WHERE IT IS FROM}}, not {found!r:.80}.")
    if not isinstance(found["source"], str) or not found["source"].strip():
        raise UserError(f"{where}: says no source. Name the page, the data sheet or the measurement.")
    return Figure(_number(found["value"], where, rule) * unit, found["source"])


def _number(value: Any, where: str, rule: Range) -> float:
    if type(value) not in (int, float):
        raise UserError(f"{where}: must be a number, not {value!r:.80}.")
    if not rule.allows(value):
        raise UserError(f"{where}: {rule}, not {value:g}.")
    return float(value)


def _runtime_rates(found: Any, where: str) -> RuntimeRates:
    _check_keys(found, (*_RUNTIME, "kernels"), where)
    for key in ("layer_us", "cache_gb_s", "kernels"):
        if not isinstance(found[key], dict):
            raise UserError(f"{where}.{key}: must map names to numbers, not {found[key]!r:.80}.")
    if not found["kernels"]:
        raise UserError(f"{where}.kernels: is empty, so the runtime need not be named.")
    kernels = {}
    for name, rate in found["kernels"].items():
        _check_keys(rate, tuple(_KERNEL), f"{where}.kernels.{name}")
        kernels[str(name)] = KernelRate(**_in_si(rate, _KERNEL, f"{where}.kernels.{name}"))
    return RuntimeRates(kernels=kernels, **_in_si(found, _RUNTIME, where))


def _in_si(found: Mapping[str, Any], units: Mapping[str, tuple[str, float]], where: str) -> dict[str, Any]:
    """{field: number in SI units, or a table of them}."""

    def number(value: Any, key: str, place: str) -> float:
        return _number(value, place, _ABOVE_0 if key.endswith("_s") else NOT_NEGATIVE) * units[key][1]

    return {
        field: {str(name): number(value, key, f"{where}.{key}.{name}") for name, value in found[key].items()}
        if isinstance(found[key], dict)
        else number(found[key], key, f"{where}.{key}")
        for key, (field, _) in units.items()
    }


def _check_keys(found: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(found, dict) or set(found) != set(keys):
        got = ", ".join(map(str, found)) if isinstance(found, dict) else f"{found!r:.80}"
        raise UserError(f"{where}: must have the keys {', '.join(keys)}, not {got}.")


def save_device(device: Device, path: Path) -> None:
    """Write a device as `load_device` reads it."""

    def shown(value: float, unit: float) -> float:
        return float(f"{value / unit:.5g}")

    def table(rates: RuntimeRates | KernelRate, units: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
        return {
            key: {name: shown(each, unit) for name, each in value.items()}
            if isinstance(value := getattr(rates, field), dict)
            else shown(value, unit)
            for key, (field, unit) in units.items()
        }

    content: dict[str, Any] = {"name": device.name}
    for key, (name, unit, _, _) in _FIGURES.items():
        if (figure := getattr(device, name)) is not None:
            content[key] = {"value": shown(figure.value, unit), "source": figure.source}
    if device.rates:
        content["rates"] = {
            name: table(rates, _RUNTIME)
            | {"kernels": {form: table(rate, _KERNEL) for form, rate in rates.kernels.items()}}
            for name, rates in device.rates.items()
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True), user_error=True)
