"""Token shards as training rows: consecutive windows of seq_len tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from plmtune.data.batches import IGNORE, Row
from plmtune.data.shards import Shards, Split
from plmtune.errors import UserError


class Windows:
    """The windows of one split; a window at the end of the text is padded with `eos_id`, which is not counted.

    Args:
        split: of `shards`.
        document_mask: keep attention and counted targets inside documents.
        whole: leave the last window out if it is not full.
    """

    def __init__(self, shards: Shards, split: Split, seq_len: int, *, document_mask: bool, whole: bool) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len ({seq_len}) must be at least 1")
        self.seq_len = seq_len
        self.num_tokens = split.num_tokens
        self.num_rows = split.num_windows(seq_len) if whole else -(-max(0, split.num_tokens - 1) // seq_len)
        self._directory = shards.directory
        self._split = split
        self._eos_id = shards.eos_id
        self._document_mask = document_mask

    def row(self, index: int) -> Row:
        """Return window `index`, with the first token of the next as its last target.

        With a document mask an end-of-document token belongs to the document that it ends. Positions restart after
        it, and its target, the first token of another document, is not counted. The target after a document whose
        rest is in the other split is never counted.
        """
        first = index * self.seq_len
        ids = self._split.read(first, first + self.seq_len + 1)
        tokens, targets = ids[:-1], ids[1:]
        if missing := self.seq_len - len(tokens):
            tokens = np.append(tokens, np.full(missing, self._eos_id))
            targets = np.append(targets, np.full(missing, IGNORE))
        breaks = self._split.breaks_in(first, first + self.seq_len) - first - 1
        if breaks.size:
            targets = targets.copy()  # tokens are a view of the same ids
            targets[breaks] = IGNORE
        if not self._document_mask:
            return Row(tokens, targets)
        ends = tokens == self._eos_id
        ends[breaks] = True
        bounds = np.unique(np.concatenate(([0], np.flatnonzero(ends) + 1, [self.seq_len])))
        return Row(tokens, np.where(ends, IGNORE, targets), tuple(np.diff(bounds).tolist()))

    def locate(self, index: int) -> str:
        """Return the files of window `index` and its tokens in each, counted from 0; the last is only a target."""
        return ", and ".join(
            f"{self._directory / file}, tokens {first:,} to {last:,}"
            for file, first, last in self._split.locate(index, self.seq_len)
        )

    def describe(self) -> str:
        return f"{self.num_tokens:,} tokens"


def open_windows(
    shards: Mapping[str, Shards], seq_len: int, *, document_mask: bool = False
) -> tuple[dict[str, Windows], dict[str, Windows]]:
    """Return the training and the held-out windows of each source.

    In the training text the tokens after the last whole window are no targets. In the held-out text every token but
    the first of each source is a target once.
    """
    if len({(source.manifest.tokenizer, source.eos_id) for source in shards.values()}) > 1:
        raise ValueError(f"the sources {', '.join(sorted(shards))} come from different tokenizers")
    train, held_out = {}, {}
    for name, source in shards.items():
        train[name] = Windows(source, source.train, seq_len, document_mask=document_mask, whole=True)
        held_out[name] = Windows(source, source.validation, seq_len, document_mask=document_mask, whole=False)
    for name, windows in train.items():
        if windows.num_rows < 1:
            raise UserError(
                f"Source {name} ({shards[name].directory}) has {windows.num_tokens:,} training tokens, "
                f"too few for seq_len={seq_len} and its last target. Give more text or a shorter seq_len"
            )
    return train, held_out
