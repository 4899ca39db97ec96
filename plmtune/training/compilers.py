"""Whether torch.compile finds here what it needs: asked before a run begins, not at its first step."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from plmtune.errors import UserError
from plmtune.extras import install_command, installed


def check_compiler(device: torch.device, what: str, otherwise: str) -> None:
    """Refuse what torch.compile cannot compile on this machine.

    Args:
        what: compiles: "key runtime.compile".
        otherwise: the override that compiles nothing.

    Raises:
        UserError: naming what is missing.
    """
    if device.type != "cuda":
        # As inductor looks for it.
        name = "clang++" if sys.platform == "darwin" else "g++"
        missing = "" if os.environ.get("TORCH_INDUCTOR_INSTALL_GXX") else _missing("C++", "CXX", (name,))
    elif installed("triton"):
        missing = _missing("C", "CC", ("gcc", "clang"))  # Triton compiles what starts its kernels
    else:
        missing = f"the package triton on a GPU, which is not installed. Install it with: {install_command('triton')}"
    if missing:
        raise UserError(f"{what}: torch.compile needs {missing}. Without one: {otherwise}.")


def _missing(language: str, variable: str, names: tuple[str, ...]) -> str:
    """The middle of a sentence about a compiler that is not there; empty if it is."""
    chosen = os.environ.get(variable)
    names = (chosen,) if chosen else names
    if any(shutil.which(name) for name in names):
        return ""
    package = "g++" if language == "C++" else "gcc"
    return (
        f"a {language} compiler, and {' or '.join(names)} is not on the PATH. Install one (Debian, Ubuntu: apt install "
        f"{package}), or set the environment variable {variable} to yours"
    )
