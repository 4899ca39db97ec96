"""PanGu-alpha's text (arXiv 2104.12369): jieba's words, joined by spaces, in SentencePiece's pieces.

jieba cuts a text into words; in each word a space becomes U+2582 and a newline U+2583; one space is put between words;
SentencePiece makes ids of that. Decoding takes all spaces away and turns U+2582 and U+2583 back. This order is the
released code's, and both steps are run by the libraries that it uses, so ids are the same for every text.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from plmtune import extras
from plmtune.errors import UserError
from plmtune.tokenizers.bpe import MAX_ID

if TYPE_CHECKING:
    import jieba

Ids = npt.NDArray[np.uint32]

TYPE = "jieba+sentencepiece"
# What tokenizer_config.json names beside the SentencePiece model of a PanGu-alpha.
CLASSES = ("GPTPanguTokenizer", "JIEBATokenizer", "PanguAlphaTokenizer")
# The version decides the words. rjieba is 17 times as fast and cuts other words: "a-b", and characters beyond U+9FD5.
JIEBA = "0.42.1"

_UNKNOWN, _CONTROL, _BYTE = 2, 3, 6  # types of pieces
_BETWEEN = "\u2581"  # SentencePiece's space
_SPACE, _NEWLINE = "\u2582", "\u2583"
_TO_PIECES = str.maketrans(" \n", _SPACE + _NEWLINE)
_FROM_PIECES = str.maketrans({" ": None, _BETWEEN: None, _SPACE: " ", _NEWLINE: "\n"})


class JiebaPieces:
    """A SentencePiece model, and the ids that it gives to jieba's words.

    Attributes:
        specials: control tokens, the unknown token and those that the data names, id by text. No text has them.
        added: none.
        pieces: bytes of each id.
        texts: SentencePiece's name of each id.
    """

    pattern = ""
    normalization = None  # part of what SentencePiece does
    adds_space = False

    def __init__(self, data: Any, where: str) -> None:
        """Open what `as_data` returns.

        Raises:
            UserError: if it is no such table, jieba is not there or is another version, or pieces are missing.
        """
        import sentencepiece

        content, named = _checked(data, where)
        if not extras.installed("jieba"):
            raise extras.missing("jieba", f"{where}, whose text jieba cuts into words,")
        if (version := _cutter_module().__version__) != JIEBA:
            raise UserError(f"{where}: jieba {version} may cut other words than {JIEBA}, with which it is to be used.")
        self.where = where
        self.data = {"version": "1.0", "type": TYPE, "jieba": JIEBA, "specials": named, "model": data["model"]}
        self.added: dict[str, int] = {}
        self.normalized: frozenset[str] = frozenset()
        proto = _parsed(content, where)
        kinds = {piece.piece: piece.type for piece in proto.pieces}
        self.texts = [piece.piece for piece in proto.pieces]
        if len(kinds) != len(self.texts) or len(kinds) > MAX_ID:
            raise UserError(f"{where}: two of its {len(self.texts):,} pieces are equal, or they exceed {MAX_ID:,}.")
        for text in named:
            if text not in kinds:
                raise UserError(f"{where}: the special token {text!r:.40} is none of its pieces.")
            # SentencePiece finds the pieces of other types in text, but never across a space between words.
            if kinds[text] not in (_UNKNOWN, _CONTROL) and len(words(text)) == 1:
                raise UserError(f"{where}: {text!r:.40} is one word of jieba's, so text could give this special token.")
        ids = {text: identity for identity, text in enumerate(self.texts)}
        self.specials = {text: ids[text] for text in self.texts if kinds[text] in (_UNKNOWN, _CONTROL) or text in named}
        self.pieces = {identity: _bytes(text, kinds[text]) for text, identity in ids.items()}
        self.pieces |= {identity: text.encode() for text, identity in self.specials.items()}
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{where}: SentencePiece does not read it ({str(error)[:160]}).") from error
        found = self.encode([" \n"], specials=False)[0].tolist()
        if b"".join(self.pieces[identity] for identity in found) != b" \n":
            raise UserError(
                f"{where}: the model gives U+2582 and U+2583, which stand for space and newline, no pieces of their "
                "own. It is trained on other text than PanGu-alpha's: use tokenizer=file."
            )

    def encode(self, texts: Sequence[str], *, specials: bool) -> list[Ids]:
        """Return the ids of each text."""
        return [
            np.array([i for _, part in self._parts(text, specials) for i in self._ids_of(part)], dtype=np.uint32)
            for text in texts
        ]

    def encode_parts(self, wholes: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """Return the ids of each text, special tokens included, divided among the parts that they begin in."""
        out = []
        for parts in wholes:
            ids: list[int] = []
            starts: list[int] = []
            for start, part in self._parts("".join(map(_whole, parts)), True):
                if isinstance(part, int):
                    ids.append(part)
                    starts.append(start)
                    continue
                for identity, place in self._placed(words(part)):
                    ids.append(identity)
                    starts.append(start + place)
            bounds = np.cumsum([len(_whole(part)) for part in parts])[:-1]
            out.append(np.split(np.array(ids, np.uint32), np.searchsorted(np.array(starts, int), bounds)))
        return out

    @cached_property
    def digest(self) -> bytes:
        return xxhash.xxh3_128_digest(self.render().encode())

    def render(self) -> str:
        """Return the tokenizer.json, which no other program reads: it would give other ids."""
        return json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))

    def _parts(self, text: str, specials: bool) -> Iterator[tuple[int, str | int]]:
        """Return the text between special tokens, and their ids, each with its place."""
        text, at = _whole(text), 0
        for found in self._special_texts.finditer(text) if specials else ():
            if found.start() > at:
                yield at, text[at : found.start()]
            yield found.start(), self.specials[found.group()]
            at = found.end()
        if at < len(text):
            yield at, text[at:]

    def _placed(self, cut: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Return the ids of words, each with the character of the text that it begins at."""
        from sentencepiece import sentencepiece_pb2

        messages: Any = sentencepiece_pb2
        lengths = [len(char.encode()) for word in cut for char in word.translate(_TO_PIECES)]
        # The byte of each character among the joined words; the space before a word counts to the word.
        spaces = np.repeat(np.arange(len(cut)), [len(word) for word in cut])
        places = np.cumsum([0, *lengths[:-1]]) + spaces
        found = messages.SentencePieceText.FromString(self._processor.encode(_joined(cut), out_type="serialized_proto"))
        for piece in found.pieces:
            yield piece.id, int(np.searchsorted(places, piece.begin))

    def _ids_of(self, part: str | int) -> list[int]:
        if isinstance(part, int):
            return [part]
        ids: list[int] = self._processor.encode(_joined(words(part)))
        return ids

    @cached_property
    def _special_texts(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) or r"(?!)")


def words(text: str) -> list[str]:
    """Return jieba's words, which joined are the text."""
    return list(_cutter().cut(text))


def as_data(content: bytes, special: Sequence[str]) -> dict[str, Any]:
    """Return the tokenizer.json of a SentencePiece model.

    Args:
        special: pieces that are special tokens whatever their type, such as the end of a document.
    """
    model = {"type": "SentencePiece", "content": base64.b64encode(content).decode()}
    return {"type": TYPE, "jieba": JIEBA, "specials": list(special), "model": model}


def is_data(data: Any) -> bool:
    return isinstance(data, dict) and data.get("type") == TYPE


def _checked(data: dict[str, Any], where: str) -> tuple[bytes, list[str]]:
    """Return the SentencePiece model and the special tokens of a tokenizer.json."""
    model, named = data.get("model"), data.get("specials")
    if data.get("jieba") != JIEBA:
        raise UserError(f"{where}, key jieba: the version {data.get('jieba')!r:.40} is not supported, only {JIEBA} is.")
    if data.get("added_tokens"):
        raise UserError(f"{where}: files beside it add tokens, which a tokenizer of jieba's words cannot have.")
    if not isinstance(named, list) or not all(isinstance(text, str) and text for text in named):
        raise UserError(f"{where}, key specials: it must be a list of pieces.")
    try:
        return base64.b64decode(model["content"] if isinstance(model, dict) else "", validate=True), named
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}, key model.content: it is no SentencePiece model in base64 ({error}).") from error


def _parsed(content: bytes, where: str) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    try:
        proto = messages.ModelProto.FromString(content)
    except DecodeError:
        proto = None
    if proto is None or not proto.pieces:
        raise UserError(f"{where} is no SentencePiece model.")
    if proto.denormalizer_spec.precompiled_charsmap:
        raise UserError(f"{where}: a SentencePiece model that changes text when it decodes is not supported.")
    return proto


def _bytes(text: str, kind: int) -> bytes:
    """The bytes that a piece decodes to: its own, because what decoding changes are single characters."""
    if kind == _BYTE:
        byte = bytes([int(text[3:5], 16)])
        return b"" if byte == b" " else byte
    return text.translate(_FROM_PIECES).encode(errors="replace")


def _joined(cut: Sequence[str]) -> str:
    return " ".join(word.translate(_TO_PIECES) for word in cut)


def _whole(text: str) -> str:
    """The text with U+FFFD for half a surrogate pair."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cutter_module() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in jieba's patterns
        import jieba
    return jieba


@cache
def _cutter() -> jieba.Tokenizer:
    """A cutter of its own: words that other code adds to jieba's do not change it.

    jieba itself would keep its dictionary in a shared temporary directory, where anyone can replace it, and say so.
    """
    module = _cutter_module()
    cutter = module.Tokenizer()
    with cutter.get_dict_file() as file:
        cutter.FREQ, cutter.total = cutter.gen_pfdict(file)
    cutter.initialized = True
    return cutter
