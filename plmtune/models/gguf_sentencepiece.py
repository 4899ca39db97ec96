"""SentencePiece's BPE in a GGUF file (tokenizer.ggml.model = llama): pieces with scores instead of a list of merges.

llama.cpp joins the two neighbours whose piece has the highest score, the leftmost of several, and looks at nothing but
pieces; a tokenizer.json lists the pairs that are joined by rank. Both give the same ids if the pairs are all that make
a piece, in the order of the pieces' scores. It puts a space (tokenizer.ggml.add_space_prefix) before each part of a
text that no special token interrupts, also before one that begins with a space.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from plmtune.errors import UserError
from plmtune.tokenizers.library import Library, steps_of
from plmtune.tokenizers.sentencepiece_files import merges_by_score
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_json_writer import added_token

SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# llama.cpp strips white space behind special tokens, but for these, where general.name has one of the names.
PHI3_NAMES = ("phi-3", "phi3")
NOT_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")
_STRIPPED = "</s>"
_MAX_TIED = 64  # pieces of one score: runs of spaces in Mistral's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTES = range(1, 7)  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class Spaces:
    """How spaces become part of pieces.

    Attributes:
        prefix: a text begins with a space more than it has.
        difference: what llama.cpp does otherwise; None: nothing.
    """

    prefix: bool
    difference: str | None = None


def is_sentencepiece(held: Library) -> bool:
    """Whether a tokenizer is a BPE of characters with byte tokens."""
    model = held.data["model"]
    cuts = {step.get("type") for step in steps_of(held.data, "pre_tokenizer", held.where)}
    return isinstance(model["vocab"], dict) and bool(model.get("byte_fallback")) and "ByteLevel" not in cuts


def spaces_of(held: Library) -> Spaces:
    """Return how a tokenizer.json treats spaces.

    Raises:
        ValueError: if llama.cpp has nothing like it; what a tokenizer does.
    """
    first = steps_of(held.data, "normalizer", held.where)
    cuts = steps_of(held.data, "pre_tokenizer", held.where)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    names = ["Prepend" if step == {"type": "Prepend", "prepend": SPACE} else str(step.get("type")) for step in first]
    replaces = replace in first
    # After Replace there is no space left at which this one could cut.
    cuts = [cut for cut in cuts if not (replaces and cut.get("type") == "Split" and cut["pattern"] == {"String": " "})]
    if replaces and not cuts and names in (["Replace"], ["Prepend", "Replace"]):
        return Spaces(prefix="Prepend" in names)
    if not (names == [] and len(cuts) == 1 and cuts[0].get("type") == "Metaspace"):
        said = " + ".join([*names, *(str(cut.get("type")) for cut in cuts)]) or "nothing"
        raise ValueError(f"changes and cuts a text by {said}, which llama.cpp has not for SentencePiece's BPE")
    (cut,) = cuts
    inner = next((token for token in held.data["model"]["vocab"] if SPACE in token[1:]), None)
    if cut.get("replacement", SPACE) != SPACE or (cut.get("split", True) and inner is not None):
        raise ValueError(f"cuts a text before each space (Metaspace), and llama.cpp would join spaces ({inner!r})")
    scheme = cut.get("prepend_scheme", "always" if cut.get("add_prefix_space", True) else "never")
    if scheme == "never":
        return Spaces(prefix=False)
    where = "also behind special tokens and " if scheme == "first" else ""
    return Spaces(True, f"llama.cpp puts a space {where}before a text that begins with one")


def as_in_llama_cpp(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer that a GGUF file of this one is: itself, or one that differs in the spaces that it adds."""
    held = tokenizer.vocabulary
    if not isinstance(held, Library) or not is_sentencepiece(held) or spaces_of(held).difference is None:
        return tokenizer
    return Tokenizer(
        Library(held.data | _text_steps(prefix=True), held.where),
        eos=tokenizer.eos,
        vocab_size=tokenizer.vocab_size,
        chat_template=tokenizer.chat_template,
        bos=tokenizer.bos,
        adds_bos=tokenizer.adds_bos,
        ends=tokenizer.end_ids,
        firsts=[text for text, identity in tokenizer.specials.items() if identity in tokenizer.first_ids],
    )


def _text_steps(*, prefix: bool) -> dict[str, Any]:
    """The steps of a tokenizer.json that treat spaces as llama.cpp does."""
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def written_tokens(held: Library) -> dict[int, tuple[str, int, float]]:
    """Return text, type and score of each token.

    Raises:
        ValueError: if llama.cpp would give other ids; what a tokenizer does.
    """
    model = held.data["model"]
    vocab: dict[str, int] = model["vocab"]
    # Where a byte has no token llama.cpp takes the piece of this one character, which ASCII alone has.
    bytes_of = {byte: (f"<0x{byte:02X}>", chr(byte) if byte < 0x80 else None) for byte in range(256)}
    lacking = [names[0] for names in bytes_of.values() if not any(name in vocab for name in names)]
    if lacking:
        raise ValueError(f"has no token for {len(lacking)} bytes ({lacking[0]}), without which llama.cpp fails on text")
    # llama.cpp looks for added tokens before it writes spaces as SPACE, so these are found as pieces alone.
    fixed = {text: identity for text, identity in held.added.items() if not (SPACE in text and text in vocab)}
    scores = _scores(model, {*held.specials, *fixed})
    tokens = {identity: (text, BYTES if BYTE.fullmatch(text) else NORMAL, 0.0) for text, identity in vocab.items()}
    tokens |= {vocab[text]: (text, NORMAL, score) for text, score in scores.items()}
    tokens |= {identity: (text, USER_DEFINED, -1000.0) for text, identity in fixed.items()}
    tokens |= {identity: (text, CONTROL, 0.0) for text, identity in held.specials.items()}
    unknown = model.get("unk_token")
    if unknown in vocab:
        tokens[vocab[unknown]] = (unknown, UNKNOWN, 0.0)
    return tokens


def _scores(model: Mapping[str, Any], fixed: set[str]) -> dict[str, float]:
    """The score of each piece that is not fixed: minus its place in the order of merges."""
    vocab = model["vocab"]
    pieces = {text for text in vocab if text not in fixed and not BYTE.fullmatch(text)}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    ways: Counter[str] = Counter()
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if (whole := left + right) in pieces and left in pieces and right in pieces:
            first.setdefault(whole, rank)
            last[whole] = rank
            ways[whole] += 1
    for text in pieces:
        cuts = [at for at in range(1, len(text)) if text[:at] in pieces and text[at:] in pieces]
        if len(cuts) != ways[text]:
            at = cuts[0] if cuts else 1
            raise ValueError(
                f"does not join {text[:at]!r:.40} and {text[at:]!r:.40} as llama.cpp does, which joins whatever makes "
                "a token (its merges are not SentencePiece's)"
            )
    order = sorted(first, key=first.__getitem__)
    scores, place, tied, end = {}, 0, 0, -1
    for text in order:
        # Pieces whose merges are mixed have one score.
        tied = tied + 1 if first[text] < end else 1
        if tied > _MAX_TIED:
            raise ValueError(f"has merges that are in no order of the pieces that they make ({text!r:.40})")
        place += tied == 1
        end = max(end, last[text])
        scores[text] = float(1 - place)
    rest = sorted(pieces - scores.keys(), key=vocab.__getitem__)
    return scores | {text: float(-place - at) for at, text in enumerate(rest)}


def stripping(held: Library) -> bool:
    """Return whether white space behind special tokens is stripped, which llama.cpp does by PHI3_NAMES.

    Raises:
        ValueError: if other tokens strip it than there, or other space; what a tokenizer does.
    """
    entries = held.data.get("added_tokens") or []
    for flag in ("lstrip", "single_word"):
        wrong = next((entry["content"] for entry in entries if entry.get(flag)), None)
        if wrong is not None:
            raise ValueError(f"has {flag} in its token {wrong!r:.40}, which llama.cpp has not")
    if not any(entry.get("rstrip") for entry in entries):
        return False
    wanted = {entry["content"]: entry["content"] not in NOT_STRIPPED for entry in entries}
    strips = {entry["content"]: bool(entry.get("rstrip")) for entry in entries}
    other = next((text for text in wanted if strips[text] != wanted[text]), None)
    lacking = [text for text in (_STRIPPED, *NOT_STRIPPED) if text not in held.data["model"]["vocab"] | wanted]
    if other is not None or lacking:
        raise ValueError(
            f"has rstrip in some of its tokens, for which llama.cpp has Phi-3's rule alone ({other or lacking[0]!r} "
            "does not fit it)"
        )
    return True


def read_pieces(tokens: Iterable[tuple[int, str, int, float]], *, prefix: bool, strips: bool) -> dict[str, Any]:
    """Return the tokenizer.json of a file's tokens.

    Args:
        tokens: id, text, type and score of those that are no padding.
        prefix: a space precedes a text.
        strips: white space behind special tokens is stripped.
    """
    tokens = list(tokens)
    vocab = {text: identity for identity, text, _, _ in tokens}
    unknown = next((text for _, text, kind, _ in tokens if kind == UNKNOWN), None)
    added = [
        added_token(identity, text, special=kind != USER_DEFINED) | {"rstrip": strips and text not in NOT_STRIPPED}
        for identity, text, kind, _ in tokens
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    scores = {text: score for _, text, kind, score in tokens if kind == NORMAL}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges_by_score(scores, vocab, "the file"),
        },
    } | _text_steps(prefix=prefix)


def check_scores(scores: Mapping[str, float], where: str, remedy: str) -> None:
    """Refuse pieces that llama.cpp joins by place, not by rank."""
    held = sorted(scores.values())
    tied = most = 1
    for one, other in pairwise(held):
        tied = tied + 1 if one == other else 1
        most = max(most, tied)
    if most > _MAX_TIED:
        raise UserError(f"{where}: {most:,} tokens have one score, so no order of merges stands for it. {remedy}")
