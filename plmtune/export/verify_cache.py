"""Whether llama.cpp caches the numbers that were computed, and says the same with flash attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from plmtune.errors import UserError
from plmtune.export.contents import Contents
from plmtune.export.diagnosis import divergence
from plmtune.export.lint import cached_numbers
from plmtune.export.report import Report
from plmtune.export.runtimes import InferenceRuntime, RuntimeName, open_runtime
from plmtune.export.runtimes.gguf_facts import GgufRuntime
from plmtune.modules.decoder import Decoder

_ARCHITECTURES = ("plm", "deepseek2")  # whose cache depends on how llama.cpp computes MLA
_FEW, _MORE = 4, 12  # tokens
# llama.cpp saves a token's id, position and sequences beside its numbers, in 16 bytes.
_NOTES = 32
_NUMBER = 4  # bytes, in fp32
# Nats that flash attention may add: on a CPU it sums values in F16. Random and trained models of 2 to 22 layers in F32
# gave 3e-8 to 6e-6 at 128 to 256 tokens.
_FLASH_KL = 5e-5
_FLASH_POSITIONS = 16


def compare_cache(
    report: Report, runtime: InferenceRuntime, model: Decoder, contents: Contents, ids: Sequence[int]
) -> None:
    """Compare the bytes that a token takes in llama.cpp's cache, in fp32, with those of `lint.cached_numbers`."""
    if contents.architecture not in _ARCHITECTURES or not isinstance(runtime, GgufRuntime):
        return
    few, more = (runtime.state_bytes(ids[:count]) for count in (_FEW, _MORE))
    found = (more - few) // (_MORE - _FEW)
    computed = _NUMBER * cached_numbers(model.config, contents.architecture)
    said = f"llama.cpp caches {found:,} bytes a token in fp32, and {computed:,} were computed"
    remark = f"of {computed:,} in fp32; llama.cpp saves its notes of a token, too"
    report.add("cache: bytes a token that differ", abs(found - computed), _NOTES, remark, said)


def compare_flash(
    report: Report,
    export: Path,
    contents: Contents,
    window: tuple[list[int], int],
    own: Tensor,
    most: float,
    *,
    threads: int | None,
    prefer: RuntimeName,
) -> None:
    """Compare what llama.cpp says with flash attention and a cache of F16, its defaults, where it caches latents.

    Args:
        window: tokens, and how many of the last are compared.
        own: what our model says of those, with the export's numbers, [n, v].
        most: KL that rounded inputs allow.
    """
    if contents.architecture != "deepseek2":
        return
    ids, last = window
    count = min(last, _FLASH_POSITIONS)
    try:
        opened = open_runtime(export, threads=threads, context=len(ids), prefer=prefer, flash_attention=True)
    except UserError as error:
        report.add("opened with flash attention: failures", 1, 0, None, str(error))
        return
    with opened as runtime:
        found = divergence(own[-count:], runtime.log_probs(ids[:-1], count))
    said = f"nats, {count} positions, cache of F16"
    cause = "with flash attention the runtime computes something else than without"
    report.add("KL with flash attention", found, most + _FLASH_KL, said, cause)
