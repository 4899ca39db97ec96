"""Types of GGUF that only llama.cpp's own quantizer makes: K-quants and IQ, and its mixes of types.

It is a function of the library in the package llama-cpp-python; there is no command line to run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plmtune.errors import UserError
from plmtune.io.atomic import atomic_write, check_room
from plmtune.models.gguf_file import opened_gguf


def quantize_gguf(source: Path, path: Path, kind: str, *, threads: int | None = None) -> list[str]:
    """Write a GGUF file again in another type, as llama.cpp does, in the place of one that is there; return notes.

    A kind such as Q4_K_M is a mix: matrices that matter more get more bits, and the vocabulary's projection Q6_K; rows
    that a type does not take get another (`lint.stored_type`).

    Args:
        source: a file of F32, F16 or BF16.
        kind: one of `lint.QUANTIZED`, or a quantized one of `lint.WRITTEN` with llama.cpp's own mix.
        threads: None: as many as there are cores.
    """
    import llama_cpp

    library: Any = llama_cpp
    with opened_gguf(source) as file:
        assert not set(file.kinds()) - {"F32", "F16", "BF16"}, "numbers that are rounded already"
    check_room(path, source.stat().st_size)
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = threads or 0
    with atomic_write(path, user_error=True) as temporary:
        with _captured_log(library) as said:
            failed = library.llama_model_quantize(bytes(source), bytes(temporary), ctypes.byref(settings))
        if failed:
            reason = next((line for line in reversed(said) if line), "it gives no reason")
            raise UserError(f"llama.cpp could not make {kind} of {source}: {reason}.")
    with opened_gguf(path) as file:
        kinds = file.kinds()
    total = sum(kinds.values())
    shares = ", ".join(f"{count / total:.0%} {name}" for name, count in kinds.items() if count >= 0.005 * total)
    return [f"Of its numbers {shares}."]


@contextmanager
def _captured_log(library: Any) -> Iterator[list[str]]:
    """Collect llama.cpp's log lines, which explain a failure."""
    said: list[str] = []

    def listen(level: int, text: bytes, data: object) -> None:
        said.append(text.decode(errors="replace").strip())

    before, data = library.llama_log_callback(), ctypes.c_void_p()
    library.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    callback = library.llama_log_callback(listen)
    library.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield said
    finally:
        library.llama_log_set(before, data)
