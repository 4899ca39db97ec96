"""Training of a byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Iterable

from plmtune.tokenizers import tokenizer_json, tokenizer_json_writer
from plmtune.tokenizers.bpe import CHATML_SPECIALS, QWEN2_PATTERN, SINGLE_BYTES
from plmtune.tokenizers.builtin_templates import CHATML_TEMPLATE
from plmtune.tokenizers.tokenizer import Tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with the `tokenizers` library; equal texts give equal tokenizers.

    It has Qwen2's pattern and NFC, and the three ChatML tokens last.

    Args:
        texts: documents; read once.
        vocab_size: all tokens, including the 256 bytes and the ChatML tokens.

    Raises:
        ValueError: if vocab_size leaves no room for a merge, or the texts do not give that many.
    """
    import tokenizers

    specials = CHATML_SPECIALS
    num_learned = vocab_size - len(specials)
    if num_learned <= len(SINGLE_BYTES):
        raise ValueError(f"vocab_size ({vocab_size}) must exceed 256 bytes and {len(specials)} special tokens")
    learner = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json_writer.skeleton(QWEN2_PATTERN, "NFC")))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_learned,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = learner.get_vocab_size()
    if learned < num_learned:
        raise ValueError(
            f"vocab_size ({vocab_size}) is more than this text gives ({learned + len(specials)}): "
            "train on more text or ask for fewer"
        )
    data = json.loads(learner.to_str())
    data["added_tokens"] = [
        tokenizer_json_writer.added_token(learned + index, special, special=True)
        for index, special in enumerate(specials)
    ]
    vocabulary = tokenizer_json.parse(data, "the trained tokenizer")
    return Tokenizer(vocabulary, chat_template=CHATML_TEMPLATE)
