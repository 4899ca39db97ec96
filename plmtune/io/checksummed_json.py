"""JSON that holds its own checksum, so that any flipped bit is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from plmtune.io.atomic import atomic_write
from plmtune.io.untrusted import load_json

_CHECKSUM = "xxh3_128"
# Far above any real file of this kind, far below what would hurt: JSON's lists take 25 times their text in memory.
_MAX_BYTES = 4 * 2**20


def dumps(content: dict[str, Any]) -> bytes:
    """Encode an object as indented JSON with its checksum last; `loads` accepts this encoding alone."""
    body = json.dumps(content, indent=1, ensure_ascii=False)
    with_checksum = {**content, _CHECKSUM: xxhash.xxh3_128_hexdigest(body.encode())}
    return json.dumps(with_checksum, indent=1, ensure_ascii=False).encode()


def loads(data: bytes) -> dict[str, Any]:
    """Return the object that `dumps` encoded; ValueError if a single bit differs."""
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
    try:
        content = load_json(data)
        if not isinstance(content, dict) or _CHECKSUM not in content:
            raise ValueError("it has no checksum")
        del content[_CHECKSUM]
        again = dumps(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    if again != data:
        raise ValueError("it does not match its own checksum")
    return content


def save(path: Path, content: dict[str, Any]) -> None:
    """Replace a file by an object with its checksum, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(dumps(content))


def load(path: Path) -> dict[str, Any]:
    """Read the object that a file holds, see `loads`."""
    return loads(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; of one that is too large, only so many that `loads` refuses them."""
    with path.open("rb") as file:
        return file.read(_MAX_BYTES + 1)
