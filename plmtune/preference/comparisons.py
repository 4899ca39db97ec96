"""Preference pairs as token ids: a prompt with the two answers whose probabilities are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from plmtune.data.pairs import Pair
from plmtune.data.rows import Refused
from plmtune.losses.preference import DIRECT, GIVEN_CHOSEN, GIVEN_REJECTED, MISMATCHED
from plmtune.preference.refinement import UNSHOWN, Refinement
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Unused

Ids = NDArray[np.int32]

_TRIES = 64  # pairs among which a mismatched answer is searched


@dataclass(frozen=True)
class Comparison:
    """A prompt and the two answers whose probabilities are compared.

    Attributes:
        kind: DIRECT: the prompt is the question. GIVEN_REJECTED, GIVEN_CHOSEN: the question with an earlier answer to
            refine (arXiv 2502.05605). MISMATCHED: the answer belongs to another question (KTO, arXiv 2402.01306).
        prompt, chosen, rejected: ids; answers with the token that ends them, None where there is none.
        pair: number of its pair among those that can be used.
        place: of the pair: "FILE, row 17".
    """

    kind: int
    prompt: Ids
    chosen: Ids | None
    rejected: Ids | None
    pair: int
    place: str

    @property
    def parts(self) -> list[Ids]:
        """The prompt and the answers that exist."""
        return [ids for ids in (self.prompt, self.chosen, self.rejected) if ids is not None]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and both answers."""
        return sum(ids.size for ids in self.parts)


def make_comparisons(
    pairs: Iterable[Pair],
    template: ChatTemplate,
    refinement: Refinement | None,
    seq_len: int,
    *,
    contexts: bool = False,
    mismatched: bool = False,
) -> tuple[list[Comparison], Refused, list[str]]:
    """Make the comparisons of each pair. Answers are never cut.

    A pair whose prompt and longer answer exceed seq_len is refused. A refinement prompt that leaves no room for the
    answers has its earlier answer shortened at the end: a row that is cut instead would lose its answers and train on
    nothing. Where no room is left for any of the earlier answer, that comparison is refused.

    Args:
        pairs: pairs with one answer only are refused unless `mismatched` is true.
        template: writes prompts and answers.
        refinement: writes refinement prompts; needed for `contexts`.
        seq_len: most tokens of a prompt and one answer.
        contexts: also make the two refinement comparisons of each pair.
        mismatched: also compare each prompt with an answer of another pair.

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
    notes = [unused.describe()] if unused else []
    if shortened:
        were = "earlier answer was" if shortened == 1 else "earlier answers were"
        notes.append(f"{shortened:,} {were} shortened, so that the answers that follow fit into seq_len ({seq_len})")
    if lacking:
        have = "pair has" if lacking == 1 else "pairs have"
        notes.append(f"{lacking:,} {have} no mismatched answer for the KL term: none fits behind the prompt")
    return made, refused, notes


def _longer(chosen: Ids | None, rejected: Ids | None) -> int:
    return max(ids.size for ids in (chosen, rejected) if ids is not None)


def _direct(
    pair: Pair, template: ChatTemplate, seq_len: int, number: int, unused: Unused, *, single: bool
) -> Comparison:
    """The comparison of a pair's answers to its prompt.

    Args:
        unused: collects what the template does not show.
        single: accept a pair with one answer.

    Raises:
        BadRow: if the pair cannot be used.
    """
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
