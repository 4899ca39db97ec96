"""The tokenizer: byte-level BPE run by tiktoken, or any other by the `tokenizers` library."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import regex
import tiktoken
import xxhash

from plmtune.errors import UserError, did_you_mean
from plmtune.io.atomic import write_atomically
from plmtune.io.provenance import num_cores
from plmtune.tokenizers import kept_ids, tokenizer_json_writer
from plmtune.tokenizers.bpe import (
    COMPLETE_PATTERNS,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    SINGLE_BYTES,
    Vocabulary,
    normalize,
)
from plmtune.tokenizers.cuts import Cuts
from plmtune.tokenizers.kept_ids import KeptIds
from plmtune.tokenizers.library import Library

Ids = npt.NDArray[np.uint32]

# Below this many characters a second thread costs more than it saves.
_TASK_CHARS = 1 << 17
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


class Tokenizer:
    """Text to ids and back; safe to use from several threads and to fork with.

    Attributes:
        vocab_size: rows of the embedding, padding included.
        num_tokens: ids from here on have no text.
        eos_id: ends a document.
        bos_id: the special token that begins a text, or None.
        adds_bos: whether each text begins with it, as in transformers. `with_bos` adds it, `encode` never does.
        first_ids: what `with_bos` adds: bos, and tokens that follow it in some tokenizers.
        end_ids: ids at which the model's answers end, from generation_config.json; eos_id is the first.
        specials: control tokens, id by text.
        token_bytes: number of bytes that each id decodes to, int32 [vocab_size]; 0 for specials and padding.
        kept: of a compressed tokenizer, its tokens' ids in the one it was compressed from; then in that one's, if
            it was compressed, too.
        fingerprint: xxh3-128 of everything that decides the ids.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | Library,
        *,
        eos: str = "<|endoftext|>",
        vocab_size: int | None = None,
        chat_template: str | None = None,
        bos: str | None = None,
        adds_bos: bool = False,
        ends: Sequence[int] = (),
        firsts: Sequence[str] = (),
        kept: Sequence[KeptIds] = (),
    ) -> None:
        """Build the tables.

        Args:
            vocab_size: rows of the embedding, if more than the tokens.
            chat_template: Jinja template of a conversation.
            ends: ids at which an answer ends, besides eos.
            firsts: the special tokens before a text, if there are several; the first is bos.
            kept: see the attribute; saved with the tokenizer.

        Raises:
            ValueError: if eos or bos is no special token, a token occurs twice, vocab_size is too small, or kept ids
                are not as many as tokens.
        """
        if eos not in vocabulary.specials:
            raise ValueError(f"eos {eos!r} is no special token.{did_you_mean(eos, vocabulary.specials)}")
        if bos not in vocabulary.specials and (bos is not None or adds_bos):
            raise ValueError(f"bos {bos!r} is no special token.{did_you_mean(bos or '', vocabulary.specials)}")
        self.vocabulary = vocabulary
        self.eos, self.eos_id = eos, vocabulary.specials[eos]
        self.bos, self.bos_id = bos, vocabulary.specials.get(bos) if bos is not None else None
        self.adds_bos = adds_bos
        self.first_ids = tuple(vocabulary.specials[text] for text in ((firsts or (bos,)) if adds_bos else ()) if text)
        self.end_ids = tuple(dict.fromkeys((self.eos_id, *ends)))
        self.specials = dict(vocabulary.specials)
        self.chat_template = chat_template
        self._library = vocabulary if isinstance(vocabulary, Library) else None
        pieces = dict(vocabulary.pieces)
        self.num_tokens = max(pieces) + 1
        self.vocab_size = self.num_tokens if vocab_size is None else vocab_size
        if self.vocab_size < self.num_tokens:
            at = next(identity for identity in sorted(pieces) if identity >= self.vocab_size)
            raise ValueError(
                f"vocab_size ({vocab_size}) is below the tokenizer's {self.num_tokens} tokens: token {at}, "
                f"{pieces[at].decode(errors='replace')!r:.60}, has no row in the model. Take the model's tokenizer, "
                "or remove what names the token"
            )
        self.kept = tuple(kept)
        for one in self.kept:
            if len(one.ids) != self.num_tokens:
                raise ValueError(f"{len(one.ids)} kept ids do not fit the tokenizer's {self.num_tokens} tokens")
        self._pieces = [pieces.get(identity, b"") for identity in range(self.vocab_size)]
        self.token_bytes: npt.NDArray[np.int32] = np.array([len(piece) for piece in self._pieces], dtype=np.int32)
        self.token_bytes[list(self.specials.values())] = 0
        if isinstance(vocabulary, Vocabulary):
            self._prepare(vocabulary)

    def _prepare(self, vocabulary: Vocabulary) -> None:
        """Make tiktoken's tables."""
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
                pat_str=_complete(vocabulary.pattern),
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
        self._cuts_at_blanks = vocabulary.pattern in COMPLETE_PATTERNS and not any(" " in text for text in fixed)
        self._always = self._fixed(vocabulary.added, vocabulary.normalized)
        self._always_and_specials = self._fixed(fixed, vocabulary.normalized)

    def __repr__(self) -> str:
        return f"Tokenizer({self.num_tokens} tokens, {self.vocab_size} rows, {self.fingerprint[:8]})"

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Return the ids of a text, without bos or eos.

        Args:
            text: any text; half a surrogate pair becomes U+FFFD.
            specials: encode the text of special tokens as these tokens. Never use it for untrusted text.
        """
        ids: list[int] = self._encode_all([text], specials)[0].tolist()
        return ids

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What stands before a text's first token: all that the tokenizer adds, else the eos of the text before."""
        return self.first_ids or (self.eos_id,)

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """Return the ids with exactly one bos before them, and what follows it, if the tokenizer adds it."""
        if len(ids) and ids[0] in self.first_ids[:1]:
            return list(ids)
        return [*self.first_ids, *ids]

    def encode_batch(self, texts: Sequence[str], *, specials: bool = False) -> list[Ids]:
        """Return the ids of each text, as `encode`, on all cores."""
        # Tasks of about equal length: several small texts, or a part of a large one.
        tasks: list[list[tuple[int, str]]] = [[]]
        room = _TASK_CHARS
        for index, text in enumerate(texts):
            for cut in [text] if specials else self._cuts(text):
                if room <= 0:
                    tasks.append([])
                    room = _TASK_CHARS
                tasks[-1].append((index, cut))
                room -= len(cut)

        def encode(task: list[tuple[int, str]]) -> list[Ids]:
            return self._encode_all([text for _, text in task], specials)

        if len(tasks) == 1:
            done = [encode(tasks[0])]
        else:
            # A new pool for each call, because threads do not survive a fork. Both engines release the GIL.
            with ThreadPoolExecutor(min(len(tasks), num_cores())) as pool:
                done = list(pool.map(encode, tasks))
        parts: list[list[Ids]] = [[] for _ in texts]
        for task, results in zip(tasks, done, strict=True):
            for (index, _), ids in zip(task, results, strict=True):
                parts[index].append(ids)
        return [held[0] if len(held) == 1 else np.concatenate(held) for held in parts]

    @property
    def depends_on_place(self) -> bool:
        """Whether a part of a text may have other ids alone than in the whole, so that parts need `encode_parts`."""
        return self._library is not None

    def encode_parts(self, texts: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """Return the ids of whole texts, special tokens included, divided among the parts that they begin in.

        SentencePiece changes the beginning of a text, and added tokens may take the white space around them.
        """
        if self._library is None:
            return [[np.array(self.encode(part, specials=True), np.uint32) for part in parts] for parts in texts]
        return self._library.encode_parts(texts)

    def last_cut(self, text: str) -> int:
        """Return the last place where a text may be cut without changing its ids; 0 if none is certain.

        It is before a blank between a printable ASCII character and an ASCII letter, where every piece ends. Texts with
        a common beginning encode it once.
        """
        at = len(text) if self._library is None and self._cuts_at_blanks else 0
        while (at := text.rfind(" ", 1, at)) > 0:
            if "!" <= text[at - 1] <= "~" and text[at + 1 : at + 2].isalpha() and text[at + 1].isascii():
                return at
        return 0

    @cached_property
    def cuts(self) -> Cuts:
        """Finds places where a text may be cut without changing its ids, whatever follows."""
        held = self.vocabulary
        if isinstance(held, Library):
            return Cuts(None, "", (), (), None)
        late = [self._normalize(text) for text in held.added if text in held.normalized]
        fixed = held.added.keys() - held.normalized
        return Cuts(held.pattern, _complete(held.pattern), fixed, late, held.normalization)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, including special tokens; bytes that are no UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        # SentencePiece puts a space before a text.
        return text.removeprefix(" ") if self._library is not None and self._library.adds_space else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; padding rows have none.

        Raises:
            ValueError: for an id outside of [0, vocab_size).
        """
        ids = list(ids)
        wrong = next((identity for identity in ids if not 0 <= identity < self.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"id {wrong} is outside of the tokenizer's {self.vocab_size} rows")
        return b"".join([self._pieces[identity] for identity in ids])

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, of a compressed one, kept_ids.json.

        The first two are for `tokenizers` and transformers.
        """
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "pad_token": self.eos,
            "clean_up_tokenization_spaces": False,
            "padded_vocab_size": self.vocab_size,
        }
        if self.bos is not None:
            config |= {"bos_token": self.bos} | ({"add_bos_token": True} if self.adds_bos else {})
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        files = {
            "tokenizer.json": self.as_json,
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        }
        if len(self.end_ids) > 1:
            files["generation_config.json"] = json.dumps({"eos_token_id": self.end_ids}, indent=2) + "\n"
        for name, text in files.items():
            write_atomically(directory / name, text)
        kept_ids.save(directory, self.fingerprint if self.kept else "", self.kept)

    @cached_property
    def fingerprint(self) -> str:
        """The xxh3-128 of everything that decides the ids, as hex."""
        held = self.vocabulary
        digest = xxhash.xxh3_128()
        if isinstance(held, Library):
            digest.update(held.digest + repr((self.eos_id, self.first_ids)).encode())
            return digest.hexdigest()
        added = sorted(held.added.items()), sorted(held.specials.items())
        digest.update(repr((held.pattern, held.normalization, added, self.eos_id)).encode())
        digest.update(np.array([len(token) for token in held.tokens], dtype="<u4").tobytes())
        digest.update(np.array(held.ids, dtype="<u4").tobytes())
        digest.update(b"".join(held.tokens))
        if held.normalized:
            digest.update(repr(sorted(held.normalized)).encode())
        if self.adds_bos:  # the token sequences differ
            digest.update(f"bos {', '.join(map(str, self.first_ids))}".encode())
        return digest.hexdigest()

    @property
    def _firsts(self) -> dict[str, int]:
        return {
            text: identity for identity in self.first_ids for text, held in self.specials.items() if held == identity
        }

    @cached_property
    def as_json(self) -> str:
        """The tokenizer.json."""
        # Cached: a run saves the same tokenizer with every checkpoint.
        if self._library is not None:
            return tokenizer_json_writer.render_library(self._library, self._firsts)
        assert isinstance(self.vocabulary, Vocabulary)
        return tokenizer_json_writer.render(self.vocabulary, self._firsts)

    def _cuts(self, text: str) -> Iterator[str]:
        if (
            len(text) <= 2 * _TASK_CHARS
            or self._library
            or self.vocabulary.pattern not in _CUTTABLE
            or self.vocabulary.added
        ):
            yield text
            return
        start = 0
        while len(text) - start > 2 * _TASK_CHARS and (found := _CUT.search(text, start + _TASK_CHARS)):
            yield text[start : found.end()]
            start = found.end()
        yield text[start:]

    def _fixed(self, tokens: dict[str, int], late: frozenset[str]) -> list[_Pass]:
        """Return the passes that find added tokens: first in the text, then in the rest of it, normalized."""
        passes = [_Pass(False, {text: identity for text, identity in tokens.items() if text not in late})]
        passes += [_Pass(True, {self._normalize(text): tokens[text] for text in tokens if text in late})]
        return [sought for sought in passes if sought.pattern is not None]

    def _encode_all(self, texts: Sequence[str], specials: bool) -> list[Ids]:
        if self._library is not None:
            return self._library.encode(texts, specials=specials)
        fixed = self._always_and_specials if specials else self._always
        return [self._encode(text, fixed) for text in texts]

    def _encode(self, text: str, fixed: list[_Pass]) -> Ids:
        if not fixed:
            return self._encode_plain(text)
        sought, *later = fixed
        if sought.normalized:
            text = self._normalize(text)
        assert sought.pattern is not None
        parts, start = [], 0
        for found in sought.pattern.finditer(text):
            parts.append(self._encode(text[start : found.start()], later))
            parts.append(np.array([sought.tokens[found.group()]], dtype=np.uint32))
            start = found.end()
        parts.append(self._encode(text[start:], later))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _normalize(self, text: str) -> str:
        return normalize(self.vocabulary.normalization, text)

    def _encode_plain(self, text: str) -> Ids:
        text = self._normalize(text)
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


def _complete(pattern: str) -> str:
    # tiktoken drops text that the pattern does not match; `tokenizers` makes a piece of it.
    return pattern if pattern in COMPLETE_PATTERNS else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


class _Pass:
    """One pass over a text, normalized or not, that finds added tokens."""

    def __init__(self, normalized: bool, tokens: dict[str, int]) -> None:
        self.normalized, self.tokens = normalized, tokens
        # Longest first, as in `tokenizers`.
        longest = sorted(tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest))) if tokens else None
