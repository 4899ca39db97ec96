"""Config keys that earlier versions knew by another name.

A run directory of an earlier version is still read: `with_new_keys` moves its values and says so. A new config or
override with an old key is refused, and `new_key` gives the hint.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple


class Renamed(NamedTuple):
    """One key that has another name or other values now. Both names are full keys of the same section."""

    old: str
    new: str
    values: Mapping[str, str] = {}  # old value -> new value


RENAMED = (
    Renamed("other_data", "allow_data_change"),
    Renamed("checkpoint.best_is", "checkpoint.mode", {"lowest": "min", "highest": "max"}),
    Renamed("chat.too_long", "chat.truncation", {"cut": "right"}),
    Renamed("prompts", "prompts_per_round"),
    Renamed("generation.strategy", "generation.mode"),
)
# Metrics of a validation: old name -> new name.
RENAMED_METRICS = {
    f"validation/{kind}h": f"validation/{kind}logratio_margin" for kind in ("", "given_rejected/", "given_chosen/")
}
# Keys that keep their name and have other values.
NEW_VALUES = (Renamed("checkpoint.best", "checkpoint.best", RENAMED_METRICS),)


def new_key(old: str) -> str | None:
    """Return today's name of a full key with the values that changed, for "did you mean"; None if it has none."""
    for _, new, changed in (renamed for renamed in RENAMED if renamed.old == old):
        values = ", ".join(f"{now} for {before}" for before, now in changed.items())
        return new + (f" ({values})" if values else "")
    return None


def metric_value(metrics: Mapping[str, Any], name: str) -> Any:
    """The value of a metric by its new name, also among those that an earlier version saved; None if it is absent."""
    before = {new: old for old, new in RENAMED_METRICS.items()}
    return metrics.get(name, metrics.get(before.get(name, name)))


def with_new_keys(config: dict[str, Any], keys: Container[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a config under today's names, and "OLD is now NEW" for each key that was renamed.

    Args:
        keys: top-level keys of the recipe's schema. An old name that a user's own schema defines is left alone.
    """
    return _rename(config, [*(renamed for renamed in RENAMED if renamed.old not in keys), *NEW_VALUES])


def with_first_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config under the names that keys had first: digests made of these hold in every version."""
    back = (Renamed(r.new, r.old, {new: old for old, new in r.values.items()}) for r in (*RENAMED, *NEW_VALUES))
    return _rename(config, back)[0]


def _rename(config: dict[str, Any], table: Iterable[Renamed]) -> tuple[dict[str, Any], list[str]]:
    config, notices = copy.deepcopy(config), []
    for old, new, values in table:
        parent, _, leaf = old.rpartition(".")
        section = config.get(parent) if parent else config
        renamed = new.rpartition(".")[2]
        if not isinstance(section, dict) or leaf not in section:
            continue
        value = section[leaf]
        new_value = values.get(value, value) if isinstance(value, str) else value
        if renamed == leaf and new_value != value:
            section[leaf] = new_value
            notices.append(f"{old}={value} is now {new}={new_value}")
        elif renamed not in section:
            section[renamed] = new_value
            del section[leaf]
            notices.append(f"{old} is now {new}")
    return config, notices
