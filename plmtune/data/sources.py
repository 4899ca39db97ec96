"""Sources of text: a `Source` yields documents, a `Mix` names several sources, `Prepared` holds tokens."""

from __future__ import annotations

import importlib
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import xxhash

from plmtune.errors import UserError, did_you_mean
from plmtune.registry import Component, register
from plmtune.tokenizers.message import BadRow, Unused

Piece = tuple[str, bool]  # of a document, and whether it ends there


class Dataset(ABC):
    """Data whose order changes only with its content."""

    name: str
    unused: Unused = Unused()  # columns that the latest reading did not use

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes when the content does."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line for a person."""


class Source(Dataset):
    """Documents of text."""

    skipped: int = 0  # bad rows left out by the latest reading

    @abstractmethod
    def documents(self, skip_bad: bool = False) -> Iterator[str]:
        """Read the documents from the first; a bad row raises, or with `skip_bad` is counted in `skipped`."""

    def pieces(self, skip_bad: bool = False) -> Iterator[Iterator[Piece]]:
        """Read the same documents one file at a time, for a hold-out that cuts each file at its tail.

        A long document comes in several pieces, so that memory does not grow with it.
        """
        yield ((text, True) for text in self.documents(skip_bad))

    def _texts(self, rows: Iterable[tuple[str, Any | BadRow]], text_key: str, skip_bad: bool) -> Iterator[str]:
        """Yield the text of each row, given with its place; count columns that are not used, and bad rows."""
        for place, row in rows:
            try:
                if isinstance(row, BadRow):
                    raise row
                text = text_of(row, text_key)
            except BadRow as error:
                if not skip_bad:
                    remedy = "Correct it, or leave such rows out with skip_bad (--skip-bad)"
                    raise UserError(f"{place} {error}. {remedy}") from error
                self.skipped += 1
                continue
            self.unused.add(str(key) for key, value in row.items() if key != text_key and is_something(value))
            yield text


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # pandas writes NaN for a number that is none


def is_something(value: Any) -> bool:
    """Whether a column holds more than null, an empty text, list or object, or a list of these."""
    if isinstance(value, list):
        return any(map(is_something, value))
    return not is_null(value) and value not in ("", {})


def type_name(value: Any) -> str:
    """Return the type of a JSON value in words."""
    if isinstance(value, bool):
        return str(value).lower()
    names = {int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def text_of(row: Any, text_key: str) -> str:
    """Return the text of one row; BadRow if there is none."""
    if not isinstance(row, dict):
        raise BadRow(f"is {type_name(row)}, not an object with the key {text_key}")
    if text_key not in row:
        raise BadRow(f"has no key {text_key}.{did_you_mean(text_key, row)} Choose it with text_key (--text-key)")
    text = row[text_key]
    if not isinstance(text, str):
        raise BadRow(f"holds {type_name(text)} under {text_key}, not text")
    check_unicode(text, f"of {text_key}")
    return text


def check_unicode(text: str, where: str) -> None:
    """Refuse (BadRow) a text that UTF-8 cannot hold."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"holds half a surrogate pair at character {error.start} {where}") from error


# Neither prose nor readable code: tables, fixtures, installed packages, build settings of this machine.
STDLIB_SKIP = {
    "site-packages", "dist-packages", "encodings", "idlelib", "lib2to3", "lib-dynload", "ensurepip",
    "pydoc_data", "turtledemo", "msilib", "__pycache__",
}  # fmt: skip
_STDLIB_SKIP_FILES = ("_sysconfigdata", "bad")


@dataclass(eq=False)
class StandardLibrary(Source):
    """See `stdlib`."""

    name = "stdlib"

    folder: Path
    topics: dict[str, str]

    def documents(self, skip_bad: bool = False) -> Iterator[str]:
        """Read the reference topics, then the sources, each in the order of its name."""
        yield from (text for _, text in sorted(self.topics.items()) if text.strip())
        for path in sorted(self.folder.rglob("*.py")):
            parts = path.relative_to(self.folder).parts
            if STDLIB_SKIP.intersection(parts) or parts[-1].startswith(_STDLIB_SKIP_FILES):
                continue
            try:
                with tokenize.open(path) as file:
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError, OSError):
                continue  # the library's own tests hold files in deliberately wrong encodings
            if text.strip():
                yield text

    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        for text in self.documents():
            digest.update(text.encode("utf-8") + b"\0")
        return digest.hexdigest()

    def describe(self) -> str:
        return f"the standard library: {len(self.topics)} reference topics, sources in {self.folder}"


@register("data", "stdlib")
def stdlib() -> Source:
    """Read the Python standard library that runs this program: English reference topics and Python sources.

    Real text under a free licence (PSF-2.0) that every machine with Python already has.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}  # some distributions put it into a package of its own
    source = StandardLibrary(Path(sysconfig.get_paths()["stdlib"]), topics)
    if next(source.documents(), None) is None:
        raise UserError(
            f"data stdlib: {source.folder} holds no Python sources (a Python without its library's text?). "
            "Use data=files with paths of your own"
        )
    return source


@dataclass(eq=False)
class Prepared(Source):
    """A directory of token shards that `prepare` made before; see `shards`."""

    name = "shards"

    directory: Path

    def documents(self, skip_bad: bool = False) -> Iterator[str]:
        raise UserError(f"{self.directory} holds tokens, not text: it needs no preparing")

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest((self.directory / "manifest.json").read_bytes())

    def describe(self) -> str:
        return f"prepared tokens in {self.directory}"


@register("data", "shards")
def shards(path: str = "") -> Source:
    """Use a directory that `plmtune data prepare` made.

    Args:
        path: the directory that holds manifest.json.
    """
    directory = Path(path).expanduser()
    if not path or not (directory / "manifest.json").is_file():
        raise UserError(
            f"data shards: path={path!r} is no directory of prepared tokens (it has no manifest.json). "
            "Make one with plmtune data prepare"
        )
    return Prepared(directory)


@dataclass(frozen=True)
class Mix:
    """Several sources by name; the weights stand in the phases."""

    sources: dict[str, Source]


@register("data", "mix")
def mix(sources: Annotated[dict[str, Component], "data"] = {}) -> Mix:  # noqa: B006 (only read)
    """Name several sources, for phases to weigh: ``sources: {mine: {component: files, paths: [a.txt]}}``.

    Args:
        sources: name -> a component of the group data, other than mix.
    """
    if not sources:
        raise ValueError("mix needs at least one source, as sources: {name: {component: files, paths: [...]}}")
    built = {}
    for name, chosen in sources.items():
        try:
            source = built[name] = chosen()
        except (UserError, ValueError) as error:
            raise type(error)(f"source {name}: {error}") from error
        if isinstance(source, Mix):
            raise ValueError(f"source {name} of the mix is itself a mix: name its {len(source.sources)} sources here")
    return Mix(built)


def named_sources(data: Source | Mix) -> dict[str, Source]:
    """Return the sources by name; a single source goes by the name of its component."""
    return dict(data.sources) if isinstance(data, Mix) else {data.name: data}
