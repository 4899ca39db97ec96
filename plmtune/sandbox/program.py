"""The program of the sandbox's interpreter: it runs code, then its tests, in one module, with the standard library.

The parent process sends the tests, followed by a nonce, after the code has run to its end; the nonce stays in the pipe
until the tests have ended. The verdict is a key that was sent with the code, and that nonce. So no descriptor and no
frame has all of it before the end, and neither an exit status nor printed text is a verdict. Tests also fail if they
get from a call, or compare, an object that equals everything and whose class they do not name. This program has its own
copy of the builtins, so the code cannot change them.
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

READY = b"ready"  # the interpreter has started and has received no code
KEY_BYTES = 16
_REASON = 2000  # characters
_FUTURE = 0x1FE0000  # flags of code that `from __future__ import` sets (CO_FUTURE_* in CPython's code.h)
_EQUALITY = ("__eq__", "mock", "ALWAYS_EQ")  # code without these has no object that equals everything
_SLOT = type(object.__eq__)
_STACK = 2 * 2**20  # of a thread: all allowed threads fit into the memory limit

# The source of the fresh interpreter: read this program, and call its main.
STUB = f"""
import builtins, marshal, os, sys

def read(count, read=os.read):
    data = b""
    while len(data) < count:
        piece = read(inlet, count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data

inlet, outlet = map(int, sys.argv[1:])
os.write(outlet, {READY!r})
order = marshal.loads(read(int.from_bytes(read(4), "little")))
names = dict(__name__="plmtune.sandbox.program", __builtins__=dict(vars(builtins)))
exec(order.pop("program"), names)
names["main"](read, outlet, **order)
"""


def main(read: Callable[[int], bytes], outlet: int, *, code: str, tested: bool, key: bytes, path: str) -> NoReturn:
    """Run the code, request the tests, run them, and send the verdict.

    Args:
        read: reads so many bytes from the parent process.
        outlet: descriptor of the verdict.
        path: folder of packages beside the standard library.
    """
    write, leave, getpid, me = os.write, os._exit, os.getpid, os.getpid()
    settrace, setprofile = sys.settrace, sys.setprofile
    module = types.ModuleType("candidate" if tested else "__main__")  # `if __name__ == "__main__":` is no test
    module.__dict__.update(__file__="candidate.py", __builtins__=builtins)
    sys.modules[module.__name__] = sys.modules["__main__"] = module
    sys.argv[:] = ["candidate.py"]
    sys.path.append(path)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # as the module `site` does
    _thread.stack_size(_STACK)
    texts = {"candidate.py": code}
    calls = Calls() if tested and any(word in code for word in _EQUALITY) else None
    reason: bytes | None = None
    try:
        _show_lines(texts)
        compiled = compile(code, "candidate.py", "exec", dont_inherit=True)
        exec(compiled, module.__dict__)
        if tested and getpid() == me:
            settrace(None)  # a tracer could skip lines of the tests
            setprofile(None)
            write(outlet, key)
            tests = texts["tests.py"] = read(int.from_bytes(read(4), "little")).decode("utf-8", "surrogatepass")
            _show_lines(texts)
            if calls:
                module.__dict__[calls.NAME] = calls.see
            if "__name__" in tests:
                module.__name__ = "__main__"
            tree = calls.watch(tests) if calls else tests
            exec(compile(tree, "tests.py", "exec", compiled.co_flags & _FUTURE, dont_inherit=True), module.__dict__)
    except BaseException as error:
        reason = None if _ended_by_unittest(error) else _format_error(error, texts)
    if reason is None and calls and (name := calls.equal_everything()):
        reason = f"an object of class {name} equals everything".encode(errors="backslashreplace")
    if getpid() == me:  # not a forked child that also reached the end
        write(outlet, key + read(KEY_BYTES) if reason is None else reason)
    leave(0 if reason is None else 1)


class _One:
    """Differs from `_Other` in class, attributes, slots and truth value."""

    __slots__ = ("one",)

    def __bool__(self) -> bool:
        return False


class _Other:
    __slots__ = ("other",)


class _Full:
    """Has every attribute, with another value at each access."""

    __slots__ = ()

    def __getattr__(self, name: str) -> object:
        return object()


class Calls:
    """The values that tests get from calls, compare, and pass on."""

    NAME = "__see__"

    def __init__(self) -> None:
        import ast  # before the code can replace it

        self.ast: Any = ast
        self.compares: dict[int, tuple[Any, str]] = {}
        self.named: set[str] = set()

    def watch(self, tests: str) -> Any:
        """The syntax tree of tests that report these values; tests that are nested too deep stay text."""
        ast, named, name = self.ast, self.named, self.NAME

        def seen(node: Any) -> Any:
            return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), [node], []), node)

        def seen_if_held(node: Any) -> Any:
            return seen(node) if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) else node

        class Watched(ast.NodeTransformer):  # type: ignore[name-defined]
            def visit(self, node: Any) -> Any:
                self.generic_visit(node)
                if isinstance(node, ast.Name):
                    named.add(node.id)
                elif isinstance(node, ast.Attribute):
                    named.add(node.attr)
                elif isinstance(node, ast.Call):
                    node.args = [seen_if_held(each) for each in node.args]
                elif isinstance(node, ast.Compare):
                    node.left = seen_if_held(node.left)
                    node.comparators = [seen_if_held(each) for each in node.comparators]
                return seen(node) if isinstance(node, (ast.Call, ast.Await)) else node

        try:
            return ast.fix_missing_locations(Watched().visit(ast.parse(tests, "tests.py")))
        except RecursionError:
            return tests

    def see(self, value: Any) -> Any:
        """Record the `__eq__` of a value's class, unless it is the interpreter's own."""
        for base in type(value).__mro__:
            how = base.__dict__.get("__eq__")
            if how is not None:
                if type(how) is not _SLOT:
                    self.compares[id(how)] = how, type(value).__name__
                break
        return value

    def equal_everything(self) -> str | None:
        """The class of a value whose `__eq__` calls all objects equal; None if there is none."""
        for how, name in self.compares.values():
            if name in self.named or name.strip("_") in self.named:
                continue  # the tests may test for it
            try:
                if all(self._equal(how, one(), other()) for one in (_One, _Full) for other in (_Other, _Full)):
                    return name
            except BaseException:  # it uses what it compares
                continue
        return None

    def _equal(self, how: Any, one: object, other: object) -> bool:
        bind = getattr(type(how), "__get__", None)
        answer = (bind(how, one, type(one)) if bind else how)(other)
        return answer is not NotImplemented and bool(answer)


def _show_lines(texts: dict[str, str], *, always: bool = False) -> None:
    """Register the lines for tracebacks and `inspect`, if needed: importing linecache takes longer than most code."""
    if always or any(name in text for text in texts.values() for name in ("getsource", "linecache", "traceback")):
        import linecache

        for name, text in texts.items():
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)


def _ended_by_unittest(error: BaseException) -> bool:
    """Whether a call of `unittest.main()` in the tests ended them without a failure."""
    if type(error) is not SystemExit or error.code or "unittest.main" not in sys.modules:
        return False
    files, trace = [], error.__traceback__
    while trace:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    while files and files[0] != "tests.py":  # this program's own frame
        del files[0]
    return {each for each in files if each != "tests.py"} == {sys.modules["unittest.main"].__file__}


def _format_error(error: BaseException, texts: dict[str, str]) -> bytes:
    """Print an error as the interpreter does, without this program's frames; return the last line."""
    import traceback

    _show_lines(texts, always=True)
    here = main.__code__.co_filename
    report: Any = traceback.TracebackException.from_exception(error)
    report.stack = traceback.StackSummary.from_list([each for each in report.stack if each.filename != here])
    lines = [line[:_REASON] for line in report.format(chain=False)]
    os.write(2, "".join(lines).encode(errors="backslashreplace"))
    return lines[-1].strip().splitlines()[-1].encode(errors="backslashreplace")
