"""What a run starts from: its phases in steps, its data, the checkpoint of `init_from`, and its directory."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from plmtune.config import build, load_config, to_plain, to_yaml
from plmtune.data.order import Phase
from plmtune.data.prepare import prepare
from plmtune.data.shards import Shards
from plmtune.data.sources import named_sources
from plmtune.data.tokenizers import Tokenizer, load_tokenizer
from plmtune.errors import UserError
from plmtune.models.files import checkpoint_directory
from plmtune.models.hf import read_description
from plmtune.modules.decoder import Decoder
from plmtune.training.checkpoint import read_state_json
from plmtune.training.distributed import broadcast_text
from plmtune.training.run_directory import RunDirectory
from plmtune.training.runtime import Runtime
from plmtune.units import parse_count

# Keys that may differ on resume: they change where and how a run computes or reports, not what it learns.
FREE = ("run_dir", "resume", "init_from", "force", "micro_batch_size", "num_workers", "log_every", "runtime",
        "checkpoint", "sample", "logger")  # fmt: skip


def resolve_phase(index: int, phase: Any, tokens_per_step: int) -> Phase:
    """Turn a config's phase, in tokens or steps, into steps.

    Raises:
        UserError: naming the key.
    """
    key = f"phases[{index}]"
    if (phase.tokens is None) == (phase.steps is None):
        raise UserError(f"key {key}: needs tokens or steps, one of the two.")
    try:
        if phase.steps is None:
            steps = math.ceil(parse_count(phase.tokens, f"{key}.tokens") / tokens_per_step)
        else:
            steps = phase.steps
    except ValueError as error:
        raise UserError(f"key {error}") from None
    if steps < 1:
        raise UserError(f"key {key}.steps: must be at least 1, not {steps}.")
    return Phase(phase.name, steps, dict(phase.mix))


@dataclass
class Origin:
    """The checkpoint that `init_from` names; a run that enters the schedule after its warmup goes on from there."""

    directory: Path
    goes_on: bool
    drawn: dict[str, int]  # sequences of each source that it has seen


def start_from(cfg: Any, model: Decoder, tokenizer: Tokenizer) -> Origin | None:
    """Find the checkpoint of `init_from` and check that it is this model with this tokenizer.

    Raises:
        UserError: naming what differs.
    """
    if not cfg.init_from:
        return None
    directory = checkpoint_directory(cfg.init_from)
    theirs, ours = read_description(directory), model.config
    for key in ours:
        # Its context may be shorter, and its initialisation is over.
        if key not in ("max_seq_len", "init_std") and ours[key] != theirs.get(key):
            raise UserError(f"init_from={cfg.init_from}: its model has {key}={theirs.get(key)}, this run {ours[key]}.")
    named = (directory / "tokenizer.json").is_file()
    if named and load_tokenizer(directory).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"init_from={cfg.init_from}: its tokenizer is another one than this run's. Use its own: "
            f"tokenizer=file tokenizer.path={directory}"
        )
    # A branched decay anneals that very run: it keeps the optimizer's moments and reads on where the other stopped.
    goes_on = cfg.scheduler.settings.get("start", "warmup") != "warmup"
    state = read_state_json(directory) if goes_on else {}
    return Origin(directory, bool(state), dict(state.get("drawn", {})))


def open_sources(cfg: Any, tokenizer: Tokenizer, runtime: Runtime) -> dict[str, Shards]:
    """Make token shards of each source of ``cfg.data``, or find them made.

    Every rank asks; the first to hold the lock works and the others wait for it, without a time limit.

    Raises:
        UserError: for text that cannot be read, shards that are damaged, or impossible settings.
    """
    settings = cfg.preparation
    opened = {}
    for name, source in named_sources(build("data", cfg.data)).items():
        try:
            directory = prepare(
                source,
                tokenizer,
                Path(settings.directory),
                holdout=settings.holdout,
                holdout_by=settings.holdout_by,
                skip_bad=settings.skip_bad,
            )
        except ValueError as error:
            raise UserError(f"key preparation: {error}") from error
        opened[name] = Shards.open(
            directory,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            verify=runtime.is_main,
        )
    return opened


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
