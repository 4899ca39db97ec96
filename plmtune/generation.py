"""Sampling text: a prompt in, a token at a time out, over a cache."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plmtune.modules.cache import Cache

if TYPE_CHECKING:
    from plmtune.data.tokenizers import Tokenizer
    from plmtune.modules.decoder import Decoder


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id a row from logits (Tensor), [b, v]; the likeliest where temperature is 0.

    Args:
        top_k: keep the k likeliest.
        top_p: of those keep the likeliest that together reach this probability (arXiv 1904.09751).

    Returns:
        Tensor: [b]
    """
    if temperature == 0:
        return logits.argmax(-1)
    kept = keep_likeliest(logits / temperature, top_k, top_p)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator)[:, 0]


def keep_likeliest(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return logits, [b, v], with -inf where `sample` is not to draw."""
    if top_k is None and top_p in (None, 1):
        return logits
    v = logits.shape[-1]
    # To sort a vocabulary takes longer than a forward of a small model; a few hundred mostly reach top_p.
    k = min(top_k or 256, v)
    while True:
        kept, ids = logits.topk(k)
        if top_p is not None:
            whole = kept if top_k is not None else logits
            probability = (kept - whole.logsumexp(-1, keepdim=True)).exp()
            # What stands before a token decides, so the likeliest always stays.
            before = probability.cumsum(-1) - probability
            kept = kept.masked_fill(before >= top_p, float("-inf"))
            if top_k is None and k < v and not bool((before[:, -1] >= top_p).all()):
                k = min(8 * k, v)
                continue
        return torch.full_like(logits, float("-inf")).scatter_(-1, ids, kept)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for impossible settings."""
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, but is {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")


class Memory:
    """One text's cache, kept from prompt to prompt: what the next has in common with it is not computed again.

    Attributes:
        ids: the text; the cache holds its first `cache.length`, also after an interrupt anywhere.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.ids: list[int] = []
        self.cache = model.new_cache(1, 0)

    def resume(self, ids: Sequence[int], room: int) -> Cache:
        """Return the cache with what `ids` and the text have in common, and room for all of ids and `room` more.

        The last of ids is never in it: the model has to read something, to say what follows.
        """
        common, limit = 0, min(self.cache.length, len(ids) - 1)
        while common < limit and self.ids[common] == ids[common]:
            common += 1
        self.cache.truncate(common)
        self.ids = list(ids)
        needed = len(ids) + room
        if needed > self.cache.max_seq_len:
            old = self.cache
            # Conversations grow turn by turn; half as much again keeps the copies few.
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
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    num_tokens: int | None = None,
    cache: Cache | None = None,
) -> Iterator[Tensor]:
    """Yield a column of new tokens, [b], at a time.

    Args:
        tokens (Tensor): prompts, [b, s].
        temperature: 0 takes the likeliest token.
        num_tokens: ids from here up have no text and are never drawn.
        cache: what came before the prompts, with room for them and the new tokens; None: nothing did.

    Raises:
        ValueError: for an empty prompt, a sum longer than the model's max_seq_len, or impossible settings.
        FloatingPointError: if the model's output is not a number.
    """
    b, s = tokens.shape
    if s == 0:
        raise ValueError("the prompt is empty: at least one token is needed to start from")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, but is {max_new_tokens}")
    before = cache.length if cache is not None else 0
    if before + s + max_new_tokens > model.max_seq_len:
        raise ValueError(
            f"{before + s} prompt and {max_new_tokens} new tokens exceed the model's max_seq_len ({model.max_seq_len})"
        )
    check_sampling(temperature, top_k, top_p)
    device = model.device
    tokens = tokens.to(device)
    if cache is None:
        cache = model.new_cache(b, s + max_new_tokens)
    for _ in range(max_new_tokens):
        states = model(tokens, cache=cache, hidden=True)
        # Only the last position is sampled; the logits of a whole prompt would fill memory for nothing.
        logits = model.logits(states[:, -1])
        if not bool(logits.isfinite().all()):
            raise FloatingPointError(
                f"the model's output after {cache.length} tokens is not a number: its weights are damaged, or its "
                "training diverged"
            )
        column = sample(logits[:, :num_tokens], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield column
        tokens = column[:, None]


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    end_ids: Collection[int] = (),
    memory: Memory | None = None,
) -> Iterator[str]:
    """Yield the text that follows `prompt`, a piece a token, until its end, max_new_tokens or the model's end.

    A piece may be empty: a character is not given out before all of its bytes are there.

    Args:
        prompt: text, in which special tokens' text stands for themselves, or ids, as of a chat template.
        end_ids: end the text beside the tokenizer's eos.
        memory: of this model, for what the prompt has in common with an earlier one; afterwards it holds this one.

    Raises:
        ValueError: if the prompt leaves no room.
        FloatingPointError: if the model's output is not a number.
    """
    device = model.device
    ids = tokenizer.with_bos(tokenizer.encode(prompt, specials=True)) if isinstance(prompt, str) else list(prompt)
    ids = ids or [tokenizer.start_id]
    ends = {tokenizer.eos_id, *end_ids}
    if len(ids) >= model.max_seq_len:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's max_seq_len is {model.max_seq_len}")
    max_new_tokens = min(max_new_tokens, model.max_seq_len - len(ids))
    cache = memory.resume(ids, max_new_tokens) if memory is not None else None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    columns = generate(
        model,
        torch.tensor([ids[cache.length :] if cache is not None else ids], device=device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(device).manual_seed(seed),
        num_tokens=tokenizer.num_tokens,
        cache=cache,
    )
    for column in columns:
        token = int(column)
        if memory is not None:
            memory.ids.append(token)
        if token in ends:
            break
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)
