"""``plmtune validate``: every mistake that can be found without memory or data."""

from __future__ import annotations

import click

from plmtune.cli import import_option
from plmtune.errors import UserError, did_you_mean
from plmtune.shipped import folder


@click.command()
@click.argument("name", metavar="FILE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--show", is_flag=True, help="Print the resolved config.")
@import_option
def validate(name: str, overrides: tuple[str, ...], show: bool) -> None:
    """Compose FILE (or a shipped config's name), check every key, and build the model on the meta device."""
    import importlib

    if not name.endswith((".yaml", ".yml")) and not (folder("conf") / f"{name}.yaml").is_file():
        known = sorted(path.stem for path in folder("conf").glob("*.yaml"))
        raise UserError(f"{name} is neither a shipped config nor a .yaml file.{did_you_mean(name, known)}")

    from plmtune import config

    config.find_config(name)  # before components are imported, and torch with them
    cfg = config.compose(name, (), overrides)
    lines = importlib.import_module(f"plmtune.recipes.{cfg.recipe}").check(cfg)
    if show:
        click.echo(config.to_yaml(cfg), nl=False)
    click.echo(f"{name}: valid. {lines}")
