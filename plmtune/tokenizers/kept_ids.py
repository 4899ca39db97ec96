"""kept_ids.json beside a compressed tokenizer: of which tokenizers its tokens are, and under which ids they were there.

A model with the compressed tokenizer can then learn from one with the original: the teacher reads the original ids of
the same tokens, and of its logits those of the kept ids are gathered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plmtune.errors import UserError, unreadable
from plmtune.io import checksummed_json
from plmtune.units import runs_of

FILE = "kept_ids.json"
_RUN = re.compile(r"([0-9]{1,7})(?:-([0-9]{1,7}))?")
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_MAX_ORIGINALS = 16


@dataclass(frozen=True)
class KeptIds:
    """The tokens that are kept of one tokenizer.

    Attributes:
        original: fingerprint of that tokenizer.
        ids: its id of each of the compressed tokenizer's tokens, in the order of the new ids.
    """

    original: str
    ids: tuple[int, ...]


def save(directory: Path, fingerprint: str, kept: Sequence[KeptIds]) -> None:
    """Write the file of a tokenizer, or remove that of another one if nothing is kept.

    Args:
        fingerprint: of the compressed tokenizer.
        kept: the tokenizer that it was compressed from, then the one that this was compressed from, and so on.
    """
    if kept:
        held = [{"original": one.original, "ids": _runs(one.ids)} for one in kept]
        checksummed_json.save(directory / FILE, {"tokenizer": fingerprint, "kept": held})
    else:
        (directory / FILE).unlink(missing_ok=True)


def read(path: Path) -> tuple[str, tuple[KeptIds, ...]]:
    """Return the fingerprint of the compressed tokenizer and what it keeps.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        content = checksummed_json.load(path)
        fingerprint, held = content["tokenizer"], content["kept"]
        if not 0 < len(held) <= _MAX_ORIGINALS:
            raise ValueError(f"it names {len(held)} tokenizers, of 1 to {_MAX_ORIGINALS}")
        kept = tuple(KeptIds(one["original"], tuple(_ids(one["ids"]))) for one in held)
        for name in (fingerprint, *(one.original for one in kept)):
            if not _FINGERPRINT.fullmatch(name):
                raise ValueError(f"{name!r:.40} is no fingerprint")
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}). Compress the tokenizer again.") from error
    return fingerprint, kept


def _runs(ids: Iterable[int]) -> str:
    """Write ids as runs of consecutive ones: ``0-255 260 262-263``."""
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs_of(ids))


def _ids(runs: str) -> list[int]:
    ids: list[int] = []
    for run in runs.split():
        found = _RUN.fullmatch(run)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last < 1 << 19:
            raise ValueError(f"{run!r:.40} is no run of ids")
        ids += range(first, last + 1)
        if len(ids) > 1 << 19:
            raise ValueError("it names more ids than a vocabulary can have")
    if len(set(ids)) != len(ids):
        raise ValueError("it names an id twice")
    return ids
