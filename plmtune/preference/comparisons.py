"""Preference pairs as token ids, a prompt with two answers whose probabilities are compared, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plmtune.data.batches import moved
from plmtune.data.preferences import Pair
from plmtune.data.rows import Refused
from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, MISMATCHED
from plmtune.preference.refinement import UNSHOWN, Refinement
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Unused

Ids = NDArray[np.int32]

_TRIES = 64  # pairs among which a mismatched answer is searched


@dataclass(frozen=True)
class Comparison:
    """A prompt and the two answers whose probabilities are compared; an answer has the token that ends it.

    kind: DIRECT: the prompt is the question. GIVEN_REJECTED, GIVEN_CHOSEN: the question with an earlier answer to
        refine (arXiv 2502.05605). MISMATCHED: the answer belongs to another question (KTO, arXiv 2402.01306).
    """

    kind: int
    prompt: Ids
    chosen: Ids | None
    rejected: Ids | None
    pair: int  # its number among those that can be used
    place: str  # of the pair: "FILE, row 17"
    # Each answer has a prompt of its own: the lengths of the two texts decide different frequencies of RoPE.
    apart: bool = False

    @property
    def parts(self) -> list[Ids]:
        """The prompt and the answers that exist."""
        return [ids for ids in (self.prompt, self.chosen, self.rejected) if ids is not None]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and both answers."""
        return sum(ids.size for ids in self.parts) + (self.prompt.size if self.apart else 0)


def make_comparisons(
    pairs: Iterable[Pair],
    template: ChatTemplate,
    refinement: Refinement | None,
    seq_len: int,
    *,
    contexts: bool = False,
    mismatched: bool = False,
    rope_key: Callable[[int], object] = lambda length: None,
) -> tuple[list[Comparison], Refused, list[str]]:
    """Make the comparisons of each pair. Answers are never cut.

    A pair whose prompt and longer answer exceed seq_len is refused. A refinement prompt that leaves no room for the
    answers has its earlier answer shortened at the end: a row that is cut instead would lose its answers and train on
    nothing. Where no room is left for any of the earlier answer, that comparison is refused.

    Args:
        refinement: needed for `contexts`.
        contexts: also make the two refinement comparisons of each pair.
        mismatched: accept pairs with one answer, and also compare each prompt with an answer of another pair.
        rope_key: the model's: what of a text's length decides its frequencies of RoPE.

    Returns:
        The comparisons, those of a pair in sequence; the refused pairs; notes for a person.
    """
    made: list[Comparison] = []
    refused, unused = Refused(), Unused()
    shortened = lacking = count = 0
    for pair in pairs:
        try:
            direct = _direct(pair, template, seq_len, count, unused, single=mismatched)
        except BadRow as error:
            refused.add(pair.place, str(error))
            continue
        made.append(direct)
        if contexts and pair.chosen is not None and pair.rejected is not None:
            assert refinement is not None
            room = seq_len - _longer(direct.chosen, direct.rejected)
            for kind, earlier in ((GIVEN_REJECTED, pair.rejected), (GIVEN_CHOSEN, pair.chosen)):
                try:
                    if not pair.shows_all:
                        raise BadRow(UNSHOWN)
                    context = refinement.encode(template, pair.prompt, earlier, max_len=room)
                    if context is None:
                        raise BadRow(f"leaves no room in seq_len ({seq_len}) for an earlier answer to refine")
                except BadRow as error:
                    refused.add(pair.place, str(error))
                    continue
                ids, cut = context
                shortened += cut
                made.append(replace(direct, kind=kind, prompt=ids))
        count += 1
    if mismatched and made:
        made, lacking = _with_mismatched(made, seq_len)
    made = [replace(held, apart=True) if _differ(held, rope_key) else held for held in made]
    notes = [unused.describe()] if unused else []
    if shortened:
        were = "earlier answer was" if shortened == 1 else "earlier answers were"
        notes.append(f"{shortened:,} {were} shortened, so that the answers that follow fit into seq_len ({seq_len})")
    if lacking:
        have = "pair has" if lacking == 1 else "pairs have"
        notes.append(f"{lacking:,} {have} no mismatched answer for the KL term: none fits behind the prompt")
    return made, refused, notes


def _differ(held: Comparison, rope_key: Callable[[int], object]) -> bool:
    """Whether the lengths of the two texts decide different frequencies of RoPE."""
    if held.chosen is None or held.rejected is None:
        return False
    return rope_key(held.prompt.size + held.chosen.size) != rope_key(held.prompt.size + held.rejected.size)


def _longer(chosen: Ids | None, rejected: Ids | None) -> int:
    return max(ids.size for ids in (chosen, rejected) if ids is not None)


def _direct(
    pair: Pair, template: ChatTemplate, seq_len: int, number: int, unused: Unused, *, single: bool
) -> Comparison:
    """The comparison of a pair's answers to its prompt; `single` accepts one answer. Raises BadRow."""
    prompt = template.encode_prompt(pair.prompt, unused)
    answers = (pair.answer("chosen"), pair.answer("rejected"))
    chosen, rejected = (None if answer is None else template.encode_answer(answer, unused) for answer in answers)
    if (chosen is None or rejected is None) and not single:
        raise BadRow("has one answer only, while this loss compares two (loss=kto takes single answers)")
    if chosen is not None and rejected is not None and np.array_equal(chosen, rejected):
        raise BadRow("has two answers that the chat template makes equal")
    if prompt.size + _longer(chosen, rejected) > seq_len:
        raise BadRow(f"has a prompt that with its longer answer exceeds seq_len ({seq_len})")
    return Comparison(DIRECT, prompt, chosen, rejected, number, pair.place)


def _with_mismatched(made: list[Comparison], seq_len: int) -> tuple[list[Comparison], int]:
    """Add to each pair's comparisons its prompt with the answer of the next pair that fits; count pairs without."""
    direct = [comparison for comparison in made if comparison.kind == DIRECT]
    answers = [c.chosen if c.chosen is not None else c.rejected for c in direct]
    found: dict[int, Comparison] = {}
    for index, own in enumerate(direct):
        for step in range(1, min(_TRIES, len(direct))):
            other = (index + step) % len(direct)
            answer = answers[other]
            same = np.array_equal(direct[other].prompt, own.prompt)  # then its answer is no mismatch
            if answer is not None and own.prompt.size + answer.size <= seq_len and not same:
                found[own.pair] = replace(own, kind=MISMATCHED, chosen=answer, rejected=None)
                break
    out: list[Comparison] = []
    for pair, members in groupby(made, key=lambda comparison: comparison.pair):
        out += [*members, *([found[pair]] if pair in found else [])]
    return out, len(direct) - len(found)


@dataclass(frozen=True)
class ComparisonBatch:
    """One micro-batch of n comparisons with t answer tokens, packed into b rows of s tokens.

    A comparison is laid out as prompt, chosen, rejected. Both answers attend to the prompt and not to each other, and
    the positions of both continue the prompt's. Of one that is `apart` the prompt stands before each answer. A rank
    without comparisons has an empty batch, which keeps ranks in step. All tensors but the mask are int64.
    """

    tokens: Tensor  # [b, s]
    input_pos: Tensor  # [b, s]
    mask: Tensor  # [b, s, s] bool, True where a query (row) may attend
    positions: Tensor  # [t], flat positions in [b * s] whose hidden states predict the answers' tokens
    targets: Tensor  # [t], those tokens
    completion: Tensor  # [t], their answer: 2i is the chosen answer of comparison i, 2i + 1 the rejected one
    lengths: Tensor  # [2n], tokens of each answer; 0: there is none
    ends: Tensor  # [2n], flat position of each answer's last token; where there is none, of the prompt's
    kind: Tensor  # [n]
    index: Tensor  # [n], number of the comparison in the data
    num_pairs: int  # direct comparisons
    num_tokens: int  # without padding
    # The comparisons are mismatched: KTO's KL term is computed from them, and they are not trained on. Equal on all
    # ranks, also for an empty batch.
    kl_only: bool = False

    def to(self, device: torch.device | str) -> ComparisonBatch:
        """Return the batch on a device, see `moved`."""
        return replace(self, **moved(self, device))


def make_batch(
    comparisons: Sequence[Comparison], rows: Sequence[Sequence[int]], *, kl_only: bool = False
) -> ComparisonBatch:
    """Lay out rows of comparisons, given by their indices; rows are as long as the longest.

    Padding attends to itself, so that no row of attention is empty.
    """
    order = [index for row in rows for index in row]
    widths = [sum(comparisons[index].num_tokens for index in row) for row in rows]
    b, s = max(1, len(rows)), max([1, *widths])
    tokens = np.zeros((b, s), dtype=np.int64)
    input_pos = np.zeros((b, s), dtype=np.int64)
    mask = np.zeros((b, s, s), dtype=np.bool_)
    triangle = np.tri(max([1, *(ids.size for index in order for ids in comparisons[index].parts)]), dtype=np.bool_)
    positions, targets, lengths, ends = [], [], [], []
    for number, row in enumerate(rows):
        at = 0
        for index in row:
            held = comparisons[index]
            size, last = held.prompt.size, -1
            for answer in (held.chosen, held.rejected):
                if last < 0 or held.apart:
                    prompt = slice(at, at + size)
                    tokens[number, prompt] = held.prompt
                    input_pos[number, prompt] = np.arange(size)
                    mask[number, prompt, prompt] = triangle[:size, :size]
                    at += size
                    last = number * s + at - 1  # of the prompt: it predicts the first token of the answers behind it
                ids = np.empty(0, dtype=np.int32) if answer is None else answer
                here = slice(at, at + ids.size)
                tokens[number, here] = ids
                input_pos[number, here] = size + np.arange(ids.size)
                mask[number, here, prompt] = True
                mask[number, here, here] = triangle[: ids.size, : ids.size]
                before = number * s + at - 1 + np.arange(ids.size)
                before[:1] = last
                positions.append(before)
                targets.append(ids)
                lengths.append(ids.size)
                at += ids.size
                ends.append(number * s + at - 1 if ids.size else last)
        padding = np.arange(at, s)
        mask[number, padding, padding] = True
    if not rows:
        mask[:] = True
    counts = np.array(lengths, dtype=np.int64)
    nothing = np.empty(0, dtype=np.int64)
    arrays = {
        "tokens": tokens,
        "input_pos": input_pos,
        "mask": mask,
        "positions": np.concatenate([nothing, *positions]),
        "targets": np.concatenate([nothing, *targets]),
        "completion": np.repeat(np.arange(counts.size), counts),
        "lengths": counts,
        "ends": np.array(ends, dtype=np.int64),
        "kind": np.array([comparisons[index].kind for index in order], dtype=np.int64),
        "index": np.array(order, dtype=np.int64),
    }
    return ComparisonBatch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        kl_only=kl_only,
        num_pairs=int((arrays["kind"] == DIRECT).sum()),
        num_tokens=sum(widths),
    )
