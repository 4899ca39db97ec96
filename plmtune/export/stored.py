"""Compare an export's tensors with the checkpoint's, up to the rounding of their types, and name what differs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from plmtune import dtypes
from plmtune.export.contents import Contents
from plmtune.export.lint import QUANTIZED, WRITTEN, matrices, stored_type
from plmtune.export.runtimes import UNVERIFIED
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import effective_weight
from plmtune.modules.quantized import Format, Quantized


class Bound(NamedTuple):
    """How far rounding takes a number, and the root mean square of a tensor's, as a share of its block's largest."""

    worst: float
    rms: float


# Of Q8_0 to Q4_0 and int8 half a step, a whole one where a block's other sign is clipped, and 2^-8 for numbers that
# were bf16 before. Of the others 1.8 to 2 times the most that llama.cpp's quantizer and ours did to normal, uniform,
# heavy-tailed, sparse, offset and ternary matrices (IQ3_S and Q2_K take outliers anywhere).
BOUNDS = {
    "Q8_0": Bound(0.0085, 0.0035),
    "Q6_K": Bound(0.05, 0.014),
    "Q5_1": Bound(0.038, 0.023),
    "Q5_0": Bound(0.068, 0.041),
    "Q5_K": Bound(0.125, 0.03),
    "Q4_1": Bound(0.073, 0.044),
    "Q4_0": Bound(0.132, 0.08),
    "Q4_K": Bound(0.25, 0.06),
    "IQ4_NL": Bound(0.25, 0.08),
    "IQ4_XS": Bound(0.25, 0.08),
    "Q3_K": Bound(0.5, 0.18),
    "IQ3_S": Bound(math.inf, 0.26),
    "Q2_K": Bound(math.inf, 0.3),
    "int8": Bound(0.0085, 0.0045),
    "int4": Bound(1.0, 0.2),  # ranges that are fitted to text clip
}
_EXACT = {code: torch.float32 if code == "F64" else dtypes.from_code(code) for code in dtypes.FLOAT_CODES}
# Blocks have scales in F16, whose smallest step is 2^-24: 127 half steps of it, of two scales that multiply.
_LEAST = 127 * 2.0**-25 * 2.1
_SLOPE = 0.02  # least factor that is reported
_SAME = 0.99  # correlation of a tensor with another that it is a rounded copy of
_MOST_ROWS = 8192  # of a matrix whose rows are looked for in another order


def bound_of(kind: str) -> Bound | None:
    """How far numbers of a kind may be from the checkpoint's; None: it is not known."""
    return BOUNDS.get(kind) or BOUNDS.get(kind.removeprefix("int8_dynamic_").partition("_")[0])


def suspect_tensors(model: Decoder, contents: Contents) -> dict[str, str]:
    """{our name: what is wrong with it} of the export's tensors that are not the checkpoint's numbers, as well as
    their type can hold them."""
    found: dict[str, str] = {}
    pieces = {piece.name for piece in contents.pieces}
    for name, theirs in contents.tensors.items():
        kind = contents.kinds.get(name, contents.kind)
        if name not in pieces and (said := _suspicion(model, name, theirs, weight_of(model, name), kind)):
            found[name] = said
    for piece in contents.pieces:
        ours = piece.written(partial(weight_of, model))
        if said := _suspicion(model, piece.name, piece.held(), ours, piece.kind):
            found[f"{piece.name}, as {piece.theirs}"] = said
    return found


def _suspicion(model: Decoder, name: str, theirs: Tensor, ours: Tensor, kind: str) -> str:
    """What is wrong with one tensor; empty: nothing."""
    if ours.shape != theirs.shape:
        return f"it is {list(theirs.shape)}, not {list(ours.shape)}"
    beyond = _beyond(theirs, ours, kind)
    if beyond is None:
        return ""
    slope = float((theirs * ours).sum() / ours.square().sum().clamp(min=1e-30))  # by least squares
    if abs(slope - 1) > _SLOPE and kind not in _EXACT and _beyond(theirs / slope, ours, kind) is None:
        beyond = f"it is about {slope:.3g} times the checkpoint's"
    return _relation(model, name, theirs, ours) or beyond


def _beyond(theirs: Tensor, ours: Tensor, kind: str) -> str | None:
    """By what a tensor is further off than its type takes it; None: it is not."""
    if torch.equal(theirs, ours):
        return None
    exact = _EXACT.get(kind)
    if exact is not None:
        # What is too small for a normal number may be zero.
        off = (theirs - ours.to(exact).float()).abs() > 2.0**-126
        said = f"{int(off.sum()):,} of its {off.numel():,} numbers are not the checkpoint's in {kind}"
        return said if off.any() else None
    bound, gap = bound_of(kind), theirs - ours
    if bound is not None:
        width = _block(kind, ours.shape[-1])
        largest, worst = (torch.linalg.vector_norm(x.view(-1, width), math.inf, dim=1) for x in (ours, gap))
        off = ~(worst <= bound.worst * largest + _LEAST)
        if off.any():
            return f"{int(off.sum()):,} of its {len(off):,} blocks of {width} are further off than {kind} rounds"
        error = float(gap.norm()) / math.sqrt(width)
        limit = bound.rms * float(largest.norm()) + _LEAST * math.sqrt(len(off))
        if not error <= limit:
            return f"it is off by {error / limit:.2g} times the most that {kind} rounds"
    return None


def _block(kind: str, width: int) -> int:
    """Numbers of a row of so many that share a scale."""
    if kind.startswith("int"):
        return Format.parse(kind).group_size or width
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]


def _relation(model: Decoder, name: str, theirs: Tensor, ours: Tensor) -> str:
    """What was done to a tensor, where it is one of the usual mistakes; empty: none of them."""
    if not torch.isfinite(theirs).all():
        return "it holds numbers that are not finite"
    if not theirs.any():
        return "all its numbers are zero"
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(theirs, ours.to(dtype).float()):
            return f"its numbers were rounded to {str(dtype).removeprefix('torch.')}"
    if _alike(theirs, ours, 0.9999):
        size = float(theirs.norm() / ours.norm())
        return f"it is {size:.4g} times the checkpoint's" if abs(size - 1) > 0.01 else ""
    if ours.ndim == 2 and ours.shape[0] == ours.shape[1] and _alike(theirs.T, ours):
        return "it is transposed"
    if _alike(theirs, -ours):
        return "its sign is turned"
    for other in model.state_dict():
        if other.endswith((".weight", ".bias")) and other != name:
            numbers = weight_of(model, other)
            if numbers.shape == ours.shape and _alike(theirs, numbers):
                return f"it holds {other}"
    gap = theirs - ours
    if gap.numel() > 1 and gap.std() < 1e-3 * gap.mean().abs():
        return f"its numbers are the checkpoint's {float(gap.mean()):+.3g}"
    return _order(theirs, ours) if theirs.ndim == 2 else ""


def _alike(one: Tensor, other: Tensor, least: float = _SAME) -> bool:
    return bool((one * other).sum() > least * one.norm() * other.norm())


def _order(theirs: Tensor, ours: Tensor) -> str:
    """Where its rows or columns are the checkpoint's in another order, which; else empty."""
    for what, one, other in (("rows", theirs, ours), ("columns", theirs.T, ours.T)):
        if one.shape[1] > 2 and len(one) <= _MOST_ROWS:
            places = (torch.nn.functional.normalize(one) @ torch.nn.functional.normalize(other).T).argmax(1)
            if _alike(one, other[places]) and len(places.unique()) == len(places):
                moved = (places != torch.arange(len(places))).nonzero()
                if len(moved):
                    at = int(moved[0])
                    return f"its {what} are in another order ({what[:-1]} {at} is the checkpoint's {int(places[at])})"
    return ""


def weight_of(model: Decoder, name: str) -> Tensor:
    """The numbers of one of our tensors, [out, in] or [n], fp32; of a tied head, the embedding's."""
    if name == "output.weight" and model.tied:
        name = "tok_embeddings.weight"
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    weight = effective_weight(module) if isinstance(module, Quantized) and leaf == "weight" else getattr(module, leaf)
    return weight.detach().float().cpu()


def summarize(found: Mapping[str, str]) -> str:
    """What is wrong with tensors, each kind of it once."""
    groups: dict[str, list[str]] = {}
    for name, what in found.items():
        groups.setdefault(what.partition(" (")[0] if " order (" in what else what, []).append(name)
    said = []
    for names in groups.values():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        said.append(f"{names[0]}{more}: {found[names[0]]}")
    more = f"; {len(said) - 4} more kinds of difference" if len(said) > 4 else ""
    return "; ".join(said[:4]) + more


def wrong_type(contents: Contents, name: str, asked: str | None, model: Decoder) -> str | None:
    """Why an export is not of the type it is called; None: it is, or none is named.

    Args:
        name: of the file or directory.
        asked: the type that it was made as; None: what a GGUF file's name says.
    """
    wanted = {name: dtypes.code_of(dtypes.from_name(name)) for name in dtypes.NAMES}
    wanted |= {} if contents.kinds else {"int8_dynamic": "int8_dynamic_int8"}  # a program's kinds are not known
    if asked is not None and asked.lower() in wanted:
        right = contents.kind == wanted[asked.lower()]
        return None if right else f"{asked} was asked for, and most of its numbers are {contents.kind}"
    if not contents.kinds or (gguf := name.removesuffix(UNVERIFIED)) == gguf.removesuffix(".gguf"):
        return None
    called = asked.upper() if asked is not None else _in_name(gguf)
    declared = contents.declared
    if called is not None and declared is not None and called != declared:
        return f"it is called {called}, and says of itself that it is {declared} (general.file_type)"
    called = called or declared
    if called not in (*WRITTEN, *QUANTIZED):
        return None
    share = _share(contents, called, model)
    # llama.cpp's mixes give some matrices more bits.
    if share >= (0.5 if called in WRITTEN else 0.25):
        return None
    return f"it is called {called}, and {1 - share:.0%} of its numbers are of other types, most of them {contents.kind}"


def _in_name(name: str) -> str | None:
    """The type in a file's name, such as model-Q4_K_M.gguf."""
    words = name.upper().removesuffix(".GGUF").replace(".", "-").split("-")
    return next((word for word in reversed(words) if word in (*WRITTEN, *QUANTIZED)), None)


def _share(contents: Contents, kind: str, model: Decoder) -> float:
    """The share of a file's numbers that are stored as a type has them, the vocabulary's projection apart."""
    sizes = matrices(model.config)
    right = total = 0
    for name, held in contents.kinds.items():
        leaf = name.split(".")[-2]
        if name.startswith("layers.") and name.endswith(".weight") and leaf in sizes:
            rows, width, _ = sizes[leaf]
            total += rows * width
            right += rows * width * (held == stored_type(kind, width))
    return right / max(1, total)
