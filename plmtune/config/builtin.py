"""Where the built-in configs and recipes are. Light, so that ``plmtune ls`` and ``cp`` need not import hydra."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def builtin_folder(name: Literal["conf", "recipes"]) -> Path:
    """The built-in configs or recipes: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
