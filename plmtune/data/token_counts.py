"""How often each token occurs in data: text, rows with text, conversations, prepared shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from plmtune.data import row_files
from plmtune.data.conversations import ConversationRows, conversations, detect
from plmtune.data.prepare import groups
from plmtune.data.rows import Refused, read_rows
from plmtune.data.shards import Shards, Split
from plmtune.data.sources import Source
from plmtune.data.text_files import files
from plmtune.errors import UserError
from plmtune.io.terminal import Progress
from plmtune.tokenizers.chat_template import ChatTemplate, find_template
from plmtune.tokenizers.message import BadRow
from plmtune.tokenizers.tokenizer import Ids, Tokenizer
from plmtune.units import show_number_of

_CONVERSATIONS = 256  # rendered and encoded at once
_TOKENS = 1 << 22  # of shards, counted at once
_REMEDY = "Correct them, or leave such rows out: --skip-bad"


@dataclass
class TokenCounts:
    """The result of a count.

    Attributes:
        counts: of each id, int64 [vocab_size].
        notes: for a person, a sentence each.
    """

    counts: NDArray[np.int64]
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())


@dataclass
class Data:
    """What `find_data` found."""

    names: Sequence[str]
    tokenizer: Tokenizer
    text: Source | None
    conversations: list[ConversationRows]
    shards: list[Shards]
    template: ChatTemplate | None


def find_data(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    format: Literal["auto", "text", "jsonl", "csv", "parquet"] = "auto",
    separator: str | None = None,
    encoding: str = "utf-8",
) -> Data:
    """Find what is counted, without reading more than the first row of each file.

    A file of rows without `text_key` is one of conversations, which the tokenizer's chat template renders.

    Args:
        names: files, folders, globs, and directories of shards that were prepared with this tokenizer.

    Raises:
        UserError: if something is missing, empty or of another kind.
        ValueError: for an impossible setting.
    """
    if not names:
        raise UserError("Name the data to count: text, rows with text or conversations, or prepared shards.")
    folders = [name for name in names if (Path(name) / "manifest.json").is_file()]
    others = tuple(name for name in names if name not in folders)
    shards = [Shards.open(Path(name), tokenizer_fingerprint=tokenizer.fingerprint) for name in folders]
    read: dict[str, Any] = {"format": format, "text_key": text_key, "separator": separator, "encoding": encoding}
    row_files.check_encoding(encoding)
    texts, chats = list[str](), list[str]()
    for path in row_files.find_files(others)[0]:
        is_chat = format == "auto" and row_files.kind_of(path) not in ("text", None)
        (chats if is_chat and _holds_conversations(path, text_key, encoding) else texts).append(str(path))
    return Data(
        names,
        tokenizer,
        files(tuple(texts), **read) if texts else None,
        [conversations((path,), encoding=encoding) for path in chats],  # type: ignore[misc]
        shards,
        find_template(None, tokenizer) if chats else None,
    )


def _holds_conversations(path: Path, text_key: str, encoding: str) -> bool:
    """Whether the first row of a file is a conversation and no text."""
    place, row = next(((place, row) for place, row in read_rows([path], encoding) if isinstance(row, dict)), ("", None))
    if row is None or text_key in row:
        return False  # the reader of text says what is wrong
    try:
        detect(row)
    except BadRow as error:
        raise UserError(f"{place} has no key {text_key} (--text-key), and as a conversation it {error}.") from error
    return True


def count_tokens(data: Data, *, skip_bad: bool = False) -> TokenCounts:
    """Count the tokens of data, a part of it in memory at a time.

    Args:
        skip_bad: leave out and count rows that cannot be read.

    Raises:
        UserError: for what cannot be read, and for data without a token.
    """
    total = TokenCounts(np.zeros(data.tokenizer.vocab_size, np.int64))
    refused, characters = Refused(), 0
    with Progress() as line:
        for shards in data.shards:
            for split in (shards.train, shards.validation):
                for ids in _parts(split):
                    total.counts += np.bincount(ids, minlength=total.counts.size)
                    line.update(f"{total.tokens / 1e6:.1f} million tokens counted", f"{shards.directory}")
        for read, found in _encoded(data, skip_bad, refused):
            ids = np.concatenate([np.empty(0, np.uint32), *found])
            total.counts += np.bincount(ids, minlength=total.counts.size)
            characters += read
            line.update(
                f"{total.tokens / 1e6:.1f} million tokens counted", f"{characters / 1e6:.1f} million characters"
            )
    for source in data.conversations:
        refused.merge(source.refused)
    if not skip_bad:
        refused.raise_if_any(_REMEDY)
    if not total.tokens:
        raise UserError(f"{', '.join(data.names)}: there is no text to count.")
    if skipped := len(refused) + (data.text.skipped if data.text else 0):
        total.notes.append(f"{show_number_of(skipped, 'bad row')} left out")
    total.notes += [s.unused.describe() for s in (data.text, *data.conversations) if s is not None and s.unused]
    return total


def _parts(split: Split) -> Iterator[NDArray[np.int64]]:
    for start in range(0, split.num_tokens, _TOKENS):
        yield split.read(start, start + _TOKENS)


def _encoded(data: Data, skip_bad: bool, refused: Refused) -> Iterator[tuple[int, list[Ids]]]:
    """Characters and ids of text and rendered conversations, a part at a time; `refused` gets what does not render."""
    if data.text is not None:
        pieces = chain.from_iterable(data.text.pieces(skip_bad))
        # Documents are cut where the tokenizer cuts, so that the ids are those of whole documents.
        for group in groups((("train", *piece) for piece in pieces), data.tokenizer):
            texts = [piece.text for piece in group]
            yield sum(map(len, texts)), data.tokenizer.encode_batch(texts)
    for source in data.conversations:
        assert data.template is not None
        read = iter(source.conversations(skip_bad=True))
        while chunk := list(islice(read, _CONVERSATIONS)):
            texts = []
            for held in chunk:
                try:
                    texts.append(data.template.render(held.messages))
                except BadRow as error:
                    refused.add(held.place, error)
            yield sum(map(len, texts)), data.tokenizer.encode_batch(texts, specials=True)
