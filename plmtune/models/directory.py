"""A model directory that is whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plmtune.errors import UserError
from plmtune.io import manifest

_CONFIG = (
    "config.json"  # as in `models.checkpoint_files`, which imports torch: asked before that, as people wait for it
)


@contextmanager
def new_directory(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that replaces `directory` at the end of the context; after an error nothing is left.

    The new directory has a manifest, by which readers find damaged files.

    Args:
        overwrite: a model that is there is replaced. Nothing else ever is.

    Raises:
        UserError: if something is there already.
    """
    directory = Path(os.path.abspath(directory))  # noqa: PTH100 - resolve() would follow a link, which is refused
    check_free(directory, overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.tmp-{os.getpid()}")
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        manifest.write(temporary, 0, {})
        check_free(directory, overwrite)
        if directory.exists():
            directory.rename(old)
        temporary.rename(directory)
    except UserError as error:
        error.args = (str(error).replace(str(temporary), str(directory)),)  # the name that the user gave
        raise
    finally:
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_free(directory: Path, overwrite: bool) -> None:
    """Refuse a path that exists, unless it is a model and `overwrite` is set.

    Raises:
        UserError: naming what exists.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise UserError(f"{directory} is there already, and is no directory. Name another place.")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / _CONFIG).is_file():
        raise UserError(f"{directory} is there already, and holds something else than a model. Name another place.")
    if not overwrite:
        raise UserError(f"{directory} holds a model already. Name another place, or give --overwrite.")
