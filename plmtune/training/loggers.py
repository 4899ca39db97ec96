"""Loggers: where metrics are written besides metrics.jsonl."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Protocol

from plmtune.errors import UserError
from plmtune.extras import missing
from plmtune.registry import Component, load, register


class Logger(Protocol):
    """What a logger has. Its class may name the `package` that it needs, for `check_installed`."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@register("logger", "jsonl")
class JsonLines(Logger):
    """Write metrics.jsonl alone, as every run does."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        pass


@register("logger", "tensorboard")
class TensorBoard:
    """Write event files for TensorBoard into the folder tensorboard of the run directory."""

    package = "tensorboard"

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self._directory = directory / "tensorboard"
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._writer is None:
            module = _need("torch.utils.tensorboard", "tensorboard")
            # A resumed run writes some steps again; TensorBoard hides their earlier values.
            self._writer = module.SummaryWriter(str(self._directory), purge_step=step)
        for key, value in values.items():
            if _is_number(value):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@register("logger", "wandb")
class WeightsAndBiases:
    """Log to Weights & Biases; a resumed run continues the same chart.

    Args:
        project: where the run appears.
        name: of the run; None takes the run directory's.
        mode: "online", "offline" (upload later with wandb sync) or "disabled".
    """

    package = "wandb"

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        *,
        project: str = "plmtune",
        name: str | None = None,
        mode: Literal["online", "offline", "disabled"] = "online",
    ) -> None:
        module = _need("wandb", "wandb")
        identity = directory / "wandb_id"
        if not identity.exists():
            identity.write_text(module.util.generate_id(), encoding="utf-8")
        self._run = module.init(
            project=project,
            name=name or directory.name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            mode=mode,
            dir=str(directory),
            config=config,
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({k: v for k, v in values.items() if _is_number(v)}, step=step)

    def close(self) -> None:
        self._run.finish()


@register("logger", "trackio")
class Trackio:
    """Log to trackio: charts that stay on this machine.

    Args:
        project, name: as for wandb.
    """

    package = "trackio"

    def __init__(
        self, directory: Path, config: dict[str, Any], *, project: str = "plmtune", name: str | None = None
    ) -> None:
        self._module = _need("trackio", "trackio")
        self._module.init(project=project, name=name or directory.name, config=config, resume="allow")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._module.log({k: v for k, v in values.items() if _is_number(v)}, step=step)

    def close(self) -> None:
        self._module.finish()


@register("logger", "several")
def several(
    directory: Path,
    config: dict[str, Any],
    *,
    loggers: Annotated[dict[str, Component], "logger"] = {},  # noqa: B006 (only read)
) -> list[Logger]:
    """Use several loggers: ``logger=[tensorboard,wandb]`` chooses this one with both.

    Args:
        loggers: name -> a logger with its settings, as ``logger.loggers.wandb.project=mine`` sets one.
    """
    _check_several(loggers)
    return [logger(directory=directory, config=config) for logger in loggers.values()]


def _check_several(loggers: Mapping[str, Component]) -> None:
    if not loggers:
        raise ValueError("several needs at least one logger: 'logger=[tensorboard, wandb]'")
    for name, logger in loggers.items():
        if logger.name == "several":
            raise ValueError(f"{name} holds loggers itself: name them in one list")


def check_installed(chosen: Component | None) -> None:
    """Refuse a logger whose package is not installed, before a run begins; the logger itself is not made."""
    if chosen is None:
        return
    if chosen.name == "several":
        held = chosen.settings.get("loggers", {})
        try:
            _check_several(held)
        except ValueError as error:
            raise UserError(f"key logger: {error}") from error
        for each in held.values():
            check_installed(each)
    package = getattr(load("logger", chosen.name), "package", None)
    if package and importlib.util.find_spec(package) is None:
        raise _missing(package)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _need(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(package) from error


def _missing(package: str) -> UserError:
    return missing(package, f"logger={package}", "logger=jsonl needs no package.")
