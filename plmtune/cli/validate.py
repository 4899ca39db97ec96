"""``plmtune validate``: every mistake that ``plmtune run`` would refuse, without training or memory for it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import click

from plmtune.cli.options import divide, import_option, option, recipe_file, without_collecting
from plmtune.io import terminal


@click.command()
@click.argument("name")
@click.argument("arguments", nargs=-1, metavar="[FILE.yaml] [KEY=VALUE]...")
@option("--show", "Print the resolved config.")
@import_option
def validate(name: str, arguments: tuple[str, ...], show: bool) -> None:
    """Check what plmtune run NAME [FILE.yaml] [KEY=VALUE]... would run; train nothing.

    NAME is a config (plmtune ls), your own recipe.py, or a YAML file. The run accepts what this command accepts,
    with two exceptions: the rows of its data are not checked, and a lack of memory is only reported.

    \b
    plmtune validate pretrain mine.yaml
    plmtune validate mine.yaml optimizer.lr=1e-4
    """
    overlays, overrides = divide(arguments)
    with without_collecting():
        module = recipe_file(name) if name.endswith(".py") else None

        from plmtune.config import compose, primary, typed_config

        if module is None:
            primary.find_config(name)  # before components are imported, and torch with them
        cfg = compose.compose(module.CONFIG if module else name, overlays, overrides)
        recipe = module or importlib.import_module(f"plmtune.recipes.{cfg.recipe}")
        said = check(recipe, cfg)
    if show:
        click.echo(typed_config.to_yaml(cfg), nl=False)
    terminal.echo(f"{' '.join([name, *overlays])}: valid. {said}")


def check(recipe: ModuleType, cfg: Any) -> str:
    """Run the recipe's checks of a config; return a summary."""
    if hasattr(recipe, "check"):
        return str(recipe.check(cfg))
    if hasattr(recipe, "preflight"):
        from plmtune.training import launcher

        return launcher.check(cfg, recipe.preflight)
    return "Keys and values are; the recipe has neither preflight nor check(cfg), which would look further."
