"""Log-probabilities of many continuations; common prefixes are computed once.

There are three ways to share: items that differ only in the last token are read at one position; a question and its
continuations are one row, with a mask; the common prefix of many rows (few-shot examples) is a shared prefix.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from plmtune.errors import LogitsNotFinite, UserError
from plmtune.evaluation.prefixes import Batch, Ids, Text, layout, plan, weigh
from plmtune.modules.attributes import eval_mode
from plmtune.modules.cache import SharedPrefix

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder

# Fixed cost of a forward, in tokens: on a CPU reading the weights, on a GPU launching the kernels.
_FORWARD_CPU, _FORWARD_GPU = 128, 2048
# Logits held at once; in fp32 these are 32 MB and 256 MB. On a CPU more is slower, since they do not fit the caches.
_LOGITS_CPU, _LOGITS_GPU = 2**23, 2**26
# Measured with 135M weights in fp32: from 1,024 to 4,096 all take the same time.
_BUDGET_CPU = 2048


@dataclass(frozen=True)
class Item:
    """A continuation whose probability after a context is computed; both are non-empty ids."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """The score of an item.

    log_prob: natural logarithm of the continuation's probability, summed over its tokens.
    greedy: whether each of its tokens was the likeliest of the vocabulary.
    """

    log_prob: float
    greedy: bool


class Scorer:
    """Score items in evaluation mode; autocast is set by the caller.

    Up to rounding, scores equal those of each item by itself: the last max_seq_len + 1 tokens of context and
    continuation, log_softmax in fp32 over all rows of the vocabulary.

    Args:
        token_budget: most tokens in a forward, halved when memory runs out; None: by the device.
    """

    def __init__(self, model: Decoder, *, token_budget: int | None = None) -> None:
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, not {token_budget}")
        self.model, self.device, self.token_budget = model, model.device, token_budget
        self._at_most = math.inf  # tokens that fit into memory
        self._shared_prefix: tuple[Ids, SharedPrefix] | None = None

    def score(self, items: Sequence[Item], known: Collection[int] = ()) -> Iterator[list[tuple[int, Score]]]:
        """Yield (number, score) of a batch of items at a time.

        Args:
            known: numbers of items that need no score; they do not change the batches of the others.
        """
        texts = self._texts(items)
        gpu = self.device.type != "cpu"
        # Keys of a text whose length changes RoPE's frequencies are its own.
        usual = self.model.rope_key(1)
        alone = [text for text in texts if usual and self.model.rope_key(text.tokens.size) != usual]
        texts = [text for text in texts if not alone or self.model.rope_key(text.tokens.size) == usual]
        alone.sort(key=lambda text: -text.tokens.size)
        batches = [Batch(text.tokens[:0], ((text,),)) for text in alone] + plan(
            texts,
            token_budget=self.token_budget or self._default_budget(),
            # A layer has 12 d^2 products a token, a score of attention 2 d: d for the query, d for the value.
            token_cost=6 * self.model.embed_dim,
            forward_cost=_FORWARD_GPU if gpu else _FORWARD_CPU,
        )
        return self._run(items, batches, frozenset(known))

    def _default_budget(self) -> int:
        if self.device.type != "cuda":
            return _BUDGET_CPU
        # Activations of a token take about eight widths of the FFN, four times embed_dim; half the memory is reserved.
        free, _ = torch.cuda.mem_get_info(self.device)
        tokens = min(max(free // 2 // (8 * 4 * 4 * self.model.embed_dim), 1024), 65536)
        return 1 << (tokens.bit_length() - 1)  # rounded, so that the next run finds the same

    def _texts(self, items: Sequence[Item]) -> list[Text]:
        """Return the distinct texts of items, in lexical order."""
        longest, vocab_size = self.model.max_seq_len, self.model.vocab_size
        # Big-endian, so that the order of the bytes is that of the ids.
        found: dict[bytes, list[int]] = {}
        for number, item in enumerate(items):
            before, scored = len(item.context), len(item.continuation)
            if not before or not 0 < scored <= longest:
                raise ValueError(
                    f"item {number}: context ({before}) and continuation ({scored}, at most {longest}) "
                    "need at least one token each"
                )
            whole = np.array([*item.context, *item.continuation], dtype=np.int64)
            if whole.min() < 0 or whole.max() >= vocab_size:
                raise ValueError(f"item {number} holds an id that the model's vocabulary ({vocab_size}) has not")
            found.setdefault(whole[-(longest + 1) : -1].astype(">u4").tobytes(), []).append(number)
        texts = []
        for key in sorted(found):
            tokens = np.frombuffer(key, dtype=">u4").astype(np.int64)
            fixed = tokens.size - max(len(items[number].continuation) for number in found[key])
            texts.append(Text(tokens, tuple(found[key]), fixed))
        return texts

    def _run(
        self, items: Sequence[Item], batches: list[Batch], known: frozenset[int]
    ) -> Iterator[list[tuple[int, Score]]]:
        try:
            for batch in batches:
                rows = [[text for text in row if not known.issuperset(text.items)] for row in batch.rows]
                scores: dict[int, Score] = {}
                waiting = [[row for row in rows if row]]
                while waiting:
                    part = waiting.pop()
                    size = weigh(part, batch.prefix)
                    if len(part) > 1 and size > self._at_most:
                        waiting += _halves(part)
                        continue
                    try:
                        with eval_mode(self.model):
                            scores |= self._compute(items, batch.prefix, part, known) if part else {}
                        continue
                    except (MemoryError, RuntimeError) as error:
                        if not out_of_memory(error):
                            raise
                    # Only here is the exception released, which holds the tensors of every frame.
                    if self.device.type == "cuda":
                        torch.cuda.empty_cache()
                    if len(part) == len(part[0]) == 1:
                        raise UserError(
                            f"memory does not suffice for one text of {part[0][0].tokens.size} tokens on "
                            f"{self.device}: end other programs, or load the model with a smaller dtype"
                        )
                    self._at_most = max(1, size // 2)
                    waiting += _halves(part)
                if scores:
                    yield sorted(scores.items())
        finally:
            self._shared_prefix = None

    @torch.no_grad()
    def _compute(
        self, items: Sequence[Item], prefix: Ids, rows: list[list[Text]], known: frozenset[int]
    ) -> dict[int, Score]:
        paths, tokens, input_pos, mask = layout(rows, prefix.size)
        places, targets, owners = [], [], []
        numbers: list[int] = []
        for text, path in paths:
            for number in text.items:
                if number not in known:
                    continuation = items[number].continuation
                    places.append(path[path.size - len(continuation) :])
                    targets.append(np.asarray(continuation, dtype=np.int64))
                    owners.append(np.full(len(continuation), len(numbers)))
                    numbers.append(number)
        cache = self._shared_prefix_of(prefix) if prefix.size else None
        hidden = self.model(
            torch.from_numpy(tokens).to(self.device),
            mask=None if mask is None else torch.from_numpy(mask).to(self.device),
            input_pos=None if mask is None else torch.from_numpy(input_pos).to(self.device),
            cache=cache,
            hidden=True,
        ).flatten(0, 1)  # [b s, d]
        log_probs, hits = self._predict(hidden, np.concatenate(places), np.concatenate(targets))
        owner = np.concatenate(owners)
        sums = np.bincount(owner, weights=log_probs, minlength=len(numbers))
        greedy = np.bincount(owner, weights=~hits, minlength=len(numbers)) == 0
        bad = sorted(n for n, s in zip(numbers, sums, strict=True) if not np.isfinite(s))
        if bad and len(paths) > 1:
            # Masked values are multiplied by 0, so NaN spreads in a row: score each text alone to find its item.
            for text in sorted((text for text, _ in paths), key=lambda text: text.items):
                self._compute(items, prefix[:0], [[text]], known)
        if bad:
            raise LogitsNotFinite(bad[0])
        return {n: Score(float(s), bool(g)) for n, s, g in zip(numbers, sums, greedy, strict=True)}

    def _predict(self, hidden: Tensor, places: Ids, targets: Ids) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return log p of each target, [t], and whether it is the likeliest, from the hidden state at its position."""
        step = max(1, (_LOGITS_CPU if self.device.type == "cpu" else _LOGITS_GPU) // self.model.vocab_size)
        # Several items may share a position, whose logits are computed once.
        asked, which = np.unique(places, return_inverse=True)
        order = np.argsort(which, kind="stable")
        bounds = np.searchsorted(which[order], np.arange(0, asked.size + step, step))
        results = []
        for chunk, (first, end) in enumerate(pairwise(bounds)):
            at = torch.from_numpy(asked[chunk * step : (chunk + 1) * step]).to(self.device)
            mine = torch.from_numpy(np.stack((which[order[first:end]] - chunk * step, targets[order[first:end]])))
            row, target = mine.to(self.device)
            # On a CPU log_softmax takes a seventh of the time of logsumexp.
            logits = F.log_softmax(self.model.logits(hidden[at]), dim=-1)  # [n, v]
            results.append(torch.stack((logits[row, target], (logits.argmax(-1)[row] == target).float())))
        log_probs, hits = torch.cat(results, dim=1).double().cpu().numpy()
        back = np.empty_like(order)
        back[order] = np.arange(order.size)
        return log_probs[back], hits[back] > 0

    def _shared_prefix_of(self, tokens: Ids) -> SharedPrefix:
        """Compute a prefix, or return the latest."""
        if self._shared_prefix is None or not np.array_equal(self._shared_prefix[0], tokens):
            self._shared_prefix = None  # before the next is there
            cache = self.model.new_cache(1, tokens.size)
            self.model(torch.from_numpy(tokens).to(self.device)[None], cache=cache, hidden=True)
            self._shared_prefix = tokens, SharedPrefix(cache)
        return self._shared_prefix[1]


def _halves(rows: list[list[Text]]) -> list[list[list[Text]]]:
    """Divide rows, or the texts of a single row, the first half last."""
    if len(rows) > 1:
        return [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
    (row,) = rows
    return [[row[len(row) // 2 :]], [row[: len(row) // 2]]]


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; PyTorch has an exception of its own only for most failures of a GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("not enough memory", "can't allocate memory", "CUDA out of memory")
    )
