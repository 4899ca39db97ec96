"""What the sandbox's interpreter executes: code, then its tests, in one module. It knows the standard library alone.

Who started it sends the tests, and behind them a nonce, once the code has run to its end; the nonce stays in the pipe
until the tests have ended. The verdict is a key that was sent with the code, and that nonce. So no descriptor has all
of it before the end, and neither has a frame; nor is an exit status, or anything that is printed, a verdict. Tests are
also not passed by an object that they get from a call, and whose class they do not name, if it equals everything.
"""

from __future__ import annotations

import _thread
import builtins
import os
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

READY = b"ready"  # an interpreter stands, and has not been sent any code
KEY_BYTES = 16
_REASON = 2000  # characters
_FUTURE = 0x1FE0000  # flags of code that `from __future__ import` sets (CO_FUTURE_* in CPython's code.h)
_STACK = 2 * 2**20  # of a thread: all that there may be fit into the memory

# The source of the fresh interpreter: read this program, and call its main.
STUB = f"""
import marshal, os, sys

def read(count):
    data = b""
    while len(data) < count:
        piece = os.read(inlet, count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data

inlet, outlet = map(int, sys.argv[1:])
os.write(outlet, {READY!r})
order = marshal.loads(read(int.from_bytes(read(4), "little")))
names = dict(__name__="plmtune.sandbox.program")
exec(order.pop("program"), names)
names["main"](read, outlet, **order)
"""


def main(read: Callable[[int], bytes], outlet: int, *, code: str, tested: bool, key: bytes, path: str) -> NoReturn:
    """Run the code, ask for the tests, run them, and say how it ended.

    Args:
        read: gives so many bytes of what is sent.
        outlet: descriptor of the verdict.
        path: where packages are found beside the standard library.
    """
    write, leave, getpid, me = os.write, os._exit, os.getpid, os.getpid()
    module = types.ModuleType("candidate" if tested else "__main__")  # its `if __name__ == "__main__":` is no test
    module.__dict__["__file__"] = "candidate.py"
    sys.modules[module.__name__] = sys.modules["__main__"] = module
    sys.argv[:] = ["candidate.py"]
    sys.path.append(path)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # which the module `site` would bring
    _thread.stack_size(_STACK)
    texts = {"candidate.py": code}
    calls = Calls() if tested and "__eq__" in code else None
    try:
        _show_lines(texts)
        compiled = compile(code, "candidate.py", "exec", dont_inherit=True)
        exec(compiled, module.__dict__)
        if tested and getpid() == me:
            sys.settrace(None)  # which could skip lines of the tests
            sys.setprofile(None)
            write(outlet, key)
            tests = texts["tests.py"] = read(int.from_bytes(read(4), "little")).decode("utf-8", "surrogatepass")
            _show_lines(texts)
            if calls:
                module.__dict__[calls.NAME] = calls.see
            if "__name__" in tests:
                module.__name__ = "__main__"
            tree = calls.watch(tests) if calls else tests
            exec(compile(tree, "tests.py", "exec", compiled.co_flags & _FUTURE, dont_inherit=True), module.__dict__)
        passed, reason = True, b""
    except BaseException as error:
        passed, reason = _ended_by_unittest(error), b""
        if not passed:
            reason = _told(error, texts)
    if passed and calls and (name := calls.equal_everything()):
        passed, reason = False, f"an object of class {name} equals everything".encode(errors="backslashreplace")
    if getpid() == me:  # not a child that came to the end, too
        write(outlet, key + read(KEY_BYTES) if passed else reason)
    leave(0 if passed else 1)


class _One:
    """With `_Other`: nothing that a class looks at, be it class, attributes, slots or truth, is the same of both."""

    __slots__ = ("one",)

    def __bool__(self) -> bool:
        return False


class _Other:
    __slots__ = ("other",)


class Calls:
    """What the tests get from calls."""

    NAME = "__see__"

    def __init__(self) -> None:
        import ast  # before the code could replace it

        self.ast: Any = ast
        self.functions: dict[types.FunctionType, str] = {}
        self.named: set[str] = set()

    def watch(self, tests: str) -> Any:
        """The syntax tree of tests in which every call's result is seen; tests nested too deep for one stay a text."""
        ast, named, name = self.ast, self.named, self.NAME

        class Watched(ast.NodeTransformer):  # type: ignore[name-defined]
            def visit_Name(self, node: Any) -> Any:
                named.add(node.id)
                return node

            def visit_Call(self, node: Any) -> Any:
                call = ast.Call(ast.Name(name, ast.Load()), [self.generic_visit(node)], [])
                return ast.copy_location(call, node)

            visit_Await = visit_Call

        try:
            return ast.fix_missing_locations(Watched().visit(ast.parse(tests, "tests.py")))
        except RecursionError:
            return tests

    def see(self, value: Any) -> Any:
        """Keep how the class of a value compares, if the code says it."""
        function = getattr(type(value), "__eq__", None)
        if type(function) is types.FunctionType and function.__code__.co_filename == "candidate.py":
            self.functions[function] = type(value).__name__
        return value

    def equal_everything(self) -> str | None:
        """The class of a value that says that whatever it is equals whatever there is; None if there is none."""
        for function, name in self.functions.items():
            if name in self.named:
                continue  # tests may want to see that of it
            try:
                answer = function(_One(), _Other())
                if answer is not NotImplemented and answer:
                    return name
            except Exception:  # it looks at what it compares
                continue
        return None


def _show_lines(texts: dict[str, str], *, always: bool = False) -> None:
    """Let tracebacks and `inspect` have the lines; the module for it takes longer to import than most code to run."""
    if always or any(name in text for text in texts.values() for name in ("getsource", "linecache", "traceback")):
        import linecache

        for name, text in texts.items():
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)


def _ended_by_unittest(error: BaseException) -> bool:
    """Whether `unittest.main()`, called by the tests themselves, ended them without a failure."""
    if type(error) is not SystemExit or error.code or "unittest.main" not in sys.modules:
        return False
    files, trace = [], error.__traceback__
    while trace:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    while files and files[0] != "tests.py":  # this program's own frame
        del files[0]
    return {each for each in files if each != "tests.py"} == {sys.modules["unittest.main"].__file__}


def _told(error: BaseException, texts: dict[str, str]) -> bytes:
    """Print an error as the interpreter would, without this program's own frame; its last line."""
    import traceback

    _show_lines(texts, always=True)
    here = main.__code__.co_filename
    told: Any = traceback.TracebackException.from_exception(error)
    told.stack = traceback.StackSummary.from_list([each for each in told.stack if each.filename != here])
    lines = [line[:_REASON] for line in told.format(chain=False)]
    os.write(2, "".join(lines).encode(errors="backslashreplace"))
    return lines[-1].strip().splitlines()[-1].encode(errors="backslashreplace")
