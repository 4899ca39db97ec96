"""Texts of exports: SentencePiece's spaces, which llama.cpp treats in its own way."""

from collections.abc import Sequence
from typing import Any

import pytest
from made_sentencepiece import LLAMA2, made

from plmtune.export.contents import Contents
from plmtune.export.report import Report
from plmtune.export.verify_text import compare_ids
from plmtune.models.gguf_sentencepiece import as_in_llama_cpp
from plmtune.tokenizers.tokenizer import Tokenizer


class Runtime:
    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name, self.tokenizer = name, tokenizer

    def encode(self, text: str) -> Sequence[int]:
        return self.tokenizer.with_bos(self.tokenizer.encode(text, specials=True))


def report(runtime: Any, tokenizer: Tokenizer) -> Report:
    found = Report("a.gguf", "a", runtime.name, "F16", 0)
    compare_ids(found, runtime, tokenizer, Contents("F16"))
    return found


def test_llama_cpps_own_spaces_are_a_figure_and_other_ids_fail() -> None:
    tokenizer = made(legacy=False)
    found = report(Runtime("llama.cpp (xllamacpp)", as_in_llama_cpp(tokenizer)), tokenizer)
    assert found.passed
    (figure,) = [check for check in found.checks if check.name == "token ids: texts with other spaces"]
    assert 0 < figure.value < 40
    assert figure.remark is not None and "llama.cpp puts a space also behind special tokens" in figure.remark
    assert not report(Runtime("llama.cpp (xllamacpp)", tokenizer), tokenizer).passed


@pytest.mark.parametrize(("name", "config"), [("transformers", {"legacy": False}), ("llama.cpp (xllamacpp)", {})])
def test_without_such_a_difference_ids_are_compared_as_they_are(name: str, config: dict[str, Any]) -> None:
    tokenizer = made(**config) if config else made(LLAMA2)
    found = report(Runtime(name, tokenizer), tokenizer)
    assert found.passed
    assert [check.name for check in found.checks] == ["token ids: texts that differ"]
