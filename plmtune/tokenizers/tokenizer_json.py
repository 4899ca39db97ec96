"""Hugging Face's tokenizer.json, read into a `Vocabulary`.

It reads byte-level BPE files whose pre-tokenizer is equivalent to one regular expression. A feature that would give
other ids than the `tokenizers` library is refused by name; `library` then runs the file.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import regex

from plmtune.errors import UserError
from plmtune.io import untrusted
from plmtune.tokenizers.bpe import (
    COMPLETE_PATTERNS,
    DIGITS_GPT2_PATTERN,
    GPT2_PATTERN,
    MAX_ID,
    Merge,
    Normalization,
    Vocabulary,
    check_merges,
    check_whole,
    recover_merges,
)

# Bytes that UTF-8 never uses: a vocabulary may lack them.
NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
# Far above any real tokenizer, and cheap enough.
_MAX_VALUES = 3 << 20
_MAX_MERGES = 1 << 20
_MAX_ADDED = 1 << 14
_MAX_TOKEN_CHARS = 1 << 10
_MAX_CHARS = 16 << 20
_MAX_PATTERN_CHARS = 1 << 12
_MAX_REPEATS = 1_000
_COUNTED = regex.compile(r"\{([0-9]{1,9}),?([0-9]{0,9})")
_NOT_SHARED = regex.compile(r"\\[wWbBhHAzZGRXKkQEuoc0-9]|(?<!\\)[$^]|\{[0-9,]+\}\+|&&|\[:|\(\?[<P]*[A-Za-z_]+>")


@cache
def byte_chars() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@cache
def _to_latin() -> dict[int, int]:
    # A raw character below 256 that is not in the alphabet (a space) is no byte.
    return dict.fromkeys(range(256), 0x10FFFF) | {ord(char): byte for byte, char in byte_chars().items()}


def to_bytes(token: str) -> bytes:
    """Return the bytes of a token in the file; UnicodeEncodeError if a character is not one of the 256."""
    return token.translate(_to_latin()).encode("latin-1")


def to_chars(token: bytes) -> str:
    return token.decode("latin-1").translate(byte_chars())


def load_json(data: bytes, where: str) -> Any:
    # In memory a list of empty lists takes 25 times the size of its text.
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > _MAX_VALUES:
        raise UserError(f"{where} holds about {values:,} values; a tokenizer has at most {_MAX_VALUES:,}.")
    try:
        return untrusted.load_json(data)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({str(error)[:100]}).") from error


def _normalization(entry: Any, where: str) -> Normalization | None:
    if isinstance(entry, dict) and entry.get("type") == "Sequence":
        steps = entry.get("normalizers") or []
        if not isinstance(steps, list):
            raise UserError(f"{where}: normalizer.normalizers must be a list, not {steps!r:.40}.")
        entry = entry if len(steps) > 1 else next(iter(steps), None)
    if entry is None:
        return None
    kind = entry.get("type") if isinstance(entry, dict) else entry
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return kind
    raise UserError(f"{where}: the normalizer {kind} is not supported (NFC, NFD, NFKC, NFKD or none are).")


def check_size(pattern: str, where: str) -> None:
    """Refuse a pattern that takes too much memory."""
    if len(pattern) > _MAX_PATTERN_CHARS:
        raise UserError(
            f"{where}: the pre-tokenizer's pattern has {len(pattern):,} of {_MAX_PATTERN_CHARS:,} characters."
        )
    # Engines expand a{9} to aaaaaaaaa, and nested repeats multiply: five of {999} take all memory.
    bounds = [max(int(low), int(high or 0), 1) for low, high in _COUNTED.findall(pattern)]
    if math.prod(bounds) > _MAX_REPEATS:
        raise UserError(f"{where}: the pre-tokenizer's pattern repeats parts of it more than {_MAX_REPEATS:,} times.")


def check_pattern(pattern: str, where: str) -> None:
    r"""Refuse what Oniguruma (in `tokenizers`) and Rust's regex (in tiktoken) read differently.

    Their ``\w``, ``\b``, ``\h``, ``^`` and ``$`` differ, and ``{1,3}+`` is possessive only in one.
    """
    check_size(pattern, where)
    bare = regex.sub(r"\[\^", "[", pattern)  # the ^ of a class is no anchor
    found = _NOT_SHARED.search(bare)
    if found:
        raise UserError(f"{where}: {found.group()!r} in the pre-tokenizer's pattern differs between regex engines.")
    try:
        empty = regex.compile(pattern).match("", timeout=1.0) is not None
    except TimeoutError:
        raise UserError(f"{where}: the pre-tokenizer's pattern {pattern!r:.80} does not come to an end.") from None
    except regex.error as error:
        raise UserError(f"{where}: the pre-tokenizer's pattern is no regular expression ({error}).") from error
    if empty:
        raise UserError(f"{where}: the pre-tokenizer's pattern {pattern!r} matches the empty text.")


def _pattern(entry: Any, where: str) -> str:
    steps = entry.get("pretokenizers") if isinstance(entry, dict) and entry.get("type") == "Sequence" else [entry]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        raise UserError(f"{where} has no ByteLevel pre-tokenizer: only byte-level BPE is supported.")
    kinds = [str(step.get("type")) for step in steps]
    *cuts, last = steps
    if last.get("type") != "ByteLevel" or not set(kinds[:-1]) <= {"Split", "Digits"}:
        raise UserError(f"{where}: the pre-tokenizer {' + '.join(kinds)} is not supported.")
    if last.get("add_prefix_space"):
        raise UserError(f"{where}: add_prefix_space of the ByteLevel pre-tokenizer is not supported.")
    if last.get("use_regex", True):
        if not cuts:
            return GPT2_PATTERN
        if len(cuts) == 1 and _cuts_digits(cuts[0]):
            return DIGITS_GPT2_PATTERN
    elif len(cuts) == 1 and cuts[0].get("type") == "Split":
        return _split_pattern(cuts[0], where)
    raise UserError(f"{where}: the pre-tokenizer {' + '.join(kinds)} is not one regular expression.")


def _cuts_digits(step: dict[str, Any]) -> bool:
    if step.get("type") == "Digits":
        return bool(step.get("individual_digits"))
    cuts = {"pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
    return all(step.get(key) == value for key, value in cuts.items())


def _split_pattern(step: dict[str, Any], where: str) -> str:
    form = step.get("pattern")
    pattern = form.get("Regex") if isinstance(form, dict) else None
    if not isinstance(pattern, str):
        raise UserError(f"{where}: the Split pre-tokenizer has no regular expression but {form!r}.")
    check_pattern(pattern, where)
    behavior, invert = step.get("behavior"), bool(step.get("invert"))
    # Dropping the text between matches changes nothing if there is none.
    if (behavior, invert) == ("Removed", True) and pattern in COMPLETE_PATTERNS:
        return pattern
    # With Isolated, invert changes nothing: matches and the text between them are pieces.
    if behavior != "Isolated":
        raise UserError(f"{where}: the Split pre-tokenizer's behaviour {behavior} is not supported (Isolated is).")
    return pattern


def added_tokens(
    entries: Any, where: str, *, every_flag: bool = False
) -> tuple[dict[str, int], dict[str, int], frozenset[str]]:
    """Return (specials, the others, those of both that are found in normalized text)."""
    specials: dict[str, int] = {}
    added: dict[str, int] = {}
    normalized = set()
    entries = entries or []
    if not isinstance(entries, list):
        raise UserError(f"{where}: added_tokens must be a list.")
    if len(entries) > _MAX_ADDED:
        raise UserError(f"{where} has {len(entries):,} added tokens; at most {_MAX_ADDED:,} are possible.")
    for entry in entries:
        content, identity = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(content, str) or not content or not isinstance(identity, int):
            raise UserError(f"{where}: an entry of added_tokens lacks its content or id.")
        special = bool(entry.get("special"))
        for flag in ("lstrip", "rstrip", "single_word"):
            if entry.get(flag) and not every_flag:
                raise UserError(f"{where}: {flag} of the added token {content!r} is not supported.")
        if entry.get("normalized"):
            normalized.add(content)
        (specials if special else added)[content] = identity
    return specials, added, frozenset(normalized)


def check_added(tokens: dict[str, int], vocab: dict[str, int], where: str) -> None:
    # The library takes a token's id from the model, and gives the others ids from the model's size on.
    next_id, held = len(vocab), set(vocab.values())
    for content, identity in sorted(tokens.items(), key=lambda item: item[1]):
        expected = vocab.get(content)
        if expected is None:
            expected, next_id = next_id, next_id + 1
            if expected in held:
                raise UserError(f"{where}: the added token {content!r} takes the id {expected} of another.")
        if identity != expected:
            raise UserError(
                f"{where}: the added token {content!r} has the id {identity} where the `tokenizers` library "
                f"gives it {expected}."
            )


def check_vocabulary(model: Any, where: str) -> dict[str, int]:
    """Return the ids of a model's tokens; UserError if it is none, or of impossible size."""
    if not isinstance(model, dict):
        raise UserError(f"{where} has no model: not a tokenizer.json.")
    kind = model.get("type", "BPE")  # old files have no type
    vocab, merges = model.get("vocab"), model.get("merges", [] if kind == "Unigram" else None)
    if kind == "Unigram":
        if not isinstance(vocab, list) or not all(
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) for entry in vocab
        ):
            raise UserError(f"{where}: model.vocab must list tokens with their scores.")
        listed, vocab = vocab, {entry[0]: identity for identity, entry in enumerate(vocab)}
        if len(vocab) != len(listed):
            raise UserError(f"{where}: model.vocab lists a token twice.")
    elif kind != "BPE" or merges is None:  # only BPE has merges
        raise UserError(f"{where}: the model type {kind} is not supported, only BPE and Unigram are.")
    if not isinstance(vocab, dict) or not vocab or not isinstance(merges, list):
        raise UserError(f"{where}: model.vocab must be a table of ids and model.merges a list.")
    if len(merges) > _MAX_MERGES or len(vocab) > MAX_ID:
        raise UserError(
            f"{where}: {len(vocab):,} tokens and {len(merges):,} merges are more than the {MAX_ID:,} and "
            f"{_MAX_MERGES:,} possible."
        )
    if max(map(len, vocab)) > _MAX_TOKEN_CHARS or sum(map(len, vocab)) > _MAX_CHARS:
        raise UserError(
            f"{where}: its tokens have {sum(map(len, vocab)):,} characters, the longest {max(map(len, vocab)):,}; "
            f"at most {_MAX_CHARS:,} and {_MAX_TOKEN_CHARS:,} are possible."
        )
    ids = list(vocab.values())
    if not all(type(identity) is int and 0 <= identity < MAX_ID for identity in ids):
        raise UserError(f"{where}: model.vocab must give ids from 0 to {MAX_ID - 1}.")
    if len(set(ids)) != len(ids):
        raise UserError(f"{where}: model.vocab gives one id to two tokens.")
    for number, merge in enumerate(merges):
        _merge_parts(merge, number, where)
    return vocab


def _merge_parts(merge: Any, number: int, where: str) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts):
        return parts[0], parts[1]
    raise UserError(f"{where}: merge {number} is not a pair of tokens: {str(merge)[:60]!r}.")


def parse(data: Any, where: str) -> Vocabulary:
    """Make a vocabulary from a tokenizer.json; UserError for what is missing or cannot give identical ids."""
    model: Any = data.get("model") if isinstance(data, dict) else None
    vocab = check_vocabulary(model, where)
    if isinstance(model["vocab"], list):
        raise UserError(f"{where}: the model type Unigram is not byte-level BPE.")
    for feature in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(feature):
            raise UserError(f"{where}: {feature} ({model[feature]!r}) of the BPE model is not supported.")
    normalization = _normalization(data.get("normalizer"), where)
    pattern = _pattern(data.get("pre_tokenizer"), where)
    specials, added, normalized = added_tokens(data.get("added_tokens"), where)
    check_added(specials | added, vocab, where)

    chars = byte_chars()
    singles = sorted((char for char in chars.values() if char in vocab), key=vocab.__getitem__)
    lacking = {byte for byte, char in chars.items() if char not in vocab} - NEVER_IN_UTF8
    if lacking and model.get("unk_token") is not None:
        raise UserError(f"{where}: unk_token for bytes without a token is not supported ({len(lacking)} bytes).")
    tokens, merges = _order(singles, model["merges"], vocab, where)
    as_bytes = _all_bytes(tokens, where, "model.vocab")
    reachable = {*tokens, *specials, *added}
    orphans = [token for token in vocab if token not in reachable]
    unreachable: dict[int, bytes] = {}
    if model.get("ignore_merges"):  # an equal piece of text is encoded to the token
        whole = _all_bytes(orphans, where, "ignore_merges with a token that")
        try:
            wrong = check_whole(as_bytes, whole)
        except ValueError as error:
            raise UserError(f"{where}: ignore_merges is not supported where {error}.") from error
        if wrong is not None:
            raise UserError(
                f"{where}: ignore_merges with a token ({to_chars(wrong)!r}) of two parts that no merge joins is not "
                "supported."
            )
        tokens, as_bytes = tokens + orphans, as_bytes + whole
    else:
        for token in orphans:
            try:
                unreachable[vocab[token]] = to_bytes(token)
            except UnicodeEncodeError:
                unreachable[vocab[token]] = token.encode(errors="replace")
    ids = [vocab[token] for token in tokens]
    return Vocabulary(as_bytes, ids, pattern, normalization, specials, added, unreachable, merges, normalized, where)


def _all_bytes(tokens: list[str], where: str, what: str) -> list[bytes]:
    try:
        return [to_bytes(token) for token in tokens]
    except UnicodeEncodeError:
        raise UserError(f"{where}: {what} is not byte-level (characters outside its 256).") from None


def _order(singles: list[str], listed: list[Any], vocab: dict[str, int], where: str) -> tuple[list[str], list[Merge]]:
    """Return the tokens in order of rank with their merges, which are proven equivalent to the file's list.

    Tokens that the file's merges do not make of their own bytes are left out: no text is encoded to them.
    """
    places: _Places = {}
    for number, merge in enumerate(listed):
        left, right = _merge_parts(merge, number, where)
        product = left + right
        for token in (left, right, product):
            if token not in vocab:
                raise UserError(f"{where}: merge {number} names {token!r}, which is not in model.vocab.")
        places.setdefault(product, {})[left, right] = number
    tokens = [*singles, *places]
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    if len(rank_of) != len(tokens):
        raise UserError(f"{where}: a merge makes a token of one character.")
    if all(len(pairs) == 1 for pairs in places.values()):
        listed_once = [pair for pairs in places.values() for pair in pairs]
        if all(left in rank_of and right in rank_of for left, right in listed_once):
            merges = [(rank_of[left], rank_of[right]) for left, right in listed_once]
            if check_merges(merges, len(singles)) is None:
                return tokens, merges
    found = _order_of_many(singles, places) or _order_of_many(singles, _reached(places, vocab))
    if found is None:
        raise UserError(f"{where}: its merges cannot be expressed by ranks.")
    return found


_Places = dict[str, dict[tuple[str, str], int]]  # token -> pair -> index in the list of merges


def _reached(places: _Places, vocab: dict[str, int]) -> _Places:
    """Return the tokens that the `tokenizers` library makes of their own characters with a file's merges."""
    import tokenizers

    merges = sorted(((place, pair) for pairs in places.values() for pair, place in pairs.items()))
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[pair for _, pair in merges]))
    made = list(places)
    found = library.encode_batch_fast(made, add_special_tokens=False)
    return {token: places[token] for token, encoding in zip(made, found, strict=True) if encoding.ids == [vocab[token]]}


def _order_of_many(singles: list[str], places: _Places) -> tuple[list[str], list[Merge]] | None:
    """Do the same where a token has several merges, as in files converted from ranks, which list every split.

    Only the merge that joins the token's bytes ever applies, so its index is the token's rank. Which one that is
    depends on the ranks: start with the first ones and check that the result is consistent. None: it is not.
    """
    made = sorted(places, key=lambda token: min(places[token].values()))
    for _ in range(2):
        try:
            reached, merges, whole = recover_merges([to_bytes(token) for token in [*singles, *made]])
        except (ValueError, UnicodeEncodeError):
            return None
        tokens = list(map(to_chars, reached))
        pairs = ((tokens[left], tokens[right]) for left, right in merges)
        acting = dict(zip(tokens[len(singles) :], pairs, strict=True))
        if any(pair not in places[token] for token, pair in acting.items()):
            return None
        # Tokens that their own bytes are not joined to are left out of both.
        before = [token for token in made if token in acting]
        if before == (after := sorted(before, key=lambda token: places[token][acting[token]])):
            return tokens, merges
        made = [*after, *map(to_chars, whole)]
    return None
