"""SentencePiece's BPE in GGUF files: ids are those of llama.cpp, from what is written and of what is read back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from made_sentencepiece import LLAMA2, ROWS, TOKENIZERS, Data, ids, made, phi3, read_back, trained, written
from made_tokenizers import TEXTS, tokenizer_json

from plmtune.errors import UserError
from plmtune.export import probe_texts
from plmtune.export.gguf_vocabulary import shown_name, vocabulary_keys
from plmtune.export.runtimes import open_runtime
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gguf_sentencepiece import as_in_llama_cpp
from plmtune.models.gguf_tokenizer import read_tokenizer
from plmtune.tokenizers.library import Library
from plmtune.tokenizers.tokenizer import Tokenizer


class TestFiles:
    @pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
    def test_give_the_same_ids_in_llama_cpp_and_read_back(self, make: Callable[[], Tokenizer], tmp_path: Path) -> None:
        tokenizer = make()
        written(tokenizer, tmp_path / "a.gguf")
        lines = [*probe_texts.lines(tuple(tokenizer.specials)), *TEXTS, *(" " * n + "x" for n in range(1, 40)), "a▁▁b"]
        found, wanted = read_back(tmp_path / "a.gguf"), as_in_llama_cpp(tokenizer)
        assert ids(found, lines) == ids(wanted, lines)
        assert [found.decode(found.encode(text)) for text in TEXTS] == [wanted.decode(wanted.encode(t)) for t in TEXTS]
        assert (found.eos, found.bos, found.adds_bos) == ("</s>", "<s>", True)
        assert found.specials == tokenizer.specials
        pytest.importorskip("xllamacpp")
        with open_runtime(tmp_path / "a.gguf", threads=1, prefer="xllamacpp") as runtime:
            assert ids(wanted, lines) == [runtime.encode(line) for line in lines]

    def test_say_where_llama_cpp_puts_more_spaces(self, tmp_path: Path) -> None:
        (note,) = written(made(legacy=False), tmp_path / "a.gguf")
        assert note == (
            "llama.cpp puts a space also behind special tokens and before a text that begins with one; this tokenizer "
            "does not."
        )
        assert written(made(LLAMA2), tmp_path / "b.gguf") == []

    def test_hold_the_types_and_scores_of_sentencepiece(self) -> None:
        keys, _ = vocabulary_keys(made(LLAMA2), ROWS)
        model = sentencepiece.SentencePieceProcessor(model_proto=trained())
        kinds, scores = keys["tokenizer.ggml.token_type"], keys["tokenizer.ggml.scores"]
        assert keys["tokenizer.ggml.model"] == "llama"
        assert keys["tokenizer.ggml.tokens"][: len(model)] == [model.id_to_piece(i) for i in range(len(model))]
        assert [int(kind) for kind in kinds[:6]] == [2, 3, 3, 4, 4, 6]
        assert {int(kind) for kind in kinds[len(model) :]} == {5}
        normal = [i for i in range(len(model)) if kinds[i] == 1]
        assert sorted(normal, key=lambda i: -scores[i]) == sorted(normal, key=lambda i: -model.get_score(i))

    def test_name_up_to_three_tokens_that_end_an_answer(self, tmp_path: Path) -> None:
        tokenizer = phi3()
        more = [tokenizer.specials[text] for text in ("<|endoftext|>", "<|user|>", "<|end|>")]
        tokenizer = Tokenizer(tokenizer.vocabulary, eos="</s>", vocab_size=ROWS, ends=more[:1])
        written(tokenizer, tmp_path / "a.gguf")
        assert read_back(tmp_path / "a.gguf").end_ids == tokenizer.end_ids
        tokenizer = Tokenizer(tokenizer.vocabulary, eos="</s>", vocab_size=ROWS, ends=[more[2], more[1], more[0]])
        assert "A GGUF file names three tokens that end an answer: llama.cpp goes past <|user|>." in written(
            tokenizer, tmp_path / "b.gguf"
        )

    def test_without_keys_have_llama_cpps_defaults(self, tmp_path: Path) -> None:
        written(made(LLAMA2), tmp_path / "a.gguf")
        with opened_gguf(tmp_path / "a.gguf") as file:
            for key in ("add_space_prefix", "add_bos_token", "bos_token_id", "eos_token_id"):
                del file.metadata[f"tokenizer.ggml.{key}"]
            found = read_tokenizer(file, ROWS)
        assert (found.eos, found.bos, found.adds_bos) == ("</s>", "<s>", True)
        assert ids(found, TEXTS) == ids(made(LLAMA2), TEXTS)

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("scores", [0.5] * ROWS, r"\d+ tokens have one score, so no order of merges stands for it. .*--tokenizer"),
            ("scores", [0.5] * 9, "512 tokens, 9 scores and types"),
            ("scores", [], "0 scores"),
            ("token_type", [7] * ROWS, "types from 1 to 6 do not fit"),
            ("model", "t5", r"model 't5' is not supported, only byte-level BPE \(gpt2\) and SentencePiece's BPE"),
        ],
    )
    def test_with_wrong_keys_are_refused(self, key: str, value: Any, said: str, tmp_path: Path) -> None:
        written(made(LLAMA2), tmp_path / "a.gguf")
        with opened_gguf(tmp_path / "a.gguf") as file, pytest.raises(UserError, match=said):
            file.metadata[f"tokenizer.ggml.{key}"] = value
            read_tokenizer(file, ROWS)


def spoilt(change: Callable[[Data], None]) -> Tokenizer:
    data = json.loads(made(LLAMA2).as_json)
    change(data)
    return Tokenizer(Library(data, "made"), eos="</s>")


def _drop_byte(data: Data) -> None:
    data["model"]["vocab"]["<spare>"] = data["model"]["vocab"].pop("<0x80>")


def _strip_some(data: Data) -> None:
    data["added_tokens"][1]["rstrip"] = True


def _mix(data: Data) -> None:
    """Two ways to make each of many pieces, where one way of all comes before the other of all."""
    vocab, signs = data["model"]["vocab"], [chr(0x1000 + at) for at in range(80)]
    for text in [sign * count for sign in signs for count in (1, 2, 3)]:
        vocab[text] = len(vocab)
    data["model"]["merges"] += [[sign * a, sign * b] for a, b in ((1, 1), (2, 1), (1, 2)) for sign in signs]


def _cut_words(data: Data) -> None:
    data["normalizer"] = None
    data["model"]["vocab"]["▁▁"] = len(data["model"]["vocab"])
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda data: data["model"]["merges"].pop(7), "does not join .* as llama.cpp does"),
            (_mix, "has merges that are in no order of the pieces"),
            (_drop_byte, "has no token for 1 bytes .<0x80>."),
            (lambda data: data["added_tokens"][3].update(lstrip=True), "has lstrip in its token '<table>'"),
            (lambda data: data["added_tokens"][3].update(single_word=True), "has single_word in its token"),
            (_strip_some, "for which llama.cpp has Phi-3's rule alone"),
            (lambda data: data.update(normalizer={"type": "NFKC"}), "changes and cuts a text by NFKC"),
            (lambda data: data.update(normalizer=None), "changes and cuts a text by nothing"),
            (_cut_words, "cuts a text before each space .Metaspace., and llama.cpp would join spaces"),
        ],
    )
    def test_what_llama_cpp_has_not_is_named(self, change: Callable[[Data], None], said: str) -> None:
        with pytest.raises(UserError, match=rf"The tokenizer .*{said}"):
            vocabulary_keys(spoilt(change), ROWS)

    def test_unigram_is_named(self) -> None:
        tokenizer = Tokenizer(Library(json.loads(tokenizer_json("Unigram")), "made"), eos="</s>", vocab_size=ROWS)
        with pytest.raises(UserError, match="is of the type Unigram"):
            vocabulary_keys(tokenizer, ROWS)


class TestNames:
    def test_of_phi3_are_given_where_white_space_is_stripped(self, tmp_path: Path) -> None:
        assert shown_name("mine", phi3()) == "mine (phi-3)"
        assert shown_name("Phi-3-mini", phi3()) == "Phi-3-mini"
        notes = written(phi3(), tmp_path / "a.gguf")
        assert notes[-1].startswith("llama.cpp strips white space behind special tokens, as this tokenizer does")

    @pytest.mark.parametrize(("name", "shown"), [("my-phi-3-copy", "my-phi_3-copy"), ("PHI3", "PHI_3"), ("a", "a")])
    def test_of_phi3_are_changed_where_it_is_not(self, name: str, shown: str) -> None:
        assert shown_name(name, made(LLAMA2)) == shown
