"""Facts for a model card from the files of a run or a model directory."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml

from plmtune.errors import UserError
from plmtune.io import metrics
from plmtune.io.run_directory import CONFIG, read_record, verify_config
from plmtune.io.untrusted import load_yaml
from plmtune.models import adapters, checkpoint_files
from plmtune.models.adapters import load_model
from plmtune.models.digest import model_digest
from plmtune.models.hf_names import SCORE

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Facts from the headers of weight files."""

    parameters: int
    dtypes: list[str]
    bytes: int
    is_reward_model: bool


@dataclass(frozen=True)
class Run:
    """A run up to a checkpoint: `entries` are the lines of metrics.jsonl up to `step`."""

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    entries: list[dict[str, Any]]
    step: int
    last_step: int

    def latest(self, key: str) -> int | float | None:
        """Return the latest value of a metric."""
        return next((entry[key] for entry in reversed(self.entries) if isinstance(entry.get(key), int | float)), None)


def run_of(directory: Path) -> tuple[Path, int] | None:
    """Return the run of a checkpoint, if any, and its step."""
    directory = directory.resolve()  # runs/NAME/latest is a link to a run
    run, step = directory.parent.parent, re.fullmatch(r"step-(\d+)", directory.name)
    if directory.parent.name != "checkpoints" or not step or not (run / CONFIG).is_file():
        return None
    return run, int(step[1])


def read_run(directory: Path) -> Run | None:
    """Return the run of a checkpoint, if any; UserError if its config was changed or damaged."""
    place = run_of(directory)
    if place is None:
        return None
    path, number = place
    verify_config(path)
    try:
        config = load_yaml((path / CONFIG).read_text(encoding="utf-8"))
        logged = path / "metrics.jsonl"
        entries = metrics.read(logged) if logged.exists() else []
        if not logged.exists() and isinstance(config, dict) and config.get("recipe") not in ("quantize", "prune"):
            _log.warning("%s is missing: the metrics of the run are unknown", logged)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: its {CONFIG} or metrics.jsonl cannot be read ({error}).") from error
    phases = config.get("phases") or [] if isinstance(config, dict) else None
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise UserError(f"{path / CONFIG} is damaged: it holds no keys, or no list of phases.")
    before = [entry for entry in entries if entry["step"] <= number]
    last = max((entry["step"] for entry in entries), default=number)
    return Run(path, config, read_record(path), before, number, last)


def is_of(model: Mapping[str, Any], directory: Path, run: Run | None) -> bool:
    """Whether a result (its section `model`) is of a checkpoint: of its run and step, or folder, or equal weights."""
    if run is not None or model.get("run"):
        place = (Path(model["run"]).resolve(), model.get("step")) if model.get("run") else None
        here = place is not None and run is not None and place == (run.path.resolve(), run.step)
    else:
        here = bool(model.get("path")) and Path(model["path"]).resolve() == directory.resolve()
    dtype = getattr(torch, str(model.get("dtype")), None)
    if here or not model.get("digest") or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return here
    try:  # a folder may have been moved or copied; only then the weights are read
        digest = model_digest(load_model(directory, "cpu", dtype))
    except (UserError, MemoryError):  # unknown
        return False
    # In training the dtype of the computation follows the digest.
    return digest == str(model["digest"]).partition(" ")[0]


def read_weights(directory: Path) -> Weights:
    """Read the headers of the weight files."""
    held = adapters.holds_adapters(directory)
    locations = checkpoint_files.locate(directory, adapters.ADAPTERS if held else "model")
    parameters, dtypes = 0, set()
    for path in set(locations.values()):
        with checkpoint_files.opened_weights(path) as opened:
            for tensor in opened.keys():  # noqa: SIM118 - no dict
                header = opened.get_slice(tensor)
                kind = header.get_dtype()
                dtypes.add(kind)
                # A quantized matrix counts its integers, two in a byte for 4 bits, not its scales and zeros.
                if not tensor.endswith((".scales", ".zeros")):
                    parameters += prod(header.get_shape()) * (2 if kind == "U8" else 1)
    size = sum(path.stat().st_size for path in set(locations.values()))
    return Weights(parameters, sorted(dtypes), size, any(name.endswith(SCORE) for name in locations))


def base_of(directory: Path, run: Run | None) -> str | None:
    """Return the init checkpoint or base model that the files name."""
    named = run.config.get("init_from") if run else None
    if named is None and adapters.holds_adapters(directory):
        named = checkpoint_files.read_json(directory, checkpoint_files.ADAPTER_CONFIG).get("base_model_name_or_path")
    return str(named) if named else None


def family_of(directory: Path) -> str:
    """Return model_type of config.json, such as "plm" or "llama"; empty for adapters."""
    if adapters.holds_adapters(directory):
        return ""
    return str(checkpoint_files.read_json(directory, checkpoint_files.CONFIG).get("model_type") or "")
