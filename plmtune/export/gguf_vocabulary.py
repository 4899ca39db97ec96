"""A tokenizer as the keys of a GGUF file: byte-level BPE (gpt2) or SentencePiece's BPE (llama)."""

from __future__ import annotations

from typing import Any

from gguf import Keys, TokenType

from plmtune.errors import UserError
from plmtune.export.huggingface import answer_end, end_ids
from plmtune.models.gguf_pre import name_by_hash, name_by_splits
from plmtune.models.gguf_sentencepiece import PHI3_NAMES, is_sentencepiece, spaces_of, stripping, written_tokens
from plmtune.models.gguf_tokenizer import NO_MERGE, PRE_TOKENIZERS
from plmtune.tokenizers.bpe import SINGLE_BYTES, Vocabulary
from plmtune.tokenizers.jieba_sentencepiece import JiebaPieces
from plmtune.tokenizers.library import Library
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_json import NEVER_IN_UTF8, to_chars

_GGML = Keys.Tokenizer
_Token = tuple[str, TokenType]
# Texts of tokens that end an answer in llama.cpp in any file (special_eog_ids in its llama-vocab.cpp).
_KNOWN_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "<eos>"),
    *("<|end_of_text|>", "<｜end▁of▁sentence｜>"),
}


def vocabulary_keys(tokenizer: Tokenizer, rows: int) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of a tokenizer, and notes for the user.

    Args:
        rows: of the model's embedding.

    Raises:
        UserError: if llama.cpp has no tokenizer like it.
    """
    held = tokenizer.vocabulary
    if isinstance(held, JiebaPieces):
        raise UserError(
            "The tokenizer is PanGu-alpha's: jieba cuts text into words first, which llama.cpp cannot do, so GGUF "
            "cannot hold it. Use --to hf."
        )
    try:
        if isinstance(held, Vocabulary):
            keys, notes = _of_ranks(tokenizer, held, rows)
        elif is_sentencepiece(held):
            keys, notes = _of_sentencepiece(held, rows)
        else:
            keys, notes = _of_splits(tokenizer, held, rows)
    except ValueError as error:
        # llama.cpp aborts on text if a file has no tokenizer.
        raise UserError(f"The tokenizer {error}, so GGUF cannot hold it. Use --to hf.") from error
    if len(set(keys[_GGML.LIST])) < rows:
        raise UserError(
            "The tokenizer has two tokens of one text, at which llama.cpp aborts, so GGUF cannot hold it. Use --to hf."
        )
    keys |= {
        _GGML.EOS_ID: tokenizer.eos_id,
        _GGML.EOT_ID: answer_end(tokenizer),
        _GGML.PAD_ID: tokenizer.eos_id,
        # Without this key llama.cpp uses token 11 or 1; it precedes a text only if the next key is true.
        _GGML.BOS_ID: tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        _GGML.ADD_BOS: tokenizer.adds_bos,
    }
    others = [i for i in end_ids(tokenizer) if i not in (keys[_GGML.EOS_ID], keys[_GGML.EOT_ID])]
    if others:
        keys[_GGML.EOM_ID] = others.pop(0)
    # llama.cpp knows more by their text.
    if unknown := [keys[_GGML.LIST][i] for i in others if keys[_GGML.LIST][i] not in _KNOWN_ENDS]:
        notes = [
            *notes,
            f"A GGUF file names three tokens that end an answer: llama.cpp goes past {', '.join(unknown)}.",
        ]
    if tokenizer.chat_template is not None:
        keys[_GGML.CHAT_TEMPLATE] = tokenizer.chat_template
    return keys, notes


def shown_name(name: str, tokenizer: Tokenizer) -> str:
    """Return a model's name, which decides in llama.cpp whether white space behind special tokens is stripped."""
    held = tokenizer.vocabulary
    wanted = isinstance(held, Library) and stripping(held)
    named = [part for part in PHI3_NAMES if part in name.lower()]
    if wanted and not named:
        return f"{name} ({PHI3_NAMES[0]})"
    if named and not wanted:
        for part in named:
            at = name.lower().index(part)
            name = f"{name[: at + 3]}_{name[at + len(part) - 1 :]}"
    return name


def _of_ranks(tokenizer: Tokenizer, held: Vocabulary, rows: int) -> tuple[dict[str, Any], list[str]]:
    pre = name_by_hash(tokenizer)
    pattern, _, takes_whole = PRE_TOKENIZERS.get(pre or "", ("", None, False))
    if pre is None or pattern != held.pattern or (held.whole and not takes_whole):
        pre = next((name for name, (pattern, _, _) in PRE_TOKENIZERS.items() if pattern == held.pattern), None)
    if not held.merges:
        pre = "gpt-2"  # whatever the pieces are, each byte is a token
    if pre == "llama-bpe" and held.unreachable:
        pre = "smaug-bpe"  # the same pattern, but no whole piece becomes a token that merges do not make
    if pre is None:
        raise ValueError("cuts text in a way that llama.cpp does not know")
    if held.whole and pre in PRE_TOKENIZERS and not PRE_TOKENIZERS[pre][2]:
        raise ValueError(
            "has tokens that only a whole piece of text gives, which llama.cpp has for Llama 3's pattern alone"
        )
    tokens: dict[int, _Token] = {i: (to_chars(token), TokenType.NORMAL) for i, token in held.unreachable.items()}
    tokens |= {i: (to_chars(token), TokenType.NORMAL) for i, token in zip(held.ids, held.tokens, strict=True)}
    chars = [to_chars(token) for token in held.tokens]
    merges = [f"{chars[left]} {chars[right]}" for left, right in held.merges]
    notes = []
    if held.normalization is not None:
        notes.append(
            f"llama.cpp does not bring text to {held.normalization}, as this tokenizer does: normalize it before."
        )
    lacking = sorted({byte[0] for byte in set(SINGLE_BYTES) - set(held.tokens)} - NEVER_IN_UTF8)
    if lacking:
        notes.append(
            f"The tokenizer has no token for {len(lacking)} bytes ({', '.join(f'{byte:#04x}' for byte in lacking[:5])}"
            f"{', ...' if len(lacking) > 5 else ''}): llama.cpp may cut what stands around one elsewhere."
        )
    return _byte_level(pre, tokens, held, merges, rows), notes


def _of_splits(tokenizer: Tokenizer, held: Library, rows: int) -> tuple[dict[str, Any], list[str]]:
    """A byte-level BPE that tiktoken does not run."""
    model = held.data["model"]
    if isinstance(model["vocab"], list):
        raise ValueError("is of the type Unigram, of which plmtune writes none")
    pre = name_by_hash(tokenizer) or name_by_splits(held, PRE_TOKENIZERS)
    if pre is None:
        raise ValueError("cuts text in a way that llama.cpp does not know")
    tokens = {identity: (text, TokenType.NORMAL) for text, identity in model["vocab"].items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return _byte_level(pre, tokens, held, merges, rows), []


def _byte_level(
    pre: str, tokens: dict[int, _Token], held: Vocabulary | Library, merges: list[str], rows: int
) -> dict[str, Any]:
    tokens = tokens | {identity: (text, TokenType.USER_DEFINED) for text, identity in held.added.items()}
    tokens |= {identity: (text, TokenType.CONTROL) for text, identity in held.specials.items()}
    listed = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(rows)]
    return {
        _GGML.MODEL: "gpt2",
        _GGML.PRE: pre,
        _GGML.LIST: [text for text, _ in listed],
        _GGML.TOKEN_TYPE: [kind for _, kind in listed],
        _GGML.MERGES: merges or [NO_MERGE],
    }


def _of_sentencepiece(held: Library, rows: int) -> tuple[dict[str, Any], list[str]]:
    spaces = spaces_of(held)
    tokens = written_tokens(held)
    listed = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED, -10000.0)) for i in range(rows)]
    keys: dict[str, Any] = {
        _GGML.MODEL: "llama",
        _GGML.PRE: "default",
        _GGML.LIST: [text for text, _, _ in listed],
        _GGML.SCORES: [score for _, _, score in listed],
        _GGML.TOKEN_TYPE: [TokenType(kind) for _, kind, _ in listed],
        _GGML.ADD_PREFIX: spaces.prefix,
    }
    unknown = held.data["model"].get("unk_token")
    if unknown in held.data["model"]["vocab"]:
        keys[_GGML.UNK_ID] = held.data["model"]["vocab"][unknown]
    notes = [f"{spaces.difference}; this tokenizer does not."] if spaces.difference else []
    if stripping(held):
        notes.append(
            "llama.cpp strips white space behind special tokens, as this tokenizer does, because "
            f"{PHI3_NAMES[0]} is in the name that the file gives the model."
        )
    return keys, notes
