"""A model as a .pte file that ExecuTorch runs through XNNPACK, one token at a time over a cache inside the program.

The file has one method that computes and some that tell, as ExecuTorch's own runner for language models expects them:

    forward(tokens int64 [1, 1], input_pos int64 [1]) -> logits fp32 [1, v]    of the token after `tokens`
    get_vocab_size, get_max_seq_len, get_max_context_len, get_bos_id, get_n_layers -> int;  get_eos_ids -> ints
    use_kv_cache, use_sdpa_with_kv_cache, enable_dynamic_shape -> bool

The cache is a buffer of the program: `forward` writes the entry of position input_pos and attends over 0 to input_pos.
To begin anew, or to go back, go on at that position: what lies after it is never seen. Memory must be zeroed when the
program is loaded, as ExecuTorch's Module and its Python runtime do. Positions must stay below get_max_seq_len: the
program does not look. A prompt is read a token at a time, as ExecuTorch's runner does without enable_dynamic_shape.

Beside FILE.pte are FILE.pte.json, which tells the same and more (`facts`), and the folder FILE.pte.tokenizer with the
tokenizer's files, as `load_tokenizer` and transformers read them.

Arithmetic is the model's own: MLA absorbed, over a cache of latents, so that PLM-1.8B keeps 18,432 numbers a token and
not 163,840. Linear layers of a dynamic format multiply integers. What `kv_b` is absorbed as are fp32 numbers.
Weight-only formats are refused: XNNPACK takes them and computes nonsense, without an error.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plmtune.errors import UserError, did_you_mean
from plmtune.export.huggingface import end_ids
from plmtune.extras import installed, missing
from plmtune.io.atomic import atomic_write, check_room
from plmtune.models.checkpoint_files import write_json
from plmtune.modules.decoder import Decoder
from plmtune.modules.feed_forward import SquaredReLU, SwiGLU
from plmtune.modules.gqa import GroupedQueryAttention
from plmtune.modules.mla import MultiHeadLatentAttention
from plmtune.modules.norm import RMSNorm
from plmtune.modules.peft import effective_weight
from plmtune.modules.quantized import Format, Quantized, QuantizedEmbedding, QuantizedLinear
from plmtune.modules.rope import RotaryEmbedding
from plmtune.modules.torchtune_layers import quiet
from plmtune.registry import load
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.units import show_bytes

Scheme = Literal["fp32", "int8_dynamic", "int8_dynamic_int4"]

# Of a score that must not count: finite, because XNNPACK's softmax subtracts, and infinity less infinity is no number.
_HIDDEN = -1e9
_DEFAULT_CONTEXT = 2048
_SCHEME_OF_BITS = {8: "int8_dynamic", 4: "int8_dynamic_int4"}
_CACHES = (".cache", ".keys", ".values")


class Norm(nn.Module):
    """RMSNorm in operations that XNNPACK has: it knows no mean of a row, but a product with 1 / d."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = nn.Parameter(norm.weight.detach(), requires_grad=False)
        width = norm.weight.shape[0]
        self.register_buffer("average", torch.full((1, width), 1 / width))

    average: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (Tensor): [s, d] -> [s, d]."""
        return x * torch.rsqrt(F.linear(x * x, self.average) + self.eps) * self.weight


class Turn(nn.Module):
    """RoPE at one position. Its partner of each number comes by a product with ones and zeros, which is exact."""

    def __init__(self, rope: RotaryEmbedding, max_seq_len: int) -> None:
        super().__init__()
        self.dim, _, _, interleaved = rope.settings
        places = torch.arange(self.dim)
        partner = places ^ 1 if interleaved else (places + self.dim // 2) % self.dim
        self.register_buffer("swap", F.one_hot(partner, self.dim).float())
        # x cos + partner sin: with one number of each pair set to 1 the tables can be read off.
        first = partner > places
        of_first, of_second = (
            rope(x.float().expand(1, max_seq_len, 1, -1))[0, :, 0] for x in (first, ~first)
        )  # [max_seq_len, dim]
        self.register_buffer("cos", torch.where(first, of_first, of_second))
        self.register_buffer("sin", torch.where(first, of_second, of_first))

    swap: Tensor
    cos: Tensor
    sin: Tensor

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x (Tensor): [h, dim], position (Tensor): [1] -> [h, dim]."""
        return x * self.cos[position] + F.linear(x, self.swap) * self.sin[position]


class LatentStep(nn.Module):
    """One token of MLA, absorbed over its own cache.

    Args:
        attention: whose projections are taken; quantized or not.
        turn: RoPE, which all layers share.
        max_seq_len: positions of the cache.
    """

    cache: Tensor
    w_uk: Tensor
    w_uv: Tensor

    def __init__(self, attention: MultiHeadLatentAttention, turn: Turn, max_seq_len: int) -> None:
        super().__init__()
        self.nope, self.rank = attention.qk_nope_head_dim, attention.kv_lora_rank
        self.width = self.rank + attention.qk_rope_head_dim
        self.scale = attention.scale
        self.q_proj, self.kv_a_proj, self.o_proj = attention.q_proj, attention.kv_a_proj, attention.o_proj
        self.norm, self.turn = _norm(attention.kv_a_norm), turn
        heads = effective_weight(attention.kv_b_proj).detach().unflatten(0, (attention.num_heads, -1))  # [h, n + v, c]
        self.num_heads = attention.num_heads
        self.register_buffer("w_uk", heads[:, : self.nope].contiguous())
        self.register_buffer("w_uv", heads[:, self.nope :].transpose(1, 2).contiguous())
        self.register_buffer("cache", torch.zeros(max_seq_len, self.width), persistent=False)

    def forward(self, x: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
        """x (Tensor): [1, d]; position (Tensor): [1]; hidden (Tensor): [t], added to scores -> [1, d]."""
        q = self.q_proj(x).view(self.num_heads, -1)
        q_rope = self.turn(q[:, self.nope :], position)
        kv = self.kv_a_proj(x)
        self.cache.index_put_(
            (position,), torch.cat((self.norm(kv[:, : self.rank]), self.turn(kv[:, self.rank :], position)), dim=-1)
        )
        kept = self.cache[None]  # [1, t, c + r]
        q_latent = torch.bmm(q[:, None, : self.nope], self.w_uk)[:, 0]  # [h, c]
        query = torch.cat((q_latent, q_rope), dim=-1) * self.scale
        # The query is turned around and not the cache, which is far larger.
        scores = torch.bmm(kept, query.transpose(0, 1)[None])[0].transpose(0, 1) + hidden  # [h, t]
        summed = torch.bmm(torch.softmax(scores, dim=-1)[None], kept)[0, :, : self.rank]  # [h, c]
        return self.o_proj(torch.bmm(summed[:, None], self.w_uv).view(1, -1))


class GroupedStep(nn.Module):
    """One token of grouped-query attention over its own cache of keys and values.

    Args:
        attention: whose projections are taken; quantized or not.
        turn: RoPE, which all layers share.
        max_seq_len: positions of the cache.
    """

    keys: Tensor
    values: Tensor
    starts: Tensor

    def __init__(self, attention: GroupedQueryAttention, turn: Turn, max_seq_len: int) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = attention.num_kv_heads, attention.head_dim
        self.scale = attention.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj, self.turn = attention.o_proj, turn
        # A head's positions lie together, and a row is a position of a head: so one index writes all heads.
        shape = (attention.num_kv_heads * max_seq_len, attention.head_dim)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)
        self.register_buffer("starts", torch.arange(attention.num_kv_heads) * max_seq_len)

    def forward(self, x: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
        """x (Tensor): [1, d]; position (Tensor): [1]; hidden (Tensor): [t], added to scores -> [1, d]."""
        heads = (self.num_kv_heads, -1, self.head_dim)
        q, k, v = (proj(x).view(-1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        rows = self.starts + position
        self.keys.index_put_((rows,), self.turn(k, position))
        self.values.index_put_((rows,), v)
        query = (self.turn(q, position) * self.scale).view(heads)  # [k, g, head_dim]
        scores = torch.bmm(self.keys.view(heads), query.transpose(1, 2)).transpose(1, 2) + hidden  # [k, g, t]
        out = torch.bmm(torch.softmax(scores, dim=-1), self.values.view(heads))
        return self.o_proj(out.reshape(1, -1))


class LayerStep(nn.Module):
    """One token of a layer."""

    def __init__(self, layer: Any, turn: Turn, max_seq_len: int) -> None:
        super().__init__()
        step = LatentStep if isinstance(layer.attention, MultiHeadLatentAttention) else GroupedStep
        self.attention = step(layer.attention, turn, max_seq_len)
        self.attention_norm, self.ffn_norm = _norm(layer.attention_norm), _norm(layer.ffn_norm)
        self.up_proj, self.down_proj = layer.ffn.up_proj, layer.ffn.down_proj
        self.gate_proj = layer.ffn.gate_proj if isinstance(layer.ffn, SwiGLU) else None

    def forward(self, x: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), position, hidden)
        normed = self.ffn_norm(x)
        up = self.up_proj(normed)
        if self.gate_proj is None:
            up = F.relu(up)
            return x + self.down_proj(up * up)
        gate = self.gate_proj(normed)
        return x + self.down_proj(gate * torch.sigmoid(gate) * up)


class Rows(nn.Module):
    """Rows of a quantized embedding: a byte a number, whatever its bits, because shifts do not lower."""

    q: Tensor
    scales: Tensor

    def __init__(self, source: QuantizedEmbedding) -> None:
        super().__init__()
        q = source.integers()
        if not source.format.symmetric:
            q = (q.unflatten(-1, (source.zeros.shape[1], -1)) - source.zeros[..., None]).flatten(-2)
        self.register_buffer("q", q)
        self.register_buffer("scales", source.scales)

    def forward(self, ids: Tensor) -> Tensor:
        scales = F.embedding(ids, self.scales)
        q = F.embedding(ids, self.q).to(scales.dtype)
        return (q.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


class Step(nn.Module):
    """One token of a decoder, in operations that ExecuTorch lowers; equal to `Decoder` fed token by token.

    Args:
        model: in fp32; its linear layers are shared, not copied.
        max_seq_len: positions of the cache.

    Raises:
        UserError: if it has other parts than those here.
    """

    places: Tensor

    def __init__(self, model: Decoder, max_seq_len: int) -> None:
        super().__init__()
        layers: list[Any] = list(model.layers)
        for index, layer in enumerate(layers):
            for part, known in (
                (layer.attention, (MultiHeadLatentAttention, GroupedQueryAttention)),
                (layer.ffn, (SquaredReLU, SwiGLU)),
            ):
                if not isinstance(part, known):
                    raise UserError(
                        f"layers.{index} has a {type(part).__name__}, which cannot be exported to ExecuTorch; "
                        f"{' and '.join(kind.__name__ for kind in known)} can."
                    )
        turn = Turn(layers[0].attention.rope, max_seq_len)
        self.layers = nn.ModuleList(LayerStep(layer, turn, max_seq_len) for layer in layers)
        self.norm = _norm(model.norm)
        embedding = model.tok_embeddings
        self.rows: nn.Module = Rows(embedding) if isinstance(embedding, QuantizedEmbedding) else embedding
        self.head = _as_linear(embedding if model.tied else model.output)
        self.register_buffer("places", torch.arange(max_seq_len))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """tokens (Tensor): [1, 1]; input_pos (Tensor): [1], its place -> logits [1, v]."""
        x = self.rows(tokens[0])
        hidden = torch.where(self.places <= input_pos, 0.0, _HIDDEN)
        for layer in self.layers:
            x = layer(x, input_pos, hidden)
        return self.head(self.norm(x))


def _norm(norm: nn.Module) -> nn.Module:
    return Norm(norm) if isinstance(norm, RMSNorm) else norm


def _as_linear(head: nn.Module) -> nn.Module:
    """The head, tied or not: its integers where inputs are rounded too, else its numbers."""
    if isinstance(head, Quantized) and head.format.dynamic:
        with torch.device("meta"):
            linear = QuantizedLinear(head.width, head.num_rows, head.format)
        linear.weight, linear.scales = head.weight, head.scales
        return linear
    weight = effective_weight(head).detach()
    with torch.device("meta"):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain


def export_pte(
    model: Decoder,
    tokenizer: Tokenizer,
    path: Path,
    *,
    scheme: str | None = None,
    max_seq_len: int | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a model as a program for ExecuTorch's XNNPACK backend; what lies beside it is told at the file's top.

    Args:
        model: PLM or Llama, of floating-point numbers or quantized; left as it is.
        tokenizer: written beside the program.
        path: of the .pte file.
        scheme: one of `Scheme`, with the embedding's head in the same 8 bits; None: fp32, or what the model is
            quantized as.
        max_seq_len: positions of its cache; None: the model's, at most 2,048.
        overwrite: replace a file that is there.

    Returns:
        What a person should know of it, a sentence each.

    Raises:
        UserError: for a scheme or parts that cannot be run, a file that is there, a package or room that lacks.
        ValueError: if max_seq_len is not between 1 and the model's.
    """
    check_scheme(model, scheme)
    if max_seq_len is None:
        max_seq_len = min(model.max_seq_len, _DEFAULT_CONTEXT)
    if not 1 <= max_seq_len <= model.max_seq_len:
        raise ValueError(f"max_seq_len ({max_seq_len}) must be between 1 and the model's ({model.max_seq_len})")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already. Name another place, or give --overwrite.")
    if not installed("executorch"):
        raise missing("executorch", "Exporting for ExecuTorch")
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
    """Refuse what XNNPACK would compute nonsense from.

    Raises:
        UserError: which says what can be done.
    """
    known = get_args(Scheme)
    if scheme is not None and scheme not in known:
        weight_only = " Weight-only integers are computed wrongly there, with no error." if "int" in scheme else ""
        raise UserError(
            f"ExecuTorch programs are made as {', '.join(known)}, not {scheme!r:.80}.{weight_only}"
            f"{did_you_mean(scheme, known)}"
        )
    for name, module in model.layers.named_modules():
        if isinstance(module, QuantizedLinear) and not module.format.dynamic:
            raise UserError(
                f"layers.{name} is stored as {module.format.name}. ExecuTorch's XNNPACK computes weight-only integers "
                "wrongly, with no error: quantize the model with int8_dynamic or int8_dynamic_int4 instead."
            )
        if isinstance(module, QuantizedLinear) and not _has(module.format):
            raise UserError(
                f"layers.{name} is stored as {module.format.name}. ExecuTorch's XNNPACK multiplies by 8 bits with a "
                "scale a row, and by 4 bits in groups of 32 or a multiple of it: quantize the model so."
            )
        if isinstance(module, QuantizedLinear) and scheme not in (None, _SCHEME_OF_BITS[module.format.bits]):
            raise UserError(
                f"The model is quantized already (layers.{name} is {module.format.name}), so it cannot become "
                f"{scheme}. Export the checkpoint that it was made from, or leave out --quant."
            )


def make_step(model: Decoder, scheme: str | None, max_seq_len: int) -> Step:
    """The program as a module, in fp32 and integers; the model is left as it is."""
    model = copy.deepcopy(model).cpu().float().eval()
    quantized = any(isinstance(module, Quantized) for module in model.modules())
    if scheme not in (None, "fp32") and not quantized:
        from plmtune.quantization.quantize import quantize

        quantize(model, executorch_formats(model, scheme))
    return Step(model, max_seq_len).requires_grad_(False)


def executorch_formats(model: Decoder, scheme: str) -> dict[str, Format]:
    """How a program of this scheme stores the matrices of a model of floating-point numbers."""
    eight = Format(8, dynamic=True)
    plan = load("quantization", scheme)(model=model, embedding=eight.name)
    # Rows that are no multiple of 32 got smaller groups, which XNNPACK has not.
    return {name: format if _has(format) else eight for name, format in plan.items()}


def _has(format: Format) -> bool:
    """Whether XNNPACK multiplies by such integers."""
    return format.dynamic and (format.group_size or 32) % 32 == 0 and (format.bits == 4) == bool(format.group_size)


@torch.no_grad()
def _lower(step: Step, facts: dict[str, Any]) -> Any:
    """The program of a step, as ExecuTorch has it; the step's quantized layers become torchao's."""
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

        from plmtune.quantization.torchao_form import to_torchao

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
            # Its own check does not know that a buffer is written in place.
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=methods,
        )
        # In place: else a whole cache would be copied for each token.
        return edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch.export and ExecuTorch say of themselves from a person who can do nothing about it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
