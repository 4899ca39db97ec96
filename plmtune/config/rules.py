"""What a config may contain. Everything else is refused before Hydra or OmegaConf read it.

Hydra imports and calls what some of its keys name and finds files by names that may climb out of ``conf/``; OmegaConf
runs resolvers; YAML's aliases and references to other keys multiply. A config can come from anywhere, so this lists
what is allowed, not what is known to be harmful. What is refused is a `UserError` that names the file or override, and
the key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from plmtune.config.schema import component_keys
from plmtune.errors import UserError, did_you_mean, refuse_pipe

# Far above any real config, far below what exhausts memory or time.
MAX_BYTES = 1 << 20
MAX_VALUES = 10_000  # aliases counted as often as they stand for something
MAX_DEPTH = 32
MAX_REFERENCES = 1_000

_OPTION = re.compile(r"(?!_)[\w-][\w.-]*")
_PLACE = re.compile(r"(?:(?:override|optional) +)*/?([A-Za-z]\w*(?:/[A-Za-z]\w*)*)")
# ${key.name}, and the environment's variables that are meant for us.
_REFERENCE = re.compile(
    r"\$\{(?:oc\.env:(?P<variable>PLMTUNE_[A-Z0-9_]+)(?:,(?P<default>[^${}\\]*))?|(?P<key>\w[\w-]*(?:\.[\w-]+|\[\d+\])*))\}"
)
_OF_HYDRA = "Hydra's own settings are given on the command line only"
_ON_COMMAND_LINE = re.compile(
    r"hydra/(?:launcher|sweeper)(?:/\w+)*|hydra\.sweep\.(?:dir|subdir)|"
    r"hydra\.launcher(?:\.\w+)+|hydra\.sweeper(?!\.params)(?:\.\w+)+"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with a limit on values and depth, as its aliases expand them."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.depth = self.num_nodes = 0
        self.expanded: dict[yaml.Node, tuple[int, int]] = {}  # node -> values, depth

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self.depth += 1
        self.num_nodes += 1
        if self.depth > MAX_DEPTH or self.num_nodes > MAX_VALUES:
            raise _too_much(mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and node not in self.expanded:
            raise yaml.constructor.ConstructorError(None, None, "an alias stands inside the value that it names", mark)
        if node is not None and not alias:
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                _refuse_twice(node)
                children = [*chain.from_iterable(node.value)]
            sizes, depths = [0, *(self.expanded[n][0] for n in children)], [0, *(self.expanded[n][1] for n in children)]
            size, depth = 1 + sum(sizes), 1 + max(depths)
            if size > MAX_VALUES or depth > MAX_DEPTH:
                raise _too_much(mark)
            self.expanded[node] = size, depth
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date in month 13, a number of thousands of digits
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


def _refuse_twice(node: yaml.MappingNode) -> None:
    """Refuse a duplicate key, of which YAML's loaders silently keep the last."""
    seen: dict[tuple[str, str], yaml.Mark] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                first = seen[key.tag, key.value].line + 1
                said = f"the key {key.value} is there twice, first in line {first}: keep one"
                raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
            seen[key.tag, key.value] = key.start_mark


def _too_much(mark: yaml.Mark) -> yaml.YAMLError:
    said = f"more than {MAX_VALUES:,} values, or nested more than {MAX_DEPTH} deep, aliases counted"
    return yaml.constructor.ConstructorError(None, None, said, mark)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config file, which is untrusted."""
    refuse_pipe(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}: is larger than {MAX_BYTES:,} bytes, which no config is.")
        content = yaml.load(data.decode("utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"{path}{where}: is not YAML that a config can hold ({problem:.200}).") from error
    if content is None:
        raise UserError(f"{path}: is empty. A config holds at least one key, such as recipe: pretrain.")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not keys and values.")
    return content


def check_file(content: Mapping[str, Any], path: Path) -> None:
    """Refuse keys, values and choices of a file that a config cannot have."""
    for name, child in content.items():
        if name == "defaults":
            _check_defaults(child, path)
        elif name == "hydra" or str(name).startswith("hydra."):
            raise UserError(f"{path}, key {name}: {_OF_HYDRA}.")
        else:
            check_value({name: child}, f"{path}, ")


def _check_defaults(entries: Any, path: Path) -> None:
    if not isinstance(entries, list):
        raise UserError(f"{path}, key defaults: must be a list, such as [override /model: plm], not {entries!r:.80}.")
    for entry in entries:
        if entry == "_self_":
            continue
        if isinstance(entry, str):
            parts = entry.removeprefix("/").split("/")
            fine = all(map(is_option, parts)) and (len(parts) == 1 or parts[0] in component_keys())
            of_hydra = parts[0].startswith("hydra")
        elif isinstance(entry, dict) and len(entry) == 1:
            ((place, option),) = entry.items()
            found = _PLACE.fullmatch(place) if isinstance(place, str) else None
            fine = found is not None and (option is None or (isinstance(option, str) and is_option(option)))
            of_hydra = re.search(r"(?:^|[ /])hydra\b", str(place)) is not None
        else:
            fine = of_hydra = False
        if of_hydra:
            raise UserError(f"{path}, key defaults: {_OF_HYDRA}.")
        if not fine:
            raise UserError(f"{path}, key defaults: {entry!r:.80} is no choice. Write - override /GROUP: NAME.")


def is_option(name: str) -> bool:
    """Whether `name` can only be a name: no path, no package, no reference."""
    return _OPTION.fullmatch(name) is not None and ".." not in name


def check_value(value: Any, place: str, key: str = "") -> None:
    """Refuse keys that Hydra interprets, types of values that a config cannot hold, and unknown references."""
    if isinstance(value, dict):
        for name, child in value.items():
            if not isinstance(name, str):
                raise UserError(f"{place}key {key or name}: its key {name!r:.80} is no text. Put it in quotes.")
            here = f"{key}.{name}" if key else name
            if any(re.fullmatch(r"_\w*_|\(\)", part) for part in name.split(".")):
                raise UserError(
                    f"{place}key {here:.200}: not allowed. Components are named (component: NAME), never imported."
                )
            check_value(child, place, here)
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            check_value(child, place, f"{key}[{index}]")
    else:
        check_scalar(value, place, key)
        if isinstance(value, str) and ("${" in _REFERENCE.sub("", value) or "\\${" in value):
            raise _bad_reference(value, place, key)


def _bad_reference(value: str, place: str, key: str) -> UserError:
    if variable := re.search(r"\$\{ *oc\.env: *(\w*)", value):
        return UserError(
            f"{place}key {key}: {value!r:.80}: a config is saved with its run, so it may read only variables that "
            f"begin with PLMTUNE_. For others use the shell, as in {key}=${variable[1]}."
        )
    return UserError(
        f"{place}key {key}: {value!r:.80} is no reference that a config can hold: only ${{key.name}} and "
        "${oc.env:PLMTUNE_NAME} are."
    )


def check_scalar(value: Any, place: str, key: str) -> None:
    """Refuse values that no key takes: numbers beyond 64 bits, text that no file can hold, dates, sets."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{place}key {key}: a whole number of {value.bit_length()} bits; at most 63 are possible.")
    if isinstance(value, str):
        if value == "???":
            raise UserError(f"{place}key {key}: has no value (???). Give one.")
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise UserError(f"{place}key {key}: holds a character that no file or name can hold.")
    elif value is not None and not isinstance(value, bool | int | float):
        raise UserError(f"{place}key {key}: a {type(value).__name__} is not possible here. Put it in quotes.")


def check_override(text: str, key: str, package: str | None, value: Any, *, multirun: bool) -> None:
    """Refuse an override of a key that Hydra interprets.

    Args:
        key, package, value: of `text`, parsed; the value a list of all where there are several.
        multirun: Hydra's launchers and sweepers may be set.
    """
    place = f"override {text:.200}: "
    values = value if isinstance(value, list) else [value]
    parts = re.split(r"[./]", key)
    if package is not None:
        raise UserError(f"{place}not allowed. A group has one place, without @.")
    if any(re.fullmatch(r"_\w*_", part) for part in parts):
        raise UserError(f"{place}not allowed. Components are named, never imported.")
    chosen = values if "/" in key else [v for v in values if not isinstance(v, dict)] if key in component_keys() else []
    if not all(v is None or (isinstance(v, str) and is_option(v)) for v in chosen):
        raise UserError(f"{place}{str(value)!r:.80} is no name of an option.")
    if parts[0] != "hydra":
        check_value({key: value}, place.removesuffix(": ") + ", ")
        return
    if not multirun:
        raise UserError(f"{place}not allowed. Hydra's settings count with -m only.")
    # Hydra resolves its own settings itself, so no resolver may stand in them.
    if not _ON_COMMAND_LINE.fullmatch(key) or "${" in re.sub(r"\$\{hydra[.:][\w.]+\}", "", text):
        raise UserError(
            f"{place}not allowed. Components are named, never imported; of Hydra's settings hydra/launcher, "
            "hydra/sweeper, their keys, hydra.sweep.dir and hydra.sweep.subdir are free."
        )
    if any(isinstance(v, dict) for v in values):
        check_value(value, place)


def resolve(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Replace references by values, with a limit; OmegaConf's own references multiply without one."""
    left = {"references": MAX_REFERENCES, "characters": MAX_BYTES}

    def plain(value: Any, key: str, open_keys: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {name: plain(child, f"{key}.{name}" if key else name, open_keys) for name, child in value.items()}
        if isinstance(value, list):
            return [plain(child, f"{key}[{index}]", open_keys) for index, child in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if whole := _REFERENCE.fullmatch(value):
            return target(whole, key, open_keys)
        if "${" in _REFERENCE.sub("", value):
            raise _bad_reference(value, place, key)
        return _REFERENCE.sub(lambda found: str(target(found, key, open_keys)), value)

    def target(found: re.Match[str], key: str, open_keys: tuple[str, ...]) -> Any:
        left["references"] -= 1
        if found["variable"]:
            result: Any = os.environ.get(found["variable"], found["default"])
            if result is None:
                raise UserError(f"{place}key {key}: the environment has no variable {found['variable']}.")
            if "${" in result:  # it would be read as a reference
                raise UserError(f"{place}key {key}: the variable {found['variable']} holds a reference itself.")
        else:
            result = values
            for part in re.findall(r"[\w-]+", found["key"]):
                try:
                    result = result[int(part)] if isinstance(result, list) else result[part]
                except (KeyError, IndexError, ValueError, TypeError):
                    near = did_you_mean(part, result) if isinstance(result, dict) else ""
                    raise UserError(f"{place}key {key}: {found[0]} refers to no key.{near}") from None
            if isinstance(result, dict | list):
                raise UserError(f"{place}key {key}: {found[0]} refers to a table; only to single values is possible.")
            if found["key"] in open_keys or len(open_keys) > MAX_DEPTH:
                raise UserError(f"{place}key {key}: {found[0]} refers to itself, or through too many others.")
            result = plain(result, key, (*open_keys, found["key"]))
        left["characters"] -= len(result) if isinstance(result, str) else 0
        if min(left.values()) < 0:
            raise UserError(f"{place}key {key}: references that make more than a config can hold.")
        return result

    done: dict[str, Any] = plain(values, "", ())
    return done
