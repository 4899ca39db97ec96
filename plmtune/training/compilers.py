"""Whether torch.compile finds its compiler, checked before a run begins."""

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
        what: the key that compiles, for the message.
        otherwise: the override that avoids it.

    Raises:
        UserError: naming what is missing.
    """
    if device.type != "cuda":
        # Where inductor looks for it.
        name = "clang++" if sys.platform == "darwin" else "g++"
        missing = "" if os.environ.get("TORCH_INDUCTOR_INSTALL_GXX") else _missing("C++", "CXX", (name,))
    elif installed("triton"):
        missing = _missing("C", "CC", ("gcc", "clang"))  # Triton compiles what starts its kernels
    else:
        missing = f"the package triton on a GPU, which is not installed. Install it with: {install_command('triton')}"
    if missing:
        raise UserError(f"{what}: torch.compile needs {missing}. Without one: {otherwise}.")


def _missing(language: str, variable: str, names: tuple[str, ...]) -> str:
    """The middle of a sentence about a missing compiler; empty if there is one."""
    chosen = os.environ.get(variable)
    names = (chosen,) if chosen else names
    if any(shutil.which(name) for name in names):
        return ""
    package = "g++" if language == "C++" else "gcc"
    return (
        f"a {language} compiler, and {' or '.join(names)} is not on the PATH. Install one (Debian, Ubuntu: apt install "
        f"{package}), or set the environment variable {variable} to yours"
    )
