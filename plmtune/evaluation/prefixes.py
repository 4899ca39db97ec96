"""Arranges texts in batches so that common prefixes are computed once.

A question and its continuations are one row, as a tree with a mask; the common prefix of many rows (few-shot examples)
is computed separately, and they attend to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from plmtune.inference.request_queue import count_shared

Ids = NDArray[np.int64]

# Tokens of a row that not all its items share: attention scores between branches are wasted.
_BRANCHES = 256
# A shorter prefix is not shared between rows.
_SHORTEST_PREFIX = 32
# Of a prefix each row holds only keys and values, about a quarter of the memory of activations.
_PREFIX_SHARE = 4


@dataclass(frozen=True, eq=False)
class Text:
    """The model's input for one or several items: context and continuation without the last token.

    tokens: ids, [n].
    items: their numbers.
    fixed: tokens before the first position whose prediction any of them needs.
    """

    tokens: Ids
    items: tuple[int, ...]
    fixed: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one forward; each is a tree of texts in lexical order.

    prefix: common prefix of all texts that is computed separately, [p]; often empty.
    """

    prefix: Ids
    rows: tuple[tuple[Text, ...], ...]


def plan(texts: Sequence[Text], *, token_budget: int, token_cost: int, forward_cost: int) -> list[Batch]:
    """Arrange texts in batches, those with the longest rows first; equal texts give equal batches.

    Args:
        texts: distinct, in lexical order.
        token_budget: of rows x tokens of the longest; a prefix counts a quarter. A single row may exceed it.
        token_cost: time of one token's linear layers, in attention scores.
        forward_cost: fixed time of a forward, in tokens.
    """
    rows = _rows(texts, token_cost)
    # The common prefix from which no item needs a prediction; in lexical order the first and the last share least.
    roots = [min(count_shared(row[0].tokens, row[-1].tokens), *(text.fixed for text in row)) for row in rows]
    links = [0] + [
        min(count_shared(above[-1].tokens, below[0].tokens), *sizes)
        for (above, below), sizes in zip(pairwise(rows), pairwise(roots), strict=True)
    ]
    _, prefixes = _choose_prefixes(links, forward_cost)
    groups = [(rows[first:end], depth) for first, end, depth in prefixes]
    inside = {number for first, end, _ in prefixes for number in range(first, end)}
    groups.append(([row for number, row in enumerate(rows) if number not in inside], 0))
    planned: list[tuple[int, list[Batch]]] = []  # of each prefix, with the tokens of the longest row
    for group, depth in groups:
        sizes = [size_of(row, depth) for row in group]
        order = sorted(range(len(group)), key=lambda number: -sizes[number])
        batches: list[Batch] = []
        planned.append((depth + max(sizes, default=0), batches))
        while order:
            longest = sizes[order[0]]
            # Another forward is better than padding that costs more.
            padding = np.cumsum([longest - sizes[number] for number in order])
            count = min(token_budget // (longest + depth // _PREFIX_SHARE), int((padding <= forward_cost).sum()))
            count = max(1, count)
            batches.append(Batch(group[0][0].tokens[:depth], tuple(tuple(group[number]) for number in order[:count])))
            order = order[count:]
    # Batches of one prefix stay together, so that it is computed once.
    return [batch for _, batches in sorted(planned, key=lambda entry: -entry[0]) for batch in batches]


def _rows(texts: Sequence[Text], token_cost: int) -> list[list[Text]]:
    """Put neighbours into one row if sharing saves more than the wasted scores between them cost."""
    rows: list[list[Text]] = []
    size = root = 0
    for text in texts:
        length = text.tokens.size
        if rows:
            shared = count_shared(rows[-1][-1].tokens, text.tokens)
            own = length - shared
            branches = size + own - min(root, shared)
            if branches <= _BRANCHES and shared * token_cost > 2 * own * size:
                rows[-1].append(text)
                size, root = size + own, min(root, shared)
                continue
        rows.append([text])
        size = root = length
    return rows


def size_of(row: Sequence[Text], prefix: int) -> int:
    """Return the tokens that a row computes after its prefix."""
    new = row[0].tokens.size - prefix
    for above, below in pairwise(row):
        new += below.tokens.size - count_shared(above.tokens, below.tokens)
    return new


def _choose_prefixes(links: Sequence[int], forward_cost: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Choose prefixes of neighbouring rows, none inside another.

    The rows share some tokens, and parts of them share more. Either all have one prefix, or the parts have theirs,
    whichever saves more tokens.

    Args:
        links: tokens that each row shares with the one before.

    Returns:
        The tokens that are saved, and the prefixes: (first row, row after the last, tokens).
    """
    # The recursion is shallow: rows whose prefixes grow from one to the next are _BRANCHES tokens apart.
    if len(links) < 2:
        return 0, []
    depth = min(links[1:])
    cuts = [0, *(number for number, link in enumerate(links) if number and link == depth), len(links)]
    saved, chosen = 0, []
    for first, end in pairwise(cuts):
        inner, prefixes = _choose_prefixes(links[first:end], forward_cost)
        saved += inner
        chosen += [(first + begin, first + stop, tokens) for begin, stop, tokens in prefixes]
    own = (len(links) - 1) * depth - forward_cost
    return (own, [(0, len(links), depth)]) if depth >= _SHORTEST_PREFIX and own > saved else (saved, chosen)


def weigh(rows: Sequence[Sequence[Text]], prefix: Ids) -> int:
    """Return what of a budget of tokens such rows take."""
    return len(rows) * (max((size_of(row, prefix.size) for row in rows), default=0) + prefix.size // _PREFIX_SHARE)


def layout(
    rows: Sequence[Sequence[Text]], prefix: int
) -> tuple[list[tuple[Text, Ids]], Ids, Ids, NDArray[np.bool_] | None]:
    """Lay out rows of texts, less `prefix` tokens of each.

    Returns:
        Each text with the flat places in [b * s] of its tokens; ids and positions, [b, s]; and what may attend to
        what, [b, s, prefix + s], or None where each row is one text, so that causal attention is right.
    """
    size = max(size_of(row, prefix) for row in rows)
    tokens = np.zeros((len(rows), size), dtype=np.int64)
    input_pos = np.zeros_like(tokens)
    mask = np.zeros((len(rows), size, prefix + size), dtype=np.bool_) if any(len(row) > 1 for row in rows) else None
    paths = []
    for number, row in enumerate(rows):
        at = 0
        path = np.empty(0, dtype=np.int64)
        previous = row[0].tokens[prefix:prefix]
        for text in row:
            ids = text.tokens[prefix:]
            shared = count_shared(previous, ids)
            new = np.arange(at, at + ids.size - shared)
            tokens[number, new] = ids[shared:]
            input_pos[number, new] = np.arange(prefix + shared, prefix + ids.size)
            if mask is not None and new.size:
                mask[number, at : at + new.size, prefix + path[:shared]] = True
                mask[number, at : at + new.size, prefix + at : prefix + at + new.size] = np.tri(
                    new.size, dtype=np.bool_
                )
            path = np.concatenate((path[:shared], new))
            paths.append((text, number * size + path))
            previous, at = ids, at + new.size
        if mask is not None:
            # Padding sees itself alone, so that no row of attention is empty.
            mask[number, np.arange(at, size), prefix + np.arange(at, size)] = True
            mask[number, :, :prefix] = True
    return paths, tokens, input_pos, mask
