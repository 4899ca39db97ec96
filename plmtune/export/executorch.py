"""A model as a .pte file that ExecuTorch runs through XNNPACK, one token at a time over a cache inside the program.

The file has one method that computes and others that return constants, as ExecuTorch's runner for language models
expects:

    forward(tokens int64 [1, 1], input_pos int64 [1]) -> logits fp32 [1, v]    of the token after `tokens`
    get_vocab_size, get_max_seq_len, get_max_context_len, get_bos_id, get_n_layers -> int;  get_eos_ids -> ints
    use_kv_cache, use_sdpa_with_kv_cache, enable_dynamic_shape -> bool

`forward` writes the entry of position input_pos into the cache and attends over 0 to input_pos. To start again, or to
go back, continue at that position: later entries are never read. Memory must be zeroed when the program is loaded, as
ExecuTorch's Module and its Python runtime do. The program does not check that positions stay below get_max_seq_len. A
prompt is read a token at a time, as ExecuTorch's runner does without enable_dynamic_shape.

Beside FILE.pte are FILE.pte.json with the same constants and more (`facts`), and the folder FILE.pte.tokenizer with the
tokenizer's files, as `load_tokenizer` and transformers read them.

Linear layers of a dynamic format multiply integers; the matrices of `kv_b` are fp32. Weight-only formats are refused:
XNNPACK accepts them and computes nonsense, without an error.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from plmtune.errors import UserError
from plmtune.export.executorch_step import DecoderStep
from plmtune.export.huggingface import end_ids
from plmtune.io.atomic import atomic_write, check_room
from plmtune.models.checkpoint_files import write_json
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, Quantized, QuantizedLinear, is_quantized
from plmtune.modules.torchtune_layers import quiet
from plmtune.registry import load
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.units import show_bytes

SCHEMES = ("fp32", "int8_dynamic", "int8_dynamic_int4")

_DEFAULT_CONTEXT = 2048
_SCHEME_OF_BITS = {8: "int8_dynamic", 4: "int8_dynamic_int4"}
_CACHES = (".cache", ".keys", ".values")


def export_pte(
    model: Decoder,
    tokenizer: Tokenizer,
    path: Path,
    *,
    scheme: str | None = None,
    max_seq_len: int | None = None,
) -> list[str]:
    """Write a model as a program for ExecuTorch's XNNPACK backend; this module's docstring lists the files beside it.

    Files that are there are replaced. Returns notes for the user, a sentence each.

    Args:
        model: PLM or Llama, of floating-point numbers or quantized; left as it is.
        tokenizer: written beside the program.
        path: of the .pte file.
        scheme: one of SCHEMES, with the embedding in 8 bits; None: the model's format, or fp32.
        max_seq_len: positions of its cache; None: the model's, at most 2,048.

    Raises:
        UserError: for an unsupported format or part, or too little room.
        ValueError: if max_seq_len is not between 1 and the model's.
    """
    check_scheme(model, scheme)
    if max_seq_len is None:
        max_seq_len = min(model.max_seq_len, _DEFAULT_CONTEXT)
    if not 1 <= max_seq_len <= model.max_seq_len:
        raise ValueError(f"max_seq_len ({max_seq_len}) must be between 1 and the model's ({model.max_seq_len})")
    notes = []
    step = make_step(model, scheme, max_seq_len)
    formats = sorted({part.format.name for part in step.modules() if isinstance(part, Quantized)})
    head = step.head
    if formats and not isinstance(head, Quantized):
        notes.append(
            f"The head is of fp32 numbers, {show_bytes(head.weight.nbytes)}, because the embedding is not stored as "  # type: ignore[arg-type]
            "int8_dynamic_int8. Quantize with quantization.embedding=int8_dynamic_int8 for a quarter of that."
        )
    facts = {
        "format": "plmtune-executorch",
        "version": 1,
        "backend": "xnnpack",
        "vocab_size": model.vocab_size,
        "max_seq_len": max_seq_len,
        "n_layers": len(model.layers),
        "bos_id": tokenizer.bos_id,
        "eos_ids": end_ids(tokenizer),
        "formats": formats or ["fp32"],
        "cache_bytes": sum(buffer.nbytes for name, buffer in step.named_buffers() if name.endswith(_CACHES)),
        "config": model.config,
    }
    check_room(path, sum(tensor.nbytes for tensor in step.state_dict().values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    program = _lower(step, facts)
    with atomic_write(path, user_error=True) as temporary, temporary.open("wb") as file:
        program.write_to_file(file)
    facts["file_bytes"] = path.stat().st_size
    write_json(path.with_name(f"{path.name}.json"), facts)
    tokenizer.save(path.with_name(f"{path.name}.tokenizer"))
    return notes


def check_scheme(model: Decoder, scheme: str | None) -> None:
    """Refuse formats that XNNPACK computes wrongly, and a scheme that is not the model's."""
    for name, module in model.layers.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        if not _has(module.format):
            raise UserError(
                f"layers.{name} is stored as {module.format.name}. ExecuTorch's XNNPACK computes weight-only integers "
                "wrongly, with no error, and has 8 bits with a scale a row and 4 bits in groups of 32 or a multiple of "
                "it: quantize the model with int8_dynamic or int8_dynamic_int4 instead."
            )
        if scheme not in (None, _SCHEME_OF_BITS[module.format.bits]):
            raise UserError(
                f"The model is quantized already (layers.{name} is {module.format.name}), so it cannot become "
                f"{scheme}. Export the checkpoint that it was made from, or leave out --quant."
            )


def make_step(model: Decoder, scheme: str | None, max_seq_len: int) -> DecoderStep:
    """The program as a module, in fp32 and integers; the model is not changed."""
    model = copy.deepcopy(model).cpu().float().eval()
    quantized = is_quantized(model)
    if scheme not in (None, "fp32") and not quantized:
        from plmtune.quantization.quantize import quantize

        quantize(model, executorch_formats(model, scheme))
    return DecoderStep(model, max_seq_len).requires_grad_(False)


def executorch_formats(model: Decoder, scheme: str) -> dict[str, Format]:
    """How a program of this scheme stores the matrices of a model of floating-point numbers."""
    eight = Format(8, dynamic=True)
    formats = load("quantization", scheme)(model=model, embedding=eight.name)
    # Rows that are no multiple of 32 have smaller groups, which XNNPACK lacks.
    return {name: format if _has(format) else eight for name, format in formats.items()}


def _has(format: Format) -> bool:
    """Whether XNNPACK multiplies by such integers."""
    return format.dynamic and (format.group_size or 32) % 32 == 0 and (format.bits == 4) == bool(format.group_size)


@torch.no_grad()
def _lower(step: DecoderStep, facts: dict[str, Any]) -> Any:
    """The ExecuTorch program of a step, whose quantized layers become torchao's."""
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

        from plmtune.quantization.quantize import to_torchao

        to_torchao(step)
        example = (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        exported = torch.export.export(step, example, strict=False)
        methods = {
            "get_vocab_size": facts["vocab_size"],
            "get_max_seq_len": facts["max_seq_len"],
            "get_max_context_len": facts["max_seq_len"],
            "get_n_layers": facts["n_layers"],
            "get_bos_id": facts["eos_ids"][0] if facts["bos_id"] is None else facts["bos_id"],
            "get_eos_ids": facts["eos_ids"],
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": False,
            "enable_dynamic_shape": False,
        }
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            # The validity check does not know buffers that are written in place.
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=methods,
        )
        # Otherwise the whole cache would be copied for each token.
        return edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of torch.export and ExecuTorch that a user can do nothing about."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
