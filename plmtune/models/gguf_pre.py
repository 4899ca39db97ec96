"""llama.cpp's names of pre-tokenizers (tokenizer.ggml.pre), found as its converter finds them: by the ids of a text.

A tokenizer that is not listed gets the name of its pattern, or of its splits. Verification compares ids in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from plmtune.tokenizers.bpe import Normalization
from plmtune.tokenizers.library import Library, steps_of
from plmtune.tokenizers.tokenizer import Tokenizer

# The text of get_vocab_base_pre in llama.cpp's converter.
TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= "
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
# sha256 of the list of ids -> name; the model that it was taken from.
HASHES = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",  # Smaug-Llama-3
    "d353350c764d8c3b39c763113960e4fb4919bea5fbf208a0e3b22e8469dc7406": "llama4",  # Llama 4
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen1.5 to Qwen3
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen3-Embedding
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",  # R1-Distill-Qwen
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",  # Megrez-3B
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",  # GPT-2
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",  # Phi-2
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",  # GPT-4o, Phi-4-mini
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",  # SmolLM, SmolLM2
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",  # StarCoder2
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",  # DeepSeek-V3
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",  # DeepSeek-LLM, -V2
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",  # DeepSeek-Coder
    "9d70134b369a70e5735009b6de918f7581b5211f7c074d1f89f753aea8248af1": "youtu",  # Youtu-LLM
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo, Ministral
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",  # Falcon 3
    "169bf0296a13c4d9b7672313f749eb36501d931022de052aad6e36f2bf34dd51": "lfm2",  # LFM2
    "4e2b24cc4770243d65a2c9ec19770a72f08cffc161adbb73fcbb6b7dd45a0aae": "exaone",  # EXAONE 3
    "9c2227e4dd922002fb81bde4fc02b0483ca4f12911410dee2255e4987644e3f8": "command-r",  # Command R
}
# How a text is cut by several expressions, one after the other.
SPLITS: dict[str, tuple[str, ...]] = {
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
}


def name_by_hash(tokenizer: Tokenizer) -> str | None:
    """Return the name of a tokenizer that llama.cpp's converter knows; None: it does not."""
    ids = tokenizer.encode(TEXT, specials=True)
    # The converter's ids begin with what transformers puts before a text, which changed with its versions.
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    before = dict.fromkeys((bos, tokenizer.first_ids, ()))
    digests = (sha256(str([*first, *ids]).encode()).hexdigest() for first in before)
    return next((HASHES[digest] for digest in digests if digest in HASHES), None)


def name_by_splits(held: Library, patterns: Mapping[str, tuple[str, Normalization | None, bool]]) -> str | None:
    """Return the name of the expressions that a tokenizer.json cuts by; None: there is none.

    Args:
        patterns: one expression by name, the normalization before it, and whether a piece that is a token is taken
            without merges.
    """
    first = [step.get("type") for step in steps_of(held.data, "normalizer", held.where)]
    known: list[tuple[str, tuple[str, ...], list[Any], bool]]
    known = [(name, (pattern,), [form] if form else [], whole) for name, (pattern, form, whole) in patterns.items()]
    known += [(name, splits, [], False) for name, splits in SPLITS.items()]
    wanted = _plain(steps_of(held.data, "pre_tokenizer", held.where))
    whole = bool(held.data["model"].get("ignore_merges"))
    return next(
        (
            name
            for name, splits, forms, takes_whole in known
            if (forms, takes_whole) == (first, whole) and _plain(split_steps(splits)) == wanted
        ),
        None,
    )


def split_steps(patterns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the pre-tokenizer of a tokenizer.json that cuts by expressions, one after the other."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return [
        *splits,
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ]


def _plain(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
