"""The tokenizer in a GGUF file's metadata."""

from __future__ import annotations

import json
from typing import Any

from plmtune.errors import UserError
from plmtune.models.gguf_file import GGUFFile
from plmtune.tokenizers import tokenizer_json, tokenizer_json_writer
from plmtune.tokenizers.bpe import DIGITS_GPT2_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, Normalization
from plmtune.tokenizers.tokenizer import Tokenizer

# How a text is cut, by llama.cpp's name for it: pattern, normalization, and whether a token that is a whole
# piece is taken without looking at merges.
PRE_TOKENIZERS: dict[str, tuple[str, Normalization | None, bool]] = {
    "smollm": (DIGITS_GPT2_PATTERN, None, False),
    "starcoder": (DIGITS_GPT2_PATTERN, None, False),
    "qwen2": (QWEN2_PATTERN, "NFC", False),
    "llama-bpe": (LLAMA3_PATTERN, None, True),
    "llama3": (LLAMA3_PATTERN, None, True),
    "llama-v3": (LLAMA3_PATTERN, None, True),
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
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)


def read_tokenizer(file: GGUFFile, rows: int) -> Tokenizer:
    """Return the tokenizer that a file's metadata hold.

    Args:
        rows: of the model's embedding.

    Raises:
        UserError: if it cannot be represented with the same ids.
    """
    remedy = "Give another with --tokenizer."
    where, metadata = f"{file.path}, its tokenizer", file.metadata
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise UserError(f"{where}: model {model!r:.80} is not supported, only byte-level BPE (gpt2) is. {remedy}")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UserError(f"{where}: the pre-tokenizer {pre!r:.80} is not supported ({known} are). {remedy}")
    tokens, merges = _list(file, "tokens", str), _list(file, "merges", str)
    merges = [] if merges == [NO_MERGE] else merges
    kinds = _list(file, "token_type", int)
    if len(kinds) != len(tokens) or len(tokens) > rows:
        raise UserError(f"{where}: {len(tokens)} tokens, their types and the model's {rows} rows do not fit together.")
    if not set(kinds) <= {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED}:
        raise UserError(f"{where}: it holds tokens of types other than 1 to 5, so it is not byte-level. {remedy}")
    eos, bos_id = _special(file, "eos"), metadata.get("tokenizer.ggml.bos_token_id")
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token")
    adds_bos = pre in _LLAMA3 and bos_id is not None if adds_bos is None else bool(adds_bos)
    bos = None
    if adds_bos or (type(bos_id) is int and 0 <= bos_id < len(kinds) and kinds[bos_id] in (_UNKNOWN, _CONTROL)):
        bos = _special(file, "bos")
        if bos == eos and not adds_bos:
            bos = None  # llama.cpp needs a token: files of tokenizers without one (Qwen2's) name eos
    vocab: dict[str, int] = {}
    added = []
    for identity, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == _UNUSED:  # a padding row
            continue
        if token in vocab:
            raise UserError(f"{where}: {token!r:.80} has the ids {vocab[token]} and {identity}. {remedy}")
        vocab[token] = identity
        if kind != _NORMAL or token in (eos, bos):
            special = kind != _USER_DEFINED or token in (eos, bos)
            added.append(tokenizer_json_writer.added_token(identity, token, special=special))
    pattern, normalization, ignore_merges = PRE_TOKENIZERS[pre]
    data = tokenizer_json_writer.skeleton(pattern, normalization)
    data["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    data["added_tokens"] = added
    template = metadata.get("tokenizer.chat_template")
    try:
        # As JSON, so that a GGUF file is checked as a tokenizer.json is.
        vocabulary = tokenizer_json.parse(json.loads(json.dumps(data)), where)
        template = template if isinstance(template, str) else None
        ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
        return Tokenizer(
            vocabulary,
            eos=eos,
            vocab_size=rows,
            chat_template=template,
            bos=bos,
            adds_bos=adds_bos,
            ends=[identity for identity in ends if type(identity) is int and 0 <= identity < len(tokens)],
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error


def _list(file: GGUFFile, name: str, kind: type) -> list[Any]:
    values = file.metadata.get(f"tokenizer.ggml.{name}")
    if isinstance(values, list) and all(type(value) is kind for value in values):
        return values
    raise UserError(f"{file.path}: tokenizer.ggml.{name} is missing or damaged. Give a tokenizer with --tokenizer.")


def _special(file: GGUFFile, name: str) -> str:
    """The text of the token that begins (bos) or ends (eos) a document."""
    key = f"tokenizer.ggml.{name}_token_id"
    identity, tokens = file.metadata.get(key), file.metadata.get("tokenizer.ggml.tokens")
    if type(identity) is not int or not isinstance(tokens, list) or not 0 <= identity < len(tokens):
        raise UserError(
            f"{file.path}: {key} is {identity!r:.80}, which is not a token. Give a tokenizer with --tokenizer."
        )
    return str(tokens[identity])
