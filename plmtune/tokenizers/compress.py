"""Compact tokenizers (PanGu-pi Pro, arXiv 2402.02791): the most frequent tokens of a larger one, closed under merges.

Tokens are pruned, not trained anew. All bytes, special and added tokens stay, and with each token the two parts that
its last merge joins. A kept token's own text is then joined by the same merges as before, because every merge on the
way is kept and no other one is new; any text is joined as far as the kept merges reach, at worst to its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plmtune.errors import UserError
from plmtune.tokenizers.jieba_sentencepiece import JiebaPieces
from plmtune.tokenizers.kept_ids import KeptIds
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import engine
from plmtune.tokenizers.tokenizer_json import NEVER_IN_UTF8, byte_chars

_MULTIPLE = 64  # of sizes that a rule chooses, for matrix products


@dataclass(frozen=True)
class Order:
    """The tokens of a tokenizer in the order in which a smaller vocabulary takes them.

    Every beginning of at least `least` tokens is closed under merges.

    Attributes:
        ids: those that always stay, then the most frequent ones, each behind its parts.
        counts: of each of the ids in the text, int64.
        least: how many always stay.
    """

    ids: Sequence[int]
    counts: NDArray[np.int64]
    least: int

    @cached_property
    def coverage(self) -> NDArray[np.float64]:
        """The share of the counted tokens that are among the first 0, 1, ... of the ids."""
        return np.concatenate([[0.0], np.cumsum(self.counts) / max(1, self.counts.sum())])

    def size_of_coverage(self, coverage: float) -> int:
        """The smallest size, rounded up to a multiple of 64, whose coverage is at least this one."""
        reached = np.flatnonzero(self.coverage >= coverage - 1e-12)
        size = max(self.least, int(reached[0]))
        return -(-size // _MULTIPLE) * _MULTIPLE

    def size_of_share(self, share: float, row: int, others: int) -> int:
        """The largest size, rounded down to a multiple of 64, whose rows are at most this share of a model.

        Args:
            share: at least that of the tokens that always stay.
            row: parameters of a token in the embedding and the head.
            others: parameters of all else.
        """
        size = int(share * others / (row * (1 - share)) + 1e-9)
        return max(self.least, size // _MULTIPLE * _MULTIPLE)


def embedding_share(size: Any, row: int, others: int) -> Any:
    """The share that embedding and head have of a model's parameters, for a size or an array of sizes."""
    return size * row / (size * row + others)


class Compressor:
    """Makes smaller tokenizers of one.

    Attributes:
        always: ids that always stay: special and added tokens, the unknown token, all bytes, or without byte fallback
            all single characters, and what these are joined from.
        num_bytes: of them, tokens of single bytes.
        lacking_bytes: bytes of UTF-8 that the tokenizer has no token for, so that text with them is lost before and
            after.
    """

    def __init__(self, tokenizer: Tokenizer, also: Iterable[int] = ()) -> None:
        """Read the tokenizer.

        Args:
            also: further ids that always stay, such as those that a checkpoint's config.json names.

        Raises:
            UserError: for a tokenizer of jieba's words.
        """
        if isinstance(tokenizer.vocabulary, JiebaPieces):
            raise UserError(
                f"{tokenizer.vocabulary.where}: compress does not make smaller tokenizers of PanGu-alpha's, whose "
                "pieces are SentencePiece's. Train a SentencePiece model with fewer pieces instead."
            )
        self.tokenizer = tokenizer
        data = json.loads(tokenizer.as_json)
        self._data = data | {"post_processor": None}
        self._model = data["model"]
        self._is_unigram = isinstance(self._model["vocab"], list)
        listed = self._model["vocab"]
        self._vocab: dict[str, int] = {e[0]: i for i, e in enumerate(listed)} if self._is_unigram else listed
        self._text = {identity: token for token, identity in self._vocab.items()}
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in self._model.get("merges", []))
        self._merges: list[tuple[str, str]] = [(left, right) for left, right in pairs]
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        self._parents: dict[int, tuple[bool, tuple[int, ...]]] = {}
        self._added = sorted((tokenizer.vocabulary.specials | tokenizer.vocabulary.added).values())
        single, self.lacking_bytes = self._bytes()
        self.num_bytes = len(single)
        named = {tokenizer.eos_id, *tokenizer.first_ids, *tokenizer.end_ids, *also}
        # What the decoder replaces, "▁" for a space, would stay as it is if it came from its bytes.
        written = [self._vocab[char] for char in sorted(_replaced(self._data)) if char in self._vocab]
        always = [*self._added, *self._unknown(), *named, *single, *written, *(() if single else self._characters())]
        self._known = self._text.keys() | set(self._added)
        self.always = self._closed([identity for identity in always if identity in self._known], whole=False)

    def describe(self) -> str:
        """Say what the tokens are that always stay."""
        parts = {"bytes": self.num_bytes, "special and added tokens": len(set(self._added))}
        others = len(self.always) - sum(parts.values())
        parts["that config files name or characters"] = others
        return ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)

    def order(self, counts: NDArray[np.int64], size: int = 0) -> Order:
        """Order the tokens by their counts.

        Args:
            counts: of each id.
            size: tokens that are needed: those without a count follow, the first ids first. Without it only tokens
                that were counted are ordered.
        """
        counted = [int(i) for i in np.lexsort((np.arange(len(counts)), -counts)) if counts[i] and int(i) in self._known]
        ids = self._closed(counted, self.always)
        if len(ids) < size:
            rest = (identity for identity in sorted(self._known) if self._parts(identity) is not None)
            ids = self._closed(rest, ids, most=size)
        return Order(ids, counts[ids].astype(np.int64), len(self.always))

    def compress(self, kept: Collection[int]) -> Tokenizer:
        """Return the tokenizer of the first ids of an `Order`, which get new ids in the order of the old ones."""
        chosen = set(kept)
        old = [*sorted(i for i in chosen if i in self._text), *sorted(i for i in chosen if i not in self._text)]
        new = {identity: at for at, identity in enumerate(old)}
        made = self.tokenizer
        vocabulary = engine(self._pruned(new), f"the compressed tokenizer of {made.vocabulary.where}")
        texts = {identity: text for text, identity in made.specials.items()}
        return Tokenizer(
            vocabulary,
            eos=made.eos,
            chat_template=made.chat_template,
            bos=made.bos,
            adds_bos=made.adds_bos,
            ends=[new[identity] for identity in made.end_ids if identity in new],
            firsts=[texts[identity] for identity in made.first_ids],
            kept=[
                KeptIds(made.fingerprint, tuple(old)),
                *(KeptIds(one.original, tuple(one.ids[identity] for identity in old)) for one in made.kept),
            ],
        )

    def _pruned(self, new: dict[int, int]) -> dict[str, Any]:
        """The tokenizer.json of the tokens that have new ids."""
        model = dict(self._model)
        if self._is_unigram:
            model["vocab"] = [entry for at, entry in enumerate(self._model["vocab"]) if at in new]
            model["unk_id"] = new.get(self._model.get("unk_id"))
        else:
            model["vocab"] = {token: new[i] for token, i in self._vocab.items() if i in new}
            held = model["vocab"]
            model["merges"] = [[a, b] for a, b in self._merges if a in held and b in held and a + b in held]
        added = [entry | {"id": new[entry["id"]]} for entry in self._data.get("added_tokens") or []]
        return self._data | {"model": model, "added_tokens": added}

    def _closed(
        self, ids: Iterable[int], before: Sequence[int] = (), *, whole: bool = True, most: int | None = None
    ) -> list[int]:
        """Return `before` and the ids, each behind the parts that it is joined from.

        Args:
            whole: see `_parts`.
            most: end when there are so many.
        """
        found = dict.fromkeys(before)
        for identity in ids:
            if most is not None and len(found) >= most:
                break
            waiting = [identity]
            while waiting:
                parts = [part for part in self._parts(waiting[-1], whole) or () if part not in found]
                if parts and waiting[-1] not in found:
                    waiting += parts
                else:
                    found[waiting.pop()] = None
        return list(found)

    def _parts(self, identity: int, whole: bool = True) -> tuple[int, ...] | None:
        """Return the tokens that a token must be kept with; None if no text is encoded to it.

        Args:
            whole: with ignore_merges a token may be one that merges do not make of its text. It is kept with the tokens
                that they do make of it, so that these are not joined further.
        """
        if identity not in self._parents:
            self._parents[identity] = self._joined(self._text.get(identity, ""))
        is_made, parts = self._parents[identity]
        return parts if is_made or (whole and self._model.get("ignore_merges")) else None

    def _joined(self, token: str) -> tuple[bool, tuple[int, ...]]:
        """Return whether merges make a token of its own text, and the parts before the last merge."""
        if self._is_unigram or len(token) == 1:
            return True, ()
        parts = list(token)
        last: list[str] = []
        while len(parts) > 1:
            ranks = [self._ranks.get((left, right), -1) for left, right in pairwise(parts)]
            least = min((rank for rank in ranks if rank >= 0), default=None)
            if least is None:
                break
            at = ranks.index(least)
            last = parts[at : at + 2]
            parts[at : at + 2] = ["".join(last)]
        is_made = len(parts) == 1
        return is_made, tuple(self._vocab[part] for part in (last if is_made else parts) if part in self._vocab)

    def _bytes(self) -> tuple[list[int], list[int]]:
        """Return (the ids of single bytes, bytes of UTF-8 without a token); none if the tokenizer has characters."""
        if _has_byte_level(self._data):
            names = byte_chars()
        elif self._model.get("byte_fallback"):
            names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
        else:
            return [], []
        lacking = [byte for byte, name in names.items() if name not in self._vocab]
        held = [self._vocab[name] for name in names.values() if name in self._vocab]
        return held, sorted(set(lacking) - NEVER_IN_UTF8)

    def _characters(self) -> list[int]:
        return [identity for token, identity in self._vocab.items() if len(token) == 1]

    def _unknown(self) -> list[int]:
        named = self._model.get("unk_token")
        found = [self._vocab[named]] if named in self._vocab else []
        return [*found, self._model["unk_id"]] if self._model.get("unk_id") is not None else found


def _steps(entry: Any) -> list[dict[str, Any]]:
    """All tables in a part of a tokenizer.json."""
    if isinstance(entry, list):
        return [step for held in entry for step in _steps(held)]
    return [entry, *_steps(list(entry.values()))] if isinstance(entry, dict) else []


def _has_byte_level(data: dict[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps([data.get("pre_tokenizer"), data.get("normalizer")]))


def _replaced(data: dict[str, Any]) -> set[str]:
    """The characters that a decoder replaces."""
    found = ""
    for step in _steps(data.get("decoder")):
        form = step.get("pattern")
        found += str(step.get("replacement", "")) if step.get("type") == "Metaspace" else ""
        found += str(form.get("String", "")) if step.get("type") == "Replace" and isinstance(form, dict) else ""
    return set(found)
