"""Configs: composed by Hydra, typed by signatures, built through the registry.

``compose`` gives a recipe's schema (`plmtune.config.schema`) in which each component stands as a `Component`: a
registered name with its settings. Hydra only merges YAML and overrides here; nothing a config says is ever imported
or called. ``multirun`` has Hydra's sweepers and launchers run a config several times.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra import main as hydra_main
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from plmtune.config.builtin import builtin_folder
from plmtune.config.messages import UNUSED, Given, explain
from plmtune.config.override_checks import as_typed, check_overrides, parse
from plmtune.config.primary import PRIMARY, store_primary
from plmtune.config.signatures import store_components
from plmtune.config.typed_config import from_plain
from plmtune.errors import UserError
from plmtune.io.atomic import remove_empty_folders
from plmtune.registry import Component


@contextlib.contextmanager
def _stored(
    name: str, overlays: Sequence[str], overrides: Sequence[str], *, multirun: bool = False
) -> Iterator[tuple[Given, list[str]]]:
    """Put a config into Hydra's store, and translate Hydra's errors; yields what it is made of, and the overrides."""
    checked = check_overrides(overrides, multirun=multirun)
    store_components()
    given = store_primary(name, overlays, overrides, checked)
    GlobalHydra.instance().clear()
    try:
        yield given, checked
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, given) from None


def _typed(composed: DictConfig, given: Given) -> Any:
    try:
        return from_plain(composed)
    except UserError as error:
        raise given.with_place(error) from None


def compose(name: str, overlays: Sequence[str] = (), overrides: Sequence[str] = ()) -> Any:
    """Compose one run's config, as the recipe's schema, for example `plmtune.config.schema.PretrainConfig`.

    Args:
        name: a built-in config (``pretrain``) or a YAML file; one without a base of its own builds on its `recipe`.
        overlays: YAML files, later ones win.
        overrides: Hydra overrides, values (``optimizer.lr=1e-4``) and groups (``model/ffn=swiglu``).
    """
    with (
        _stored(name, overlays, overrides) as (given, checked),
        initialize_config_dir(str(builtin_folder("conf")), version_base="1.3"),
    ):
        return _typed(hydra_compose(PRIMARY, overrides=[*checked, *UNUSED]), given)


def multirun(
    name: str, overlays: Sequence[str], overrides: Sequence[str], task: Callable[[Any], Any], directory: Path
) -> None:
    """Hydra's own multirun: its sweepers and launchers call `task` with each composed config.

    Args:
        directory: where each job gets a run directory, named by its number, unless the config has `run_dir`.

    Raises:
        UserError: of the first job that is refused, naming it. Of jobs that begin no run no folder is left.
    """
    from unittest import mock  # imports asyncio

    with contextlib.ExitStack() as stack:
        given, checked = stack.enter_context(_stored(name, overlays, overrides, multirun=True))
        for text in checked:
            if text.startswith("hydra.sweep.dir="):
                directory = Path(text.removeprefix("hydra.sweep.dir="))

        def job(composed: DictConfig) -> Any:
            place = Path(HydraConfig.get().runtime.output_dir)
            try:
                cfg = _typed(composed, given)
                cfg.run_dir = cfg.run_dir or str(place)
                return task(cfg)
            finally:
                with contextlib.suppress(OSError):  # not empty: a run began there
                    place.rmdir()

        def result(done: JobReturn) -> Any:
            if done.status is JobStatus.COMPLETED:
                return done._return_value
            if not isinstance(done._return_value, UserError):
                raise done._return_value
            number = done.hydra_cfg.hydra.job.num if done.hydra_cfg else "?"
            # Hydra writes tables in another way than they were typed, so keys are compared.
            same = {text.partition("=")[0] for text in checked if not parse(text).is_sweep_override()}
            own = [as_typed(text) for text in done.overrides or () if text.partition("=")[0] not in same]
            raise UserError(f"job {number} ({', '.join(own)}): {done._return_value}") from done._return_value

        settings = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none",
                    "hydra.job.chdir=false", f"hydra.sweep.dir={directory}"]  # fmt: skip
        stack.enter_context(remove_empty_folders(directory))
        # Hydra raises errors instead of printing them and exiting with code 1; its own result prints what failed.
        stack.enter_context(mock.patch.dict(os.environ, HYDRA_FULL_ERROR="1"))
        stack.enter_context(mock.patch.object(sys, "argv", ["plmtune", "--multirun", *settings, *checked]))
        stack.enter_context(
            mock.patch.object(JobReturn, "return_value", property(result, vars(JobReturn)["return_value"].fset))
        )
        try:
            hydra_main(version_base="1.3", config_path=str(builtin_folder("conf")), config_name=PRIMARY)(job)()
        finally:
            if directory.is_dir() and [path.name for path in directory.iterdir()] == ["multirun.yaml"]:
                (directory / "multirun.yaml").unlink()


def build(key: str, chosen: Component | None, **runtime: Any) -> Any:
    """Call a component; impossible numbers come back with the key in front."""
    if chosen is None:
        raise UserError(f"key {key}: no component chosen. See: plmtune ls {key}")
    try:
        return chosen(**runtime)
    except ValueError as error:
        raise UserError(f"key {key}: {error}") from error
