"""The second engine: a tokenizer.json that ranks cannot represent, run by the `tokenizers` library."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from plmtune.errors import UserError
from plmtune.tokenizers.tokenizer_json import added_tokens, check_added, check_size, check_vocabulary, to_bytes

if TYPE_CHECKING:
    import tokenizers

Ids = npt.NDArray[np.uint32]

_MAX_STEPS = 64  # of the normalizer, the pre-tokenizer or the decoder
_MAX_GROWTH = 64  # of a text, by the normalizer
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# The library cannot be interrupted. Without a repeated group the time is a power of the text's length, and the engine
# stops after ten million tries for one match.
_REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{\d*,?\d*\})")
_REFERS_BACK = re.compile(r"\\[1-9gk]|\(\?[&RP(0-9]")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")


class Library:
    """What a tokenizer.json holds, and the ids that the library gives.

    Attributes:
        specials: control tokens, id by text; in a document their text stays plain text by default.
        added: tokens that are found in any text, id by text.
        pieces: bytes of each id.
    """

    pattern = ""  # no single regular expression
    normalization = None  # part of what the library does

    def __init__(self, data: Any, where: str) -> None:
        """Check a tokenizer.json and read it.

        Raises:
            UserError: for what the library does not read, what has no text per token, and what would take too long.
        """
        model: Any = data.get("model") if isinstance(data, dict) else None
        vocab = check_vocabulary(model, where)
        self.where = where
        # Post-processors put tokens around a text, which `Tokenizer.with_bos` does; the others depend on the caller.
        self.data = data | {"truncation": None, "padding": None, "post_processor": None}
        for key in ("normalizer", "pre_tokenizer", "decoder"):
            _check_steps(key, steps_of(data, key, where), where)
        self.specials, self.added, _ = added_tokens(data.get("added_tokens"), where, every_flag=True)
        check_added(self.specials | self.added, vocab, where)
        for feature in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(feature):
                raise UserError(f"{where}: {feature} ({model[feature]!r:.40}) of the model is not supported.")
        piece = _Pieces(steps_of(data, "decoder", where), where)
        texts = {identity: token for token, identity in (vocab | self.added).items()}
        self.pieces = {identity: piece.bytes_of(token) for identity, token in texts.items()}
        self.pieces |= {identity: text.encode() for text, identity in self.specials.items()}
        self._with_specials = self._open(self.data)
        ids = self.encode(["a"], specials=True)[0].tolist()
        self.adds_space = b"".join(self.pieces.get(identity, b"") for identity in ids) == b" a"

    def encode(self, texts: Sequence[str], *, specials: bool) -> list[Ids]:
        """Return the ids of each text."""
        run = (self._with_specials if specials else self._plain).encode_batch_fast
        return [self._ids(found, specials) for found in self._call(run, texts)]

    def encode_parts(self, wholes: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """Return the ids of each text, special tokens included, divided among the parts that they begin in."""
        out = []
        encoded = self._call(self._with_specials.encode_batch, ["".join(parts) for parts in wholes])
        for parts, found in zip(wholes, encoded, strict=True):
            starts = [first for first, _ in found.offsets]
            ends = np.cumsum([len(part) for part in parts])[:-1]
            out.append(np.split(self._ids(found, True), np.searchsorted(np.maximum.accumulate([0, *starts])[1:], ends)))
        return out

    @cached_property
    def digest(self) -> bytes:
        return xxhash.xxh3_128_digest(self.render({}).encode())

    def render(self, changes: dict[str, Any]) -> str:
        """Return the tokenizer.json."""
        return json.dumps(self.data | changes, ensure_ascii=False, separators=(",", ":"))

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The tokenizer that takes the text of special tokens for text.

        Their tokens get names in the model that no text has: a model may make them of text, too.
        """
        model: dict[str, Any] = dict(self.data["model"])
        names = {text: f"\U0010ffff{secrets.token_hex(16)}{text}" for text in self.specials}
        if isinstance(model["vocab"], list):
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        elif names.keys() & model["vocab"].keys():
            model["vocab"] = {names.get(text, text): identity for text, identity in model["vocab"].items()}
            model["unk_token"] = names.get(model.get("unk_token", ""), model.get("unk_token"))
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
            model["merges"] = [[a, b] for a, b in pairs if not names.keys() & {a, b, a + b}]
        added = [entry for entry in self.data.get("added_tokens") or [] if entry["content"] in self.added]
        return self._open(self.data | {"model": model, "added_tokens": added})

    @cached_property
    def _renumbered(self) -> dict[int, int]:
        """Added tokens whose ids are others where special tokens are not there."""
        ids = {text: self._plain.token_to_id(text) for text in self.added}
        return {found: self.added[text] for text, found in ids.items() if found not in (None, self.added[text])}

    def _ids(self, found: tokenizers.Encoding, specials: bool) -> Ids:
        ids = found.ids
        if not specials and self._renumbered:
            ids = [self._renumbered.get(identity, identity) for identity in ids]
        return np.array(ids, dtype=np.uint32)

    def _open(self, data: dict[str, Any]) -> tokenizers.Tokenizer:
        import tokenizers

        # `Tokenizer.encode_batch` has threads of its own, and those of the library do not survive a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(data))
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{self.where}: the tokenizers library does not read it ({str(error)[:160]}).") from error

    def _call(self, run: Any, texts: Sequence[str]) -> Any:
        try:
            return run(list(texts), add_special_tokens=False)
        except TypeError:  # half a surrogate pair
            whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
            return run(whole, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"{self.where}, key pre_tokenizer or normalizer: a pattern does not come to an end on a text of "
                f"{max(map(len, texts)):,} characters ({error}). Use a tokenizer with a simpler one."
            ) from error


class _Pieces:
    """The bytes of tokens, as a tokenizer.json's decoder writes each."""

    def __init__(self, steps: list[dict[str, Any]], where: str) -> None:
        self._byte_level = self._byte_fallback = False
        self._replaced: list[tuple[str, str]] = []
        for step in steps:
            match step.get("type"):
                case "ByteLevel":
                    self._byte_level = True
                case "ByteFallback":
                    self._byte_fallback = True
                case "Metaspace":
                    self._replaced.append((str(step.get("replacement", "▁")), " "))
                case "Replace" if isinstance(step.get("pattern"), dict) and "String" in step["pattern"]:
                    self._replaced.append((str(step["pattern"]["String"]), str(step.get("content"))))
                case "Fuse" | "Strip":  # what they change depends on the place of a token
                    pass
                case other:
                    raise UserError(f"{where}: the decoder {other} is not supported.")

    def bytes_of(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return to_bytes(token)
            except UnicodeEncodeError:
                return token.encode(errors="replace")
        if self._byte_fallback and (found := _BYTE.fullmatch(token)):
            return bytes([int(found.group(1), 16)])
        for old, new in self._replaced:
            token = token.replace(old, new)
        return token.encode(errors="replace")


def steps_of(data: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or decoder, one list for all nested sequences."""
    steps, left = [], [data.get(key)]
    while left:
        entry = left.pop(0)
        if isinstance(entry, dict) and entry.get("type") == "Sequence":
            name = next((name for name in ("normalizers", "pretokenizers", "decoders") if name in entry), "steps")
            if not isinstance(held := entry.get(name), list):
                raise UserError(f"{where}: {key}.{name} must be a list, not {held!r:.40}.")
            left = held + left
        elif isinstance(entry, dict):
            steps.append(entry)
        if len(steps) + len(left) > _MAX_STEPS:
            raise UserError(f"{where}: {key} has more than {_MAX_STEPS} steps.")
    return steps


def _check_steps(key: str, steps: list[dict[str, Any]], where: str) -> None:
    """Refuse steps that could take time or memory without limit."""
    growth = 1.0
    for step in steps:
        if not isinstance(form := step.get("pattern") or {}, dict):
            raise UserError(f"{where}: {key} has the pattern {form!r:.40}, which is not a table.")
        pattern = form.get("Regex", "")
        content = step.get("content") or step.get("prepend") or ""
        if not isinstance(pattern, str) or not isinstance(content, str):
            raise UserError(f"{where}: {key} has the pattern or content {pattern or content!r:.40}, which is not text.")
        check_size(pattern, where)
        bare = _CLASS.sub("[]", pattern)
        if found := _REPEATED_GROUP.search(bare) or _REFERS_BACK.search(bare):
            raise UserError(f"{where}: {key} has a pattern with {found.group()!r}, which can take exponential time.")
        shortest = 1 if pattern else len(str(form.get("String") or "x"))
        growth *= max(1.0, len(content) / shortest)
    if growth > _MAX_GROWTH or math.isnan(growth):
        raise UserError(f"{where}: {key} makes a text more than {_MAX_GROWTH} times as long.")
