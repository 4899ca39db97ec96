"""Hydra's multirun: its sweepers and launchers run a config several times."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import main as hydra_main
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from plmtune.config.builtin import builtin_folder
from plmtune.config.compose import all_keys
from plmtune.config.messages import explain
from plmtune.config.override_checks import check_overrides
from plmtune.config.primary import PRIMARY, store_primary
from plmtune.config.signatures import FIELDS
from plmtune.config.store import store_components
from plmtune.config.typed_config import from_plain
from plmtune.errors import UserError
from plmtune.io.atomic import remove_empty_folders


def multirun(
    name: str, overlays: Sequence[str], overrides: Sequence[str], task: Callable[[Any], Any], directory: Path
) -> None:
    """Hydra's own multirun: its sweepers and launchers call `task` with each composed config.

    Args:
        directory: where each job gets a run directory, named by its number, unless the config has `run_dir`.

    Raises:
        UserError: of the first job that is refused, naming it. Of jobs that begin no run no folder is left.
    """
    checked = check_overrides(overrides, multirun=True)
    for text in checked:
        directory = Path(text.removeprefix("hydra.sweep.dir=")) if text.startswith("hydra.sweep.dir=") else directory
    store_components()
    given = store_primary(name, overlays, overrides, checked)

    def job(composed: DictConfig) -> Any:
        place = Path(HydraConfig.get().runtime.output_dir)
        try:
            try:
                cfg = from_plain(composed)
            except UserError as error:
                raise given.with_place(error) from None
            cfg.run_dir = cfg.run_dir or str(place)
            return task(cfg)
        finally:
            with contextlib.suppress(OSError):  # not empty: a run began there
                place.rmdir()

    settings = [
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.job.chdir=false",
        f"hydra.sweep.dir={directory}",
    ]
    from unittest import mock  # imports asyncio

    def result(done: JobReturn) -> Any:
        if done.status is JobStatus.COMPLETED:
            return done._return_value
        if not isinstance(done._return_value, UserError):
            raise done._return_value
        number = done.hydra_cfg.hydra.job.num if done.hydra_cfg else "?"
        own = [text for text in done.overrides or () if text not in checked]
        raise UserError(f"job {number} ({', '.join(own)}): {done._return_value}") from done._return_value

    argv = ["plmtune", "--multirun", *settings, *checked]
    GlobalHydra.instance().clear()
    with (
        remove_empty_folders(directory),
        contextlib.ExitStack() as patched,
    ):
        # Hydra raises errors instead of printing them and exiting with code 1.
        patched.enter_context(mock.patch.dict(os.environ, HYDRA_FULL_ERROR="1"))
        patched.enter_context(mock.patch.object(sys, "argv", argv))
        patched_result = property(
            result, vars(JobReturn)["return_value"].fset
        )  # Hydra's own prints what failed, in its words
        patched.enter_context(mock.patch.object(JobReturn, "return_value", patched_result))
        try:
            hydra_main(version_base="1.3", config_path=str(builtin_folder("conf")), config_name=PRIMARY)(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, given, all_keys, FIELDS) from None
        finally:
            if directory.is_dir() and [path.name for path in directory.iterdir()] == ["multirun.yaml"]:
                (directory / "multirun.yaml").unlink()
