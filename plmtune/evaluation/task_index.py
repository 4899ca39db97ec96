"""Names of lm-eval's tasks, groups and tags, without importing lm-eval.

lm-eval's own index parses 14,000 files and their includes in about 20 seconds a process. Here every file is parsed
once, in about two seconds, and the result is cached in the user's cache folder. The rules are those of
`lm_eval.tasks._index`; a test compares the two.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
import yaml

from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.atomic import atomic_write, user_cache
from plmtune.io.untrusted import load_yaml

Kind = Literal["task", "class", "group", "tag"]
_KINDS: tuple[Kind, ...] = ("class", "group", "task")  # the first that is a key of a file
# Whether a task runs model-written code: no, with the metric code_eval (in our sandbox), or by its own means.
Code = Literal["no", "code_eval", "own"]

_FORMAT = 3  # of the cached index
_PASSED_OVER = {"__pycache__", ".ipynb_checkpoints"}
_LOOKS_LIKE_A_TASK = {"dataset_path", "doc_to_text", "doc_to_target", "output_type", "metric_list"}


@dataclass(frozen=True)
class Known:
    """A name that lm-eval knows.

    Attributes:
        path: of its YAML; None for a tag.
        output: output_type of a task, "" if its class decides.
        members: names in a group or a tag.
    """

    name: str
    kind: Kind
    path: str | None
    output: str
    code: Code
    members: tuple[str, ...]


def lm_eval_folder() -> Path:
    """Return the folder of lm-eval's tasks without importing lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "Evaluation needs the package lm-eval. Install it with: "
            f"{shlex.quote(sys.executable)} -m pip install 'lm-eval>=0.4.13'"
        )
    return Path(spec.submodule_search_locations[0]) / "tasks"


def lm_eval_index() -> dict[str, Known]:
    """Return all names of lm-eval's own tasks, from the cache if it is valid and of this version."""
    folder = lm_eval_folder()
    kept = _cache_file(folder)
    with contextlib.suppress(OSError, ValueError):  # missing or damaged
        return _unpack(kept.read_bytes())
    if os.environ.get("RANK", "0") == "0":
        terminal.echo("Reading the names of lm-eval's tasks; the next time they are known", err=True)
    known = read_folder(folder, strict=False)
    with contextlib.suppress(OSError):  # no home, or not writable: it takes seconds each time
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept) as temporary:
            temporary.write_bytes(_pack(known))
    return known


def read_folder(folder: Path, *, strict: bool) -> dict[str, Known]:
    """Read the names that the YAML files below a folder define.

    Args:
        folder: searched recursively.
        strict: a file that cannot be read is an error; else it is skipped, as in lm-eval.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --include takes one with the YAML files of your tasks")
    reader = _Reader()
    found: dict[str, Known] = {}
    for path in _yaml_files(folder):
        try:
            config, chain = reader.merged(path)
            kind = next((kind for kind in _KINDS if kind in config), None)
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            if strict:
                raise UserError(f"{path} cannot be read as a task: {_in_words(error)}") from error
            continue
        if kind is None:
            reader.nameless[path] = _LOOKS_LIKE_A_TASK & config.keys()
            continue
        name = config["group" if kind == "group" else "task"] if kind != "class" else config.get("task")
        if not isinstance(name, str):
            if strict:
                raise UserError(f"{path}: the key {kind} must be a name, not {name!r}")
            continue
        if name in found:  # lm-eval keeps the first
            continue
        tags = _texts(config.get("tag"))
        members = tuple(_members(config.get("task"))) if kind == "group" else ()
        code = _code_of(config, chain)
        output = str(config.get("output_type") or ("generate_until" if kind == "task" else ""))
        found[name] = Known(name, kind, str(path), "" if kind == "group" else output, code, members)
        for tag in tags if kind != "group" else ():
            held = found.get(tag) or Known(tag, "tag", None, "", "no", ())
            if held.kind == "tag":
                found[tag] = Known(tag, "tag", None, "", "no", (*held.members, name))
    if strict:
        for path, keys in reader.nameless.items():
            if keys and path not in reader.included:
                raise UserError(f"{path} has {', '.join(sorted(keys))} but no key task, which names it: add task: NAME")
    return found


class _Reader:
    """Reads each YAML file once, as lm-eval does, but without functions."""

    def __init__(self) -> None:
        self._places: dict[tuple[Path, str], Path] = {}  # most files include one of a few
        self._parsed: dict[Path, dict[str, Any]] = {}
        self.included: set[Path] = set()
        self.nameless: dict[Path, set[str]] = {}

    def merged(self, path: Path, seen: set[Path] | None = None) -> tuple[dict[str, Any], list[Path]]:
        """Return a file merged with its includes, and all these files."""
        seen = set() if seen is None else seen
        if path in seen:
            raise ValueError(f"it includes {path} twice, or itself")
        seen.add(path)
        if path not in self._parsed:
            parsed = load_yaml(path.read_text(encoding="utf-8"), _Loader)
            if not isinstance(parsed, dict):
                raise ValueError(f"it holds a {type(parsed).__name__}, not keys and values")
            self._parsed[path] = parsed
        own = dict(self._parsed[path])
        merged: dict[str, Any] = {}
        chain = [path]
        for name in _texts(own.pop("include", None)):
            included = self._places.get((path.parent, name))
            if included is None:
                included = self._places[path.parent, name] = (path.parent / name).resolve()
                self.included.add(included)
            inherited, files = self.merged(included, seen)
            inherited.pop("task_list", None)
            merged |= inherited
            chain += files
        return merged | own, chain


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A safe loader for which ``!function utils.name`` is text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def _yaml_files(folder: Path) -> list[Path]:
    found: list[str] = []
    for parent, folders, files in os.walk(folder.resolve()):
        folders[:] = [name for name in folders if name not in _PASSED_OVER]
        found += [f"{parent}/{name}" for name in files if name.endswith(".yaml")]
    return [Path(path) for path in sorted(found)]


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _members(value: Any) -> Iterator[str]:
    """Yield the names in a group: plain, with settings, or in a nested group."""
    for item in [value] if isinstance(value, str | dict) else value or []:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            if isinstance(item.get("group"), str):
                yield item["group"]
                yield from _members(item.get("task"))
            elif isinstance(item.get("task"), str):
                yield item["task"]


def _code_of(config: dict[str, Any], chain: list[Path]) -> Code:
    if not config.get("unsafe_code"):
        return "no"
    # Its functions are beside the YAML that names them.
    sources = [*chain, *(path for folder in {path.parent for path in chain} for path in folder.glob("*.py"))]
    return "code_eval" if any(b"code_eval" in path.read_bytes() for path in sources) else "own"


def _in_words(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename}, which it includes, is not there"
    return str(error) or type(error).__name__


def _cache_file(folder: Path) -> Path:
    place = xxhash.xxh3_64_hexdigest(str(folder).encode())
    return user_cache() / f"lm_eval-{importlib.metadata.version('lm_eval')}-{_FORMAT}-{place}.json"


def _pack(known: dict[str, Known]) -> bytes:
    body = json.dumps([astuple(entry) for entry in known.values()]).encode()
    return xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body


def _unpack(packed: bytes) -> dict[str, Known]:
    digest, _, body = packed.partition(b"\n")
    if digest != xxhash.xxh3_128_hexdigest(body).encode():
        raise ValueError("damaged")
    return {
        name: Known(name, kind, path, output, code, tuple(members))
        for name, kind, path, output, code, members in json.loads(body)
    }
