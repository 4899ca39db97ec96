"""The first engine: byte-level BPE by ranks, run by tiktoken."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import regex
import tiktoken

from plmtune.errors import UserError
from plmtune.tokenizers.bpe import (
    COMPLETE_PATTERNS,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    SINGLE_BYTES,
    Vocabulary,
    normalize,
)

Ids = npt.NDArray[np.uint32]

# Below this many characters a second thread costs more than it saves.
TASK_CHARS = 1 << 17
# tiktoken requires a special token; this one is never allowed in a text, so it never applies.
_NO_SPECIAL = "\x00plmtune\x00"
# A document may be cut between a newline and an ASCII letter if the pattern never looks across: in these patterns white
# space with a newline in it ends a piece at its last newline.
_CUT = re.compile(r"\n(?=[A-Za-z])")
_CUTTABLE = frozenset({QWEN2_PATTERN, LLAMA3_PATTERN})
# CPU time for a pattern that is not known to be linear: far more than any needs without exponential backtracking.
_PATTERN_SECONDS = 1.0
_PATTERN_CHARS_A_SECOND = 50_000
_MAX_PIECES = 1 << 16  # whose ids are cached


class Ranks:
    """The ids that tiktoken gives, and where it lacks something, as the `tokenizers` library.

    Attributes:
        cuts_at_blanks: every piece ends before a blank between two printable characters, see `Tokenizer.last_cut`.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Make the tables.

        Raises:
            ValueError: if the pattern is no regular expression.
        """
        self.vocabulary = vocabulary
        # Bytes without a token get ranks past all others, because tiktoken needs them; their ids are dropped later.
        num_ranks = len(vocabulary.tokens)
        ranks = {token: rank for rank, token in enumerate(vocabulary.tokens)}
        lacking = [byte for byte in SINGLE_BYTES if byte not in ranks]
        ranks |= {byte: num_ranks + index for index, byte in enumerate(lacking)}
        self._lacking = b"".join(lacking)
        self._num_ranks = num_ranks
        ids = np.array(vocabulary.ids, dtype=np.uint32)
        self._ids = None if np.array_equal(ids, np.arange(num_ranks)) else ids
        try:
            self._bpe = tiktoken.Encoding(
                "plmtune",
                pat_str=complete_pattern(vocabulary.pattern),
                mergeable_ranks=ranks,
                special_tokens={_NO_SPECIAL: len(ranks)},
            )
        except ValueError as error:
            raise ValueError(f"the pattern {vocabulary.pattern!r} is no regular expression ({error})") from error
        # Other patterns may take exponential time, in which tiktoken cannot be interrupted.
        self._is_linear = vocabulary.pattern in COMPLETE_PATTERNS
        self._piece_ids: dict[str, list[int]] = {}
        self._pattern_seconds = _PATTERN_SECONDS
        fixed = vocabulary.added | vocabulary.specials
        self.cuts_at_blanks = vocabulary.pattern in COMPLETE_PATTERNS and not any(" " in text for text in fixed)
        self._always = self._fixed(vocabulary.added, vocabulary.normalized)
        self._always_and_specials = self._fixed(fixed, vocabulary.normalized)

    def encode(self, texts: Sequence[str], *, specials: bool) -> list[Ids]:
        """Return the ids of each text."""
        fixed = self._always_and_specials if specials else self._always
        return [self._encode(text, fixed) for text in texts]

    def divide(self, text: str) -> Iterator[str]:
        """Yield parts of a long text that have the same ids alone."""
        if len(text) <= 2 * TASK_CHARS or self.vocabulary.pattern not in _CUTTABLE or self.vocabulary.added:
            yield text
            return
        start = 0
        while len(text) - start > 2 * TASK_CHARS and (found := _CUT.search(text, start + TASK_CHARS)):
            yield text[start : found.end()]
            start = found.end()
        yield text[start:]

    def _fixed(self, tokens: dict[str, int], late: frozenset[str]) -> list[_Pass]:
        """Return the passes that find added tokens: first in the text, then in the rest of it, normalized."""
        passes = [_Pass(False, {text: identity for text, identity in tokens.items() if text not in late})]
        passes += [_Pass(True, {self.normalize(text): tokens[text] for text in tokens if text in late})]
        return [sought for sought in passes if sought.pattern is not None]

    def _encode(self, text: str, fixed: list[_Pass]) -> Ids:
        if not fixed:
            return self._encode_plain(text)
        sought, *later = fixed
        if sought.normalized:
            text = self.normalize(text)
        assert sought.pattern is not None
        parts, start = [], 0
        for found in sought.pattern.finditer(text):
            parts.append(self._encode(text[start : found.start()], later))
            parts.append(np.array([sought.tokens[found.group()]], dtype=np.uint32))
            start = found.end()
        parts.append(self._encode(text[start:], later))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def normalize(self, text: str) -> str:
        """Return a text as its pieces are found in it."""
        return normalize(self.vocabulary.normalization, text)

    def _encode_plain(self, text: str) -> Ids:
        text = self.normalize(text)
        try:
            whole = self._is_linear
            ranks = self._bpe.encode_to_numpy(text, disallowed_special=()) if whole else self._encode_by_piece(text)
        except UnicodeEncodeError:
            return self._encode_plain(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:
            # The pattern's look-ahead ran out of stack, for example in hundreds of thousands of spaces.
            ranks = self._encode_by_piece(text)
        if whole and self._lacking and ranks.size and ranks.max() >= self._num_ranks:
            # `tokenizers` drops such bytes before it merges, so that their neighbours may be merged.
            ranks = self._encode_by_piece(text)
        return ranks if self._ids is None else self._ids[ranks]

    def _encode_by_piece(self, text: str) -> Ids:
        """Encode piece by piece: slow, exact for every text, and with a time limit for the pattern."""
        ranks: list[int] = []
        known = self._piece_ids
        for piece in self._pieces_of(text):
            found = known.get(piece)
            if found is None:
                data = piece.encode().translate(None, self._lacking)
                found = self._bpe._encode_single_piece(data) if data else []
                if len(known) < _MAX_PIECES:
                    known[piece] = found
            ranks += found
        return np.array(ranks, dtype=np.uint32)

    def _pieces_of(self, text: str) -> Iterator[str]:
        # A pattern that is slow on each of many short texts is stopped, too: the time that one leaves is for the next.
        room = len(text) / _PATTERN_CHARS_A_SECOND
        seconds = min(self._pattern_seconds, _PATTERN_SECONDS) + room
        pattern, limit = _compiled(self.vocabulary.pattern), seconds
        begun = time.thread_time()
        while True:
            try:
                spans = [found.span() for found in pattern.finditer(text, timeout=limit)]
                break
            except TimeoutError as error:
                limit *= 4  # the time of all threads counts for `timeout`
                if time.thread_time() - begun > seconds / 2:
                    raise UserError(
                        f"{self.vocabulary.where}, key pre_tokenizer: the pattern {self.vocabulary.pattern!r:.80} does "
                        f"not come to an end in {seconds:.1f} s of CPU time on a text of {len(text):,} characters. Use "
                        "a tokenizer with a simpler one."
                    ) from error
        self._pattern_seconds = seconds - (time.thread_time() - begun)
        at = 0
        for begin, end in [*spans, (len(text), len(text))]:
            if begin > at:  # text that the pattern does not match is a piece
                yield text[at:begin]
            if end > begin:
                yield text[begin:end]
            at = max(at, end)


@cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def complete_pattern(pattern: str) -> str:
    """A pattern that matches all of a text."""
    # tiktoken drops text that the pattern does not match; `tokenizers` makes a piece of it.
    return pattern if pattern in COMPLETE_PATTERNS else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


class _Pass:
    """One pass over a text, normalized or not, that finds added tokens."""

    def __init__(self, normalized: bool, tokens: dict[str, int]) -> None:
        self.normalized, self.tokens = normalized, tokens
        # Longest first, as in `tokenizers`.
        longest = sorted(tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest))) if tokens else None
