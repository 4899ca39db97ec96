"""What a model costs a device, by arithmetic: bytes to hold, bytes and FLOPs a token. The model is not run.

Two runtimes are known: plmtune, whose cache holds an MLA's latent, and llama.cpp, which expands a PLM's to keys and
values, but not in the architecture deepseek2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from plmtune import dtypes
from plmtune.errors import UserError, did_you_mean
from plmtune.export.lint import QUANTIZED, WRITTEN, stored_bytes, stored_type
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, Quantized
from plmtune.quantization.schemes import EMBEDDING, HEAD, POSITIONS, VALUES, shapes
from plmtune.registry import Component, describe_components

RUNTIMES = ("plmtune", "llama.cpp")
FLOATS = {name: dtypes.BYTES[name] for name in ("fp32", "bf16")}
STORED = "stored"  # the scheme of a checkpoint that is quantized already

# Tokens that llama.cpp computes at once, by default (n_ubatch).
_LLAMA_CPP_BATCH = 512
# What a process takes besides its model: Python with torch on Linux, measured; llama.cpp's own is small.
PROGRAM = {"plmtune": 315 * 2**20, "llama.cpp": 30 * 2**20}

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, width] of a model.

    Attributes:
        name: its module; `like` the module that was inspected, where layers are equal.
        layer: its layer, None outside of them.
    """

    name: str
    rows: int
    width: int
    layer: int | None
    like: str

    @property
    def numel(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class Attention:
    """One layer's attention.

    Attributes:
        kind: "latent" (MLA) or "heads": how plmtune's cache holds it.
        latent: numbers a token in plmtune's cache; expanded: in llama.cpp's, keys and values of each head if not
            absorbed.
        decode: FLOPs of one new token for each cached one, in plmtune.
        prompt: FLOPs of one token for each token it attends to over keys and values: of a prompt, and in llama.cpp.
        heads: of queries.
        window: tokens that a token attends to at most; None: all.
        absorbed: llama.cpp caches the latent and attends over it, of prompts, too.
    """

    kind: Literal["latent", "heads"]
    latent: int
    expanded: int
    decode: int
    prompt: int
    heads: int
    window: int | None = None
    absorbed: bool = False

    def seen(self, tokens: int) -> int:
        """Tokens that one after so many others attends to."""
        return tokens if self.window is None else min(tokens, self.window)

    def pairs(self, tokens: int) -> int:
        """Pairs of tokens of a prompt that attention computes."""
        seen = self.seen(tokens)
        return seen * tokens - (seen * seen + 1) // 2


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that its costs follow from: `ModelShape.of(model)`, best on the meta device.

    Attributes:
        model: that was inspected.
        other: parameters outside matrices: norms, biases.
    """

    model: Decoder = field(compare=False, repr=False)
    matrices: tuple[Matrix, ...]
    attention: tuple[Attention, ...]
    other: int
    formats: dict[str, Format]

    @classmethod
    def of(cls, model: Decoder) -> ModelShape:
        """Raises ValueError for an attention that does not say its shapes."""
        matrices = []
        for name, shape in shapes(model).items():
            match = _LAYER.match(name)
            layer = int(match[1]) if match else None
            matrices.append(Matrix(name, *shape, layer, name))
        formats = {n: m.format for n, m in model.named_modules() if isinstance(m, Quantized)}
        other = sum(p.numel() for p in model.parameters()) - sum(m.numel for m in matrices if m.name not in formats)
        layers: list[Any] = list(model.layers)
        return cls(model, tuple(matrices), tuple(map(_attention, layers)), other, formats)

    def as_deepseek2(self) -> ModelShape:
        """A PLM's shape in the form deepseek2 of a GGUF file: the latent cached, each up projection held twice."""
        gates = [
            replace(matrix, name=matrix.name.replace("up_proj", "gate_proj"))
            for matrix in self.matrices
            if matrix.name.endswith("ffn.up_proj")
        ]
        return replace(
            self,
            matrices=(*self.matrices, *gates),
            attention=tuple(replace(a, expanded=a.latent, absorbed=True) for a in self.attention),
        )

    def repeated(self, num_layers: int) -> ModelShape:
        """The shape with `num_layers` layers, of a model with one layer: a sweep builds one model."""
        assert self.num_layers == 1
        inside = [m for m in self.matrices if m.layer is not None]
        outside = [m for m in self.matrices if m.layer is None]
        copies = [
            replace(m, name=_LAYER.sub(f"layers.{i}.", m.name, count=1), layer=i)
            for i in range(num_layers)
            for m in inside
        ]
        in_layer = sum(p.numel() for p in self.model.layers.parameters()) - sum(m.numel for m in inside)
        return replace(
            self,
            matrices=(*outside, *copies),
            attention=self.attention * num_layers,
            other=self.other + in_layer * (num_layers - 1),
        )

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    @property
    def max_seq_len(self) -> int:
        return int(self.model.max_seq_len)

    @property
    def parameters(self) -> int:
        return self.other + sum(m.numel for m in self.matrices)

    @property
    def non_embedding_parameters(self) -> int:
        return self.parameters - sum(m.numel for m in self.matrices if m.layer is None)

    @property
    def head(self) -> Matrix:
        """The vocabulary's projection."""
        return next(m for m in self.matrices if m.name == (EMBEDDING if self.model.tied else HEAD))

    @property
    def multiplied(self) -> tuple[Matrix, ...]:
        """The matrices that a token is multiplied with; others are only looked up."""
        looked_up = POSITIONS if self.model.tied else (*POSITIONS, EMBEDDING)
        return tuple(m for m in self.matrices if m.name not in looked_up and not m.name.startswith(VALUES))


def _attention(layer: Any) -> Attention:
    module = layer.attention
    if not (hasattr(module, "head_shapes") and hasattr(module, "cache_shapes")):
        raise ValueError(f"{type(module).__name__} has no head_shapes() and cache_shapes(), which its costs come from")
    (heads, key), (kv_heads, _), (_, value) = module.head_shapes()
    kept = sum(number * width for number, width in module.cache_shapes())
    expanded = kv_heads * (key + value)
    prompt = 2 * heads * (key + value)
    if len(module.cache_shapes()) == 1:
        # Scores over the latent and the rope key, then a sum of latents, for each head (absorbed decoding).
        decode = 2 * heads * (kept + module.kv_lora_rank)
        gated = getattr(layer.ffn, "gate_proj", None) is not None  # so it is of the architecture deepseek2
        return Attention("latent", kept, kept if gated else expanded, decode, prompt, heads, absorbed=gated)
    return Attention("heads", kept, expanded, prompt, prompt, heads, getattr(module, "window", None))


def our_schemes() -> list[str]:
    """Schemes that plmtune runs."""
    return [*FLOATS, *(name for name in describe_components().get("quantization", {}) if name != "mixed")]


def schemes_of(runtime: str) -> list[str]:
    return our_schemes() if runtime == "plmtune" else [kind.lower() for kind in (*WRITTEN, *QUANTIZED)]


def check_schemes(schemes: Sequence[str], runtimes: Sequence[str]) -> list[tuple[str, str]]:
    """(runtime, scheme) for each that is possible."""
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise UserError(f"There is no runtime {runtime}.{did_you_mean(runtime, RUNTIMES)}")
    for scheme in schemes:
        if scheme == STORED:
            continue
        if not any(scheme in schemes_of(runtime) for runtime in runtimes):
            known = sorted({name for runtime in runtimes for name in schemes_of(runtime)})
            raise UserError(f"{' and '.join(runtimes)} has no scheme {scheme}.{did_you_mean(scheme, known)}")
    return [
        (runtime, scheme)
        for runtime in runtimes
        for scheme in schemes
        if scheme in schemes_of(runtime) or (scheme == STORED and runtime == "plmtune")
    ]


@dataclass(frozen=True)
class Weights:
    """What a model's weights cost in one scheme.

    Attributes:
        file: bytes on disk, without the tokenizer.
        memory: bytes when loaded.
        read: form (bf16, int4_g32, Q8_0, ...) -> bytes that a decoded token reads.
        products: form -> matrices that it is multiplied with.
        numbers: form -> how many numbers these hold, the vocabulary's projection left out.
        head: form of the vocabulary's projection, which only the last token of a prompt needs.
        cached: bytes of a number in the cache.
    """

    file: int
    memory: int
    read: dict[str, int]
    products: dict[str, int]
    numbers: dict[str, int]
    head: str
    cached: int


def weights(model_shape: ModelShape, runtime: str, scheme: str) -> Weights:
    """Cost of a model's weights."""
    forms = _our_forms(model_shape, scheme) if runtime == "plmtune" else _gguf_forms(model_shape, scheme)
    width = 4 if runtime == "llama.cpp" else FLOATS.get(scheme, 2)  # norms: llama.cpp keeps them in F32
    file = memory = model_shape.other * width
    read: dict[str, int] = {}
    products: dict[str, int] = {}
    numbers: dict[str, int] = {}
    multiplied = {matrix.name for matrix in model_shape.multiplied}
    for matrix in model_shape.matrices:
        form, size = forms[matrix.name]
        file += size
        memory += size
        if matrix.name not in multiplied:
            continue
        if runtime == "plmtune" and matrix.name.endswith("kv_b_proj") and form not in FLOATS:
            # Absorbed decoding wants its numbers each token, so they are kept in place of the integers.
            memory += 2 * matrix.numel - matrix.numel * Format.parse(form).bits // 8
            form, size = "bf16", 2 * matrix.numel
        read[form] = read.get(form, 0) + size
        products[form] = products.get(form, 0) + 1
        numbers[form] = numbers.get(form, 0) + (matrix.numel if matrix is not model_shape.head else 0)
    cached = FLOATS.get(scheme, 2) if runtime == "plmtune" else 2
    return Weights(file, memory, read, products, numbers, forms[model_shape.head.name][0], cached)


def _our_forms(model_shape: ModelShape, scheme: str) -> dict[str, tuple[str, int]]:
    if scheme in FLOATS:
        return {m.name: (scheme, m.numel * FLOATS[scheme]) for m in model_shape.matrices}
    if scheme == STORED:
        plan = model_shape.formats
    elif model_shape.formats:
        raise UserError(
            f"The checkpoint is quantized already, so it cannot be planned as {scheme}: take the one before."
        )
    else:
        plan = Component("quantization", scheme)(model=model_shape.model)
    forms = {}
    for matrix in model_shape.matrices:
        format = plan.get(matrix.like)
        shape = (matrix.rows, matrix.width)
        forms[matrix.name] = (format.name, format.num_bytes(shape)) if format else ("bf16", 2 * matrix.numel)
    return forms


def _gguf_forms(model_shape: ModelShape, scheme: str) -> dict[str, tuple[str, int]]:
    """What llama.cpp's quantizer (llama_tensor_get_type) stores matrices as; one type for all where ours writes."""
    kind, forms, head = scheme.upper(), {}, model_shape.head
    absorbed = any(attention.absorbed for attention in model_shape.attention)
    first, last = model_shape.num_layers // 8, 7 * model_shape.num_layers // 8
    for matrix in model_shape.matrices:
        layer = matrix.layer or 0
        # The vocabulary's projection, and of a mix (_M) what errors hurt most in half of the layers, get 6 bits.
        delicate = matrix.name.endswith(("v_proj", "down_proj")) and kind in ("Q4_K_M", "Q5_K_M")
        delicate = delicate and (layer < first or layer >= last or (layer - first) % 3 == 2)
        if matrix.name in POSITIONS:
            type = "F32"
        elif kind in QUANTIZED and (matrix is head or delicate):
            type = stored_type("Q6_K", matrix.width)
        else:
            type = stored_type(kind, matrix.width, head=matrix is head)
        forms[matrix.name] = type, stored_bytes(type, matrix.numel)
        if absorbed and matrix.name.endswith("kv_b_proj"):
            # The keys' part is stored transposed, in rows of another width.
            part: Any = model_shape.model.config["attention"]
            width = part["qk_nope_head_dim"]
            keys = matrix.numel * width // (width + part["v_head_dim"])
            size = stored_bytes(stored_type(kind, width), keys)
            forms[matrix.name] = type, size + stored_bytes(type, matrix.numel - keys)
    return forms


def cache_bytes(model_shape: ModelShape, runtime: str, tokens: int = 1, *, dtype_bytes: int = 2) -> int:
    """Bytes that a cache of so many tokens takes; 16 bits a number unless said otherwise."""
    numbers = sum(a.latent if runtime == "plmtune" else a.expanded for a in model_shape.attention)
    return numbers * dtype_bytes * tokens


def attention_flops(model_shape: ModelShape, runtime: str, tokens: int) -> int:
    """FLOPs that one new token's attention over so many cached ones takes."""
    return sum(
        (a.decode if runtime == "plmtune" or a.absorbed else a.prompt) * a.seen(tokens) for a in model_shape.attention
    )


def prompt_attention_flops(model_shape: ModelShape, tokens: int, runtime: str = "plmtune") -> int:
    """FLOPs of attention over a prompt, whose tokens see half of it each, or their window."""
    return sum(
        (a.decode if runtime == "llama.cpp" and a.absorbed else a.prompt) * a.pairs(tokens)
        for a in model_shape.attention
    )


def decode_flops(model_shape: ModelShape, runtime: str, context: int) -> int:
    """FLOPs of one new token after `context` others."""
    return 2 * sum(m.numel for m in model_shape.multiplied) + attention_flops(model_shape, runtime, context)


def workspace_bytes(model_shape: ModelShape, runtime: str, prompt: int, context: int) -> int:
    """Bytes of intermediate results while a prompt is read: the widest place of a layer, and one row of logits."""
    rows = prompt if runtime == "plmtune" else min(prompt, _LLAMA_CPP_BATCH)
    residual = 3 * model_shape.model.embed_dim
    attended = max(a.prompt for a in model_shape.attention)  # queries, keys and values of all heads: 2 h (qk + v)
    widest = max((max(m.rows, m.width) for m in model_shape.matrices if m.layer is not None), default=0)
    inside = max(2 * widest, attended)
    if runtime == "plmtune":
        return 2 * rows * (residual + inside) + 4 * model_shape.model.vocab_size
    # Without flash attention, which a PLM's own architecture has not, the scores of a batch are there as a whole.
    scores = max(0 if a.absorbed else a.heads for a in model_shape.attention) * context
    return 4 * rows * (residual + max(inside, scores)) + 4 * model_shape.model.vocab_size
