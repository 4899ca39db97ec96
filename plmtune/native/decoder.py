"""Which models decode.c takes, what it is told of them, and when a forward is its business."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from plmtune.modules.attention import GroupedQueryAttention, MultiHeadLatentAttention
from plmtune.modules.cache import Cache
from plmtune.modules.decoder import Decoder
from plmtune.modules.feed_forward import SquaredReLU, SwiGLU
from plmtune.modules.linear import Linear
from plmtune.modules.norm import RMSNorm, autocast_active
from plmtune.modules.quantized import Format, Quantized, QuantizedEmbedding, QuantizedLinear
from plmtune.modules.rope import RotaryEmbedding, rope_tables
from plmtune.native.library import library, unavailable

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4 = 2, 3
_CPU = torch.device("cpu")

_pointer, _number, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Vector(ctypes.Structure):
    _fields_ = (("at", _pointer), ("kind", _number))


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", _pointer),
        ("zeros", _pointer),
        ("scales", _Vector),
        ("bias", _Vector),
        *((name, _number) for name in ("kind", "rows", "cols", "group", "dynamic")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _Vector) for name in ("attention_norm", "latent_norm", "ffn_norm")),
        *((name, _float) for name in ("attention_eps", "latent_eps", "ffn_eps", "scale")),
        ("cos", _pointer),
        ("sin", _pointer),
        *((name, _number) for name in ("latent", "heads", "kv_heads", "nope", "turned", "value", "interleaved")),
        ("sparse", _number),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("norm", _Vector),
        ("eps", _float),
        ("num_layers", _number),
    )


class _Unfit(Exception):
    """A model, or a part of one, that decode.c does not take."""


def _ask(condition: object) -> None:
    if not condition:
        raise _Unfit


class _Seen:
    """Tensors as decode.c is told of them, which are kept."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Tensor, int]] = []

    def at(self, tensor: Tensor) -> int:
        _ask(type(tensor) in (Tensor, nn.Parameter) and tensor.device == _CPU)
        self.tensors.append((tensor, tensor.data_ptr()))
        return tensor.data_ptr()

    def vector(self, tensor: Tensor) -> _Vector:
        _ask(tensor.dtype in _KINDS and tensor.is_contiguous())
        return _Vector(self.at(tensor), _KINDS[tensor.dtype])

    def matrix(self, module: nn.Module, *, by_input: bool = False) -> _Matrix:
        """A layer's matrix; by_input: its transpose is what lies in memory."""
        told = _Matrix()
        if isinstance(module, Quantized) and module.dense is None:
            _ask(type(module) in (QuantizedLinear, QuantizedEmbedding) and not module.tile)
            format = module.format
            _ask(module.weight.is_contiguous() and module.weight.numel() > 0)
            told.kind = _INT8 if format.bits == 8 else _INT4
            told.rows, told.cols = module.num_rows, module.width
            told.group, told.dynamic = format.group_size or module.width, format.dynamic
            _ask(told.group % (16 if format.bits == 8 else 32) == 0)
            told.weight, told.scales = self.at(module.weight), self.vector(module.scales)
            if not format.symmetric:
                _ask(module.zeros.is_contiguous())
                told.zeros = self.at(module.zeros)
        else:
            _ask(type(module) in (Linear, nn.Linear, nn.Embedding, QuantizedLinear))
            weight = module.dense if isinstance(module, Quantized) else cast(Tensor, module.weight)
            assert weight is not None
            _ask(weight.dtype in _KINDS and (weight.t() if by_input else weight).is_contiguous())
            told.kind, told.weight = _KINDS[weight.dtype], self.at(weight)
            told.rows, told.cols = weight.shape
            told.group = told.cols
        bias = getattr(module, "bias", None)
        if bias is not None:
            told.bias = self.vector(bias)
        return told


class _Binding(_Seen):
    """What decode.c was told of a model, and what must still be as it was for that to be true."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        _ask(type(model) is Decoder)
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
        self.layers = (_Layer * len(model.layers))()
        for told, layer in zip(self.layers, cast(Iterator[Any], model.layers), strict=True):
            self.layer(told, layer)
        self.model = _Model(layers=self.layers, num_layers=len(model.layers))
        self.model.embedding = self.matrix(model.tok_embeddings)
        self.model.head = self.model.embedding if model.tied else self.matrix(model.output)
        self.model.norm, self.model.eps = self.norm(model.norm)

    def fresh(self, model: Decoder) -> bool:
        """Whether the model is still what decode.c was told."""
        return (
            all(kept.get(name) is value for kept, name, value in self.held)
            and all(tensor.data_ptr() == at for tensor, at in self.tensors)
            and model.dtype == self.dtype
            and [ffn.sparse for ffn in self.ffns] == self.sparse
        )

    def norm(self, module: nn.Module) -> tuple[_Vector, float]:
        _ask(type(module) is RMSNorm)
        norm = cast(RMSNorm, module)
        return self.vector(norm.weight), norm.eps

    def layer(self, told: _Layer, layer: Any) -> None:
        attention, ffn = layer.attention, layer.ffn
        told.attention_norm, told.attention_eps = self.norm(layer.attention_norm)
        told.ffn_norm, told.ffn_eps = self.norm(layer.ffn_norm)
        told.q, told.o = self.matrix(attention.q_proj), self.matrix(attention.o_proj)
        told.heads = attention.num_heads
        if type(attention) is MultiHeadLatentAttention:
            told.k, told.v = self.matrix(attention.kv_a_proj), self.matrix(attention.kv_b_proj)
            _ask(told.v.kind in _KINDS.values() and not told.v.bias.at)
            told.latent_norm, told.latent_eps = self.norm(attention.kv_a_norm)
            told.latent, told.kv_heads = attention.kv_lora_rank, 1
            told.nope, told.turned = attention.qk_nope_head_dim, attention.qk_rope_head_dim
            told.value, told.scale = attention.v_head_dim, attention.scale
        else:
            _ask(type(attention) is GroupedQueryAttention)
            told.k, told.v = self.matrix(attention.k_proj), self.matrix(attention.v_proj)
            told.kv_heads, told.turned = attention.num_kv_heads, attention.head_dim
            told.value, told.scale = attention.head_dim, attention.head_dim**-0.5
        rope = attention.rope
        _ask(type(rope) is RotaryEmbedding)
        settings: tuple[int, int, float, bool] = rope.settings
        told.interleaved = settings[-1]
        tables = rope_tables(*settings, _CPU)
        self.tables += tables
        told.cos, told.sin = (table.data_ptr() for table in tables)
        told.up = self.matrix(ffn.up_proj)
        if type(ffn) is SwiGLU:
            told.gate, told.down = self.matrix(ffn.gate_proj), self.matrix(ffn.down_proj)
        else:
            _ask(type(ffn) is SquaredReLU)
            told.sparse = ffn.sparse
            told.down = self.matrix(ffn.down_proj, by_input=ffn.sparse)
            _ask(not (ffn.sparse and told.down.bias.at))


def missing() -> str | None:
    """Why decoding is eager here, as a sentence; None: it is native."""
    return unavailable() or (None if _sound() else "it computes something else than torch on this machine.")


@functools.cache
@torch.inference_mode()
def _sound() -> bool:
    """Whether a small model says natively what it says in torch: a compiler is not believed unasked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(
            vocab_size=64,
            embed_dim=32,
            num_layers=2,
            max_seq_len=32,
            attention=lambda: MultiHeadLatentAttention(
                32, 2, 32, RMSNorm, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
            ),
            ffn=lambda: SquaredReLU(32, hidden_dim=72),
            norm=RMSNorm,
            init_std=0.2,
        ).eval()
    ids, found = torch.arange(20)[None], []
    for native in (None, NativeDecoder()):
        model.native = native
        cache = model.new_cache(1, 32)
        found.append(torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(20)]))
    return bool((found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().max())


class NativeDecoder:
    """Decodes a model's tokens one at a time, where it can; a copy is its own, and binds its own model.

    Weights are read where they lie. What changes them in place is seen at once; what puts other tensors or modules in
    their places is noticed, and the model looked at anew.
    """

    def __init__(self) -> None:
        self._binding: _Binding | None = None

    def __reduce__(self) -> tuple[type[NativeDecoder], tuple[()]]:
        return NativeDecoder, ()  # no pointers go along

    @classmethod
    def of(cls, model: Decoder) -> NativeDecoder | None:
        """One for this model; None where it does not take it, or nothing is compiled."""
        if missing() is not None:
            return None
        found = cls()
        return found if found._bind(model) is not None else None

    def _bind(self, model: Decoder) -> _Binding | None:
        if self._binding is None or not self._binding.fresh(model):
            self._binding = None
            try:
                self._binding = _Binding(model)
            except _Unfit:
                return None
        return self._binding

    def _ready(self, model: Decoder) -> _Binding | None:
        if (
            torch.is_grad_enabled()
            or model.training
            or torch.compiler.is_compiling()
            or autocast_active(_CPU)
            or nn_module._global_forward_hooks
            or nn_module._global_forward_pre_hooks
        ):
            return None
        binding = self._bind(model)
        if binding is None or any(binding.hooks) or any(ffn.record_sparsity for ffn in binding.ffns):
            return None
        return binding

    def step(self, model: Decoder, tokens: Tensor, cache: Cache) -> Tensor | None:
        """What `Decoder.forward` computes of one token, [1, 1], written to the cache: normed hidden states, [1, 1, d].

        None: this is for the modules to compute, and nothing was done.
        """
        if tokens.shape != (1, 1) or tokens.device != _CPU or type(cache) is not Cache:
            return None
        binding = self._ready(model)
        if binding is None or cache.length >= cache.max_seq_len:
            return None
        buffers = [buffer for layer in cache.layers for buffer in layer]
        first = buffers[0]
        if first.dtype not in _KINDS or binding.dtype not in _KINDS:
            return None
        for buffer in buffers:
            if buffer.shape[0] != 1 or buffer.dtype != first.dtype or not buffer.is_contiguous():
                return None
        token = int(tokens)
        if not 0 <= token < model.vocab_size:
            return None  # for the embedding to complain of
        out = torch.empty(1, 1, model.embed_dim, dtype=binding.dtype)
        failed = library().plmtune_decode(
            ctypes.byref(binding.model),
            _number(token),
            _number(cache.length),
            (_pointer * len(buffers))(*[buffer.data_ptr() for buffer in buffers]),
            _number(_KINDS[first.dtype]),
            _number(cache.max_seq_len),
            _pointer(out.data_ptr()),
            _number(_KINDS[binding.dtype]),
            ctypes.c_int(torch.get_num_threads()),
        )
        if failed:
            raise MemoryError("there is no memory for decoding a token")
        cache.advance(1)
        return out

    def logits(self, model: Decoder, hidden: Tensor) -> Tensor | None:
        """fp32 logits, [..., v], of one normed hidden state, [..., d]; None: this is for the modules to compute."""
        if hidden.numel() != model.embed_dim or hidden.device != _CPU or hidden.dtype not in _KINDS:
            return None
        binding = self._ready(model)
        if binding is None:
            return None
        return _product(binding.model.head, hidden.contiguous()).view(*hidden.shape[:-1], -1)


def _product(matrix: _Matrix, x: Tensor) -> Tensor:
    """matrix x in fp32, [out], of x (Tensor), contiguous, as many numbers as the matrix has columns."""
    y = torch.empty(matrix.rows)
    vector = _Vector(x.data_ptr(), _KINDS[x.dtype])
    threads = ctypes.c_int(torch.get_num_threads())
    if library().plmtune_product(ctypes.byref(matrix), vector, _pointer(y.data_ptr()), threads):
        raise MemoryError("there is no memory for a product")
    return y


def takes(format: Format, dtype: torch.dtype, width: int) -> bool:
    """Whether `multiply`, `dequantize` and `round_inputs` take such a matrix on the CPU of this machine."""
    lanes = 16 if format.bits == 8 else 32
    return dtype in _KINDS and (format.group_size or width) % lanes == 0 and missing() is None


def multiply(module: Quantized, x: Tensor) -> Tensor:
    """x (Tensor), [n, in] -> [n, out], row by row, from integers that lie as in files."""
    told = _Seen().matrix(module)
    told.bias = _Vector()  # is added by the layer
    products = [_product(told, row) for row in x.float().contiguous()]
    return torch.stack(products).to(x.dtype) if products else x.new_empty(0, module.num_rows)


def dequantize(module: Quantized, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return what `Quantized.dequantize` returns, in fp32 or bf16, of integers that lie as in files."""
    start, end, _ = rows.indices(module.num_rows)
    out = torch.empty(end - start, module.width, dtype=dtype)
    library().plmtune_rows(
        ctypes.byref(_Seen().matrix(module)),
        _number(start),
        _number(end),
        _pointer(out.data_ptr()),
        _number(_KINDS[dtype]),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out


def round_inputs(x: Tensor) -> Tensor:
    """Return what `quantized.round_inputs` returns for x (Tensor), [n, in], contiguous."""
    out, threads = torch.empty_like(x), ctypes.c_int(torch.get_num_threads())
    vector, (rows, width) = _Vector(x.data_ptr(), _KINDS[x.dtype]), x.shape
    if library().plmtune_round(vector, _number(rows), _number(width), _pointer(out.data_ptr()), threads):
        raise MemoryError("there is no memory for a product")
    return out


def attach(model: nn.Module) -> bool:
    """Have a decoder decode natively from now on, and say whether it does."""
    if not isinstance(model, Decoder):
        return False
    model.native = NativeDecoder.of(model)
    return model.native is not None
