"""SentencePiece's BPE with the steps of each family's real tokenizer, and small GGUF files with any tokenizer."""

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from made_tokenizers import TEXTS

from plmtune.export.gguf_writer import write_gguf
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gguf_tokenizer import read_tokenizer
from plmtune.models.llama import llama
from plmtune.registry import component
from plmtune.tokenizers.library import Library
from plmtune.tokenizers.sentencepiece_files import read_model
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_json_writer import added_token

Data = dict[str, Any]
ROWS = 512
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
LLAMA2: Data = {"normalizer": {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}, "pre_tokenizer": None}
GEMMA: Data = {
    "normalizer": _REPLACE,
    "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
}


@cache
def trained() -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines()]), model_writer=out,
        vocab_size=480, hard_vocab_limit=False, character_coverage=0.98, minloglevel=2, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["<table>", "\n\n"],
    )  # fmt: skip
    return out.getvalue()


def made(changes: Data | None = None, added: list[Data] | None = None, **config: Any) -> Tokenizer:
    """A tokenizer of the trained model with other steps, and tokens behind its own."""
    data, _ = read_model(trained(), config, "made")
    size = len(data["model"]["vocab"])
    data["added_tokens"] += [entry | {"id": size + at} for at, entry in enumerate(added or [])]
    data = json.loads(json.dumps(data | (changes or {})))
    return Tokenizer(Library(data, "made"), eos="</s>", bos="<s>", adds_bos=True, vocab_size=ROWS)


def phi3() -> Tokenizer:
    tokens = [added_token(0, text, special=True) for text in ("<|endoftext|>", "<|user|>", "<|end|>")]
    found = made(LLAMA2, tokens)
    assert isinstance(found.vocabulary, Library)
    entries = found.vocabulary.data["added_tokens"]
    entries = [entry | {"rstrip": entry["content"] not in ("<unk>", "<s>", "<|endoftext|>")} for entry in entries]
    return made(LLAMA2 | {"added_tokens": entries})


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "Llama 2, TinyLlama": lambda: made(LLAMA2),
    "Mistral: a space before the first part": lambda: made(legacy=False),
    "a space before each part": lambda: made(legacy=True),
    "no space": lambda: made(add_prefix_space=False),
    "Gemma": lambda: made(GEMMA, [added_token(0, text, special=False) for text in ("<b>", "<unused0>")]),
    "Phi-3": phi3,
}


def written(tokenizer: Tokenizer, path: Path, rows: int = ROWS) -> list[str]:
    attention = component("attention", "gqa", num_kv_heads=1, head_dim=32)
    ffn = component("ffn", "swiglu", hidden_dim=32)
    sizes = {"embed_dim": 32, "num_layers": 1, "num_heads": 1, "max_seq_len": 512}
    return write_gguf(llama(rows, attention=attention, ffn=ffn, **sizes), tokenizer, path, kind="F16")


def read_back(path: Path, rows: int = ROWS) -> Tokenizer:
    with opened_gguf(path) as file:
        return read_tokenizer(file, rows)


def ids(tokenizer: Tokenizer, lines: list[str]) -> list[list[int]]:
    return [tokenizer.with_bos(tokenizer.encode(line, specials=True)) for line in lines]
