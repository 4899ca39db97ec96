"""Examples of a fine-tuning run: conversations are read, encoded, held out and packed; pairs are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import xxhash

from plmtune.data.conversations import Conversations
from plmtune.data.packing import Example, PackedRows, fit
from plmtune.data.preferences import Pair, Preferences
from plmtune.data.rows import REMEDY, Refused
from plmtune.data.sources import Source
from plmtune.errors import UserError
from plmtune.io.terminal import track
from plmtune.tokenizers.chat_template import ChatTemplate, TrainOn
from plmtune.tokenizers.message import BadRow, Unused
from plmtune.units import show_number_of

_BATCH = 1024  # conversations encoded at once

Truncation = Literal["drop", "right"]
Grouped = tuple[Example, bytes]  # the hash decides whether the example is held out
Encode = Callable[[Any, "Collected"], Iterator[Grouped]]


@dataclass(frozen=True)
class Examples:
    """Training rows and held-out rows by source, hashes of the ids, and notes for a person."""

    train: dict[str, PackedRows]
    held_out: dict[str, PackedRows]
    fingerprints: dict[str, str]
    notes: list[str]


def open_examples(
    sources: Mapping[str, Any],
    template: ChatTemplate,
    *,
    seq_len: int,
    train_on: TrainOn,
    truncation: Truncation,
    skip_bad: bool,
    holdout: float,
    seed: int,
    encode: Encode | None = None,
    shown: bool = False,
) -> Examples:
    """Read, encode and pack every source.

    Args:
        sources: by name; conversations, or with `encode` pairs.
        skip_bad: leave out rows that cannot be used, and report them in `notes`.
        holdout: share of the conversations kept for validation. The hash of a group decides, so the examples of one
            group stay together; equal conversations are one group.
        encode: makes examples of sources of pairs; see `plmtune.preference.refinement.encode_pairs`.
        shown: print progress.
    """
    train, held_out, fingerprints, notes = {}, {}, {}, []
    for name, source in sources.items():
        refuse_other_kinds(name, source, (Conversations,) if encode is None else (Preferences,))
        collected = Collected(template, seq_len, train_on, truncation)
        read = (encode or _encode_conversations)(source, collected)
        digest = xxhash.xxh3_128()
        kept, held = list[Example](), list[Example]()
        for example, group in track(read, f"conversations of {name} encoded", shown=shown):
            digest.update(xxhash.xxh3_128_digest(example.tokens.tobytes()) + example.trained.tobytes())
            share = int.from_bytes(group[:8], "little") / 2**64
            (held if share < holdout else kept).append(example)
        collected.refused.merge(source.refused)
        if not skip_bad:
            collected.refused.raise_if_any(REMEDY, good=len(kept) + len(held) + len(collected.left_out))
        collected.unused.merge(source.unused)
        notes += [f"{name}: {note}" for note in collected.notes()]
        if not kept:
            reasons = "\n".join(notes)
            found = len(held) + len(collected.refused) + len(collected.left_out)
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
class Collected:
    """How the conversations of one source are encoded, and which of them were not used unchanged."""

    template: ChatTemplate
    seq_len: int
    train_on: TrainOn
    truncation: Truncation
    refused: Refused = field(default_factory=Refused)
    left_out: Refused = field(default_factory=Refused)
    cut: Refused = field(default_factory=Refused)
    unused: Unused = field(default_factory=Unused)
    shortened: int = 0  # earlier answers in refinement prompts

    def fit(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples that fit, see `packing.fit`; count the others."""
        return fit(examples, self.seq_len, self.truncation, self.left_out, self.cut)

    def notes(self) -> list[str]:
        """Return what a person should know about what was not used."""
        counted = (("left out", self.refused), ("left out", self.left_out), ("cut", self.cut))
        notes = [f"{show_number_of(len(n), 'conversation')} {word}:\n{n.describe()}" for word, n in counted if n]
        if self.shortened:
            were = "earlier answer was" if self.shortened == 1 else "earlier answers were"
            fit_in = f"so that the answer that follows fits into seq_len ({self.seq_len:,} tokens)"
            notes.append(f"{self.shortened:,} {were} shortened, {fit_in}")
        return [*notes, self.unused.describe()] if self.unused else notes


def _encode_conversations(source: Conversations, collected: Collected) -> Iterator[Grouped]:
    """Encode conversations; equal ones have one hash."""
    remaining = iter(source.conversations(skip_bad=True))
    while chunk := list(islice(remaining, _BATCH)):
        examples = []
        found = collected.template.encode_batch([c.messages for c in chunk], collected.train_on, collected.unused)
        for conversation, encoded in zip(chunk, found, strict=True):
            if isinstance(encoded, BadRow):
                collected.refused.add(conversation.place, encoded)
            else:
                examples.append(Example(*encoded, conversation.place))
        for example in collected.fit(examples):
            yield example, xxhash.xxh3_128_digest(example.tokens.tobytes())


def open_pairs(sources: Mapping[str, Any], *, skip_bad: bool) -> tuple[list[Pair], list[str]]:
    """Read the pairs of every source; return them with notes for a person."""
    pairs: list[Pair] = []
    notes: list[str] = []
    for name, source in sources.items():
        refuse_other_kinds(name, source, (Preferences,))
        before = len(pairs)
        pairs += source.pairs(skip_bad=True)
        if not skip_bad:
            source.refused.raise_if_any(REMEDY, good=len(pairs) - before)
        if source.unused:
            notes.append(f"{name}: {source.unused.describe()}")
    return pairs, notes


_KINDS: dict[type, str] = {
    Source: "plain text (data=files, hub, shards, stdlib)",
    Conversations: "conversations (data=conversations, docstrings)",
    Preferences: "pairs (data=preferences, docstring_pairs)",
}


def refuse_other_kinds(name: str, source: Any, kinds: tuple[type, ...]) -> None:
    """Raise UserError for a source that is none of `kinds`, which are of Source, Conversations and Preferences."""
    if not isinstance(source, kinds):
        held = next((said for kind, said in _KINDS.items() if isinstance(source, kind)), type(source).__name__)
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        raise UserError(f"key data: source {name} holds {held.partition(' (')[0]}; this run takes {wanted}.")
