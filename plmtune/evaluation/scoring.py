"""Log-probabilities of many continuations, in which tokens that items begin with are computed once.

Three ways to share: items whose tokens are all the same but the last are read off one place; a question and its
continuations lie in one row, under a mask; what many rows begin with (few-shot examples) is a stem that they attend to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from plmtune.errors import UserError
from plmtune.modules.cache import Stem

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder

Ids = NDArray[np.int64]

# Tokens of a row besides those that all its items share: what one branch computes of scores with another is wasted.
_BRANCHES = 256
# A shorter stem is left to the rows; and one must spare so many tokens, which is what another forward costs besides
# them: on a CPU reading the weights once more, on a GPU launching all its kernels.
_SHORTEST_STEM = 32
_FORWARD_CPU, _FORWARD_GPU = 128, 2048
# Of a stem each row holds keys and values only, about a quarter of what a token's own activations take.
_STEM_SHARE = 4
# Logits held at once; in fp32 these are 32 MB and 256 MB. On a CPU more is slower, for they leave the caches.
_LOGITS_CPU, _LOGITS_GPU = 2**23, 2**26
# Measured with 135M weights in fp32: from 1,024 to 4,096 all take the same time.
_BUDGET_CPU = 2048


@dataclass(frozen=True)
class Item:
    """A continuation whose probability after a context is asked for; both are ids, and neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """What the model says of an item.

    log_prob: natural logarithm of the continuation's probability, the sum over its tokens.
    greedy: each of its tokens was the likeliest of all rows of the vocabulary.
    """

    log_prob: float
    greedy: bool


class NotFinite(ValueError):
    """Logits were NaN or infinite; `index` is the first item of its batch that met them."""

    def __init__(self, index: int) -> None:
        super().__init__(f"the log-probability of item {index} is not a finite number")
        self.index = index


@dataclass(frozen=True, eq=False)
class Text:
    """What goes into the model for one or several items: context and continuation without the last token.

    tokens: ids, [n].
    items: their numbers.
    fixed: tokens before the first place that predicts something for any of them.
    """

    tokens: Ids
    items: tuple[int, ...]
    fixed: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that one forward computes: each is several texts in lexical order that lie in it as a tree.

    stem: tokens that all texts begin with and that are computed apart, [p]; often none.
    """

    stem: Ids
    rows: tuple[tuple[Text, ...], ...]


def plan(texts: Sequence[Text], *, token_budget: int, token_cost: int, forward_cost: int) -> list[Batch]:
    """Arrange texts in batches, those with the longest rows first; equal texts give equal batches.

    Args:
        texts: distinct, in lexical order.
        token_budget: of rows x tokens of the longest, where a stem counts for a quarter. One row may exceed it.
        token_cost: scores of attention that could be computed in the time of one token's linear layers.
        forward_cost: tokens that could be computed in the time that a forward takes besides.
    """
    rows = _rows(texts, token_cost)
    roots = [_root(row) for row in rows]
    links = [0] + [
        min(_shared(above[-1].tokens, below[0].tokens), *sizes)
        for (above, below), sizes in zip(pairwise(rows), pairwise(roots), strict=True)
    ]
    stems = _stems(links, forward_cost)
    groups = [(rows[first:end], depth) for first, end, depth in stems]
    alone = np.ones(len(rows), dtype=np.bool_)
    for first, end, _ in stems:
        alone[first:end] = False
    groups.append(([row for row, is_alone in zip(rows, alone, strict=True) if is_alone], 0))
    batches: list[tuple[int, Batch]] = []
    for group, depth in groups:
        sizes = [_size(row, depth) for row in group]
        order = sorted(range(len(group)), key=lambda number: -sizes[number])
        while order:
            longest = sizes[order[0]]
            # Another forward is better than padding that takes longer.
            padding = np.cumsum([longest - sizes[number] for number in order])
            count = min(token_budget // (longest + depth // _STEM_SHARE), int((padding <= forward_cost).sum()))
            count = max(1, count)
            batch = Batch(group[0][0].tokens[:depth], tuple(tuple(group[number]) for number in order[:count]))
            batches.append((depth + longest, batch))
            order = order[count:]
    # Batches of one stem stay together, so that it is needed once; a sort of groups by their longest does that.
    longest_of: dict[bytes, int] = {}
    for size, batch in batches:
        longest_of.setdefault(batch.stem.tobytes(), size)
    return [batch for _, batch in sorted(batches, key=lambda entry: -longest_of[entry[1].stem.tobytes()])]


def _rows(texts: Sequence[Text], token_cost: int) -> list[list[Text]]:
    """Put neighbours into one row where what they share takes longer than the scores between them, which are wasted."""
    rows: list[list[Text]] = []
    size = root = 0
    for text in texts:
        length = text.tokens.size
        if rows:
            shared = _shared(rows[-1][-1].tokens, text.tokens)
            own = length - shared
            branches = size + own - min(root, shared)
            if branches <= _BRANCHES and shared * token_cost > 2 * own * size:
                rows[-1].append(text)
                size, root = size + own, min(root, shared)
                continue
        rows.append([text])
        size = root = length
    return rows


def _shared(a: Ids, b: Ids) -> int:
    """Return how many tokens both begin with."""
    length = min(a.size, b.size)
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def _root(row: Sequence[Text]) -> int:
    """Return how many tokens all texts of a row begin with and none needs a prediction from."""
    # Between the first and the last in lexical order the others cannot share less.
    return min(_shared(row[0].tokens, row[-1].tokens), *(text.fixed for text in row))


def _size(row: Sequence[Text], stem: int) -> int:
    """Return the tokens that a row computes after its stem."""
    new = row[0].tokens.size - stem
    for above, below in pairwise(row):
        new += below.tokens.size - _shared(above.tokens, below.tokens)
    return new


@dataclass
class _Run:
    """Neighbouring rows, from `first` on, that share `depth` tokens; and the best that can be done inside them."""

    depth: int
    first: int
    spared: int = 0
    chosen: tuple[tuple[int, int, int], ...] = ()


def _stems(links: Sequence[int], forward_cost: int) -> list[tuple[int, int, int]]:
    """Choose stems: (first row, row after the last, tokens), none inside another.

    Runs of rows that share so many tokens form a tree, whose branches share more; each either is a stem or leaves
    that to its branches, whichever spares more tokens.

    Args:
        links: tokens that each row shares with the one before.
    """
    open_runs = [_Run(0, 0)]
    for end, link in enumerate([*links[1:], 0], start=1):
        first, spared = end - 1, 0
        chosen: tuple[tuple[int, int, int], ...] = ()
        while open_runs[-1].depth > link:
            run = open_runs.pop()
            run.spared, run.chosen = run.spared + spared, run.chosen + chosen
            own = (end - run.first - 1) * run.depth - forward_cost
            if run.depth >= _SHORTEST_STEM and own > run.spared:
                run.spared, run.chosen = own, ((run.first, end, run.depth),)
            first, spared, chosen = run.first, run.spared, run.chosen
        if open_runs[-1].depth < link:
            open_runs.append(_Run(link, first))
        open_runs[-1].spared += spared
        open_runs[-1].chosen += chosen
    return list(open_runs[0].chosen)


class Scorer:
    """Score items; the model computes as in evaluation, and autocast is the caller's.

    Equal to taking each item by itself but for how sums are rounded: the last max_seq_len + 1 tokens of context and
    continuation, log_softmax in fp32 over all rows of the vocabulary.

    Args:
        model: the model.
        token_budget: most tokens a forward, halved when memory runs out; None: by the device.

    Attributes:
        truncated: items that lost the beginning of their context.

    Raises:
        ValueError: for a budget below 1.
    """

    def __init__(self, model: Decoder, *, token_budget: int | None = None) -> None:
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, not {token_budget}")
        self.model = model
        self.token_budget = token_budget
        self.truncated = 0
        self._at_most: int | None = None
        self._stem: tuple[Ids, Stem] | None = None

    def score(self, items: Sequence[Item], known: Collection[int] = ()) -> Iterator[list[tuple[int, Score]]]:
        """Yield (number, score) of a batch of items at a time.

        Args:
            items: what is asked.
            known: numbers of items that need no score. The batches are those that all items make, without them.

        Raises:
            NotFinite: while it runs.
            UserError: if a row alone is too much for the memory.
            ValueError: for an item that is empty or has ids that the model does not know, or a continuation longer
                than max_seq_len.
        """
        texts = self._texts(items)
        gpu = self.device.type != "cpu"
        batches = plan(
            texts,
            token_budget=self.token_budget or self._default_budget(),
            # A linear layer is 12 d^2 products a token, a score 2 d: one for the query, one for the value.
            token_cost=6 * self.model.embed_dim,
            forward_cost=_FORWARD_GPU if gpu else _FORWARD_CPU,
        )
        return self._run(items, batches, frozenset(known))

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    def _default_budget(self) -> int:
        if self.device.type != "cuda":
            return _BUDGET_CPU
        # A token's activations are some eight widths of the FFN, four times embed_dim; half the memory is for the rest.
        free, _ = torch.cuda.mem_get_info(self.device)
        tokens = min(max(free // 2 // (8 * 4 * 4 * self.model.embed_dim), 1024), 65536)
        return 1 << (tokens.bit_length() - 1)  # rounded, so that the next time finds the same

    def _texts(self, items: Sequence[Item]) -> list[Text]:
        """Return the distinct texts of items, in lexical order; count what is cut."""
        longest, vocab_size = self.model.max_seq_len, self.model.vocab_size
        # Big-endian, so that the order of the bytes is that of the ids.
        found: dict[bytes, list[int]] = {}
        for number, item in enumerate(items):
            length = len(item.context) + len(item.continuation)
            if not len(item.context) or not len(item.continuation):
                raise ValueError(f"item {number} needs a context and a continuation of at least one token each")
            if len(item.continuation) > longest:
                raise ValueError(
                    f"the continuation of item {number} has {len(item.continuation)} tokens, "
                    f"but the model's max_seq_len is {longest}"
                )
            whole = np.array([*item.context, *item.continuation], dtype=np.int64)
            if whole.min() < 0 or whole.max() >= vocab_size:
                wrong = int(whole[(whole < 0) | (whole >= vocab_size)][0])
                raise ValueError(f"item {number} holds the id {wrong}, but the model's vocabulary has {vocab_size}")
            self.truncated += length > longest + 1
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
                    limit = self._at_most
                    if limit and _weight(part, batch.stem) > limit and len(part) > 1:
                        waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
                    elif part:
                        done = self._attempt(items, batch.stem, part, known)
                        if done is None:
                            waiting += self._halves(part, batch.stem)
                        else:
                            scores |= done
                if scores:
                    yield sorted(scores.items())
        finally:
            self._stem = None

    def _halves(self, part: list[list[Text]], stem: Ids) -> list[list[list[Text]]]:
        """Divide rows that did not fit into memory, and remember how many tokens that were."""
        if len(part) == 1 and len(part[0]) == 1:
            raise UserError(
                f"memory does not suffice for one text of {part[0][0].tokens.size} tokens on {self.device}: "
                "end other programs, or load the model with a smaller dtype"
            )
        self._at_most = max(1, _weight(part, stem) // 2)
        if len(part) == 1:
            (row,) = part
            return [[row[len(row) // 2 :]], [row[: len(row) // 2]]]
        return [part[len(part) // 2 :], part[: len(part) // 2]]

    def _attempt(
        self, items: Sequence[Item], stem: Ids, rows: list[list[Text]], known: frozenset[int]
    ) -> dict[int, Score] | None:
        """Return the scores of rows, or None when memory ran out; what it held is free again then."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            return self._compute(items, stem, rows, known)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
        finally:
            if training:
                self.model.train()
        # Only here is the exception gone, which held the tensors of every frame.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.no_grad()
    def _compute(
        self, items: Sequence[Item], stem: Ids, rows: list[list[Text]], known: frozenset[int]
    ) -> dict[int, Score]:
        paths, tokens, input_pos, mask = _layout(rows, stem.size)
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
        cache = self._stem_of(stem) if stem.size else None
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
            # What a mask hides is multiplied by 0, so NaN spreads in a row: only alone is an item's own.
            for text in sorted((text for text, _ in paths), key=lambda text: text.items):
                self._compute(items, stem[:0], [[text]], known)
        if bad:
            raise NotFinite(bad[0])
        return {n: Score(float(s), bool(g)) for n, s, g in zip(numbers, sums, greedy, strict=True)}

    def _predict(self, hidden: Tensor, places: Ids, targets: Ids) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return log p of each target, [t], and whether it is the likeliest, from the hidden state at its place."""
        weight = self.model.head_weight
        step = max(1, (_LOGITS_CPU if self.device.type == "cpu" else _LOGITS_GPU) // weight.shape[0])
        # Several items may ask one place: its logits are computed once.
        asked, which = np.unique(places, return_inverse=True)
        order = np.argsort(which, kind="stable")
        bounds = np.searchsorted(which[order], np.arange(0, asked.size + step, step))
        results = []
        for chunk, (first, end) in enumerate(pairwise(bounds)):
            at = torch.from_numpy(asked[chunk * step : (chunk + 1) * step]).to(self.device)
            mine = torch.from_numpy(np.stack((which[order[first:end]] - chunk * step, targets[order[first:end]])))
            row, target = mine.to(self.device)
            # On a CPU log_softmax takes a seventh of the time of logsumexp.
            logits = F.log_softmax(F.linear(hidden[at], weight).float(), dim=-1)  # [n, v]
            results.append(torch.stack((logits[row, target], (logits.argmax(-1)[row] == target).float())))
        log_probs, hits = torch.cat(results, dim=1).double().cpu().numpy()
        back = np.empty_like(order)
        back[order] = np.arange(order.size)
        return log_probs[back], hits[back] > 0

    def _stem_of(self, tokens: Ids) -> Stem:
        """Compute a stem, or return the newest again."""
        if self._stem is None or not np.array_equal(self._stem[0], tokens):
            self._stem = None  # before the next is there
            cache = self.model.new_cache(1, tokens.size)
            self.model(torch.from_numpy(tokens).to(self.device)[None], cache=cache, hidden=True)
            self._stem = tokens, Stem(cache)
        return self._stem[1]


def _weight(rows: Sequence[Sequence[Text]], stem: Ids) -> int:
    """Return what of a budget of tokens such rows take."""
    return len(rows) * (max((_size(row, stem.size) for row in rows), default=0) + stem.size // _STEM_SHARE)


def _out_of_memory(error: BaseException) -> bool:
    words = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in words for sign in ("not enough memory", "can't allocate memory", "CUDA out of memory")
    )


def _layout(
    rows: Sequence[Sequence[Text]], stem: int
) -> tuple[list[tuple[Text, Ids]], Ids, Ids, NDArray[np.bool_] | None]:
    """Lay out rows of texts, less `stem` tokens of each.

    Returns:
        Each text with the flat places in [b * s] of its tokens; ids and positions, [b, s]; and what may attend to
        what, [b, s, stem + s], or None where each row is one text, so that causal attention is right.
    """
    size = max(_size(row, stem) for row in rows)
    tokens = np.zeros((len(rows), size), dtype=np.int64)
    input_pos = np.zeros_like(tokens)
    mask = np.zeros((len(rows), size, stem + size), dtype=np.bool_) if any(len(row) > 1 for row in rows) else None
    paths = []
    for number, row in enumerate(rows):
        at = 0
        path = np.empty(0, dtype=np.int64)
        previous = row[0].tokens[stem:stem]
        for text in row:
            ids = text.tokens[stem:]
            shared = _shared(previous, ids)
            new = np.arange(at, at + ids.size - shared)
            tokens[number, new] = ids[shared:]
            input_pos[number, new] = np.arange(stem + shared, stem + ids.size)
            if mask is not None and new.size:
                mask[number, at : at + new.size, stem + path[:shared]] = True
                mask[number, at : at + new.size, stem + at : stem + at + new.size] = np.tri(new.size, dtype=np.bool_)
            path = np.concatenate((path[:shared], new))
            paths.append((text, number * size + path))
            previous, at = ids, at + new.size
        if mask is not None:
            # Padding sees itself alone, so that no row of attention is empty.
            mask[number, np.arange(at, size), stem + np.arange(at, size)] = True
            mask[number, :, :stem] = True
    return paths, tokens, input_pos, mask
