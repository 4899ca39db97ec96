"""Configs composed of parts that are read, and merged into their schema, once: tests compose a thousand."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra.core.object_type import ObjectType

from plmtune.config import primary, rules, typed_config
from plmtune.config.builtin import builtin_folder


class _Pickler(pickle.Pickler):
    """Keeps classes and types as they are: a schema's class is made while the program runs, so no module has it."""

    def __init__(self, file: io.BytesIO, classes: list[Any]) -> None:
        super().__init__(file)
        self.classes = classes

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, type) and type(value).__module__ != "typing":
            return None
        self.classes.append(value)
        return len(self.classes) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, classes: list[Any]) -> None:
        super().__init__(file)
        self.classes = classes

    def persistent_load(self, number: int) -> Any:
        return self.classes[number]


class Kept:
    """A value of which each caller receives a copy of its own, several times faster than by copy.deepcopy."""

    def __init__(self, value: Any) -> None:
        file, self.classes = io.BytesIO(), list[Any]()
        _Pickler(file, self.classes).dump(value)
        self.content = file.getvalue()

    def copy(self) -> Any:
        return _Unpickler(io.BytesIO(self.content), self.classes).load()


def read_once() -> None:
    """Make Hydra read each of its configs, each schema and each version of a built-in file once in this process."""
    read, kept = ConfigRepository.load_config, dict[Any, tuple[Kept, Any]]()
    builtin = builtin_folder("conf")

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        source = self._find_object_source(config_path=config_path, object_type=ObjectType.CONFIG)
        held: Any = None
        if source is not None and config_path.startswith("hydra/"):
            key: Any = config_path
        elif isinstance(source, StructuredConfigSource) and not config_path.startswith("plmtune_"):
            held = source.store._load(source._normalize_file_name(config_path)).node
            key = (config_path, id(held))  # held below, so no other object has this id
        elif source is not None and source.path == str(builtin):
            found = (builtin / source._normalize_file_name(config_path)).stat()
            key = (config_path, found.st_ino, found.st_mtime_ns, found.st_size)
        else:
            return read(self, config_path)
        if key not in kept:
            kept[key] = Kept(read(self, config_path)), held
        return kept[key][0].copy()

    ConfigRepository.load_config = load_config  # type: ignore[method-assign]


def parse_once() -> None:
    """Parse equal config files once in this process; one that is refused is read again, as the refusal names it."""
    read, kept = rules.read_yaml, dict[bytes, Kept]()

    def read_yaml(path: Path) -> dict[str, Any]:
        try:
            if not path.is_file() or path.stat().st_size > rules.MAX_BYTES:
                return read(path)
            content = path.read_bytes()
        except OSError:
            return read(path)
        if content not in kept:
            kept[content] = Kept(read(path))
        return kept[content].copy()

    primary.read_yaml = typed_config.read_yaml = read_yaml


def merge_once() -> None:
    """Merge equal values into the same schema once in this process."""
    merge, kept = typed_config.merge, dict[Any, dict[str, Any]]()

    def merged(schema: Any, values: dict[str, Any], key: str, place: str) -> dict[str, Any]:
        same = (schema, repr(values))  # which tells 1, 1.0, True and "1" apart
        if same not in kept:
            kept[same] = merge(schema, values, key, place)  # a refusal is not kept: it names the key and the place
        return copy.deepcopy(kept[same])

    typed_config.merge = merged
