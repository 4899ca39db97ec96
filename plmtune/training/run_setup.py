"""Finding the run to resume, and opening a run's directory and its batches."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from plmtune.config.rules import read_yaml
from plmtune.config.schema import PretrainConfig, RunConfig, SftConfig
from plmtune.config.typed_config import load_config, to_yaml
from plmtune.data.batches import Batches, EncodedRows
from plmtune.data.order import Phase
from plmtune.errors import UserError
from plmtune.io import manifest
from plmtune.io.run_directory import (
    CONFIG,
    RECORD,
    RunDirectory,
    read_record,
    refuse_if_in_use,
    resolve_link,
    verify_config,
)
from plmtune.training import distributed
from plmtune.training.distributed import broadcast_from_rank0
from plmtune.training.resume_checks import (
    changed_data,
    config_digest,
    differences,
    keep_pinned_revisions,
    keys_from_init_checkpoint,
    refuse_other_config,
    refuse_other_data,
    resolve_links,
    torchrun_job_id,
)
from plmtune.training.runtime import Runtime

log = logging.getLogger(__name__)


def open_batches(
    cfg: PretrainConfig | SftConfig,
    runtime: Runtime,
    rows: Mapping[str, EncodedRows],
    phases: Sequence[Phase],
    held_out: Mapping[str, EncodedRows],
    skip: Mapping[str, int] | None = None,
) -> Batches:
    """This rank's batches of some rows, see `Batches`; what does not divide is a UserError."""
    try:
        return Batches(
            rows,
            phases,
            validation=held_out,
            global_batch_size=cfg.global_batch_size,
            micro_batch_size=cfg.micro_batch_size,
            seed=cfg.seed,
            rank=runtime.data_rank,
            world_size=runtime.data_world_size,
            num_workers=cfg.num_workers,
            skip=skip,
            context=runtime.context,
        )
    except ValueError as error:  # names its setting
        raise UserError(str(error)) from error


def find_run(cfg: RunConfig) -> None:
    """Find the run to resume, if there is one, and set `run_dir` and `resume` of `cfg` accordingly on every rank.

    With ``resume=true`` it is the run in `run_dir`, or the newest unfinished one of this name and config. A process
    that torchrun restarted resumes the run that its job began, whatever `resume` says. Call it before anything depends
    on whether this is a new run.

    Raises:
        UserError: if there is nothing to resume, or the run was started with another config.
        SystemExit: with 0, if a restarted job has finished its run.
    """

    def find() -> tuple[str, bool]:
        if not cfg.resume:
            found = _run_of_this_job(cfg)
        elif cfg.run_dir:
            path = resolve_link(Path(cfg.run_dir))
            found = _with_this_config(path, cfg) if (path / CONFIG).is_file() else None
        else:
            found = _newest_with_config(cfg)
        if found is None:
            return "", False
        refuse_if_in_use(found)
        return str(found), read_record(found).get("status") == "finished"

    # Rank 0 decides for all: a later rank would already see what rank 0 is about to make.
    found, finished = broadcast_from_rank0(find)
    if not found:
        cfg.resume = False
        for field in fields(cfg):
            if field.name != "run_dir":
                setattr(cfg, field.name, resolve_links(getattr(cfg, field.name)))
        return
    if finished and not cfg.resume:
        log.warning("%s: an earlier attempt of this job has finished it.", found)
        raise SystemExit(0)
    cfg.run_dir, cfg.resume = found, True
    saved = load_config(Path(found) / CONFIG)
    for key in keys_from_init_checkpoint(cfg):  # the run filled these in when it began
        setattr(cfg, key, getattr(saved, key))
    keep_pinned_revisions(cfg, saved)


def open_run(
    cfg: RunConfig, runtime: Runtime, data: Mapping[str, str], saved: Mapping[str, Any] | None = None
) -> RunDirectory:
    """Open the run that `find_run` found, or create a new one. Every rank calls it.

    Args:
        cfg: a recipe's config; `run_dir` is filled in.
        runtime: an error that ends its block is noted in run.json, also one before the recipe trains.
        data: fingerprint of each source.
        saved: the state in the checkpoint that the run resumes from; its "config" (`config_digest`) and "data" count
            where run.json is damaged.
    """
    path = Path(cfg.run_dir) if cfg.run_dir else _new_path(cfg.name, runtime)
    cfg.run_dir = str(path)
    run = RunDirectory(path)

    def begin() -> None:
        nonlocal run
        if cfg.resume:
            run = _reopen(cfg, path, data, saved or {})
        else:
            run = RunDirectory.create(path, to_yaml(cfg), sys.argv, data=data, job=torchrun_job_id())
        runtime.hold(run)
        if not cfg.resume:
            run.update(starts_from=getattr(cfg, "init_from", getattr(cfg, "checkpoint", None)))

    broadcast_from_rank0(begin)
    return run


def _reopen(cfg: RunConfig, path: Path, data: Mapping[str, str], saved: Mapping[str, Any]) -> RunDirectory:
    """Open the run at `path` again, if config.yaml and the data are what the run began with."""
    began_with = load_config(path / CONFIG)
    if not verify_config(path):
        digests = config_digest(began_with), config_digest(began_with, read_yaml(path / CONFIG))
        if saved.get("config") not in (None, *digests):
            raise UserError(
                f"{path / CONFIG} is not what the run began with, says its checkpoint, and {RECORD} is missing or "
                f"damaged. Put {CONFIG} back, or start a new run from its weights: init_from={path}"
            )
        says = "the checkpoint says what" if "config" in saved else "nothing says what config and data"
        log.warning("%s is missing or damaged: %s the run began with.", path / RECORD, says)
    attempts = read_record(path).get("attempts")
    reached = [a.get("saved", 0) for a in attempts if isinstance(a, dict)] if isinstance(attempts, list) else []
    if not saved and any(reached):
        raise UserError(
            f"{path} has saved step {max(reached)}, and {path / 'checkpoints'} holds no checkpoint. Is its disk there? "
            "Put them back, or start a new run."
        )
    # The latest attempt may have changed the data after the checkpoint was written, so either of the two counts.
    known = [seen for seen in (read_record(path).get("data"), saved.get("data")) if isinstance(seen, dict)]
    before = data if data in known or not known else known[0]
    if not cfg.allow_data_change:
        refuse_other_data(path, before, data)
    elif changed := changed_data(before, data):
        log.warning("%s: %s since the run began; resuming all the same (allow_data_change=true).", path, changed)
    own = ("run_dir", "resume", "init_from", "force", "allow_data_change")
    run = RunDirectory.open(
        path,
        command=sys.argv,
        changed={key: pair for key, pair in differences(began_with, cfg).items() if key not in own},
        changed_data={n: [before.get(n), data.get(n)] for n in {*before, *data} if before.get(n) != data.get(n)},
    )
    run.update(data=dict(data), config=manifest.digest(path / CONFIG))
    return run


def _with_this_config(path: Path, cfg: RunConfig) -> Path:
    verify_config(path)
    refuse_other_config(path, load_config(path / CONFIG), cfg)
    return path


def _newest_with_config(cfg: RunConfig) -> Path:
    """The newest unfinished run of this name and config."""
    for path in _runs_of(cfg.name):
        if read_record(path).get("status") == "finished":
            continue
        try:
            verify_config(path)
        except UserError as error:
            log.warning("Skipped: %s", error)
            continue
        with contextlib.suppress(UserError):  # of another config, another user's, or one that needs --import
            refuse_other_config(path, load_config(path / CONFIG), cfg)
            return path
    raise UserError(
        f"resume=true: there is no unfinished run with this config under runs/{cfg.name}. "
        "Start one without resume=true, or name it: plmtune resume RUN_DIR."
    )


def _run_of_this_job(cfg: RunConfig) -> Path | None:
    """The run that this job began before torchrun restarted it; None if it is not restarted, or died before that."""
    if distributed.restarted():
        for path in [Path(cfg.run_dir)] if cfg.run_dir else _runs_of(cfg.name):
            record = read_record(path)
            if record.get("job") != torchrun_job_id() or not (path / CONFIG).is_file():
                continue
            _with_this_config(path, cfg)  # the file that the command names may have been edited since
            attempts = record.get("attempts")
            if isinstance(attempts, list) and attempts and attempts[-1].get("ended_by") == "guard":
                raise UserError(
                    f"{path}: its guard ended it, so a restart by torchrun does not resume it: plmtune resume {path}"
                )
            return path
    return None


def _runs_of(name: str) -> list[Path]:
    """The runs in runs/NAME, newest first."""
    return sorted((path.parent for path in (Path("runs") / name).glob(f"[0-9]*/{CONFIG}")), reverse=True)


def _new_path(name: str, runtime: Runtime) -> Path:
    """runs/NAME/DATE-TIME of rank 0, the same on every rank."""
    path = Path("runs") / name / f"{datetime.now():%Y%m%d-%H%M%S}"
    while runtime.is_main and path.exists():
        time.sleep(0.2)
        path = path.with_name(f"{datetime.now():%Y%m%d-%H%M%S}")
    return path.with_name(broadcast_from_rank0(lambda: path.name))
