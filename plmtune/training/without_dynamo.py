"""Settings are checked without importing dynamo, the tracer of torch.compile: it takes 0.7 CPU seconds."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"


class _Waiting(ModuleType):
    """Stands for torch._dynamo, and is replaced by it as soon as more is asked of it than `disable`.

    torch keeps dynamo out of some functions, among them those that compute shapes on the meta device and those that
    make an optimizer, and imports dynamo at their first call for no other reason.
    """

    def __init__(self) -> None:
        super().__init__(_NAME)
        self._called: list[Any] = []

    def disable(self, function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        self._called.append(function)
        return function

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
    """Inside, torch imports dynamo only for what needs it. What is compiled inside imports it."""
    if _NAME in sys.modules:
        yield
        return
    waiting = sys.modules[_NAME] = _Waiting()
    try:
        yield
    finally:
        waiting.leave()
