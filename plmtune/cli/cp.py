"""``plmtune cp``: a built-in config or recipe as the start of your own."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from plmtune.cli.options import PATH, overwrite_option
from plmtune.config.builtin import builtin_folder
from plmtune.config.names import name_hint, usage_of
from plmtune.errors import UserError, either, near_names
from plmtune.io import terminal


@click.command()
@click.argument("name")
@click.argument("target", type=PATH)
@overwrite_option
def cp(name: str, target: Path, overwrite: bool) -> None:
    """Copy a config or preset (pretrain, plm_20m) or a recipe (recipes/pretrain) to TARGET.

    \b
    plmtune cp plm_1.8b my.yaml        then: plmtune run my.yaml
    plmtune cp plm_20m my.yaml         then: plmtune run pretrain model=my.yaml
    plmtune cp recipes/pretrain my.py  then: plmtune run my.py
    """
    conf = builtin_folder("conf")
    known = {str(path.relative_to(conf).with_suffix("")): path for path in conf.rglob("*.yaml")}
    known |= {f"recipes/{path.stem}": path for path in builtin_folder("recipes").glob("[a-z]*.py")}
    asked = name.removeprefix("conf/").removesuffix(".yaml")
    of_that_name = [full for full in known if full.rpartition("/")[2] == asked and not full.startswith("recipes/")]
    source = known.get(asked) or (known[of_that_name[0]] if len(of_that_name) == 1 else None)
    if source is None:
        near = of_that_name or near_names(name, known)
        hint = f" Did you mean {either(near)}?" if near else name_hint(name)
        raise UserError(f"There is no config, preset or recipe {name}. See: plmtune ls.{hint}")
    if target.is_dir():
        target = target / source.name
    if target.suffix != source.suffix:
        raise UserError(f"{target}: {name} is a {source.suffix} file. Give the copy the same ending.")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists. Choose another name, or pass --overwrite.")
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist.")
    shutil.copyfile(source, target)
    is_preset = source.suffix == ".yaml" and source.parent != conf
    use = usage_of(source.relative_to(conf).parent.as_posix(), str(target)) if is_preset else target
    terminal.echo(f"{source.name} -> {target}\nUse it with: plmtune run {use}")
