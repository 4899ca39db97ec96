"""Conversations of system, user and assistant, from rows of every usual shape; docstrings of Python as such."""

from __future__ import annotations

import ast
import sysconfig
import tokenize
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import xxhash

from plmtune.data.messages import COMPLETIONS, MESSAGES, PAIRS, PROMPTS, Parts, joined, messages_of, text_under
from plmtune.data.rows import FromRows, Refused, Rows
from plmtune.data.sources import STDLIB_SKIP, Dataset, type_name
from plmtune.errors import UserError
from plmtune.ranges import NotEmpty, check
from plmtune.registry import register
from plmtune.tokenizers.message import BadRow, Message, Unused

Shape = Literal["messages", "sharegpt", "alpaca", "prompt_completion"]

_NAMES = frozenset((*MESSAGES, *PROMPTS, *COMPLETIONS))
_PAIR = "is a preference pair, not a conversation: data=preferences reads such rows, messages_key=chosen takes one side"
_LABELLED = (
    "has a label that says whether its answer is good: data=preferences with loss=kto reads such rows (to train on all "
    "of them, liked or not, name the columns: messages_key, or prompt_key and completion_key)"
)


@dataclass(frozen=True)
class Conversation:
    """A conversation with an answer, or several."""

    messages: tuple[Message, ...]  # perhaps tools, perhaps a system message, then the others in the order of the row
    place: str  # "FILE, line 17"
    extra: dict[str, Any] = field(default_factory=dict)  # the other columns of its row, as far as they are JSON
    unused: tuple[str, ...] = field(default=(), compare=False)  # the columns that nothing reads


class Conversations(Dataset):
    """A source of conversations."""

    refused: Refused  # rows that the latest reading could not use

    @abstractmethod
    def conversations(self, skip_bad: bool = False) -> Iterator[Conversation]:
        """Read them; bad rows are collected in `refused`, and without `skip_bad` raised at the end."""


@dataclass(frozen=True)
class Keys:
    """Keys of a row that replace the usual names."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    system: str | None = None


@dataclass(eq=False)
class ConversationRows(FromRows, Conversations):
    name = "conversations"

    shape: Literal["auto"] | Shape
    keys: Keys

    def conversations(self, skip_bad: bool = False) -> Iterator[Conversation]:
        """Read the rows; the first that fits a shape decides the shape of all."""
        shape: Shape | None = None if self.shape == "auto" else self.shape

        def convert(row: dict[str, Any], place: str) -> Conversation:
            nonlocal shape
            shape = shape or detect(row, self.keys)
            return conversation_of(row, place, shape, self.keys)

        return self._read(convert, skip_bad)

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.rows.fingerprint()} {self.shape} {self.keys}".encode())


@register("data", "conversations")
def conversations(
    paths: tuple[str, ...] = (),
    *,
    hub: str | None = None,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    shape: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto",
    messages_key: str | None = None,
    prompt_key: str | None = None,
    completion_key: str | None = None,
    system_key: str | None = None,
    encoding: str = "utf-8",
    max_rows: int | None = None,
) -> Conversations:
    """Read conversations from JSON, JSON lines, CSV, TSV, Parquet or the hub.

    Args:
        paths: files, folders or globs.
        hub: a dataset of the Hugging Face hub, instead of paths.
        subset: its configuration; needed for a dataset with several and no default.
        split: train, validation, ...
        revision: branch, tag or commit; a commit pins the data.
        shape: auto detects it from the first row. messages: a list of role and content. sharegpt: a list of from and
            value. alpaca: instruction, input and output, perhaps history and system. prompt_completion: two texts, or
            two lists of messages, under the usual names (prompt, question, ...; completion, response, answer, ...).
        messages_key: key of the list, where it is not messages, conversations or conversation.
        prompt_key: key of the prompt, where it has another name.
        completion_key: key of the answer, where it has another name.
        system_key: key of the system's message, where it is not system or system_prompt.
        encoding: of JSON and CSV.
        max_rows: read so many rows and no more.
    """
    keys = {"messages_key": messages_key, "prompt_key": prompt_key, "completion_key": completion_key}
    check(NotEmpty(), **keys, system_key=system_key)
    lists = shape in ("messages", "sharegpt")
    if (prompt_key or completion_key) and (messages_key or shape not in ("auto", "prompt_completion")):
        raise ValueError("prompt_key and completion_key go with shape=prompt_completion")
    if messages_key and not lists and shape != "auto":
        raise ValueError(f"messages_key goes with shape=messages or sharegpt, not {shape}")
    rows = Rows(paths, hub=hub, subset=subset, split=split, revision=revision, encoding=encoding, max_rows=max_rows)
    return ConversationRows(rows, shape, Keys(messages_key, prompt_key, completion_key, system_key))


def detect(row: dict[str, Any], keys: Keys = Keys()) -> Shape:
    """Return the shape of a row; BadRow if it fits none."""
    parts = Parts(row)
    _refuse_other_kinds(parts, keys)
    listed = _list_key(parts, keys)
    if listed is not None:
        first = next(iter(parts.row[listed]), None)
        return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else "messages"
    named = keys.prompt or keys.completion
    # dolly has context and response where Alpaca has input and output
    if not named and "instruction" in parts and ("output" in parts or ("context" in parts and "response" in parts)):
        return "alpaca"
    if parts.first(PROMPTS, keys.prompt) and parts.first(COMPLETIONS, keys.completion):
        return "prompt_completion"
    if (key := parts.first(MESSAGES, keys.messages)) is not None:
        raise BadRow(f"holds {type_name(parts.row[key])} under {key}, not a list of messages")
    held = ", ".join(map(str, list(parts.row)[:8])) or "nothing"
    near = [key for key in parts.row if str(key) not in _NAMES and str(key).strip().lower() in _NAMES]
    hint = f" ({', '.join(repr(str(key).strip().lower()) for key in near[:4])} would be read)" if near else ""
    raise BadRow(
        f"fits no known shape of a conversation (it holds {held:.200}){hint}; see shape, prompt_key, completion_key"
    )


def conversation_of(row: dict[str, Any], place: str, shape: Shape, keys: Keys = Keys()) -> Conversation:
    """Read one row; BadRow if it is not of that shape, or no conversation that can be learned from."""
    parts = Parts(row)
    _refuse_other_kinds(parts, keys)
    opening = parts.opening(keys.system)
    if shape in ("messages", "sharegpt"):
        listed = _list_key(parts, keys)
        if listed is None:
            raise BadRow(f"is not of the shape {shape}: it has no list under {keys.messages or ' or '.join(MESSAGES)}")
        messages = messages_of(parts.take(listed))
    elif shape == "alpaca":
        messages = parts.question("instruction") + _answer(parts, "output" if "output" in parts else "response")
    else:
        prompt, completion = parts.first(PROMPTS, keys.prompt), parts.first(COMPLETIONS, keys.completion)
        if prompt is None:
            raise BadRow(f"has no {keys.prompt or ' or '.join(PROMPTS)} (see prompt_key)")
        if completion is None:
            raise BadRow(f"has no {keys.completion or ' or '.join(COMPLETIONS)} (see completion_key)")
        messages = parts.question(prompt, alone=keys.prompt is not None) + _answer(parts, completion)
    messages = joined(opening, messages)
    if not any(message.role == "assistant" for message in messages):
        raise BadRow("has no assistant turn")
    return Conversation(tuple(messages), place, parts.extra(), parts.unused())


def _answer(parts: Parts, key: str) -> list[Message]:
    answer = parts.take(key)
    is_list = isinstance(answer, list) and any(isinstance(turn, dict) and "type" not in turn for turn in answer)
    return messages_of(answer) if is_list else [Message("assistant", text_under(answer, f"under {key}"))]


def _refuse_other_kinds(parts: Parts, keys: Keys) -> None:
    if keys == Keys() and any(one in parts and other in parts for one, other in PAIRS):
        raise BadRow(_PAIR)
    if keys in (Keys(), Keys(system=keys.system)) and parts.label() is not None:
        raise BadRow(_LABELLED)


def _list_key(parts: Parts, keys: Keys) -> str | None:
    names = (keys.messages,) if keys.messages else MESSAGES
    return next((name for name in names if isinstance(parts.row.get(name), list)), None)


class Docstrings(Conversations):
    name = "docstrings"
    refused, unused = Refused(), Unused()  # of these none is

    def conversations(self, skip_bad: bool = False) -> Iterator[Conversation]:
        for function in public_functions():
            messages = (Message("user", function.question), Message("assistant", function.doc))
            yield Conversation(messages, f"docstring of {function.where}")

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(repr(public_functions()).encode("utf-8", "surrogatepass"))

    def describe(self) -> str:
        return f"docstrings of {len(public_functions()):,} functions of the standard library"


@register("data", "docstrings")
def docstrings() -> Conversations:
    """Ask what each public function of the standard library does; its docstring's first paragraph answers.

    The data can be checked, and is part of every Python.
    """
    public_functions()
    return Docstrings()


# Not meant for users of the library, or without useful docstrings.
_SKIPPED_FOLDERS = STDLIB_SKIP | {"test", "tests", "config", "distutils"}
_LONGEST_SIGNATURE = 80
_LONGEST_ANSWER = 300
_SHORTEST_ANSWER = 12


@dataclass(frozen=True)
class Function:
    """A public function or method of the standard library; `doc` is the first paragraph of its docstring."""

    module: str
    name: str  # a method's with its class: PurePath.joinpath
    signature: str  # "(*pathsegments)"
    doc: str

    @property
    def where(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def question(self) -> str:
        """A user's question about the function."""
        return f"What does {self.where}{self.signature} do?"


@cache
def public_functions() -> tuple[Function, ...]:
    """List the standard library's public functions with a docstring, from its sources: nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[tuple[str, str], Function] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts or _SKIPPED_FOLDERS.intersection(parts) or any(part.startswith("_") for part in parts):
            continue
        try:
            with tokenize.open(path) as file:
                tree = ast.parse(file.read())
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for function in _functions_in(tree.body, ".".join(parts)):
            found.setdefault((function.module, function.name), function)
    if not found:
        raise UserError(
            f"data docstrings: {root} holds no Python sources (a Python without its library's text?). "
            "Use data=conversations with paths of your own"
        )
    return tuple(found[key] for key in sorted(found))


def _functions_in(body: list[ast.stmt], module: str, owner: str = "") -> Iterator[Function]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _functions_in(node.body, module, f"{owner}{node.name}.")
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if any("property" in text or text.endswith((".setter", ".deleter")) for text in decorators):
            continue
        arguments = node.args
        if owner and "staticmethod" not in decorators:  # self, or the class
            del (arguments.posonlyargs or arguments.args)[:1]
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        signature = f"({ast.unparse(arguments)})"
        doc = (ast.get_docstring(node) or "").split("\n\n")[0]
        # A paragraph of code or a signature is no explanation.
        doc = "" if ">>>" in doc or "->" in doc else " ".join(doc.split())
        if len(signature) <= _LONGEST_SIGNATURE and _SHORTEST_ANSWER <= len(doc) <= _LONGEST_ANSWER:
            yield Function(module, owner + node.name, signature, doc)
