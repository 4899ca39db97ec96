"""Directories of checkpoints: names of steps, fsync, and a manifest of sizes and hashes that finds any damage."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from plmtune.errors import UserError, unreadable
from plmtune.io import checksummed_json
from plmtune.io.atomic import atomic_write, user_cache
from plmtune.io.untrusted import load_json

NAME = "manifest.json"
VERIFIED = ".verified.json"  # states of the files whose hashes matched, see `check_files_once`
_STEP = re.compile(r"step-(\d{8,})")


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in directory.iterdir() if not path.is_symlink())
    return sorted(int(match[1]) for match in matches if match)


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def resolve_pointer(path: Path) -> Path:
    """The checkpoint that the file RUN/checkpoints/latest or best names; any other path unchanged."""
    if path.name not in ("latest", "best") or path.is_symlink() or not path.is_file():
        return path
    with path.open("rb") as file:
        name = file.read(80).decode("utf-8", errors="replace").strip()
    found = path.parent / name
    return found if _STEP.fullmatch(name) and found.is_dir() and not found.is_symlink() else path


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text`, atomically and durably."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """The xxh3-128 of a file, in hex."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def write(directory: Path, step: int, known: Mapping[str, Any], only: Iterable[str] = ("*",)) -> None:
    """Write the manifest of `directory`. Its other files must exist.

    Args:
        known: "bytes" and "xxh3_128" of files that are synced; the others are hashed and synced.
        only: patterns of the files to list.
    """
    files = dict(known)
    for path in sorted({path for pattern in only for path in directory.glob(pattern)}):
        if path.name not in (NAME, VERIFIED, *known):
            files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": digest(path)}
            sync(path)
    for name, entry in known.items():
        found = (directory / name).stat().st_size
        if found != entry["bytes"]:
            raise OSError(errno.EIO, f"{name} has {found:,} bytes where {entry['bytes']:,} were written")
    write_text(directory / NAME, checksummed_json.dumps({"files": files, "format": 1, "step": step}).decode())


def check_files(
    directory: Path, *, hashes: bool = True, seen: Callable[[int], object] = lambda size: None
) -> dict[str, Any]:
    """Check every file of `directory` against its manifest and return that; UserError names the first that is wrong.

    Args:
        hashes: read every byte; else compare sizes only.
        seen: called with the size of each file after its check.
    """
    manifest = read(directory)
    for path in (*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")):
        if path.name not in manifest["files"]:  # loading might take it for the weights
            raise UserError(f"{path} is not in {NAME}: it was added later. Move it away.")
    for name, expected in manifest["files"].items():
        _check_file(directory / name, expected["bytes"], expected["xxh3_128"] if hashes else None)
        seen(expected["bytes"])
    return manifest


def check_files_once(directory: Path, only: Iterable[str] | None = None) -> None:
    """Check a directory against its manifest before it is read: sizes always, hashes once for each state of a file.

    A state is size, time of change and inode, so each write, copy or replacement is read again. Checked states are
    kept in the directory, or in the user's cache if the directory is read-only. A directory without a manifest of
    ours, such as a model from elsewhere, passes.

    Args:
        only: names of the files whose hashes count; None: all.
    """
    if not (directory / NAME).is_file() or _is_of_others(directory / NAME):
        return
    files = check_files(directory, hashes=False)["files"]
    known: dict[str, Any] = {}
    for path in reversed(_verified_files(directory)):
        with contextlib.suppress(OSError, ValueError):  # without it, everything is hashed again
            known = checksummed_json.load(path)
    states = {name: _state(directory / name, files[name]) for name in files}
    wanted = [name for name in files if only is None or name in only]
    todo = [name for name in wanted if known.get(name) != states[name]]
    for name in todo:
        _check_file(directory / name, files[name]["bytes"], files[name]["xxh3_128"])
    right = {name: state for name, state in states.items() if name in wanted or known.get(name) == state}
    for path in _verified_files(directory) if todo else ():
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            checksummed_json.save(path, right)
            return


def _is_of_others(path: Path) -> bool:
    """Whether a manifest.json is another program's. A damaged one of ours still has two of its three keys."""
    try:
        content = load_json(checksummed_json.read_bytes(path))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError:
        return False
    return not isinstance(content, dict) or len({"files", "format", "xxh3_128"} & content.keys()) < 2


def _state(path: Path, entry: Mapping[str, Any]) -> list[Any]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, entry["xxh3_128"]]


def _verified_files(directory: Path) -> tuple[Path, Path]:
    """Where checked states are kept: in the directory, and in the user's cache."""
    key = xxhash.xxh3_128_hexdigest(str(directory.resolve()).encode())
    return directory / VERIFIED, user_cache() / "verified" / f"{key}.json"


def read(directory: Path) -> dict[str, Any]:
    """The manifest of `directory`, checked against its own checksum."""
    path = directory / NAME
    if not path.is_file() or path.is_symlink():
        raise UserError(f"{directory} has no {NAME}: it is not a checkpoint, or was never finished.")
    try:
        manifest = checksummed_json.load(path)
        files = manifest["files"]
        for name, entry in files.items():
            # A manifest is untrusted: its names must not lead out of its directory.
            if name != Path(name).name or name in (".", ".."):
                raise UserError(f"{path} names {name!r}, which is not a plain file name.")
            if not isinstance(entry["bytes"], int) or not isinstance(entry["xxh3_128"], str):
                raise ValueError(f"its entry of {name} is no size and hash")
        version = manifest["format"]
        if not isinstance(manifest["step"], int):
            raise ValueError("its step is no number")
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}).") from error
    if version != 1:
        raise UserError(f"{path} has format {version}; this version reads 1. Use a newer plmtune.")
    return manifest


def _check_file(path: Path, size: int, expected: str | None) -> None:
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is missing or not a plain file.")
    found = path.stat().st_size
    if found != size:
        raise UserError(f"{path} has {found} bytes, and its manifest says {size}.")
    if expected is None:
        return
    try:
        actual = digest(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if actual != expected:
        raise UserError(f"{path} is damaged: xxh3 {actual}, expected {expected}.")
