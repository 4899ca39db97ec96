"""The process in which code under test lives. Whatever it does to itself, it can only answer.

Sent to a fresh interpreter by `plmtune.sandbox_judge`, together with `plmtune.sandbox_wire`.
"""

from __future__ import annotations

import builtins
import operator
import os
import sys
import types

from plmtune.sandbox_wire import Peer, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_OPERATORS = {
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift"),
    *("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "eq", "getitem", "setitem", "delitem"),
}
_FUNCTIONS = {
    *("getattr", "setattr", "delattr", "iter", "next", "len", "bool", "repr", "str", "format"),
    *("isinstance", "issubclass"),
}


class Callback:
    """A function of the tests, which the code was given as an argument."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask("call", self, *arguments, **named)


class Candidate(Peer):
    """The side of the code: everything of it may be named, and called, by the tests."""

    def make_proxy(self, number: int) -> Any:
        return Callback(self)

    def may_export(self, value: Any) -> bool:
        return True

    def fail(self, reason: str) -> NoReturn:
        os._exit(1)


def main(inlet: Any, outlet: Any) -> None:
    """Run the code, then answer until the end."""
    module = types.ModuleType("__main__")

    def copied(how: str, value: Any) -> Any:
        import copy

        return getattr(copy, how)(value)

    def name(wanted: str) -> tuple[bool, Any]:
        return wanted in module.__dict__, module.__dict__.get(wanted)

    peer = Candidate(inlet, outlet, {"name": name, "call": lambda called, *given, **named: called(*given, **named)})
    peer.functions |= {each: getattr(operator, each) for each in _OPERATORS}
    peer.functions |= {each: getattr(builtins, each) for each in _FUNCTIONS}
    peer.functions |= {"copied": copied, "plain": plain}
    me = os.getpid()
    code, tested = peer.ask("code")
    if tested:  # then it is imported, and no program of its own
        module.__name__ = "candidate"
    sys.modules[module.__name__] = module
    exec(compile(code, "<code>", "exec", dont_inherit=True), module.__dict__)
    if os.getpid() != me:  # a child that it made, which came to the end of the code too
        os._exit(0)
    peer.ask("begin")
    while os.getpid() == me:
        peer.serve()
    os._exit(0)
