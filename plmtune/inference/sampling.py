"""Sampling of text, one token at a time, with a KV cache."""

from __future__ import annotations

import codecs
import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.modules.cache import Cache
from plmtune.ranges import AT_LEAST_1, NOT_NEGATIVE, Range, check

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder
    from plmtune.tokenizers.tokenizer import Tokenizer

# Temperatures below it are greedy: logits divided by less leave the range of fp32.
GREEDY = 1e-6


class Drawing(TypedDict, total=False):
    """How a token is drawn, see `sample`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None


class Sampling(Drawing, total=False):
    """How tokens are drawn, see `sample` and `penalize`; a penalty of 1 is none."""

    repetition_penalty: float


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample one id a row from logits (Tensor), [b, v]; the most likely one at temperature 0.

    Args:
        top_k: keep the k most likely tokens.
        top_p: of these keep the most likely that together reach this probability (arXiv 1904.09751).
        min_p: of these keep tokens with at least this share of the highest probability (arXiv 2407.01082).

    Returns:
        Tensor: [b]
    """
    if temperature < GREEDY:
        return logits.argmax(-1)
    kept = top_k_top_p(logits / temperature, top_k, top_p, min_p)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator)[:, 0]


def penalize(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Return logits, [b, v], with lower values for ids that a row has seen (arXiv 1909.05858, 4.1).

    As transformers' RepetitionPenaltyLogitsProcessor: a positive logit is divided by the penalty, a negative one is
    multiplied by it, regardless of how often the id was seen.

    Args:
        seen: of each row the ids of its prompt and its answer so far.
    """
    if penalty == 1:
        return logits
    logits, numbers = logits.clone(), torch.finfo(logits.dtype)
    penalty, most = max(penalty, numbers.tiny), numbers.max  # near 0 it is 0 in fp32, and scores exceed fp32
    for row, ids in zip(logits, seen, strict=True):
        known = torch.tensor([i for i in set(ids) if i < len(row)], dtype=torch.long, device=row.device)
        scores = row[known]
        row[known] = torch.where(scores < 0, scores * penalty, scores / penalty).clamp(-most, most)
    return logits


def top_k_top_p(logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None = None) -> Tensor:
    """Return logits, [b, v], with -inf for tokens that top_k, top_p or min_p exclude."""
    logits = _top(logits, top_k, top_p)
    if min_p:
        # A share of the highest probability is a difference of logits, so no softmax is needed.
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), float("-inf"))
    return logits


def _top(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    if top_k is None and top_p in (None, 1):
        return logits
    v = logits.shape[-1]
    # Sorting a vocabulary takes longer than a forward of a small model; a few hundred tokens usually reach top_p.
    k = min(top_k or 256, v)
    while True:
        kept, ids = logits.topk(k)
        if top_p is not None:
            whole = kept if top_k is not None else logits
            probability = (kept - whole.logsumexp(-1, keepdim=True)).exp()
            # The probability before a token decides, so the most likely token always stays.
            before = probability.cumsum(-1) - probability
            kept = kept.masked_fill(before >= top_p, float("-inf"))
            if top_k is None and k < v and not bool((before[:, -1] >= top_p).all()):
                k = min(8 * k, v)
                continue
        return torch.full_like(logits, float("-inf")).scatter_(-1, ids, kept)


def check_sampling(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Raise ValueError for settings out of their range."""
    check(NOT_NEGATIVE, temperature=temperature)
    check(AT_LEAST_1, top_k=top_k)
    check(Range(above=0, most=1), top_p=top_p)
    check(Range(least=0, most=1), min_p=min_p)
    check(Range(above=0), repetition_penalty=repetition_penalty)


def encode_stops(until: Sequence[str]) -> tuple[bytes, ...]:
    """Return stop strings, none of them empty, as bytes, because tokens may end inside a character."""
    if "" in until:
        raise ValueError("a stop string is empty: an answer would end before it begins")
    return tuple(stop.encode("utf-8", errors="replace") for stop in until)


def before_stop(text: str, until: Sequence[str]) -> str:
    """Return a text up to its first stop string."""
    return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))]


def release(data: bytes, until: Sequence[bytes]) -> tuple[bytes, bytes, bool]:
    """Split a text's newest bytes: those that can be shown, a possible beginning of a stop string, whether one came."""
    found = [at for stop in until if (at := data.find(stop)) >= 0]
    if found:
        return data[: min(found)], b"", True
    lengths = (length for stop in until for length in range(1, len(stop)) if data.endswith(stop[:length]))
    shown = len(data) - max(lengths, default=0)
    return data[:shown], data[shown:], False


class PrefixCache:
    """The KV cache of one text, reused by the next prompt as far as both agree.

    Attributes:
        ids: of the text; the cache holds the first `cache.length` of them, also after an interrupt.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.ids: list[int] = []
        self.cache = model.new_cache(1, 0)

    def resume(self, ids: Sequence[int], room: int) -> Cache:
        """Return the cache of the common prefix of `ids` and the text, with room for all of ids and `room` more.

        The last of ids is never in it, because the model must read at least one token.
        """
        common, limit = 0, min(self.cache.length, len(ids) - 1)
        while common < limit and self.ids[common] == ids[common]:
            common += 1
        if self.model.rope_key(self.cache.length) != self.model.rope_key(len(ids)):
            common = 0  # the cached keys are not those of a text of this length
        self.cache.truncate(common)
        self.ids = list(ids)
        needed = len(ids) + room
        if needed > self.cache.max_seq_len:
            old = self.cache
            # Conversations grow turn by turn; growing by half keeps the copies few.
            longer = max(needed, min(old.max_seq_len * 3 // 2, self.model.max_seq_len))
            new = self.model.new_cache(1, longer)
            for mine, theirs in zip(new.layers, old.layers, strict=True):
                for buffer, held in zip(mine, theirs, strict=True):
                    buffer[:, :, :common] = held[:, :, :common]
            new.length = common
            self.cache = new
        return self.cache


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    num_tokens: int | None = None,
    cache: Cache | None = None,
    before: Sequence[int] = (),
    **drawing: Unpack[Drawing],
) -> Iterator[Tensor]:
    """Yield columns of new tokens, [b].

    Args:
        tokens (Tensor): prompts, [b, s].
        repetition_penalty: see `penalize`; 1 for none.
        num_tokens: ids from here on have no text and are never sampled.
        cache: of the tokens before the prompts, with room for prompts and new tokens; None: there are none.
        before: ids in the cache, for the repetition penalty, and for LongRoPE, which reads a text again as it grows
            beyond the original length.
        drawing: arguments of `sample`.
    """
    b, s = tokens.shape
    if s == 0:
        raise ValueError("the prompt is empty: at least one token is needed to start from")
    check(NOT_NEGATIVE, max_new_tokens=max_new_tokens)
    cached = cache.length if cache is not None else 0
    if cached + s + max_new_tokens > model.max_seq_len:
        raise ValueError(
            f"{cached + s} prompt and {max_new_tokens} new tokens exceed the model's max_seq_len ({model.max_seq_len})"
        )
    check_sampling(repetition_penalty=repetition_penalty, **drawing)
    device = model.device
    seen = [[*before, *row] for row in tokens.tolist()] if repetition_penalty != 1 else []
    tokens = tokens.to(device)
    if cache is None:
        cache = model.new_cache(b, s + max_new_tokens)
    whole = torch.tensor([before], dtype=torch.long, device=device).expand(b, -1) if len(before) == cached else None
    for _ in range(max_new_tokens):
        if whole is not None:
            whole = torch.cat((whole, tokens), dim=1)
            if model.must_reread(cache.length, whole.shape[1]):
                cache.truncate(0)
                tokens = whole
        states = model(tokens, cache=cache, hidden=True)
        # Only the last position is sampled; the logits of a whole prompt would fill memory for nothing.
        logits = model.logits(states[:, -1])
        if not bool(logits.isfinite().all()):
            raise FloatingPointError(
                f"the model's output after {cache.length} tokens is not a number: its weights are damaged, or its "
                "training diverged"
            )
        scores = penalize(logits[:, :num_tokens], seen, repetition_penalty)
        column = sample(scores, generator=generator, **drawing)
        yield column
        tokens = column[:, None]
        for row, token in zip(seen, column.tolist() if seen else (), strict=True):
            row.append(token)


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Return the ids of a prompt: at least one, with bos where the tokenizer adds it to a text."""
    ids = tokenizer.with_bos(tokenizer.encode(prompt, specials=True)) if isinstance(prompt, str) else list(prompt)
    return ids or list(tokenizer.start_ids)


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    until: Sequence[str] = (),
    seed: int = 0,
    end_ids: Collection[int] = (),
    prefix_cache: PrefixCache | None = None,
    **sampling: Unpack[Sampling],
) -> Iterator[str]:
    """Yield the text that follows `prompt`, one piece a token, until an end id, max_new_tokens or max_seq_len.

    A piece may be empty: a character is yielded once all of its bytes exist, and a possible beginning of a stop string
    once it turns out to be none.

    Args:
        prompt: text, in which special tokens are recognized, or ids, as from a chat template.
        until: the text ends before the first of these, at any position inside a token.
        end_ids: ids that end the text, in addition to the tokenizer's own.
        prefix_cache: cache of an earlier prompt of this model, reused where the prompts agree; afterwards of this one.
    """
    stops = encode_stops(until)
    device = model.device
    ids = prompt_ids(tokenizer, prompt)
    ends = {*tokenizer.end_ids, *end_ids}
    if len(ids) >= model.max_seq_len:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's max_seq_len is {model.max_seq_len}")
    if (worst := max(ids)) >= model.vocab_size:
        raise UserError(
            f"The prompt holds the token {tokenizer.decode([worst])!r:.80} (id {worst}), and the model's embedding has "
            f"{model.vocab_size:,} rows, none for it. Leave it out, or take the tokenizer of the model's training."
        )
    max_new_tokens = min(max_new_tokens, model.max_seq_len - len(ids))
    cache = prefix_cache.resume(ids, max_new_tokens) if prefix_cache is not None else None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    columns = generate(
        model,
        torch.tensor([ids[cache.length :] if cache is not None else ids], device=device),
        max_new_tokens=max_new_tokens,
        generator=torch.Generator(device).manual_seed(seed),
        num_tokens=tokenizer.num_tokens,
        cache=cache,
        before=ids[: cache.length] if cache is not None else (),
        **sampling,
    )
    held, stopped = b"", False
    for column in columns:
        token = int(column)
        if prefix_cache is not None:
            prefix_cache.ids.append(token)
        if token in ends:
            break
        shown, held, stopped = release(held + tokenizer.decode_bytes([token]), stops)
        yield decoder.decode(shown)
        if stopped:
            break
    yield decoder.decode(held, final=True)
