"""Whether a run may be resumed: with which config, which data, and by which job."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import xxhash

from plmtune.config.overrides import hydra_literal
from plmtune.config.renamed import with_first_keys
from plmtune.config.schema import RunConfig
from plmtune.config.typed_config import to_plain
from plmtune.errors import UserError
from plmtune.io import hub
from plmtune.io.run_directory import LATEST, NEWEST, resolve_link
from plmtune.registry import Component

# Keys that may change on resume: they say where and how a run computes or reports, not what it learns.
RESUME_MUTABLE = ("run_dir", "resume", "allow_data_change", "force", "micro_batch_size", "num_workers", "log_every",
        "runtime", "parallel", "checkpoint", "guard", "validation", "eval", "sample", "logger")  # fmt: skip
_OF_ONE_MODEL = ("run_dir", "resume", "allow_data_change", "force", "device")
_RESUME_MUTABLE_OF = {"quantize": _OF_ONE_MODEL, "prune": _OF_ONE_MODEL}
# Keys that say where the data is. Its fingerprints say what it is, and allow_data_change=true lets it change.
DATA = ("data", "preparation")
# Keys that a new run fills in from the checkpoint that it starts from.
_INHERITED = ("init_from", "model", "tokenizer", "seq_len")
_INHERITED_OF = {"quantize": ("checkpoint", "quantization"), "prune": ("checkpoint",)}


def _resume_mutable(cfg: RunConfig) -> tuple[str, ...]:
    return _RESUME_MUTABLE_OF.get(cfg.recipe, RESUME_MUTABLE)


def keys_from_init_checkpoint(cfg: RunConfig) -> list[str]:
    """Keys that a config leaves to the checkpoint: empty, or a link such as runs/NAME/latest, which moves."""
    keys = [key for key in _INHERITED_OF.get(cfg.recipe, _INHERITED) if hasattr(cfg, key)]
    values = {key: getattr(cfg, key) for key in keys}
    return [key for key, v in values.items() if v is None or (isinstance(v, str) and Path(v).is_symlink())]


def resolve_links(value: Any) -> Any:
    """A config's value in which links such as runs/NAME/latest, which move, are replaced by the runs' directories."""
    if isinstance(value, str) and {LATEST, NEWEST} & set(Path(value).parts):
        path = Path(value)
        link = next((p for p in (path, *path.parents) if p.name in (LATEST, NEWEST) and p.is_symlink()), None)
        return str(resolve_link(link) / path.relative_to(link)) if link else value
    if isinstance(value, Component):
        return replace(value, settings=resolve_links(value.settings))
    if isinstance(value, dict):
        return {key: resolve_links(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(resolve_links(child) for child in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: resolve_links(getattr(value, field.name)) for field in fields(value)})
    return value


def keep_pinned_revisions(cfg: RunConfig, saved: RunConfig) -> None:
    """Give a resumed config the commits of the hub's models that its run began with, see `hub.pin`."""
    for key, (old, new) in differences(saved, cfg).items():
        if hub.is_pin(old, new):
            key, _, setting = key.partition(".")
            chosen = getattr(cfg, key)
            if setting and not isinstance(chosen, Component):
                setattr(chosen, setting, old)
            elif setting:
                setattr(cfg, key, replace(chosen, settings={**chosen.settings, setting: old}))
            else:
                setattr(cfg, key, old)


def config_digest(cfg: RunConfig, written: Mapping[str, Any] | None = None) -> str:
    """The xxh3-128 of the keys that decide what a run learns. A checkpoint keeps it, in case run.json is lost.

    Args:
        written: the content of the run's config.yaml, which lacks the keys that later versions added.
    """
    mutable = (*_resume_mutable(cfg), *DATA, "init_from")
    fixed = {key: value for key, value in (written or to_plain(cfg)).items() if key not in mutable}
    return xxhash.xxh3_128_hexdigest(json.dumps(with_first_keys(fixed), sort_keys=True).encode())


def differences(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Full keys whose values differ between two typed configs, with both values."""
    found: dict[str, tuple[Any, Any]] = {}

    def compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> None:
        for key in [*old, *(key for key in new if key not in old)]:
            a, b = old.get(key), new.get(key)
            if isinstance(a, dict) and isinstance(b, dict):
                compare(a, b, f"{prefix}{key}.")
            elif a != b:
                found[prefix + key] = a, b

    compare(to_plain(before), to_plain(now), "")
    return found


_MOVABLE = ("distillation.teacher", "distillation.cache")  # places, whose contents a run checks itself


def refuse_other_config(path: Path, before: RunConfig, now: RunConfig) -> None:
    """Refuse a config with which the run at `path` would learn something else than with its own."""
    mutable = (*_resume_mutable(now), *(DATA if now.allow_data_change else ()), *keys_from_init_checkpoint(now))
    for key, (old, new) in differences(before, now).items():
        top = key.partition(".")[0]
        if key in _MOVABLE and None not in (old, new):
            continue
        if top not in mutable and resolve_links(new) != old and not hub.is_pin(old, new):
            way = "start a new run" + (f" from its weights: init_from={path}" if hasattr(now, "init_from") else "")
            way = "give allow_data_change=true (--allow-data-change)" if top in DATA else way
            raise UserError(
                f"{path} was started with {key}={hydra_literal(old)}, not {hydra_literal(new)}, and that decides "
                f"what a run learns. Leave it as it was to resume, or {way}"
            )


def refuse_other_data(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse data, by the fingerprint of each source, that is not what the run at `path` saw."""
    if changed := changed_data(before, now):
        raise UserError(
            f"{path}: {changed} since the run began. Put it back; or resume with other data, in another order and with "
            f"another hold-out: plmtune resume {path} --allow-data-change; or start a new run from its weights: "
            f"init_from={path}"
        )


def refuse_other_order(checkpoint: Path, before: Mapping[str, int] | None, now: Mapping[str, int]) -> None:
    """Refuse a checkpoint of a version that mixed sources in another order, by each source's samples up to its step."""
    if before is None or before == now:
        return
    saw, would = (", ".join(f"{name} {count:,}" for name, count in seen.items()) for seen in (before, now))
    raise UserError(
        f"{checkpoint} has drawn other sequences ({saw}) than this version of plmtune draws up to its step ({would}): "
        "resumed, it would see some twice and others never. Resume it with the version that began it, or start a new "
        f"run from its weights: init_from={checkpoint}"
    )


def changed_data(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which sources differ, in words; empty if none does."""
    parts = []
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            how = "is new" if name not in before else "is gone" if name not in now else "has changed"
            what = name if name.startswith("the ") else f"the text of source {name}"
            parts.append(f"{what} {how}")
    return ", ".join(parts)


def torchrun_job_id() -> str:
    """A name of the torchrun job that started this process, the same after torchrun restarts its workers; else empty.

    The run id alone is "none" by default, so the name includes the process that starts the workers.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return ""
    # Process ids repeat: in a container each torchrun may be process 1.
    began = psutil.Process(os.getppid()).create_time()
    return f"{run_id}, process {os.getppid()} of {began:.2f} on {socket.gethostname()}"
