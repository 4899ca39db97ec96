"""The tokenizer that a word of the command line names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from plmtune.errors import UserError
from plmtune.io import hub

if TYPE_CHECKING:
    from plmtune.tokenizers.tokenizer import Tokenizer


def find_tokenizer(text: str) -> Tokenizer:
    """Return the tokenizer of a registered name, a directory, a file, or a run's newest checkpoint."""
    from plmtune.config.names import name_hint
    from plmtune.registry import describe_components, load

    named = set(describe_components()["tokenizer"]) - {"file"}  # that one is reached by its path
    if text in named:
        return load("tokenizer", text)()
    path = Path(text)
    if path.is_dir() and not (path / "tokenizer.json").exists() and (path / "checkpoints").is_dir():
        from plmtune.models.checkpoint_files import checkpoint_directory

        text = str(checkpoint_directory(path))
    if path.exists() or hub.parse(text):
        return load("tokenizer", "file")(path=text)
    raise UserError(f"{text} is neither a tokenizer's name nor a file or directory with one.{name_hint(text, named)}")
