"""Programs with the names of Slurm's, which write what they were given and answer what a test says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def install(place: Path, patch: pytest.MonkeyPatch, **answers: str) -> Path:
    """Put programs before all others on the PATH.

    Args:
        answers: by program, a line of shell that answers; "$@" are its arguments.

    Returns:
        The directory, in which PROGRAM.given has the arguments of the last call.
    """
    folder = place / "bin"
    folder.mkdir(exist_ok=True)
    for name, answer in answers.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "$@" > {folder}/{name}.given\n{answer}\n')
        program.chmod(0o755)
    patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def only(place: Path, patch: pytest.MonkeyPatch, **answers: str) -> Path:
    """The same, and nothing else is found on the PATH."""
    folder = install(place, patch, **answers)
    patch.setenv("PATH", str(folder))
    return folder
