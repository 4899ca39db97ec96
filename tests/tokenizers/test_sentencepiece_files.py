"""tokenizer.model files against the sentencepiece package and transformers."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from made_tokenizers import TEXTS

from plmtune.errors import UserError
from plmtune.tokenizers.tokenizer_files import load_tokenizer

# As Llama 2, TinyLlama and Mistral; as Gemma; as T5.
_IDENTITY = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
_AS_GEMMA = {"add_dummy_prefix": False, "user_defined_symbols": ["<table>", "\n\n"]}
TRAINED: dict[str, dict[str, Any]] = {
    "BPE": {"model_type": "bpe"} | _IDENTITY,
    "BPE without a first space": {"model_type": "bpe"} | _IDENTITY | _AS_GEMMA,
    "Unigram": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
}
HARD = [
    *(*TEXTS, "", " ", "a", " a", "a ", "  a  b   c    ", "\t\ttabs\t", " " * 70, "a▁▁ \u2581a"),
    "你好，世界 12３４５ ½ Ⅷ emoji 👩‍👩‍👧‍👦🏳️‍🌈 🇨🇳 \u200d\u200b\ufeff \ufffd \x01",
    "if (a) {\n\n    b; }\r\n<table> <table>x",
]


def trained(kind: str, place: Path) -> sentencepiece.SentencePieceProcessor:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines()]), model_writer=out,
        vocab_size=500, hard_vocab_limit=False, character_coverage=0.98, minloglevel=2, **TRAINED[kind],
    )  # fmt: skip
    (place / "tokenizer.model").write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


@pytest.mark.parametrize("kind", TRAINED)
def test_ids_are_those_of_sentencepiece(kind: str, tmp_path: Path) -> None:
    theirs, ours = trained(kind, tmp_path), load_tokenizer(tmp_path)
    # transformers puts no second space before a text that begins with one.
    texts = [text for text in HARD if kind != "BPE" or not text.startswith(" ")]
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    known = [text for text in texts if theirs.unk_id() not in theirs.encode(text)]
    assert [ours.decode(ours.encode(text)) for text in known] == [theirs.decode(theirs.encode(text)) for text in known]
    assert (ours.eos, ours.bos, ours.adds_bos) == ("</s>", "<s>", False)
    assert 2 in ours.encode("a</s>b", specials=True) and 2 not in ours.encode("a</s>b")
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint
    assert [again.encode(text) for text in HARD] == [ours.encode(text) for text in HARD]


@pytest.mark.parametrize("flag", [False, True])
def test_the_flag_puts_bos_before_a_text_as_in_transformers(flag: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trained("BPE", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": flag})
    )
    ours, theirs = load_tokenizer(tmp_path), transformers.LlamaTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        assert ours.with_bos(ours.encode(text, specials=True)) == theirs(text)["input_ids"], text


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for content, said in ((b"IQ== 0\nIg== 1\n", "tiktoken's ranks"), (b"\xff" * 99, "is no SentencePiece model")):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=said):
            load_tokenizer(tmp_path)
