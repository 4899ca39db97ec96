"""Optimizers are checked without importing dynamo, the tracer of torch.compile: it takes 0.7 CPU seconds.

It leans on two private names of torch: `torch._dynamo.disable`, and `__dynamo_disable`, in which a function keeps what
that gave. Where a torch does otherwise, dynamo is imported as ever, and only the time is lost.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

_NAME = "torch._dynamo"


class _Waiting(ModuleType):
    """Stands for torch._dynamo, and is replaced by it as soon as more is asked of it than to disable a function.

    torch keeps dynamo out of some functions, among them those that make an optimizer and those that compute shapes on
    the meta device, and imports dynamo at their first call for no other reason.
    """

    def __init__(self) -> None:
        super().__init__(_NAME)
        self._called: list[Any] = []

    def disable(self, *arguments: Any, **named: Any) -> Any:
        if not arguments or not isinstance(arguments[0], FunctionType):  # another call than the one that is known
            self.leave()
            return importlib.import_module(_NAME).disable(*arguments, **named)
        self._called.append(arguments[0])
        return arguments[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # of whoever looks at all modules
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(_NAME), name)

    def leave(self) -> None:
        """Leave no trace, so that what is compiled later is compiled as ever."""
        for function in self._called:
            vars(function).pop("__dynamo_disable", None)
        self._called.clear()
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
            vars(sys.modules["torch"]).pop("_dynamo", None)


@contextlib.contextmanager
def without_dynamo() -> Iterator[None]:
    """Inside, torch imports dynamo only for what needs it. For checks: nothing may be computed or compiled inside."""
    if _NAME in sys.modules:
        yield
        return
    waiting = sys.modules[_NAME] = _Waiting()
    try:
        yield
    finally:
        waiting.leave()
