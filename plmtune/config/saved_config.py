"""The saved config of a run: read back, and changed by overrides. Nothing is composed again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from plmtune.config.choices import group_at, take_choices
from plmtune.config.override_checks import check_overrides, parse
from plmtune.config.renamed import with_new_keys
from plmtune.config.rules import read_yaml
from plmtune.config.schema import SCHEMAS
from plmtune.config.typed_config import from_plain, to_plain
from plmtune.errors import UserError


def load_config(path: Path) -> Any:
    """Read a resolved ``config.yaml`` back, through the same checks; nothing is composed again.

    Keys that an earlier version named otherwise are read, with a notice.
    """
    content = read_yaml(path)
    schema = SCHEMAS.get(str(content.get("recipe")))
    content, renamed = with_new_keys(content, [f.name for f in dataclasses.fields(schema)] if schema else ())
    if renamed:
        _notice_once(f"{path}: written by an earlier version: {', '.join(renamed)}.")
    return from_plain(content, where=str(path))


@cache
def _notice_once(text: str) -> None:
    """Log a notice once in a process: a run's config is read several times."""
    logging.getLogger(__name__).warning(text)


def override(cfg: Any, overrides: Sequence[str]) -> Any:
    """Change keys of a typed config, with the words and the checks of the command line; nothing is composed again.

    ``key=value`` replaces a value, or merges into a section; ``logger=tensorboard`` chooses another component, with
    its own defaults.

    Raises:
        UserError: naming the override.
    """
    for text in overrides:
        check_overrides([text])
        parsed = parse(text)
        if parsed.is_delete() or parsed.is_add() or parsed.is_sweep_override() or parsed.package:
            raise UserError(f"override {text}: write key=value, as a saved config has every key and one value of each.")
        value = parsed.value()
        section = to_plain(cfg)
        plain, *above, last = section, *parsed.key_or_group.replace("/", ".").split(".")
        for name in above:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        group = group_at(parsed.key_or_group)
        choices: dict[str, str | None] = {}
        if group and isinstance(value, str | list):
            place = parsed.key_or_group.replace(".", "/")
            settings = take_choices(value, place, group, choices, f"override {text:.200}, ")
            section[last] = {"component": choices[place], **settings}
        elif isinstance(value, dict) and isinstance(section.get(last), dict):
            section[last] = {**section[last], **value}
        else:
            section[last] = value
        cfg = from_plain(plain, where=f"override {text}")
    return cfg
