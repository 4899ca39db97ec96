"""The decoder: embedding, pre-norm layers, final norm, vocabulary projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from plmtune.modules.attention_kernels import mark_for_compile
from plmtune.modules.cache import Cache, LayerCache, SharedPrefix
from plmtune.modules.checkpointing import Checkpointing, keep_products, run_layer
from plmtune.modules.initial_weights import Init, draw_weights
from plmtune.modules.linear import linear
from plmtune.modules.norm import autocast_active
from plmtune.modules.peft import effective_weight
from plmtune.modules.quantized import Quantized, QuantizedEmbedding, QuantizedLinear
from plmtune.modules.segments import Segments
from plmtune.modules.sharding import is_sharded
from plmtune.modules.shared_sequence import Mask, SharedSequence
from plmtune.ranges import WIDTH, Range, check

_NOT_COMPUTED = ("training", "activation_checkpointing", "observe")
_SETTING = (int, float, str, tuple, type(None))


class DecoderLayer(nn.Module):
    """h = x + scale * attention(norm(x)); h + scale * ffn(norm(h)).

    Args:
        norm: makes a norm.
        post_norms: norm what attention and ffn give, too, before it is added (Gemma 2).
        residual_scale: of what is added (MiniCPM).
    """

    def __init__(
        self,
        attention: nn.Module,
        ffn: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        post_norms: bool = False,
        residual_scale: float = 1.0,
    ):
        super().__init__()
        self.attention = attention
        self.ffn = ffn
        self.attention_norm = norm()
        self.ffn_norm = norm()
        self.post_attention_norm = norm() if post_norms else None
        self.post_ffn_norm = norm() if post_norms else None
        self.residual_scale = residual_scale

    def parallel_plan(self) -> dict[str, str]:
        """How tensor parallelism divides it, see `parallel.plan`: tokens between attention and ffn."""
        norms = dict.fromkeys(("attention_norm", "ffn_norm", "post_attention_norm", "post_ffn_norm"), "sequence")
        return {**norms, "attention": "gather", "ffn": "gather"}

    def compile(self, *args: Any, **settings: Any) -> None:
        """Compile this layer: `torch.nn.Module.compile`."""
        mark_for_compile()
        super().compile(*args, **settings)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask = None,
        input_pos: Tensor | None = None,
        cache: LayerCache | None = None,
        selective: bool = False,
        **of_tokens: Tensor,
    ) -> Tensor:
        """Return the output, [b, s, d]; selective: see `checkpointing`."""
        if selective:
            return keep_products(self.forward, x, mask=mask, input_pos=input_pos, cache=cache, **of_tokens)
        attended = self.attention(self.attention_norm(x), mask=mask, input_pos=input_pos, cache=cache, **of_tokens)
        x = self._add(x, attended, self.post_attention_norm)
        return self._add(x, self.ffn(self.ffn_norm(x)), self.post_ffn_norm)

    def _add(self, x: Tensor, new: Tensor, norm: nn.Module | None) -> Tensor:
        new = new if norm is None else norm(new)
        return x + (new if self.residual_scale == 1 else new * self.residual_scale)


class Decoder(nn.Module):
    """A language model: tokens [b, s] -> logits [b, s, v].

    Built from factories, so that each layer gets its own modules; `plmtune.models` has the ones with names.

    Args:
        vocab_size: rows of the embedding.
        embed_dim: width of the residual stream.
        num_layers: layers.
        max_seq_len: longest sequence, cached tokens included.
        attention: makes the attention of a layer from its index.
        ffn: makes one layer's feed-forward.
        norm: makes a norm from its width.
        tie_embeddings: the embedding is also the vocabulary projection.
        init_std: standard deviation of the initial matrices.
        post_norms, residual_scale: of each `DecoderLayer`.
        learned_positions: add a learned vector for each position to the embedding (GPT-2).
        query_layer: the last layer's queries are projected from a learned vector for each position, in place of its
            normed input, from which keys and values are projected (PanGu-alpha, arXiv 2104.12369, section 2.2). Row n
            of `query_embeddings` asks for the token that follows the one at position n.
        embed_scale: multiplies the embedding (Gemma, MiniCPM).
        logit_scale: multiplies the logits (MiniCPM).
        logit_soft_cap: logits become logit_soft_cap tanh(logit / logit_soft_cap) (Gemma 2).

    Attributes:
        value_embeddings: of the layers whose attention has a `value_embed_width`, by their number; or None.
        activation_checkpointing: what training keeps of each layer for the backward: none, full, selective, or a
            number, see `checkpointing`.
        config: the component and settings it was built from, as `plmtune.models` fills in; saved with it.
        source_keys: config.json of the checkpoint that it was read from, empty for another model.
        quantization: the scheme that its quantized layers come from, as plain data; empty where none are.
        native: a `plmtune.native.NativeDecoder`, which computes single tokens on a CPU; None: the modules do.
        observe: called with the number of each layer and its output, [b, s, d]; None: nothing is. Native decoding does
            not call it.

    Raises:
        ValueError: for a size below 1, or a last layer whose attention does not take queries of their own.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        max_seq_len: int,
        attention: Callable[[int], nn.Module],
        ffn: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module],
        tie_embeddings: bool = True,
        init_std: float = 0.02,
        post_norms: bool = False,
        residual_scale: float = 1.0,
        learned_positions: bool = False,
        query_layer: bool = False,
        embed_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        check(WIDTH, vocab_size=vocab_size, embed_dim=embed_dim, max_seq_len=max_seq_len)
        check(
            Range(least=1, most=1024), num_layers=num_layers
        )  # the deepest published has 1,000; each takes milliseconds
        check(Range(least=0, most=10), init_std=init_std)
        check(
            Range(above=0, most=1e6),
            residual_scale=residual_scale,
            embed_scale=embed_scale,
            logit_scale=logit_scale,
            logit_soft_cap=logit_soft_cap,
        )
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self.num_layers = num_layers  # of the whole model, also in a stage of a pipeline
        self.max_seq_len = max_seq_len
        self.tied = tie_embeddings
        self.init_std = init_std
        self.embed_scale, self.logit_scale, self.logit_soft_cap = embed_scale, logit_scale, logit_soft_cap
        self.activation_checkpointing: Checkpointing = "none"
        self.config: dict[str, Any] = {}
        self.source_keys: dict[str, Any] = {}
        self.quantization: dict[str, Any] = {}
        self.native: Any = None  # it imports this file
        self.observe: Callable[[int, Tensor], None] | None = None
        self.tok_embeddings = _table(vocab_size, embed_dim)
        self.pos_embeddings = _table(max_seq_len, embed_dim) if learned_positions else None
        self.layers = nn.ModuleList(
            DecoderLayer(
                attention(index),
                ffn(),
                lambda: norm(embed_dim),
                post_norms=post_norms,
                residual_scale=residual_scale,
            )
            for index in range(num_layers)
        )
        widths = {
            str(i): getattr(cast(Any, layer).attention, "value_embed_width", 0) for i, layer in enumerate(self.layers)
        }
        self.value_embeddings = None
        if any(widths.values()):
            self.value_embeddings = nn.ModuleDict(
                {index: _table(vocab_size, width) for index, width in widths.items() if width}
            )
        self.query_embeddings = None
        if query_layer:
            if not getattr(cast(Any, self.layers[-1]).attention, "takes_query", False):
                raise ValueError("the query layer's attention must take queries of their own: use gqa or mha")
            self.query_embeddings = _table(max_seq_len, embed_dim)
        self.norm = norm(embed_dim)
        if not tie_embeddings:
            self.output = nn.Linear(embed_dim, vocab_size, bias=False)
        self.init_weights()

    def parallel_plan(self) -> dict[str, str]:
        """How tensor parallelism divides it, see `parallel.plan`: the vocabulary."""
        tables = {"tok_embeddings": "embedding", "pos_embeddings": "embedding", "query_embeddings": "embedding_whole"}
        values = {f"value_embeddings.{index}": "embedding_width" for index in self.value_embeddings or ()}
        return {**tables, **values, "norm": "sequence_gather", "output": "head"}

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Decoder:
        """Allocate weights that were on the meta device; as torch's own, which imports sympy: half a CPU second."""

        def empty(t: Tensor) -> Tensor:
            if is_sharded(t):
                return torch.empty_like(t, device=device)
            return torch.empty(t.shape, dtype=t.dtype, device=device)

        return self._apply(empty, recurse=recurse)

    def init_weights(self, generator: torch.Generator | None = None, init: Init | None = None) -> None:
        """Draw all matrices from N(0, init_std); set norms to factors of 1 and biases to 0.

        An init gives a factor of init_std for each matrix. With a generator the numbers are the same for any number of
        processes: each draws whole matrices, one at a time, and keeps its shard.
        """
        draw_weights(self, self.init_std, generator, init, self.num_layers)

    def computation(self) -> dict[str, Any]:
        """What decides a result besides the weights' numbers: each module's class, settings and shapes."""
        found = {}
        for name, module in self.named_modules():
            held = {key: value for key, value in vars(module).items() if isinstance(value, _SETTING)}
            settings = {key: value for key, value in held.items() if key[0] != "_" and key not in _NOT_COMPUTED}
            rope = getattr(module, "rope", None)
            shapes = {key: tuple(weight.shape) for key, weight in module.named_parameters(recurse=False)}
            found[name] = (type(module), settings, None if rope is None else (rope.settings, rope.scaling), shapes)
        return found

    @property
    def numbered_layers(self) -> dict[int, Any]:
        """The layers by their numbers in the whole model."""
        return {int(name): layer for name, layer in self.layers.named_children()}

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection, [v, d], for a loss that never holds all logits; of a quantized one, its numbers
        written out."""
        return effective_weight(self.tok_embeddings if self.tied else self.output)

    @property
    def loss_settings(self) -> dict[str, float]:
        """Keywords that a loss over hidden states and `head_weight` needs besides them: soft_cap, if there is one."""
        return {} if self.logit_soft_cap is None else {"soft_cap": self.logit_soft_cap}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.norm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states without autocast, and of the cache."""
        return next(self.norm.parameters()).dtype

    @property
    def num_parameters(self) -> int:
        """Numbers of the model; those stored as integers count, their scales do not."""
        stored = sum(m.num_rows * m.width for m in self.modules() if isinstance(m, Quantized))
        return stored + sum(parameter.numel() for parameter in self.parameters())

    def rope_key(self, length: int) -> tuple[int, ...]:
        """What of a text's length decides RoPE's frequencies, so that keys cached under another one are not its own;
        empty where nothing does."""
        found = set()
        for layer in self.layers:
            scaling = getattr(getattr(cast(Any, layer).attention, "rope", None), "scaling", None)
            if scaling is not None and scaling.by_length:
                found.add(scaling.key(length))
        return tuple(sorted(found))

    def must_reread(self, cached: int, length: int) -> bool:
        """Whether a text of which `cached` tokens are in a cache is read again as it grows to `length`."""
        ropes = (getattr(cast(Any, layer).attention, "rope", None) for layer in self.layers)
        scalings = (rope.scaling for rope in ropes if rope is not None and rope.scaling is not None)
        return cached > 0 and any(s.rereads and s.key(cached) != s.key(length) for s in scalings)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits, [..., v], of normed hidden states, [..., d]."""
        logits = self._project(hidden)
        return logits if self.logit_soft_cap is None else self.logit_soft_cap * torch.tanh(logits / self.logit_soft_cap)

    def _project(self, hidden: Tensor) -> Tensor:
        if self.native is not None:
            found: Tensor | None = self.native.logits(self, hidden)
            if found is not None:
                return found
        head = self.tok_embeddings if self.tied else self.output
        if isinstance(head, QuantizedEmbedding):
            return head.project(hidden).float()
        if isinstance(head, QuantizedLinear):
            return head(hidden).float()
        return linear(hidden, self.head_weight).float()

    @torch.no_grad()
    def add_score_head(self, generator: torch.Generator | None = None) -> None:
        """Add `score`, a linear layer from a hidden state to one number; `models.reward` reads it.

        It is drawn from N(0, init_std), like the other matrices by `init_weights` too.
        """
        self.score = nn.Linear(self.embed_dim, 1, bias=False, device=self.device, dtype=self.dtype)
        self.score.weight.normal_(0.0, self.init_std, generator=generator)
        if not self.tied:
            # Nothing asks for logits any more, and DDP waits for the gradient of each parameter that wants one.
            self.output.requires_grad_(False)

    def new_cache(self, batch_size: int, max_seq_len: int) -> Cache:
        """Allocate an empty cache for `max_seq_len` tokens, in the model's dtype and on its device.

        Raises:
            ValueError: if that is longer than the model's own.
        """
        if max_seq_len > self.max_seq_len:
            raise ValueError(f"a cache of {max_seq_len} tokens exceeds the model's max_seq_len ({self.max_seq_len})")
        layers = []
        for layer in self.layers:
            shapes = cast(Any, layer).attention.cache_shapes()
            layers.append(
                tuple(
                    torch.empty(batch_size, heads, max_seq_len, width, dtype=self.dtype, device=self.device)
                    for heads, width in shapes
                )
            )
        return Cache(layers)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Mask = None,
        input_pos: Tensor | None = None,
        cache: Cache | None = None,
        hidden: bool = False,
    ) -> Tensor:
        """Return logits, or the hidden states that give them.

        Args:
            tokens (Tensor): ids, [b, s].
            mask (Tensor | Segments | SharedSequence | None): boolean, [b, s, t], True where it may attend,
                t = cached + s; or the texts that each row holds; or which tokens of each row are here, with their
                positions in input_pos; None: causal.
            input_pos (Tensor | None): positions for RoPE, [b, s]; None: 0, 1, ... after what the cache holds.
                With them rows may be longer than max_seq_len, as long as no position is
                (not where a cache is written).
            cache (Cache | None): from `new_cache`; this forward appends to it.
            hidden: return the normed hidden states, [b, s, d], instead of logits; logit_scale is in them.

        Returns:
            Tensor: fp32 logits, [b, s, v], or hidden states.

        Raises:
            ValueError: if cached and new tokens are more than max_seq_len or than the cache takes, or segments are
                given with a cache.
        """
        s = tokens.shape[1]
        t = s + (cache.length if cache is not None else 0)
        if isinstance(mask, Segments) and cache is not None:
            raise ValueError("segments say where whole texts lie, so they cannot be read piece by piece into a cache")
        if input_pos is not None and (cache is None or isinstance(cache, SharedPrefix)):
            texts = mask.segments if isinstance(mask, SharedSequence) else mask
            if isinstance(texts, Segments):
                t = texts.longest
            else:  # a GPU is not asked, since the answer would have to be waited for
                t = int(input_pos.max()) + 1 if input_pos.device.type == "cpu" else 0
        if t > self.max_seq_len:
            raise ValueError(f"a sequence of {t} tokens exceeds the model's max_seq_len ({self.max_seq_len})")
        if cache is not None and t > cache.max_seq_len:
            raise ValueError(f"a sequence of {t} tokens exceeds the cache's max_seq_len ({cache.max_seq_len})")
        if self.native is not None and cache is not None and mask is None and input_pos is None:
            found: Tensor | None = self.native.step(self, tokens, cache)
            if found is not None:
                return found if hidden else self.logits(found)
        x = self.embed(tokens, input_pos, start=t - s)
        x = self.finish(self.run_layers(x, tokens, mask=mask, input_pos=input_pos, cache=cache, start=t - s))
        return x if hidden else self.logits(x)

    def run_layers(
        self,
        x: Tensor,
        tokens: Tensor,
        *,
        mask: Mask = None,
        input_pos: Tensor | None = None,
        cache: Cache | None = None,
        start: int = 0,
    ) -> Tensor:
        """The last layer's output, [b, s, d], of the first one's input x (Tensor), [b, s, d]; a stage of a pipeline
        has some of the layers."""
        how = self.activation_checkpointing if self.training and cache is None else "none"
        for index, layer in self.numbered_layers.items():
            of_tokens = self.of_tokens(index, tokens, input_pos, start=start)
            kept = cache.layer(index) if cache is not None else None
            x = run_layer(how, index, layer, x, mask=mask, input_pos=input_pos, cache=kept, **of_tokens)
            if self.observe is not None:
                self.observe(index, x)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    def embed(self, tokens: Tensor, input_pos: Tensor | None = None, *, start: int = 0) -> Tensor:
        """The first layer's input, [b, s, d], of tokens (Tensor), [b, s].

        Args:
            input_pos (Tensor | None): their positions, [b, s]; None: from `start` on.
        """
        x = self.tok_embeddings(tokens)
        if self.pos_embeddings is not None:
            x = x + self.pos_embeddings(_places(tokens, input_pos, start).view(-1, tokens.shape[1]))  # [b or 1, s, d]
        if self.embed_scale != 1:
            x = x * torch.tensor(self.embed_scale, dtype=x.dtype).item()  # rounded first, as in transformers
        return _as_computed(x)

    def of_tokens(
        self, index: int, tokens: Tensor, input_pos: Tensor | None = None, *, start: int = 0
    ) -> dict[str, Any]:
        """What a layer gets of tokens (Tensor), [b, s], besides hidden states, as keywords: value, its value
        embeddings; query, what the query layer asks with, [b, s, d].

        Args:
            input_pos (Tensor | None): as for `embed`.
        """
        found = {}
        if self.value_embeddings is not None and str(index) in self.value_embeddings:
            found["value"] = _as_computed(self.value_embeddings[str(index)](tokens))
        if self.query_embeddings is not None and index == self.num_layers - 1:
            query = _as_computed(self.query_embeddings(_places(tokens, input_pos, start)))
            found["query"] = query.expand(*tokens.shape, -1)
        return found

    def finish(self, x: Tensor) -> Tensor:
        """The normed hidden states, [b, s, d], of the last layer's output (Tensor), [b, s, d]."""
        x = self.norm(x)
        return x if self.logit_scale == 1 else x * self.logit_scale


def _table(rows: int, width: int) -> nn.Embedding:
    # `init_weights` draws the numbers. On the meta device a draw by nn.Embedding imports dynamo: a CPU second.
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def _places(tokens: Tensor, input_pos: Tensor | None, start: int) -> Tensor:
    """Positions of tokens (Tensor), [b, s]: input_pos, [b, s], or those from `start` on, [s]."""
    return torch.arange(start, start + tokens.shape[1], device=tokens.device) if input_pos is None else input_pos


def _as_computed(embedded: Tensor) -> Tensor:
    """What an embedding gives, in autocast's dtype where that is on: without this all that follows would be fp32."""
    if autocast_active(embedded.device):  # embedding is not on its list
        return embedded.to(torch.get_autocast_dtype(embedded.device.type))
    return embedded
