"""Optional packages, and the command that installs them."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

from plmtune.errors import UserError

# module -> the extra of pyproject.toml that installs it
EXTRAS = {
    "datasets": "hub",
    "huggingface_hub": "hub",
    "wandb": "wandb",
    "trackio": "trackio",
    "xllamacpp": "gguf",
    "llama_cpp": "llama-cpp",
    "transformers": "transformers",
    "executorch": "executorch",
    "submitit": "slurm",
    "jieba": "pangu",
}


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a spec, or None in sys.modules
        return False


def missing(module: str, needs: str, otherwise: str = "") -> UserError:
    """Return the error that names a missing package and how to install it.

    Args:
        needs: the beginning of the sentence: "logger=wandb", "a.gguf".
        otherwise: a sentence on what works without the package.
    """
    extra = EXTRAS.get(module)  # None: a required package
    what = f"{module} (extra {extra})" if extra else module
    message = f"{needs} needs the package {what}, which is not installed. Install it with: {install_command(module)}"
    return UserError(f"{otherwise} {message}".lstrip())


def install_command(module: str) -> str:
    """Return the command that installs a module for the interpreter in use: with its extra, or else by its own name.

    An extra is installed into the checkout, if there is one.
    """
    extra, checkout = EXTRAS.get(module), _checkout()
    if extra is None:
        what = module
    else:
        what = f"-e {shlex.quote(f'{checkout}[{extra}]')}" if checkout else f'"plmtune[{extra}]"'
    return f"{shlex.quote(sys.executable)} -m pip install {what}"


def install_here() -> str:
    """Return the command that installs the checkout in the working directory, on another machine."""
    return "python3 -m pip install --editable ."


def _checkout() -> Path | None:
    """The checkout of an editable installation."""
    folder = Path(__file__).parents[1]
    return folder if (folder / "pyproject.toml").is_file() else None
