"""The tokenizer: byte-level BPE run by tiktoken, PanGu-alpha's by jieba, or any other by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from plmtune.errors import did_you_mean
from plmtune.io.atomic import write_atomically
from plmtune.io.provenance import num_cores
from plmtune.tokenizers import kept_ids, tokenizer_json_writer
from plmtune.tokenizers.bpe import Vocabulary
from plmtune.tokenizers.cuts import Cuts
from plmtune.tokenizers.jieba_sentencepiece import JiebaPieces
from plmtune.tokenizers.kept_ids import KeptIds
from plmtune.tokenizers.library import Library
from plmtune.tokenizers.ranks import TASK_CHARS, Ranks, complete_pattern

Ids = npt.NDArray[np.uint32]


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
        vocabulary: Vocabulary | Library | JiebaPieces,
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
        self._engine = Ranks(vocabulary) if isinstance(vocabulary, Vocabulary) else vocabulary
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

    def __repr__(self) -> str:
        return f"Tokenizer({self.num_tokens} tokens, {self.vocab_size} rows, {self.fingerprint[:8]})"

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Return the ids of a text, without bos or eos.

        Args:
            text: any text; half a surrogate pair becomes U+FFFD.
            specials: encode the text of special tokens as these tokens. Never use it for untrusted text.
        """
        ids: list[int] = self._engine.encode([text], specials=specials)[0].tolist()
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
        room = TASK_CHARS
        for index, text in enumerate(texts):
            for cut in self._engine.divide(text) if isinstance(self._engine, Ranks) and not specials else [text]:
                if room <= 0:
                    tasks.append([])
                    room = TASK_CHARS
                tasks[-1].append((index, cut))
                room -= len(cut)

        def encode(task: list[tuple[int, str]]) -> list[Ids]:
            return self._engine.encode([text for _, text in task], specials=specials)

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
        return not isinstance(self._engine, Ranks)

    def encode_parts(self, texts: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """Return the ids of whole texts, special tokens included, divided among the parts that they begin in.

        SentencePiece changes the beginning of a text, and added tokens may take the white space around them.
        """
        if isinstance(self._engine, Ranks):
            return [[np.array(self.encode(part, specials=True), np.uint32) for part in parts] for parts in texts]
        return self._engine.encode_parts(texts)

    def last_cut(self, text: str) -> int:
        """Return the last place where a text may be cut without changing its ids; 0 if none is certain.

        It is before a blank between a printable ASCII character and an ASCII letter, where every piece ends. Texts with
        a common beginning encode it once.
        """
        at = len(text) if isinstance(self._engine, Ranks) and self._engine.cuts_at_blanks else 0
        while (at := text.rfind(" ", 1, at)) > 0:
            if "!" <= text[at - 1] <= "~" and text[at + 1 : at + 2].isalpha() and text[at + 1].isascii():
                return at
        return 0

    @cached_property
    def cuts(self) -> Cuts:
        """Finds places where a text may be cut without changing its ids, whatever follows."""
        if not isinstance(self._engine, Ranks):
            return Cuts(None, "", (), (), None)
        held = self._engine.vocabulary
        late = [self._engine.normalize(text) for text in held.added if text in held.normalized]
        fixed = held.added.keys() - held.normalized
        return Cuts(held.pattern, complete_pattern(held.pattern), fixed, late, held.normalization)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, including special tokens; bytes that are no UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        # SentencePiece puts a space before a text.
        return text.removeprefix(" ") if not isinstance(self._engine, Ranks) and self._engine.adds_space else text

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
        if not isinstance(held, Vocabulary):
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
        if isinstance(self._engine, JiebaPieces):
            return self._engine.render()
        if isinstance(self._engine, Library):
            return tokenizer_json_writer.render_library(self._engine, self._firsts)
        return tokenizer_json_writer.render(self._engine.vocabulary, self._firsts)
