"""What a fine-tuning run learns from: conversations and pairs, read, encoded, held out and packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import xxhash

from plmtune.data.chat_template import ChatTemplate
from plmtune.data.conversations import Conversations
from plmtune.data.packing import Example, PackedRows, fit
from plmtune.data.preferences import Pair, Preferences
from plmtune.data.refinement import Refinement
from plmtune.data.rows import Message, Refused
from plmtune.data.sources import BadRow
from plmtune.data.ticker import ticking
from plmtune.errors import UserError

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
        holdout: share of the conversations kept for validation, chosen by their ids: equal ones stay together.
        refinement: make of each pair the two conversations of ARIES's first stage (arXiv 2502.05605): the chosen
            answer to the prompt, and the chosen answer to the prompt with the rejected one to better.
        shown: say now and then how far it is.

    Raises:
        UserError: for rows that cannot be used, or where nothing is left to train on.
    """
    train, held_out, fingerprints, notes = {}, {}, {}, []
    for name, source in sources.items():
        refused, examples, kept = Refused(), list[Example](), list[Example]()
        read = ticking(_conversations(name, source, refinement), f"conversations of {name} encoded", shown=shown)
        for chunk in _chunks(read):
            for (_, place), encoded in zip(chunk, template.encode_batch([m for m, _ in chunk], train_on), strict=True):
                if isinstance(encoded, BadRow):
                    refused.add(place, encoded)
                else:
                    examples.append(Example(*encoded, place))
        _merge(refused, source.refused)
        if not skip_bad:
            refused.raise_if_any(_REMEDY)
        fitting, left_out, cut = fit(examples, seq_len, too_long)
        for word, counted in (("left out", refused), ("left out", left_out), ("cut", cut)):
            if counted:
                notes.append(f"{name}: {len(counted):,} conversations {word}:\n{counted.describe()}")
        digest = xxhash.xxh3_128()
        held: list[Example] = []
        for example in fitting:
            key = xxhash.xxh3_128_digest(example.tokens.tobytes())
            digest.update(key + example.trained.tobytes())
            share = int.from_bytes(key[:8], "little") / 2**64
            (held if share < holdout else kept).append(example)
        if not kept:
            reasons = "\n".join(notes)
            raise UserError(
                f"source {name}: none of its {len(examples) + len(refused):,} conversations can be trained on."
                + (f"\n{reasons}" if reasons else " It is empty.")
            )
        fingerprints[name] = digest.hexdigest()
        train[name] = PackedRows(kept, seq_len, seed)
        if held:
            held_out[name] = PackedRows(held, seq_len, seed)
    return Examples(train, held_out, fingerprints, notes)


Placed = tuple[tuple[Message, ...], str]


def _conversations(name: str, source: Any, refinement: Refinement | None) -> Iterator[Placed]:
    """The messages of each conversation, with their place."""
    if isinstance(source, Conversations) and refinement is None:
        for held in source.conversations(skip_bad=True):
            yield held.messages, held.place
    elif isinstance(source, Preferences) and refinement is not None:
        for pair in source.pairs(skip_bad=True):
            if pair.chosen is None or pair.rejected is None:
                source.refused.add(pair.place, "has one answer only, and refining takes two")
                continue
            yield (*pair.prompt, Message("assistant", pair.chosen)), pair.place
            asked = refinement.fill(pair.prompt, pair.rejected)
            yield (*asked, Message("assistant", pair.chosen)), pair.place
    else:
        wanted = "conversations (data=conversations, docstrings)"
        if refinement is not None:
            wanted = "pairs, as loss=sft_refine makes its rows of them (data=preferences, docstring_pairs)"
        raise UserError(f"source {name} holds {kind_of(source)}; this run takes {wanted}.")


def open_pairs(sources: Mapping[str, Any], *, skip_bad: bool) -> list[Pair]:
    """Read the pairs of every source.

    Raises:
        UserError: for rows that cannot be used, or a source that holds no pairs.
    """
    pairs: list[Pair] = []
    for name, source in sources.items():
        if not isinstance(source, Preferences):
            raise UserError(
                f"source {name} holds {kind_of(source)}; this run takes pairs (data=preferences, docstring_pairs)."
            )
        pairs += source.pairs(skip_bad=True)
        if not skip_bad:
            source.refused.raise_if_any(_REMEDY)
    return pairs


def kind_of(source: Any) -> str:
    """What a source holds, in a word."""
    kinds = {Conversations: "conversations", Preferences: "pairs"}
    return next((word for kind, word in kinds.items() if isinstance(source, kind)), "plain text")


def _chunks(placed: Iterator[Placed]) -> Iterator[list[Placed]]:
    chunk: list[Placed] = []
    for one in placed:
        chunk.append(one)
        if len(chunk) == _BATCH:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _merge(into: Refused, other: Refused) -> None:
    for reason, count in other.counts.items():
        into.counts[reason] = into.counts.get(reason, 0) + count
        into.first.setdefault(reason, other.first[reason])
