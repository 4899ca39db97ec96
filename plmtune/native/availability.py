"""Whether native decoding works on this machine: a library that could be compiled and that passes a self-check."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator

import torch
from torch import nn

from plmtune.modules.decoder import Decoder
from plmtune.modules.feed_forward import SquaredReLU, SwiGLU
from plmtune.modules.gqa import GroupedQueryAttention
from plmtune.modules.mla import MultiHeadLatentAttention
from plmtune.modules.norm import RMSNorm
from plmtune.modules.quantized import Format, Quantized, install
from plmtune.native.decoder import NativeDecoder
from plmtune.native.library import is_disabled, unavailable
from plmtune.native.structs import CPU, KINDS

_log = logging.getLogger(__name__)
_logged: set[str] = set()
_POSITION = 517  # of the first token of the self-check: two threads share a cache of at least 512 tokens


def unavailable_reason() -> str | None:
    """Why decoding is eager here, as a sentence; None: it is native."""
    if reason := unavailable():
        return reason
    failed = _failed_check()
    return None if failed is None else f"its self-check differs from PyTorch on this machine ({failed})."


def supports(format: Format, dtype: torch.dtype, width: int) -> bool:
    """Whether `multiply`, `dequantize` and `round_inputs` handle such a matrix on this machine's CPU."""
    lanes = 16 if format.bits == 8 else 32
    return dtype in KINDS and (format.group_size or width) % lanes == 0 and unavailable_reason() is None


def attach(model: nn.Module) -> bool:
    """Let a decoder decode natively from now on, and return whether it does; else log once a process why not."""
    if not isinstance(model, Decoder):
        return False
    model.native, reason = None, unavailable_reason()
    if reason is None:
        native = NativeDecoder()
        if native.bind(model) is not None:
            model.native = native
            return True
        reason = "the model has parts that native decoding does not support."
    if model.device == CPU and not is_disabled() and reason not in _logged:
        _logged.add(reason)
        _log.warning("tokens are decoded by eager PyTorch, which is slower: %s", reason)
    return False


def _check_models() -> Iterator[tuple[str, Decoder, float]]:
    """(name, a small decoder, tolerance) of each kind of number and each module that decode.c computes."""
    dim, heads, longest = 128, 4, _POSITION + 3

    def decoder(latent: bool) -> Decoder:
        return Decoder(
            vocab_size=64,
            embed_dim=dim,
            num_layers=2,
            max_seq_len=longest,
            attention=lambda _: (
                MultiHeadLatentAttention(
                    dim, heads, longest, RMSNorm, kv_lora_rank=40, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
                )
                if latent
                else GroupedQueryAttention(dim, heads, longest, RMSNorm, num_kv_heads=2)
            ),
            ffn=lambda: SquaredReLU(dim, hidden_dim=160) if latent else SwiGLU(dim, hidden_dim=160),
            norm=RMSNorm,
            tie_embeddings=latent,
            init_std=0.1,
        ).eval()

    yield "MLA, squared ReLU", decoder(True), 1e-4
    sparse = decoder(True)
    for module in sparse.modules():
        if isinstance(module, SquaredReLU):
            module.sparse = True
    yield "skipped zeros", sparse, 1e-4
    yield "GQA, SwiGLU", decoder(False), 1e-4
    for latent in (True, False):
        yield "bf16", decoder(latent).bfloat16(), 3e-2
    for name in ("int8", "int8_g32", "int4_g32", "int8_dynamic_int8", "int8_dynamic_int4_g32"):
        model, format = decoder(False), Format.parse(name)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
        install(model, dict.fromkeys(names, format))
        for module in model.modules():
            if isinstance(module, Quantized):
                module.weight.random_(*((-128, 128) if format.bits == 8 else (0, 256)))
                module.scales.uniform_(0.5, 1.5).mul_(0.1 / 2 ** (format.bits - 1))
                if not format.symmetric:
                    module.zeros.random_(6, 11)
        yield name, model.eval(), 3e-2 if format.dynamic else 1e-4


@functools.cache
@torch.inference_mode()
def _failed_check() -> str | None:
    """Which small model decode.c computes differently than PyTorch; None: no one."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, model, tolerance in _check_models():
                if not _agrees(model, tolerance):
                    return name
                torch.set_num_threads(1)  # one model with all threads is enough: on a busy machine they wait long
    finally:
        torch.set_num_threads(threads)
    return None


def _agrees(model: Decoder, tolerance: float) -> bool:
    exact, native = copy.deepcopy(model).float(), NativeDecoder()
    if native.bind(model) is None:
        return False
    model.native = native
    caches = [each.new_cache(1, each.max_seq_len) for each in (exact, model)]
    for expected, found in zip(*(cache.layers for cache in caches), strict=True):
        for one, other in zip(expected, found, strict=True):
            one.copy_(other.normal_())
    for cache in caches:
        cache.length = _POSITION
    for token in torch.arange(2).view(2, 1, 1):
        logits = [each(token, cache=cache) for each, cache in zip((exact, model), caches, strict=True)]
        if not (logits[0] - logits[1]).abs().max() <= tolerance * logits[0].abs().max():
            return False
    return True
