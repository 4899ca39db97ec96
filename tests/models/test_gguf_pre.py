"""llama.cpp's names of pre-tokenizers, by the ids of a text and by how text is cut."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from made_sentencepiece import ROWS, ids, read_back, written
from made_tokenizers import FAMILIES, TEXTS, tokenizer_json

from plmtune.errors import UserError
from plmtune.export import probe_texts
from plmtune.export.gguf_vocabulary import vocabulary_keys
from plmtune.export.runtimes import open_runtime
from plmtune.models import gguf_pre
from plmtune.models.gguf_pre import HASHES, SPLITS, TEXT, name_by_hash
from plmtune.models.gguf_tokenizer import PRE_TOKENIZERS
from plmtune.tokenizers.library import Library
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import engine
from plmtune.tokenizers.tokenizer_json import parse

PRE = "tokenizer.ggml.pre"


def made(family: str, **changes: Any) -> Tokenizer:
    data = json.loads(tokenizer_json(family)) | changes
    return Tokenizer(engine(data, family), eos=FAMILIES[family][1], vocab_size=768)


def llama3() -> Any:
    """With tokens that only a whole piece of text gives, but none of two parts, which tiktoken does not run."""
    data = json.loads(tokenizer_json("Llama 3"))
    vocab = data["model"]["vocab"]
    vocab[data["added_tokens"][-1]["content"] + "?"] = vocab.pop("qx")
    return parse(data, "Llama 3")


def known_as(tokenizer: Tokenizer, name: str, before: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    digest = sha256(str([*before, *tokenizer.encode(TEXT, specials=True)]).encode()).hexdigest()
    monkeypatch.setattr(gguf_pre, "HASHES", HASHES | {digest: name})


class TestByHash:
    def test_a_known_tokenizer_gets_its_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = made("GPT-2")
        assert name_by_hash(tokenizer) is None
        assert vocabulary_keys(tokenizer, 768)[0][PRE] == "gpt-2"
        known_as(tokenizer, "phi-2", [], monkeypatch)
        assert vocabulary_keys(tokenizer, 768)[0][PRE] == "phi-2"

    def test_the_token_that_begins_a_text_counts_added_or_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        held, bos = llama3(), "<|begin_of_text|>"
        tokenizer = Tokenizer(held, eos="<|eot_id|>", bos=bos)
        known_as(tokenizer, "falcon3", [tokenizer.specials[bos]], monkeypatch)
        assert name_by_hash(tokenizer) == name_by_hash(Tokenizer(held, eos="<|eot_id|>", bos=bos, adds_bos=True))
        assert vocabulary_keys(tokenizer, tokenizer.vocab_size)[0][PRE] == "falcon3"

    @pytest.mark.parametrize("name", ["qwen2", "smaug-bpe"])
    def test_a_name_that_cuts_otherwise_is_not_taken(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = Tokenizer(llama3(), eos="<|eot_id|>", vocab_size=768)
        known_as(tokenizer, name, [], monkeypatch)
        assert vocabulary_keys(tokenizer, 768)[0][PRE] == "llama-bpe"

    def test_names_that_files_are_read_by_are_names_of_hashes_or_of_patterns(self) -> None:
        assert set(SPLITS) <= set(HASHES.values())
        assert not set(SPLITS) & set(PRE_TOKENIZERS)


class TestSplits:
    @pytest.mark.parametrize("family", ["DeepSeek", "Llama 3"])
    def test_what_tiktoken_does_not_run_gives_llama_cpps_ids(self, family: str, tmp_path: Path) -> None:
        tokenizer = made(family)
        assert isinstance(tokenizer.vocabulary, Library)
        lines = [*probe_texts.lines(tuple(tokenizer.specials)), *TEXTS]
        written(tokenizer, tmp_path / "a.gguf", rows=768)
        found = read_back(tmp_path / "a.gguf", rows=768)
        assert ids(found, lines) == ids(tokenizer, lines)
        pytest.importorskip("xllamacpp")
        with open_runtime(tmp_path / "a.gguf", threads=1, prefer="xllamacpp") as runtime:
            assert ids(tokenizer, lines) == [runtime.encode(line) for line in lines]

    def test_other_splits_are_named(self) -> None:
        steps = json.loads(tokenizer_json("DeepSeek"))["pre_tokenizer"]["pretokenizers"]
        other = made("DeepSeek", pre_tokenizer={"type": "Sequence", "pretokenizers": steps[1:]})
        with pytest.raises(UserError, match=r"cuts text in a way that llama.cpp does not know"):
            vocabulary_keys(other, ROWS)
