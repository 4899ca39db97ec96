"""Attributes of modules that have other values for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def with_attributes(modules: Iterable[object], **values: Any) -> Iterator[None]:
    """Set attributes of modules inside the context, and restore them at its end."""
    with ExitStack() as stack:
        for module in modules:
            for name, value in values.items():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode inside the context, and restore its mode at its end."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
