"""SentencePiece's tokenizer.model as a tokenizer.json, by the rules of transformers' converters."""

from __future__ import annotations

import base64
from typing import Any

from plmtune.errors import UserError
from plmtune.tokenizers.bpe import MAX_ID
from plmtune.tokenizers.tokenizer_json_writer import added_token, puts_before

_UNIGRAM, _BPE = 1, 2  # trainer_spec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of pieces
_MAX_PAIRS = 1 << 20


def read_model(content: bytes, config: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a tokenizer.json, and the configuration with the tokens that the model names.

    Args:
        config: tokenizer_config.json: `add_bos_token`, `add_prefix_space` and `legacy` count, as in transformers.

    Raises:
        UserError: if it is no such model, or has what the library does not.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    try:
        proto: Any = messages.ModelProto.FromString(content)
    except DecodeError:
        proto = None
    if proto is None or not proto.pieces:
        if content[:200].split(b"\n")[0].count(b" ") == 1:
            raise UserError(f"{where} holds tiktoken's ranks. Rename it to a name that ends with .tiktoken.")
        raise UserError(f"{where} is no SentencePiece model.")
    trained, normalized = proto.trainer_spec, proto.normalizer_spec
    if trained.model_type not in (_UNIGRAM, _BPE):
        raise UserError(f"{where}: the model type {trained.model_type} is not supported, only Unigram and BPE are.")
    if trained.treat_whitespace_as_suffix or not normalized.escape_whitespaces:
        raise UserError(f"{where}: white space that follows its word, or stays as it is, is not supported.")
    if any(piece.type == _UNUSED for piece in proto.pieces):
        raise UserError(f"{where}: pieces of the type UNUSED are not supported.")
    pieces = [piece.piece for piece in proto.pieces]
    if len({*pieces}) != len(pieces) or len(pieces) > MAX_ID:
        raise UserError(f"{where}: {len(pieces):,} pieces, of which two are equal or which are more than {MAX_ID:,}.")
    space = config.get("add_prefix_space")
    space = normalized.add_dummy_prefix if space is None else bool(space)
    data: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(identity, piece.piece, special=piece.type != _USER_DEFINED)
            for identity, piece in enumerate(proto.pieces)
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(normalized)},
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            # A text that Strip shortened does not begin at its first character, which "first" means.
            "prepend_scheme": (
                ("always" if config.get("legacy", normalized.remove_extra_whitespaces) else "first")
                if space
                else "never"
            ),
            "split": False,
        },
        "post_processor": None,
        "decoder": _decoder(trained.byte_fallback, space),
        "model": _unigram(proto) if trained.model_type == _UNIGRAM else _bpe(proto, where),
    }
    named = {"bos_token": trained.bos_id, "eos_token": trained.eos_id}
    config = {key: pieces[identity] for key, identity in named.items() if 0 <= identity < len(pieces)} | config
    if config.get("add_bos_token"):
        bos: Any = config.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        if bos not in pieces:
            raise UserError(f"{where}: add_bos_token is true, but bos_token {bos!r:.40} is none of its pieces.")
        data["post_processor"] = puts_before({bos: pieces.index(bos)})
    return data, config


def _normalizers(spec: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        steps.append(
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode()}
        )
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return steps


def _decoder(byte_fallback: bool, space: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    steps += [{"type": "ByteFallback"}] if byte_fallback else []
    steps += [{"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []
    return {"type": "Sequence", "decoders": steps}


def _unigram(proto: Any) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": proto.trainer_spec.unk_id,
        "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _bpe(proto: Any, where: str) -> dict[str, Any]:
    vocab = {piece.piece: identity for identity, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": proto.trainer_spec.unk_piece or None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges_by_score(scores, vocab, where),
    }


def merges_by_score(scores: dict[str, float], vocab: dict[str, int], where: str) -> list[list[str]]:
    """Return the merges of pieces: SentencePiece joins the neighbours whose piece has the highest score.

    Of one score it joins the leftmost first. So a run grows from its left, and the pair with the longest left part is
    first, as in transformers.
    """
    pairs = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                pairs.append((-score, -len(left), -len(right), vocab[left], vocab[right], left, right))
        if len(pairs) > _MAX_PAIRS:
            raise UserError(f"{where}: its pieces are joined in more than {_MAX_PAIRS:,} ways.")
    return [[left, right] for *_, left, right in sorted(pairs)]
