"""What decode.c computes: a token of a whole decoder, and products and conversions of single matrices."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from plmtune.modules.cache import Cache
from plmtune.modules.decoder import Decoder
from plmtune.modules.feed_forward import SquaredReLU, SwiGLU
from plmtune.modules.gqa import GroupedQueryAttention
from plmtune.modules.mla import MultiHeadLatentAttention
from plmtune.modules.norm import RMSNorm, autocast_active
from plmtune.modules.quantized import Quantized
from plmtune.modules.rope import RotaryEmbedding
from plmtune.native.library import library
from plmtune.native.structs import (
    CPU,
    KINDS,
    Layer,
    Matrix,
    Model,
    TensorRefs,
    Unsupported,
    Vector,
    number,
    pointer,
    require,
)


class _BoundModel(TensorRefs):
    """A model as decode.c's structures, and what must not change for them to stay valid."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        require(type(model) is Decoder)
        require(
            model.pos_embeddings is model.value_embeddings is model.query_embeddings is None
            and model.embed_scale == model.logit_scale == 1
        )
        self.tables: list[Tensor] = []
        # (a module's own dictionary, name, what it held)
        self.held: list[tuple[dict[str, Any], str, object]] = []
        self.hooks: list[dict[int, Any]] = []
        self.ffns: list[SquaredReLU] = []
        self.dtype = model.dtype
        for module in model.modules():
            if module is not model:
                self.hooks += [module._forward_hooks, module._forward_pre_hooks]
                self.ffns += [module] if isinstance(module, SquaredReLU) else []
            for kept in (module._modules, module._parameters, module._buffers):
                self.held += [(cast(dict[str, Any], kept), name, value) for name, value in kept.items()]
            if isinstance(module, Quantized):
                self.held.append((vars(module), "dense", module.dense))
        self.sparse = [ffn.sparse for ffn in self.ffns]
        self.layers = (Layer * len(model.layers))()
        for struct, layer in zip(self.layers, cast(Iterator[Any], model.layers), strict=True):
            self.layer(struct, layer)
        self.model = Model(layers=self.layers, num_layers=len(model.layers))
        self.model.embedding = self.matrix(model.tok_embeddings)
        self.model.head = self.model.embedding if model.tied else self.matrix(model.output)
        self.model.norm, self.model.eps = self.norm(model.norm)

    def is_current(self, model: Decoder) -> bool:
        """Whether the structures still describe the model."""
        return (
            all(kept.get(name) is value for kept, name, value in self.held)
            and all(tensor.data_ptr() == at for tensor, at in self.tensors)
            and model.dtype == self.dtype
            and [ffn.sparse for ffn in self.ffns] == self.sparse
        )

    def norm(self, module: nn.Module) -> tuple[Vector, float]:
        require(type(module) is RMSNorm)
        norm = cast(RMSNorm, module)
        require(not norm.unit_offset)
        return self.vector(norm.weight), norm.eps

    def layer(self, struct: Layer, layer: Any) -> None:
        attention, ffn = layer.attention, layer.ffn
        require(layer.post_attention_norm is None and layer.residual_scale == 1)
        require(getattr(attention, "q_lora_rank", None) is attention.shortcut is None)
        struct.attention_norm, struct.attention_eps = self.norm(layer.attention_norm)
        struct.ffn_norm, struct.ffn_eps = self.norm(layer.ffn_norm)
        struct.q, struct.o = self.matrix(attention.q_proj), self.matrix(attention.o_proj)
        struct.heads = attention.num_heads
        if type(attention) is MultiHeadLatentAttention:
            struct.k, struct.v = self.matrix(attention.kv_a_proj), self.matrix(attention.kv_b_proj)
            require(struct.v.kind in KINDS.values() and not struct.v.bias.at)
            struct.latent_norm, struct.latent_eps = self.norm(attention.kv_a_norm)
            struct.latent, struct.kv_heads = attention.kv_lora_rank, 1
            struct.nope, struct.turned = attention.qk_nope_head_dim, attention.qk_rope_head_dim
            struct.value, struct.scale = attention.v_head_dim, attention.scale
        else:
            require(type(attention) is GroupedQueryAttention)
            struct.k, struct.v = self.matrix(attention.k_proj), self.matrix(attention.v_proj)
            require(attention.q_norm is attention.window is attention.soft_cap is None)
            require(attention.rope_dim == attention.head_dim)
            struct.kv_heads, struct.turned = attention.num_kv_heads, attention.head_dim
            struct.value, struct.scale = attention.head_dim, attention.scale
        rope = attention.rope
        require(type(rope) is RotaryEmbedding)
        require(rope.scaling is None or not rope.scaling.by_length)
        struct.interleaved = rope.settings[-1]
        tables = rope.tables(CPU)
        self.tables += tables
        struct.cos, struct.sin = (table.data_ptr() for table in tables)
        struct.up = self.matrix(ffn.up_proj)
        if type(ffn) is SwiGLU:
            struct.gate, struct.down = self.matrix(ffn.gate_proj), self.matrix(ffn.down_proj)
        else:
            require(type(ffn) is SquaredReLU)
            struct.sparse = ffn.sparse
            struct.down = self.matrix(ffn.down_proj, by_input=ffn.sparse)
            require(not (ffn.sparse and struct.down.bias.at))


class NativeDecoder:
    """Decodes a model's tokens one at a time; a copy of the model gets a decoder of its own.

    Weights are read in place, so in-place changes take effect at once. Replaced tensors or modules are noticed, and the
    structures are built again.
    """

    def __init__(self) -> None:
        self._bound: _BoundModel | None = None

    def __reduce__(self) -> tuple[type[NativeDecoder], tuple[()]]:
        return NativeDecoder, ()  # pointers are not copied

    def bind(self, model: Decoder) -> _BoundModel | None:
        """The structures of a model, built again where it changed; None if it has unsupported parts."""
        if self._bound is None or not self._bound.is_current(model):
            self._bound = None
            try:
                self._bound = _BoundModel(model)
            except Unsupported:
                return None
        return self._bound

    def _usable(self, model: Decoder) -> _BoundModel | None:
        if (
            torch.is_grad_enabled()
            or model.training
            or torch.compiler.is_compiling()
            or autocast_active(CPU)
            or nn_module._global_forward_hooks
            or nn_module._global_forward_pre_hooks
        ):
            return None
        bound = self.bind(model)
        if bound is None or any(bound.hooks) or any(ffn.record_sparsity for ffn in bound.ffns):
            return None
        return bound

    def step(self, model: Decoder, tokens: Tensor, cache: Cache) -> Tensor | None:
        """Compute one token, [1, 1], as `Decoder.forward` does: append to the cache, return hidden states, [1, 1, d].

        None: the modules must compute it; nothing was done.
        """
        if tokens.shape != (1, 1) or tokens.device != CPU or type(cache) is not Cache:
            return None
        bound = self._usable(model)
        if bound is None or cache.length >= cache.max_seq_len:
            return None
        buffers = [buffer for layer in cache.layers for buffer in layer]
        first = buffers[0]
        if first.dtype not in KINDS or bound.dtype not in KINDS:
            return None
        for buffer in buffers:
            if buffer.shape[0] != 1 or buffer.dtype != first.dtype or not buffer.is_contiguous():
                return None
        token = int(tokens)
        if not 0 <= token < model.vocab_size:
            return None  # the embedding raises
        out = torch.empty(1, 1, model.embed_dim, dtype=bound.dtype)
        places = (pointer * len(buffers))(*[buffer.data_ptr() for buffer in buffers])
        held = KINDS[first.dtype], cache.max_seq_len
        _call("decode", ctypes.byref(bound.model), token, cache.length, places, *held, out, KINDS[bound.dtype])
        cache.advance(1)
        return out

    def logits(self, model: Decoder, hidden: Tensor) -> Tensor | None:
        """fp32 logits, [..., v], of one normed hidden state, [..., d]; None: the modules must compute it."""
        if hidden.numel() != model.embed_dim or hidden.device != CPU or hidden.dtype not in KINDS:
            return None
        bound = self._usable(model)
        if bound is None:
            return None
        return product(bound.model.head, hidden.contiguous()).view(*hidden.shape[:-1], -1)


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the library with numbers, structures and tensors, and with as many threads as torch uses."""
    given = [number(each) if isinstance(each, int) else each for each in arguments]
    given = [pointer(each.data_ptr()) if isinstance(each, Tensor) else each for each in given]
    if getattr(library(), f"plmtune_{name}")(*given, ctypes.c_int(torch.get_num_threads())):
        raise MemoryError(f"out of memory in decode.c ({name})")


def product(matrix: Matrix, x: Tensor) -> Tensor:
    """matrix x in fp32, [out], of x (Tensor), contiguous, as many numbers as the matrix has columns."""
    y = torch.empty(matrix.rows)
    _call("product", ctypes.byref(matrix), Vector(x.data_ptr(), KINDS[x.dtype]), y)
    return y


def multiply(module: Quantized, x: Tensor) -> Tensor:
    """x (Tensor), [n, in] -> [n, out], row by row, from integers in the files' order."""
    matrix = TensorRefs().matrix(module)
    matrix.bias = Vector()  # the layer adds it
    products = [product(matrix, row) for row in x.float().contiguous()]
    return torch.stack(products).to(x.dtype) if products else x.new_empty(0, module.num_rows)


def dequantize(module: Quantized, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return what `Quantized.dequantize` returns, in fp32 or bf16, from integers in the files' order."""
    start, end, _ = rows.indices(module.num_rows)
    out = torch.empty(end - start, module.width, dtype=dtype)
    _call("rows", ctypes.byref(TensorRefs().matrix(module)), start, end, out, KINDS[dtype])
    return out


def round_inputs(x: Tensor) -> Tensor:
    """Return what `quantized.round_inputs` returns for x (Tensor), [n, in], contiguous."""
    out = torch.empty_like(x)
    _call("round", Vector(x.data_ptr(), KINDS[x.dtype]), *x.shape, out)
    return out
