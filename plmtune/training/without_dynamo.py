"""Checking optimizers without importing dynamo, the tracer of torch.compile, which takes 0.7 CPU seconds.

It uses two private names of torch: `torch._dynamo.disable`, and `__dynamo_disable`, where a function keeps its result.
A torch without them imports dynamo as usual, which costs only the time.
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
    """A stand-in for torch._dynamo that only disables functions; any other use imports the module itself.

    torch disables dynamo for some functions, such as those that make an optimizer or compute shapes on the meta
    device, and imports dynamo at their first call for no other reason.
    """

    def __init__(self) -> None:
        super().__init__(_NAME)
        self._called: list[Any] = []

    def disable(self, *arguments: Any, **named: Any) -> Any:
        if not arguments or not isinstance(arguments[0], FunctionType):  # not the known call
            self.leave()
            return importlib.import_module(_NAME).disable(*arguments, **named)
        self._called.append(arguments[0])
        return arguments[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked of every module in sys.modules
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(_NAME), name)

    def leave(self) -> None:
        """Undo everything, so that later compilation is not affected."""
        for function in self._called:
            vars(function).pop("__dynamo_disable", None)
        self._called.clear()
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
            vars(sys.modules["torch"]).pop("_dynamo", None)


@contextlib.contextmanager
def without_dynamo() -> Iterator[None]:
    """Import dynamo only where it is needed. For checks: nothing may be computed or compiled in the block."""
    if _NAME in sys.modules:
        yield
        return
    waiting = sys.modules[_NAME] = _Waiting()
    try:
        yield
    finally:
        waiting.leave()
