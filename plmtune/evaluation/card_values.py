"""Values of configs and records as text of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show_component(settings: Mapping[str, Any]) -> str:
    given = show_settings({key: value for key, value in settings.items() if key != "component"})
    return f"{settings.get('component')}" + (f" ({given})" if given else "")


def show_settings(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {show_value(value)}" for key, value in given.items() if value is not None)


def show_value(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return f"({show_settings(value)})"
    if isinstance(value, list):
        return "[" + ", ".join(map(show_value, value)) + "]"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
