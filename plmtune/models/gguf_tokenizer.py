"""The tokenizer in a GGUF file's metadata."""

from __future__ import annotations

import json
from typing import Any

from plmtune.errors import UserError
from plmtune.models.gguf_file import GGUFFile
from plmtune.models.gguf_pre import SPLITS, split_steps
from plmtune.models.gguf_sentencepiece import (
    BYTES,
    CONTROL,
    NORMAL,
    PHI3_NAMES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    check_scores,
    read_pieces,
)
from plmtune.tokenizers import tokenizer_json_writer
from plmtune.tokenizers.bpe import DIGITS_GPT2_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, Normalization
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import engine

# How a text is cut, by llama.cpp's name for it: pattern, normalization, and whether a token that is a whole
# piece is taken without looking at merges.
PRE_TOKENIZERS: dict[str, tuple[str, Normalization | None, bool]] = {
    "smollm": (DIGITS_GPT2_PATTERN, None, False),
    "starcoder": (DIGITS_GPT2_PATTERN, None, False),
    "qwen2": (QWEN2_PATTERN, "NFC", False),
    "llama-bpe": (LLAMA3_PATTERN, None, True),
    "smaug-bpe": (LLAMA3_PATTERN, None, False),
    "gpt-2": (GPT2_PATTERN, None, False),
}
# Of these llama.cpp puts bos before a text where the file does not say (tokenizer.ggml.add_bos_token).
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
# Other names of the same.
PRE_TOKENIZERS |= dict.fromkeys(_LLAMA3, PRE_TOKENIZERS["llama-bpe"])
PRE_TOKENIZERS |= dict.fromkeys(("deepseek-r1-qwen", "megrez"), PRE_TOKENIZERS["qwen2"])
PRE_TOKENIZERS |= dict.fromkeys(("phi-2", "olmo", "jais", "gigachat", "trillion"), PRE_TOKENIZERS["gpt-2"])
PRE_TOKENIZERS |= dict.fromkeys(("refact", "command-r", "codeshell", "exaone", "minerva-7b"), PRE_TOKENIZERS["smollm"])
PRE_TOKENIZERS["dbrx"] = PRE_TOKENIZERS["smaug-bpe"]
# llama.cpp does not read a list without merges; this one of bytes that UTF-8 never uses does not act.
NO_MERGE = "ÿ ÿ"
_REMEDY = "Give another with --tokenizer."


def read_tokenizer(file: GGUFFile, rows: int) -> Tokenizer:
    """Return the tokenizer that a file's metadata hold.

    Args:
        rows: of the model's embedding.

    Raises:
        UserError: if it cannot be represented with the same ids.
    """
    where, metadata = f"{file.path}, its tokenizer", file.metadata
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UserError(
            f"{where}: model {model!r:.80} is not supported, only byte-level BPE (gpt2) and SentencePiece's BPE "
            f"(llama) are. {_REMEDY}"
        )
    tokens, kinds = _list(file, "tokens", str), _list(file, "token_type", int)
    if len(kinds) != len(tokens) or len(tokens) > rows:
        raise UserError(f"{where}: {len(tokens)} tokens, their types and the model's {rows} rows do not fit together.")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    defaults = {"bos": 1, "eos": 2} if model == "llama" else {}
    eos, bos_id = _special(file, "eos", defaults), metadata.get("tokenizer.ggml.bos_token_id", defaults.get("bos"))
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token")
    if adds_bos is None:
        adds_bos = (pre in _LLAMA3 or model == "llama") and bos_id is not None
    bos = None
    if adds_bos or (type(bos_id) is int and 0 <= bos_id < len(kinds) and kinds[bos_id] in (UNKNOWN, CONTROL)):
        bos = _special(file, "bos", defaults)
        if bos == eos and not adds_bos:
            bos = None  # llama.cpp needs a token: files of tokenizers without one (Qwen2's) name eos
    seen: dict[str, int] = {}
    for identity, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != UNUSED and seen.setdefault(token, identity) != identity:  # else a padding row
            raise UserError(f"{where}: {token!r:.80} has the ids {seen[token]} and {identity}. {_REMEDY}")
    data = _sentencepiece(file, tokens, kinds, where) if model == "llama" else _byte_level(file, tokens, kinds, where)
    for entry in data["added_tokens"]:
        entry["special"] |= entry["content"] in (eos, bos)
    held = {entry["content"] for entry in data["added_tokens"]}
    data["added_tokens"] += [
        tokenizer_json_writer.added_token(seen[text], text, special=True)
        for text in dict.fromkeys((eos, bos))
        if text in seen and text not in held
    ]
    data["added_tokens"].sort(key=lambda entry: entry["id"])
    template = metadata.get("tokenizer.chat_template")
    try:
        # As JSON, so that a GGUF file is checked as a tokenizer.json is.
        data = json.loads(json.dumps(data))
        vocabulary = engine(data, where)
        template = template if isinstance(template, str) else None
        ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
        return Tokenizer(
            vocabulary,
            eos=eos,
            vocab_size=rows,
            chat_template=template,
            bos=bos,
            adds_bos=bool(adds_bos),
            ends=[identity for identity in ends if type(identity) is int and 0 <= identity < len(tokens)],
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error


def _byte_level(file: GGUFFile, tokens: list[str], kinds: list[int], where: str) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE."""
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS.keys() | SPLITS.keys():
        known = ", ".join(sorted(PRE_TOKENIZERS.keys() | SPLITS.keys()))
        raise UserError(f"{where}: the pre-tokenizer {pre!r:.80} is not supported ({known} are). {_REMEDY}")
    merges = _list(file, "merges", str)
    if not set(kinds) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED}:
        raise UserError(f"{where}: it holds tokens of types other than 1 to 5, so it is not byte-level. {_REMEDY}")
    pattern, normalization, ignore_merges = PRE_TOKENIZERS.get(pre, ("", None, False))
    data = tokenizer_json_writer.skeleton(pattern, normalization)
    if pre in SPLITS:
        data["pre_tokenizer"]["pretokenizers"] = split_steps(SPLITS[pre])
    held = [(i, token, kind) for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED]
    vocab = {token: identity for identity, token, _ in held}
    merges = [] if merges == [NO_MERGE] else merges
    data["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    data["added_tokens"] = [
        tokenizer_json_writer.added_token(identity, token, special=kind != USER_DEFINED)
        for identity, token, kind in held
        if kind != NORMAL
    ]
    return data


def _sentencepiece(file: GGUFFile, tokens: list[str], kinds: list[int], where: str) -> dict[str, Any]:
    """The tokenizer.json of pieces with scores."""
    metadata, scores = file.metadata, _list(file, "scores", float)
    if len(scores) != len(tokens) or not set(kinds) <= set(range(NORMAL, BYTES + 1)):
        raise UserError(
            f"{where}: {len(tokens)} tokens, {len(scores)} scores and types from 1 to 6 do not fit together."
        )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    name = str(metadata.get("general.name", "")).lower()
    held = [
        (identity, token, kind, score)
        for identity, (token, kind, score) in enumerate(zip(tokens, kinds, scores, strict=True))
        if kind != UNUSED
    ]
    check_scores({token: score for _, token, kind, score in held if kind == NORMAL and len(token) > 1}, where, _REMEDY)
    return read_pieces(held, prefix=bool(prefix), strips=any(part in name for part in PHI3_NAMES))


def _list(file: GGUFFile, name: str, kind: type) -> list[Any]:
    values = file.metadata.get(f"tokenizer.ggml.{name}")
    if isinstance(values, list) and all(type(value) is kind for value in values):
        return values
    raise UserError(f"{file.path}: tokenizer.ggml.{name} is missing or damaged. Give a tokenizer with --tokenizer.")


def _special(file: GGUFFile, name: str, defaults: dict[str, int]) -> str:
    """The text of the token that begins (bos) or ends (eos) a document."""
    key = f"tokenizer.ggml.{name}_token_id"
    identity, tokens = file.metadata.get(key, defaults.get(name)), file.metadata.get("tokenizer.ggml.tokens")
    if type(identity) is not int or not isinstance(tokens, list) or not 0 <= identity < len(tokens):
        raise UserError(
            f"{file.path}: {key} is {identity!r:.80}, which is not a token. Give a tokenizer with --tokenizer."
        )
    return str(tokens[identity])
