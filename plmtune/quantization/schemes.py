"""Schemes: the format of each matrix of a model. A scheme returns {module name: Format} for a model.

The model may be on the meta device: only names and shapes are used. Candidates are the linear layers and the embedding;
norms and a reward model's score head are never quantized. Rules are patterns (fnmatch) on module names:

    rules: {"layers.0.*": int8, "*.ffn.down_proj": int4_g32, output: keep}     # later ones win

Arguments of the schemes:
    model: with these layers.
    group_size: neighbours in a row that share a scale (and a zero).
    embedding: format of the embedding, of value embeddings and of the head, or keep.
    rules: pattern of module names -> format or keep; later ones win.
    qat: fake-quantize weights (and inputs) with this scheme during fine-tuning.

They raise ValueError for an unknown format, or a pattern that matches no module's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from plmtune.errors import did_you_mean
from plmtune.modules.quantized import Format, Quantized
from plmtune.registry import register

KEEP = "keep"
EMBEDDING, HEAD = "tok_embeddings", "output"
VALUES = "value_embeddings."  # of layers: tables as the embedding is
# Looked up by position; never quantized, as in llama.cpp: there are few, and each is added to a hidden state or asks.
POSITIONS = ("pos_embeddings", "query_embeddings")


class LayerFormats(dict[str, Format]):
    """Module name -> its format; other modules stay unquantized.

    Attributes:
        notes: sentences on formats that did not fit a module and were replaced.
    """

    def __init__(self, formats: Mapping[str, Format] = {}, notes: list[str] | None = None) -> None:
        super().__init__(formats)
        self.notes = notes or []


@register("quantization", "int8")
def int8(
    model: nn.Module,
    *,
    embedding: str = "int8",
    rules: dict[str, str] = {},  # noqa: B006 - read only
    qat: bool = False,
) -> dict[str, Format]:
    """Weights of 8 bits, a scale a row: half of bf16's bytes, hardly any loss."""
    return _choose(model, Format(8), embedding, rules)


@register("quantization", "int8_dynamic")
def int8_dynamic(
    model: nn.Module,
    *,
    embedding: str = "int8",
    rules: dict[str, str] = {},  # noqa: B006 - read only
    qat: bool = False,
) -> dict[str, Format]:
    """Weights of 8 bits, and inputs rounded to 8 bits token by token: what integer units and XNNPACK multiply."""
    return _choose(model, Format(8, dynamic=True), embedding, rules)


@register("quantization", "int8_dynamic_int4")
def int8_dynamic_int4(
    model: nn.Module,
    *,
    group_size: int = 32,
    embedding: str = "int8",
    rules: dict[str, str] = {},  # noqa: B006 - read only
    qat: bool = False,
) -> dict[str, Format]:
    """Weights of 4 bits around zero in groups, and inputs rounded to 8 bits token by token (8da4w)."""
    return _choose(model, Format(4, group_size, dynamic=True), embedding, rules)


@register("quantization", "int4")
def int4(
    model: nn.Module,
    *,
    group_size: int = 32,
    embedding: str = "int8",
    rules: dict[str, str] = {},  # noqa: B006 - read only
    qat: bool = False,
) -> dict[str, Format]:
    """Weights of 4 bits in groups, each with a scale and a zero: the smallest."""
    return _choose(model, Format(4, group_size), embedding, rules)


@register("quantization", "mixed")
def mixed(
    model: nn.Module,
    *,
    rules: dict[str, str] = {},  # noqa: B006 - read only
    qat: bool = False,
) -> dict[str, Format]:
    """The formats of the rules alone, such as those that `--sensitivity` proposes."""
    if not rules:
        raise ValueError("rules: mixed stores nothing in integers without them, such as {'*.ffn.*': int4_g32}")
    return _choose(model, None, KEEP, rules)


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shape [out, in] of each matrix of a model, quantized or not, by its module's name; a score head's left out."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            found[name] = module.num_rows, module.width
        elif isinstance(module, nn.Linear | nn.Embedding) and name.rpartition(".")[2] != "score":
            rows, width = module.weight.shape
            found[name] = rows, width
    return found


def candidates(model: nn.Module) -> dict[str, tuple[int, int]]:
    """`shapes` of the matrices that can be quantized, none of which is."""
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            raise ValueError(f"the model is quantized already ({name} is {module.format.name}): take the one before")
    return {name: shape for name, shape in shapes(model).items() if name not in POSITIONS}


def _choose(model: nn.Module, linear: Format | None, embedding: str, rules: Mapping[str, str]) -> dict[str, Format]:
    sizes = candidates(model)
    rows = _parse("embedding", embedding)
    chosen = {name: rows if name in (EMBEDDING, HEAD) or name.startswith(VALUES) else linear for name in sizes}
    for pattern, format_name in rules.items():
        format = _parse(f"rules, {pattern!r:.80}", format_name)
        matched = [name for name in sizes if fnmatchcase(name, pattern)]
        if not matched:
            near = did_you_mean(pattern, sizes)
            raise ValueError(f"rules: no module's name matches {pattern!r:.80}.{near if len(near) < 400 else ''}")
        chosen |= dict.fromkeys(matched, format)
    formats = LayerFormats()
    replaced: dict[tuple[Format, Format | None, int], list[str]] = {}
    for name, format in chosen.items():
        if format is None:
            continue
        width = sizes[name][1]
        fitting = fit(format, width)
        if fitting is not None:
            formats[name] = fitting
        if fitting != format:
            replaced.setdefault((format, fitting, width), []).append(name)
    for (format, fitting, width), names in replaced.items():
        which = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        instead = f"stored as {fitting.name}" if fitting else "kept as it is"
        formats.notes.append(f"{which}: rows of {width} numbers do not divide as {format.name} wants; {instead}")
    return formats


def _parse(key: str, name: str) -> Format | None:
    try:
        return None if name == KEEP else Format.parse(name)
    except ValueError as error:
        raise ValueError(f"{key}: {error}; or {KEEP}") from error


def fit(format: Format, width: int) -> Format | None:
    """The nearest format that fits rows of `width` numbers: with the largest group that divides them, else 8 bits with
    one scale a row, else (an odd width) None."""
    if width % 2:
        return None
    if format.group_size is None or width % format.group_size == 0:
        return format
    for size in range(min(format.group_size - 16, width // 16 * 16), 0, -16):
        if width % size == 0:
            return Format(format.bits, size, format.dynamic)
    return Format(8, dynamic=format.dynamic)
