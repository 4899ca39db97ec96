"""What a fine-tuning run learns from: conversations and pairs, read, encoded, held out and packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import xxhash

from plmtune.data.conversations import Conversations
from plmtune.data.packing import Example, PackedRows, fit
from plmtune.data.preferences import Pair, Preferences
from plmtune.data.rows import Refused
from plmtune.data.sources import BadRow, Source, Unused
from plmtune.errors import UserError
from plmtune.io.progress import ticking
from plmtune.preference.refinement import UNSHOWN, Refinement
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.units import show_number_of

_BATCH = 1024  # conversations encoded at once
_REMEDY = "Mend them, or leave such rows out: chat.skip_bad=true"


@dataclass(frozen=True)
class Examples:
    """Rows to train on and held-out rows by source, what the ids hash to, and remarks for a person."""

    train: dict[str, PackedRows]
    held_out: dict[str, PackedRows]
    fingerprints: dict[str, str]
    notes: list[str]


def open_examples(
    sources: Mapping[str, Any],
    template: ChatTemplate,
    *,
    seq_len: int,
    train_on: Literal["all", "last"],
    too_long: Literal["drop", "cut"],
    skip_bad: bool,
    holdout: float,
    seed: int,
    refinement: Refinement | None = None,
    shown: bool = False,
) -> Examples:
    """Read, encode and pack every source.

    Args:
        sources: by name; conversations, or with `refinement` preferences.
        skip_bad: leave out rows that cannot be used, and say so.
        holdout: share of the conversations kept for validation, chosen by their ids: equal ones stay together, and
            of pairs all that have one prompt.
        refinement: make of each pair the two conversations of ARIES's first stage (arXiv 2502.05605): the chosen
            answer to the prompt, and the chosen answer to the prompt with the rejected one to better, which is
            shortened where both do not fit into seq_len. Prompts are not trained, nor are the answers that they hold,
            whatever `train_on` says.
        shown: say now and then how far it is.

    Raises:
        UserError: for rows that cannot be used, or where nothing is left to train on.
    """
    train, held_out, fingerprints, notes = {}, {}, {}, []
    for name, source in sources.items():
        refuse_other_kinds(name, source, (Conversations,) if refinement is None else (Preferences,))
        counts = _Counts()
        if refinement is None:
            read = _conversations(source, template, train_on, seq_len, too_long, counts)
        else:
            read = _refinements(source, template, refinement, seq_len, too_long, counts)
        digest = xxhash.xxh3_128()
        kept, held = list[Example](), list[Example]()
        for example, group in ticking(read, f"conversations of {name} encoded", shown=shown):
            digest.update(xxhash.xxh3_128_digest(example.tokens.tobytes()) + example.trained.tobytes())
            share = int.from_bytes(group[:8], "little") / 2**64
            (held if share < holdout else kept).append(example)
        _merge(counts.refused, source.refused)
        if not skip_bad:
            counts.refused.raise_if_any(_REMEDY, good=len(kept) + len(held) + len(counts.left_out))
        for word, counted in (("left out", counts.refused), ("left out", counts.left_out), ("cut", counts.cut)):
            if counted:
                notes.append(f"{name}: {show_number_of(len(counted), 'conversation')} {word}:\n{counted.describe()}")
        if counts.shortened:
            were = "earlier answer was" if counts.shortened == 1 else "earlier answers were"
            fit_in = f"so that the answer that follows fits into seq_len ({seq_len:,} tokens)"
            notes.append(f"{name}: {counts.shortened:,} {were} shortened, {fit_in}")
        counts.unused.merge(source.unused)
        if counts.unused:
            notes.append(f"{name}: {counts.unused.describe()}")
        if not kept:
            reasons = "\n".join(notes)
            found = len(held) + len(counts.refused) + len(counts.left_out)
            raise UserError(
                f"source {name}: none of its {show_number_of(found, 'conversation')} can be trained on."
                + (f"\n{reasons}" if reasons else " It is empty." if not found else " All are held out: chat.holdout.")
            )
        fingerprints[name] = digest.hexdigest()
        train[name] = PackedRows(kept, seq_len, seed)
        if held:
            held_out[name] = PackedRows(held, seq_len, seed)
    return Examples(train, held_out, fingerprints, notes)


@dataclass
class _Counts:
    """What of a source was not taken as it is: rows that are bad or too long, answers shortened, columns not used."""

    refused: Refused = field(default_factory=Refused)
    left_out: Refused = field(default_factory=Refused)
    cut: Refused = field(default_factory=Refused)
    unused: Unused = field(default_factory=Unused)
    shortened: int = 0

    def fit(self, examples: Sequence[Example], seq_len: int, too_long: Literal["drop", "cut"]) -> list[Example]:
        """Return the examples that fit, see `packing.fit`; count the others."""
        fitting, left_out, cut = fit(examples, seq_len, too_long)
        _merge(self.left_out, left_out)
        _merge(self.cut, cut)
        return fitting


# An example, and the hash that decides whether it is held out.
Grouped = tuple[Example, bytes]


def _conversations(
    source: Conversations,
    template: ChatTemplate,
    train_on: Literal["all", "last"],
    seq_len: int,
    too_long: Literal["drop", "cut"],
    counts: _Counts,
) -> Iterator[Grouped]:
    """Encode conversations; equal ones have one hash."""
    remaining = iter(source.conversations(skip_bad=True))
    while chunk := list(islice(remaining, _BATCH)):
        examples = []
        found = template.encode_batch([held.messages for held in chunk], train_on, counts.unused)
        for held, encoded in zip(chunk, found, strict=True):
            if isinstance(encoded, BadRow):
                counts.refused.add(held.place, encoded)
            else:
                examples.append(Example(*encoded, held.place))
        for example in counts.fit(examples, seq_len, too_long):
            yield example, xxhash.xxh3_128_digest(example.tokens.tobytes())


def _refinements(
    source: Preferences,
    template: ChatTemplate,
    refinement: Refinement,
    seq_len: int,
    too_long: Literal["drop", "cut"],
    counts: _Counts,
) -> Iterator[Grouped]:
    """Encode pairs: the chosen answer to the prompt, then to the prompt with the rejected one; one hash a prompt."""
    for pair in source.pairs(skip_bad=True):
        chosen = pair.answer("chosen")
        if chosen is None or pair.rejected is None:
            source.refused.add(pair.place, "has one answer only, and refining takes two")
            continue
        try:
            if not pair.shows_all:
                raise BadRow(UNSHOWN)
            prompt, answer = (
                template.encode_prompt(pair.prompt, counts.unused),
                template.encode_answer(chosen, counts.unused),
            )
            # Cut from the right, a long question would lose what is trained: the answer that it shows gives way.
            context = refinement.encode(template, pair.prompt, pair.rejected, max_len=seq_len - answer.size)
        except BadRow as error:
            counts.refused.add(pair.place, error)
            continue
        asked = [prompt]
        if context is None:
            counts.left_out.add(pair.place, f"leaves no room in seq_len ({seq_len:,}) for an earlier answer to refine")
        else:
            asked.append(context[0])
            counts.shortened += context[1]
        examples = [
            Example(np.concatenate([ids, answer]), np.arange(ids.size + answer.size) >= ids.size, pair.place)
            for ids in asked
        ]
        said = repr([(message.role, message.content) for message in pair.prompt])
        group = xxhash.xxh3_128_digest(said.encode("utf-8", "surrogatepass"))
        for example in counts.fit(examples, seq_len, too_long):
            yield example, group


def open_pairs(sources: Mapping[str, Any], *, skip_bad: bool) -> tuple[list[Pair], list[str]]:
    """Read the pairs of every source, with remarks for a person.

    Raises:
        UserError: for rows that cannot be used, or a source that holds no pairs.
    """
    pairs: list[Pair] = []
    notes: list[str] = []
    for name, source in sources.items():
        refuse_other_kinds(name, source, (Preferences,))
        before = len(pairs)
        pairs += source.pairs(skip_bad=True)
        if not skip_bad:
            source.refused.raise_if_any(_REMEDY, good=len(pairs) - before)
        if source.unused:
            notes.append(f"{name}: {source.unused.describe()}")
    return pairs, notes


_KINDS: dict[type, str] = {
    Source: "plain text (data=files, hub, shards, stdlib)",
    Conversations: "conversations (data=conversations, docstrings)",
    Preferences: "pairs (data=preferences, docstring_pairs)",
}


def refuse_other_kinds(name: str, source: Any, kinds: tuple[type, ...]) -> None:
    """Refuse a source that holds something else than a run trains on.

    Args:
        kinds: classes of what it trains on: Source, Conversations, Preferences.

    Raises:
        UserError: naming the source, what it holds and what the run takes.
    """
    if not isinstance(source, kinds):
        held = next((said for kind, said in _KINDS.items() if isinstance(source, kind)), type(source).__name__)
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        raise UserError(f"key data: source {name} holds {held.partition(' (')[0]}; this run takes {wanted}.")


def _merge(into: Refused, other: Refused) -> None:
    for reason, count in other.counts.items():
        into.counts[reason] = into.counts.get(reason, 0) + count
        into.first.setdefault(reason, other.first[reason])
