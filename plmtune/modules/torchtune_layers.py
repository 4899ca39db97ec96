"""torchtune's adapter layers, importable beside today's torchao.

torchtune 0.6.1 is its last release; torchao has since moved the module of NF4 tensors that it imports.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch

_OLD = "torchao.dtypes.nf4tensor"
_NEW = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"


class Layers(NamedTuple):
    """What is used of the two: the layers, and `to_nf4(tensor, block_size, scaler_block_size)`."""

    lora_linear: Any
    dora_linear: Any
    to_nf4: Any


def layers() -> Layers:
    """Import them, which takes seconds, so only when adapters are asked for."""
    with quiet():
        nf4 = import_module(_NEW)
        sys.modules.setdefault(_OLD, nf4)
        peft = import_module("torchtune.modules.peft")

    def clone(op: Any, args: Any, kwargs: Any = None) -> Any:
        inner = nf4.apply_to_inner_tensors(args[0], op, args[1:], kwargs)
        return nf4.NF4Tensor(*nf4.construct_nf4_args(args[0], inner))

    # Both libraries' own quantizes again: other numbers, and a failure where 64 * 256 does not divide their count.
    nf4.implements([torch.ops.aten.clone.default])(clone)
    return Layers(peft.LoRALinear, peft.DoRALinear, nf4.to_nf4)


# What torchao warns of when it is imported, by logger: kernels of its own for other GPUs, and its use of torch. Neither
# touches what is used here.
_WARNINGS = {
    "torchao": "Failed to load /",
    "torch.utils._pytree": "%s is an Enum subclass",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what torchao warns of when it is imported, and nothing else."""

    def passes(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(tuple(_WARNINGS.values()))

    loggers = [logging.getLogger(name) for name in _WARNINGS]
    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)
