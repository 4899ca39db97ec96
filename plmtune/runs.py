"""Which directory a run works in: a new one, or the one it goes on with."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from plmtune.config import load_config, to_plain, to_yaml
from plmtune.errors import UserError
from plmtune.training.distributed import broadcast_text
from plmtune.training.run_directory import RunDirectory
from plmtune.training.runtime import Runtime

# Keys that may differ on resume: they change where and how a run computes or reports, not what it learns.
FREE = ("run_dir", "resume", "init_from", "force", "micro_batch_size", "num_workers", "log_every", "runtime",
        "checkpoint", "sample", "logger")  # fmt: skip


def open_run(cfg: Any, runtime: Runtime, data: Mapping[str, str]) -> RunDirectory:
    """Open the run to go on with (``resume=true``), or create a new one. Every rank calls it.

    Args:
        cfg: a recipe's config; `run_dir` is filled in.
        data: fingerprint of each source.

    Raises:
        UserError: if there is nothing to resume, or what is there was started with another config or other data.
    """
    # Rank 0 looks and tells: a later rank would already see what rank 0 is about to make.
    found = _existing(cfg) if cfg.resume and runtime.is_main else None
    found_name = broadcast_text(str(found) if found else "")
    existing = Path(found_name) if found_name else None
    if existing is None and cfg.resume and cfg.run_dir is None:
        raise UserError(
            f"resume=true: there is no unfinished run with this config under runs/{cfg.name}. "
            "Start one without resume=true, or name it: plmtune resume RUN_DIR."
        )
    if existing is not None:
        cfg.run_dir = str(existing)
        before = RunDirectory(existing, is_main=False, lock=None).record().get("data", {})
        for name in sorted({*before, *data}):
            if before.get(name) != data.get(name):
                raise UserError(
                    f"{existing}: the text of source {name} has changed since the run began. Put it back, or start a "
                    f"new run from its weights: init_from={existing}"
                )
        return RunDirectory.open(existing, is_main=runtime.is_main)
    path = Path(cfg.run_dir) if cfg.run_dir else _fresh(cfg.name, runtime)
    cfg.run_dir, cfg.resume = str(path), False
    run = RunDirectory.create(path, to_yaml(cfg), sys.argv, data=data, is_main=runtime.is_main)
    runtime.barrier()
    if runtime.is_main and path.parent == Path("runs") / cfg.name:
        _point(path.parent / "latest", path.name)
    return run


def _existing(cfg: Any) -> Path | None:
    """The run that `cfg` goes on with: the one it names, or the newest unfinished one of its name and config."""
    if cfg.run_dir is not None:
        path = Path(cfg.run_dir)
        if not (path / "config.yaml").is_file():
            return None
        differing = _differences(to_plain(load_config(path / "config.yaml")), to_plain(cfg))
        if differing:
            key, before, now = differing[0]
            raise UserError(
                f"{path} was started with {key}={before}, not {now}. Give the same config to resume, or start a new "
                f"run from its weights: init_from={path}"
            )
        return path
    for path in sorted((Path("runs") / cfg.name).glob("[0-9]*/config.yaml"), reverse=True):
        run = RunDirectory(path.parent, is_main=False, lock=None)
        if run.record().get("status") == "finished":
            continue
        try:
            before = load_config(path)
        except UserError:  # a stranger's, or one that needs --import: not this one
            continue
        if not _differences(to_plain(before), to_plain(cfg)):
            return path.parent
    return None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if not prefix and key in FREE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found


def _fresh(name: str, runtime: Runtime) -> Path:
    """runs/NAME/DATE-TIME of rank 0, the same on every rank."""
    path = Path("runs") / name / f"{datetime.now():%Y%m%d-%H%M%S}"
    while runtime.is_main and path.exists():
        time.sleep(0.2)
        path = path.with_name(f"{datetime.now():%Y%m%d-%H%M%S}")
    return path.with_name(broadcast_text(path.name))


def _point(link: Path, target: str) -> None:
    """Let runs/NAME/latest name the newest run; without links (some file systems) there is none."""
    temporary = link.with_name(f".latest-{os.getpid()}")
    try:
        temporary.symlink_to(target)
        temporary.replace(link)
    except OSError:
        temporary.unlink(missing_ok=True)
