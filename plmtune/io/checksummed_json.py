"""JSON under a checksum of its own, in which any flipped bit is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from plmtune.io.untrusted import load_json

_CHECKSUM = "xxh3_128"
# Far above any real file of this kind, far below what would hurt: JSON's lists take 25 times their text in memory.
_MAX_BYTES = 4 * 2**20


def seal(content: dict[str, Any]) -> bytes:
    """Spell an object as JSON for people with its checksum last; only this spelling of it is whole."""
    body = json.dumps(content, indent=1, ensure_ascii=False)
    sealed = {**content, _CHECKSUM: xxhash.xxh3_128_hexdigest(body.encode())}
    return json.dumps(sealed, indent=1, ensure_ascii=False).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """Return what `seal` was given.

    Raises:
        ValueError: if a single bit is another one.
    """
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
    try:
        content = load_json(data)
        if not isinstance(content, dict) or _CHECKSUM not in content:
            raise ValueError("it has no checksum")
        del content[_CHECKSUM]
        again = seal(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    if again != data:
        raise ValueError("it does not match its own checksum")
    return content


def read(path: Path) -> bytes:
    """The bytes of a sealed file; of one too large to be any, only so many that `unseal` refuses them."""
    with path.open("rb") as file:
        return file.read(_MAX_BYTES + 1)
