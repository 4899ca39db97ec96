"""Configs: composed by Hydra, typed by signatures, built through the registry.

``compose`` gives a recipe's schema (`plmtune.config.schema`) in which each component stands as a `Component`: a
registered name with its settings. Hydra only merges YAML and overrides here; nothing a config says is ever imported
or called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plmtune.config.builtin import builtin_folder
from plmtune.config.messages import explain
from plmtune.config.override_checks import check_overrides
from plmtune.config.primary import PRIMARY, store_primary
from plmtune.config.schema import SCHEMAS
from plmtune.config.signatures import FIELDS
from plmtune.config.store import store_components
from plmtune.config.typed_config import from_plain
from plmtune.errors import UserError
from plmtune.registry import Component

# Files of Hydra's command line and logging, which compose() does not use; reading them takes a tenth of its time.
_UNUSED = [f"~hydra/{name}" for name in ("help", "hydra_help", "job_logging", "hydra_logging", "output", "env")]


def compose(name: str, overlays: Sequence[str] = (), overrides: Sequence[str] = ()) -> Any:
    """Compose one run's config.

    Args:
        name: a built-in config (``pretrain``) or a YAML file; one without a base of its own builds on its `recipe`.
        overlays: YAML files, later ones win.
        overrides: Hydra overrides, values (``optimizer.lr=1e-4``) and groups (``model/ffn=swiglu``).

    Returns:
        the recipe's schema, for example `plmtune.config.schema.PretrainConfig`.

    Raises:
        UserError: naming the file or the override, the key, and the nearest right name.
    """
    checked = check_overrides(overrides)
    store_components()
    given = store_primary(name, overlays, overrides, checked)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(builtin_folder("conf")), version_base="1.3"):
            composed = hydra_compose(PRIMARY, overrides=[*checked, *_UNUSED])
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, given, all_keys, FIELDS) from None
    try:
        return from_plain(composed)
    except UserError as error:
        raise given.with_place(error) from None


def all_keys(base: str) -> list[str]:
    """Every full key of a built-in config, for "did you mean"."""
    return _all_keys(base, frozenset(SCHEMAS.values()))


@cache
def _all_keys(base: str, schemas: frozenset[type]) -> list[str]:
    with initialize_config_dir(str(builtin_folder("conf")), version_base="1.3"):
        return list(_flat(OmegaConf.to_container(hydra_compose(base, overrides=_UNUSED), resolve=False)))


def _flat(value: Any, prefix: str = "") -> Iterator[str]:
    for key, child in value.items():
        yield f"{prefix}{key}"
        if isinstance(child, dict):
            yield from _flat(child, f"{prefix}{key}.")


def build(key: str, chosen: Component | None, **runtime: Any) -> Any:
    """Call a component; impossible numbers come back with the key in front.

    Raises:
        UserError: if nothing is chosen for the key, or the component refuses its settings.
    """
    if chosen is None:
        raise UserError(f"key {key}: no component chosen. See: plmtune ls {key}")
    try:
        return chosen(**runtime)
    except ValueError as error:
        raise UserError(f"key {key}: {error}") from error
