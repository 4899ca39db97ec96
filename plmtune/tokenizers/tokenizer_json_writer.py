"""Writes a `Vocabulary` as Hugging Face's tokenizer.json."""

from __future__ import annotations

import json
from typing import Any

from plmtune.tokenizers.bpe import Normalization, Vocabulary
from plmtune.tokenizers.library import Library
from plmtune.tokenizers.tokenizer_json import to_chars


def added_token(identity: int, content: str, *, special: bool, normalized: bool = False) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized}
    return {"id": identity, "content": content, **flags, "special": special}


def skeleton(pattern: str, normalization: Normalization | None) -> dict[str, Any]:
    """Return a tokenizer.json without tokens."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": normalization} if normalization else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }


def puts_before(tokens: dict[str, int]) -> dict[str, Any]:
    """A post-processor that puts tokens, id by text, before each text."""
    first, second = ([{"SpecialToken": {"id": token, "type_id": at}} for token in tokens] for at in (0, 1))
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*first, text],
        "pair": [*first, text, *second, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [identity], "tokens": [token]} for token, identity in tokens.items()
        },
    }


def render(vocabulary: Vocabulary, first: dict[str, int]) -> str:
    """Return the tokenizer.json of a vocabulary; `first` are special tokens before each text."""
    chars = [to_chars(token) for token in vocabulary.tokens]
    vocab = dict(zip(chars, vocabulary.ids, strict=True))
    vocab |= {to_chars(token): identity for identity, token in vocabulary.unreachable.items()}
    # They are in the model as well, so that the library gives them these ids.
    vocab |= vocabulary.specials | vocabulary.added
    data = skeleton(vocabulary.pattern, vocabulary.normalization)
    data["model"] |= {
        "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
        "merges": [[chars[left], chars[right]] for left, right in vocabulary.merges],
    }
    if vocabulary.whole:
        data["model"]["ignore_merges"] = True
    specials, normalized = vocabulary.specials, vocabulary.normalized
    data["added_tokens"] = [
        added_token(identity, content, special=content in specials, normalized=content in normalized)
        for content, identity in sorted((specials | vocabulary.added).items(), key=lambda item: item[1])
    ]
    if first:
        data["post_processor"] = puts_before(first)
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def render_library(held: Library, first: dict[str, int]) -> str:
    return held.render({"post_processor": puts_before(first)} if first else {})
