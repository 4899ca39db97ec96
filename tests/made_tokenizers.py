"""Small tokenizers with the structure of each family's real tokenizer.json, made by the `tokenizers` library."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from plmtune.tokenizers.bpe import LLAMA3_PATTERN, QWEN2_PATTERN

TEXTS = [
    "the quick brown fox jumps over the lazy dog and the cat, isn't it? They'LL see 12345 or 3.14\n" * 4,
    "你好，世界。床前明月光，疑是地上霜。 日本語のテキスト かな カナ\n" * 4,
    "def f(x: int) -> str:\n\treturn f'{x:>10}'  # done\n\n\n    if x != 0x1F:\r\n        pass\r\n" * 4,
    "Привет, мир! עברית العربية हिन्दी ไทย cafe\u0301 café ﬁ Å emoji 👩‍👩‍👧 🇨🇳 👍🏽\n" * 2,
]
_DEEPSEEK = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def _trained(made: tokenizers.Tokenizer, specials: Sequence[str], byte_level: bool, size: int = 700) -> dict[str, Any]:
    """Train a BPE; special tokens and the bytes are its first, as in SentencePiece, or all bytes are."""
    first = [] if byte_level else [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=first, initial_alphabet=alphabet, limit_alphabet=300, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    data: dict[str, Any] = json.loads(made.to_str())
    data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["content"] in specials]
    if byte_level:
        other = tokenizers.Tokenizer.from_str(json.dumps(data))
        other.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
        data = json.loads(other.to_str())
    return data


def _byte_level(
    cuts: Sequence[Any], specials: Sequence[str], normalizer: Any = None, **settings: Any
) -> dict[str, Any]:
    made = tokenizers.Tokenizer(models.BPE(**settings))
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=not cuts)])
    made.decoder = decoders.ByteLevel()
    return _trained(made, specials, True)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _sentencepiece(normalizer: Any, pre: Any, strips: bool, specials: Sequence[str]) -> dict[str, Any]:
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre is not None:
        made.pre_tokenizer = pre
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strips else [])])
    return _trained(made, specials, False)


def _with_bos(data: dict[str, Any], bos: str) -> dict[str, Any]:
    made = tokenizers.Tokenizer.from_str(json.dumps(data))
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return dict(json.loads(made.to_str()))


_LLAMA2_NORMALIZER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _llama3() -> dict[str, Any]:
    data = _byte_level([_split(LLAMA3_PATTERN)], ["<|begin_of_text|>", "<|eot_id|>"], ignore_merges=True)
    size = len(data["model"]["vocab"])
    # Tokens that merges do not make: only a whole piece of text gives them, in the last "q" and "x" are neighbours.
    more = ["theand", "foxes", "qx"]
    data["model"]["vocab"] |= {text: size + 2 + at for at, text in enumerate(more)}
    data["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    return _with_bos(data, "<|begin_of_text|>")


def _phi3() -> dict[str, Any]:
    data = _sentencepiece(_LLAMA2_NORMALIZER, None, True, ["<unk>", "<s>", "</s>"])
    made = tokenizers.Tokenizer.from_str(json.dumps(data))
    made.add_special_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])
    made.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("<tool>s", single_word=True)])
    return dict(json.loads(made.to_str()))


def _gemma() -> dict[str, Any]:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    data = _sentencepiece(
        normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False, specials
    )
    made = tokenizers.Tokenizer.from_str(json.dumps(data))
    made.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "▁▁", "▁▁▁▁", "<table>")])
    return _with_bos(dict(json.loads(made.to_str())), "<bos>")


def _unigram() -> dict[str, Any]:
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>", "<extra>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens(["<tool>"])
    return dict(json.loads(made.to_str()))


def _mistral_tekken() -> dict[str, Any]:
    return _byte_level(
        [_split(LLAMA3_PATTERN.replace("{1,3}", ""))], ["<unk>", "<s>", "</s>", "[INST]"], ignore_merges=True
    )


# Family -> its tokenizer.json, and the token that ends a document.
FAMILIES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "GPT-2": (lambda: _byte_level([], ["<|endoftext|>"]), "<|endoftext|>"),
    "Llama 3": (_llama3, "<|eot_id|>"),
    "Qwen2, Qwen3": (
        lambda: _byte_level([_split(QWEN2_PATTERN)], ["<|endoftext|>", "<|im_end|>"], normalizers.NFC()),
        "<|endoftext|>",
    ),
    "SmolLM2": (
        lambda: _byte_level([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)], ["<|endoftext|>"]),
        "<|endoftext|>",
    ),
    "SmolLM3": (lambda: _byte_level([_split(LLAMA3_PATTERN)], ["<|end_of_text|>", "<|im_end|>"]), "<|im_end|>"),
    "DeepSeek": (
        lambda: _byte_level(
            [_split(r"\p{N}{1,3}"), _split("[一-龥぀-ゟ゠-ヿ]+"), _split(_DEEPSEEK)],
            ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
        ),
        "<｜end▁of▁sentence｜>",
    ),
    "Mistral (Tekken)": (_mistral_tekken, "</s>"),
    "Llama 2, TinyLlama": (
        lambda: _with_bos(_sentencepiece(_LLAMA2_NORMALIZER, None, True, ["<unk>", "<s>", "</s>"]), "<s>"),
        "</s>",
    ),
    "Mistral (SentencePiece)": (
        lambda: _with_bos(
            _sentencepiece(
                None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True, ["<unk>", "<s>", "</s>"]
            ),
            "<s>",
        ),
        "</s>",
    ),
    "Phi-3": (_phi3, "</s>"),
    "Gemma": (_gemma, "<eos>"),
    "Unigram": (_unigram, "</s>"),
}


@cache
def tokenizer_json(family: str) -> str:
    return json.dumps(FAMILIES[family][0]())
