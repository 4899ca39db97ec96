"""Perplexity of a model on documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from plmtune.errors import LogitsNotFinite
from plmtune.evaluation.scoring import Item, Scorer

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder
    from plmtune.tokenizers.tokenizer import Tokenizer

# Characters of documents that are scored together: enough for even batches, few enough for quick progress.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Perplexity:
    """Sums over documents.

    Attributes:
        nats: -log p of the tokens, each given those before it in its document.
        tokens: of the text, without the start token and the end of a document.
        bytes: of the text in UTF-8.
        documents: that contain text.
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); comparable between models with one tokenizer."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with any tokenizers."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def perplexity(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    scorer: Scorer | None = None,
    progress: Callable[[Perplexity], None] | None = None,
) -> Perplexity:
    """Score every token of every document once.

    A document starts with bos if the tokenizer adds it, else with the eos that separates documents in training. A
    document longer than `window` is read in windows that each score `stride` more tokens, so that all but its first
    tokens have at least window - stride tokens before them; the last window reaches back as far as possible. With
    stride = window this is lm-eval's rolling log-likelihood.

    Args:
        window: tokens that the model reads at once; None: its max_seq_len.
        stride: tokens that a window scores; None: window, each token is read once.
        scorer: of this model; None: a new one.
        progress: called with the sums so far after each batch.
    """
    window = model.max_seq_len if window is None else window
    stride = window if stride is None else stride
    if not 1 <= window <= model.max_seq_len:
        raise ValueError(
            f"window ({window}) must be at least 1 and at most the model's max_seq_len ({model.max_seq_len})"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"stride ({stride}) must be at least 1 and at most window ({window})")
    if tokenizer.num_tokens > model.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.num_tokens} tokens, the model's vocabulary {model.vocab_size}")
    scorer = scorer or Scorer(model)
    start = tokenizer.start_ids
    total = Perplexity()
    for block in _blocks(documents):
        items: list[Item] = []
        origins: list[tuple[int, int]] = []  # of each item: its document in the block, the first of its tokens
        held = [ids.tolist() for ids in tokenizer.encode_batch(block)]
        for number, ids in enumerate(held):
            for first, item in windows(ids, start, window, stride):
                items.append(item)
                origins.append((number, first))
        seen = total
        try:
            for batch in scorer.score(items):
                nats = -math.fsum(score.log_prob for _, score in batch)
                seen += Perplexity(nats, sum(len(items[index].continuation) for index, _ in batch))
                if progress is not None:
                    progress(seen)
        except LogitsNotFinite as error:
            index = int(error.item)
            number, first = origins[index]
            last = first + len(items[index].continuation) - 1
            raise ValueError(
                f"document {total.documents + number + 1:,}, tokens {first:,} to {last:,}: the model's output is not a "
                "number; its weights are damaged, its training diverged, or its dtype overflows"
            ) from error
        total = seen + Perplexity(bytes=sum(len(text.encode()) for text in block), documents=len(block))
        if progress is not None:
            progress(total)
    return total


def windows(ids: list[int], start: Sequence[int], window: int, stride: int) -> Iterator[tuple[int, Item]]:
    """Yield the windows of one document: the index of the first scored token in `ids`, context and scored tokens.

    Args:
        start: what the document begins with, which is not scored.
    """
    start = start[-window:]
    text = [*start, *ids]
    before = len(start) - 1  # of the last token that gives the first one's scores
    done = min(window - before, len(ids))
    if ids:
        yield 0, Item(list(start), ids[:done])
    while done < len(ids):
        end = min(done + stride, len(ids))
        yield done, Item(text[max(end + before - window, 0) : done + before + 1], ids[done:end])
        done = end


def _blocks(documents: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    held = 0
    for text in documents:
        block.append(text)
        held += len(text)
        if held >= _BLOCK:
            yield block
            block, held = [], 0
    if block:
        yield block
