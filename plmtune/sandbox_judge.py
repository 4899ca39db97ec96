"""The process in which tests run, apart from the code that they test, and the only one that has the verdict's pipe.

The tests' names are their own, then Python's, then the code's; where the code is named like a builtin and no assertion
names anything else, the code's come before Python's. What the code returns comes as a plain value, made here
(`plmtune.sandbox_wire`), or as a `Handle`: an object of the code's own, whose methods run where the code is.
"""

from __future__ import annotations

import _ast
import _operator
import builtins
import marshal
import os
import sys
import types

from plmtune.sandbox_wire import Peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any, NoReturn

_SIZE = 2000  # characters of a reason
_CLASSES_OF_CALLABLES = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    type,
)

# What a fresh interpreter starts with: the programs that follow are modules, all but the last of them imported.
STUB = """
import marshal, sys, types
inlet, outlet = (open(int(fd), mode) for fd, mode in zip(sys.argv[1:], ("rb", "wb")))
del sys.argv[1:]
for name, code in marshal.loads(inlet.read(int.from_bytes(inlet.read(4), "little"))):
    module = sys.modules[name] = types.ModuleType(name)
    exec(code, module.__dict__)
del name, code
module.main(inlet, outlet)
"""

_CHANGING = (list, dict, set)
_ARITHMETIC = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)


class Handle:
    """An object of the code's own, in the process of the tests.

    Attributes, methods, items and iteration are the object's. Comparisons are asked of it only among objects of the
    code: one that says that it equals everything equals no value of the tests, and arithmetic with one gives no number.
    Only an object of a subclass of int, str, list, ... is to values of the tests what its base class holds of it.
    """

    __slots__ = ("__held", "__peer")

    def __init__(self, peer: Peer) -> None:
        object.__setattr__(self, "_Handle__peer", peer)
        object.__setattr__(self, "_Handle__held", None)

    def __getattr__(self, name: str) -> Any:
        return self.__peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__peer.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self.__peer.ask("delattr", self, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.__peer.ask("call", self, *arguments, **named)

    def __getitem__(self, key: Any) -> Any:
        return self.__peer.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__peer.ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self.__peer.ask("delitem", self, key)

    def __iter__(self) -> Any:
        return self.__peer.ask("iter", self)

    def __next__(self) -> Any:
        return self.__peer.ask("next", self)

    def __len__(self) -> int:
        return self.__peer.ask("len", self)

    def __bool__(self) -> bool:
        return self.__peer.ask("bool", self)

    def __repr__(self) -> str:
        return self.__peer.ask("repr", self)

    def __str__(self) -> str:
        return self.__peer.ask("str", self)

    def __format__(self, how: str) -> str:
        return self.__peer.ask("format", self, how)

    def __contains__(self, wanted: Any) -> bool:
        return any(item is wanted or item == wanted for item in self)

    def __enter__(self) -> Any:
        return self.__getattr__("__enter__")()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        return self.__getattr__("__exit__")(kind, error, None)

    def __copy__(self) -> Any:
        return self.__peer.ask("copied", "copy", self)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__peer.ask("copied", "deepcopy", self)

    def __instancecheck__(self, value: Any) -> bool:
        return self.__peer.ask("isinstance", value, self) is True

    def __subclasscheck__(self, kind: Any) -> bool:
        return self.__peer.ask("issubclass", kind, self) is True

    def __plain(self) -> Any:
        """The value that its base class holds, NotImplemented if none; what cannot change is asked once."""
        if self.__held is None:
            held = self.__peer.ask("plain", self)
            if type(held) in _CHANGING:
                return held
            object.__setattr__(self, "_Handle__held", NotImplemented if type(held) in (Handle, type(None)) else held)
        return self.__held

    def __fixed(self) -> Any:
        """As `__plain`, of what cannot change: an answer that changed could lie between any two bounds."""
        held = self.__plain()
        return NotImplemented if type(held) in _CHANGING else held

    def __hash__(self) -> int:
        held = self.__fixed()
        return id(self) if held is NotImplemented else hash(held)

    def __eq__(self, other: object) -> Any:
        if self is other or other is None:
            return self is other or NotImplemented
        if isinstance(other, Handle):
            return self.__peer.ask("eq", self, other) is True
        held = self.__plain()
        return NotImplemented if held is NotImplemented else held == other

    def __lt__(self, other: Any) -> bool:
        return self.__compared("lt", other)

    def __le__(self, other: Any) -> bool:
        return self.__compared("le", other)

    def __gt__(self, other: Any) -> bool:
        return self.__compared("gt", other)

    def __ge__(self, other: Any) -> bool:
        return self.__compared("ge", other)

    def __compared(self, how: str, other: Any) -> bool:
        if type(other) is not Handle:
            held = self.__fixed()
            return NotImplemented if held is NotImplemented else getattr(_operator, how)(held, other)
        return self.__peer.ask(how, self, other) is True

    def __operate(self, how: str, *operands: Any) -> Any:
        found = self.__peer.ask(how, *operands)
        if type(found) is Handle:
            return found
        held = [each.__plain() if type(each) is Handle else each for each in operands]
        if any(each is NotImplemented for each in held):
            raise TypeError(f"{how} of an object of the code's own is no value that tests could trust")
        return getattr(_operator, how)(*held)

    def __number(self) -> Any:
        held = self.__fixed()
        if held is NotImplemented:
            raise TypeError("an object of the code's own is no number that tests could trust")
        return held

    def __int__(self) -> int:
        return int(self.__number())

    def __float__(self) -> float:
        return float(self.__number())

    def __index__(self) -> int:
        return _operator.index(self.__number())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.__number(), digits)


def _give_operators() -> None:
    def forward(name: str) -> Any:
        return lambda self, other: self._Handle__operate(name, self, other)

    def reflected(name: str) -> Any:
        return lambda self, other: self._Handle__operate(name, other, self)

    def unary(name: str) -> Any:
        return lambda self: self._Handle__operate(name, self)

    for name in _ARITHMETIC:
        function = f"{name}_" if name in ("and", "or") else name
        setattr(Handle, f"__{name}__", forward(function))
        setattr(Handle, f"__r{name}__", reflected(function))
    for name in ("neg", "pos", "abs", "invert"):
        setattr(Handle, f"__{name}__", unary(name))


_give_operators()


class Names(dict[str, object]):
    """Python's builtin names, and after them the code's: where the interpreter looks last."""

    def __init__(self, peer: Peer, own: set[str]) -> None:
        """Begin with all builtins but those that are the code's `own` to define."""
        super().__init__({name: value for name, value in vars(builtins).items() if name not in own})
        self.peer = peer

    def __missing__(self, name: str) -> Any:
        if not name.startswith("__"):
            known, value = self.peer.ask("name", name)
            if known is True:
                return value
        return vars(builtins)[name]


def named_as_builtins(tests: str) -> set[str]:
    """The builtins' names that all assertions share, where none of them names anything else.

    `assert sum(10, 15) == 6` can only mean a `sum` of the code's: else it would test nothing of it.
    """
    tree = compile(tests, "<tests>", "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)
    named = [
        {each.id for each in _nodes(node) if isinstance(each, _ast.Name)}
        for node in _nodes(tree)
        if isinstance(node, _ast.Assert)
    ]
    if not named or not set.union(*named) <= vars(builtins).keys():
        return set()
    return {name for name in set.intersection(*named) if not name.startswith("__")}


def _nodes(tree: _ast.AST) -> list[_ast.AST]:
    """All of a tree; the module `ast`, which has a function for it, takes longer to import than most tests to run."""
    found = [tree]
    for node in found:
        for field in node._fields:
            value = getattr(node, field, None)
            found += [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, _ast.AST)]
    return found


class Judge(Peer):
    """The side of the tests: the code may name the functions that it was given, and nothing else."""

    def __init__(self, inlet: Any, outlet: Any, verdict: int, code: str, tests: str) -> None:
        super().__init__(inlet, outlet, {"code": self._code, "begin": lambda: None, "call": self._call})
        self.verdict = verdict
        self.texts = code, tests
        self.process = os.getpid()

    def make_proxy(self, number: int) -> Any:
        return Handle(self)

    def may_export(self, value: Any) -> bool:
        return isinstance(value, _CLASSES_OF_CALLABLES)

    def fail(self, reason: str) -> NoReturn:
        if reason:
            self.end("reason", f"broke off from its tests: {reason[:_SIZE]}")
        self.end("gone")

    def say(self, fact: str, what: str = "") -> None:
        """Tell who started this process, in a line."""
        if os.getpid() == self.process:  # not a child that the tests made
            os.write(self.verdict, fact.encode() + b" " + what.encode("unicode_escape") + b"\n")

    def end(self, fact: str, what: str = "") -> NoReturn:
        """Tell the verdict, and end."""
        self.say(fact, what)
        os._exit(0)

    def _code(self) -> tuple[str, bool]:
        del self.functions["code"]  # is told once
        self.say("ready")
        return self.texts[0], bool(self.texts[1].strip())

    def _call(self, called: Any, *arguments: Any, **named: Any) -> Any:
        if not self.exported(called):
            raise TypeError("only functions that were given as arguments can be called")
        return called(*arguments, **named)


def main(
    inlet: int, outlet: int, verdict: int, programs: list[tuple[str, CodeType]], code: str, tests: str
) -> NoReturn:
    """Send the programs to the interpreter that waits for them, run the tests, and say what became of them."""
    peer = Judge(os.fdopen(inlet, "rb"), os.fdopen(outlet, "wb"), verdict, code, tests)
    try:
        data = marshal.dumps(programs)
        peer.outlet.write(len(data).to_bytes(4, "little") + data)
        peer.outlet.flush()
    except OSError:
        peer.end("gone")
    peer.serve()
    peer.serve()
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        module.__dict__["__builtins__"] = Names(peer, named_as_builtins(tests))
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), module.__dict__)
        sys.stdout.flush()
    except BaseException as error:
        peer.end("reason", _told(error, tests))
    peer.end("finished")


def _told(error: BaseException, tests: str) -> str:
    """Print an error as the interpreter would, with the lines of the tests alone; its last line."""
    import linecache
    import traceback

    linecache.cache["<tests>"] = (len(tests), None, tests.splitlines(keepends=True), "<tests>")
    told = traceback.TracebackException.from_exception(error)
    told.stack = traceback.StackSummary.from_list([each for each in told.stack if each.filename == "<tests>"])
    text = [line[:_SIZE] for line in told.format(chain=False)]
    print("".join(text).encode(errors="backslashreplace").decode(), end="", file=sys.__stdout__, flush=True)
    return text[-1].strip().splitlines()[-1]
