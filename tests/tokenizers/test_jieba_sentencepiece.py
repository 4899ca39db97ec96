"""PanGu-alpha's text against the steps of the released code, run by jieba and sentencepiece themselves."""

import io
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from plmtune.errors import UserError
from plmtune.export.contents import tokenizer_tables
from plmtune.export.gguf_vocabulary import vocabulary_keys
from plmtune.export.huggingface import export_hf
from plmtune.models.llama import llama
from plmtune.registry import component
from plmtune.tokenizers import jieba_sentencepiece
from plmtune.tokenizers.compress import Compressor
from plmtune.tokenizers.jieba_sentencepiece import JiebaPieces, as_data, words
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import file, load_tokenizer, pangu_alpha

jieba: Any = pytest.importorskip("jieba")

TEXTS = [
    "深圳是中国的一个城市,今天天气很好。\nThe quick brown fox jumps over the lazy dog.\n",
    "我们 在 学习 自然语言处理 and machine learning 3.14%\n\n  北京大学的学生喜欢读书",
]
HARD = [*TEXTS, "", " ", "\n", " \n  a\n", "<eot>", "a▂b▃c▁d", "\u3000\t\r\n囧囧", "a-b🙂", "，"]


@cache
def trained(kind: str = "bpe", rule: str = "identity", symbol: str = "<eot>", byte_fallback: bool = False) -> bytes:
    lines = [" ".join(word.translate(str.maketrans(" \n", "▂▃")) for word in words(text)) for text in TEXTS * 5]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=400, hard_vocab_limit=False, model_type=kind,
        character_coverage=1.0, normalization_rule_name=rule, minloglevel=2, num_threads=1,
        user_defined_symbols=[symbol], byte_fallback=byte_fallback,
    )  # fmt: skip
    return out.getvalue()


def made(content: bytes | None = None) -> Tokenizer:
    return Tokenizer(JiebaPieces(as_data(content or trained(), ["<eot>"]), "made"), eos="<eot>")


def released(content: bytes, text: str) -> tuple[list[int], str]:
    """The released code's ids, and the text that it decodes them to."""
    jieba.dt.FREQ, jieba.dt.total = jieba_sentencepiece._cutter().FREQ, jieba_sentencepiece._cutter().total
    jieba.dt.initialized = True  # so that jieba writes no file
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    cut = [word.translate(str.maketrans(" \n", "\u2582\u2583")) for word in jieba.cut(text, cut_all=False)]
    ids = processor.encode(" ".join(cut))
    return ids, processor.decode(ids).replace(" ", "").replace("\u2582", " ").replace("\u2583", "\n")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_ids_and_text_are_those_of_the_released_code(kind: str, rule: str) -> None:
    content = trained(kind, rule)
    ours = made(content)
    for text in HARD:
        ids, shown = released(content, text)
        assert ours.encode(text) == ids, text
        # Our tokenizers write the unknown token as its name.
        assert ours.decode(ids).replace("<unk>", "⁇") == shown, text


class TestRoundTrip:
    def test_spaces_newlines_and_mixed_scripts_come_back(self) -> None:
        ours = made()
        for text in (*TEXTS, "", " ", "\n", "  \n\n a", "中国 fox\n 3.14%"):
            ids = ours.encode(text)
            assert ours.decode(ids) == text
            assert ours.token_bytes[ids].sum() == len(text.encode())

    def test_ids_decode_one_at_a_time_as_they_do_together(self) -> None:
        ours = made()
        ids = ours.encode(TEXTS[1])
        assert b"".join(ours.decode_bytes([identity]) for identity in ids).decode() == TEXTS[1]

    def test_bytes_of_a_character_are_pieces_too(self) -> None:
        ours = made(trained(byte_fallback=True))
        ids = ours.encode("🙂é 囧")
        assert ours.decode(ids) == "🙂é 囧" and ours.token_bytes[ids].sum() == len("🙂é 囧".encode())
        assert ours.decode_bytes([_id(ours, "<0x20>")]) == b""  # as all spaces

    def test_the_signs_that_stand_for_space_and_newline_become_these(self) -> None:
        assert made().decode(made().encode("中国▂的▃fox")) == "中国 的\nfox"

    def test_the_sign_of_sentencepiece_is_lost(self) -> None:
        assert made().decode(made().encode("中国▁的")) == "中国的"

    def test_what_the_model_normalizes_is_lost(self) -> None:
        ours = made(trained(rule="nmt_nfkc"))
        assert ours.decode(ours.encode("中国\u3000的\t学生")) == "中国的学生"
        assert ours.decode(ours.encode("今天，天气")) == "今天,天气"

    def test_half_a_surrogate_pair_is_the_replacement_character(self) -> None:
        assert made().encode("中\ud800国") == made().encode("中\ufffd国")


def _id(tokenizer: Tokenizer, piece: str) -> int:
    assert isinstance(tokenizer.vocabulary, JiebaPieces)
    return tokenizer.vocabulary.texts.index(piece)


class TestSpecialTokens:
    def test_text_gives_none(self) -> None:
        ours = made()
        assert ours.eos_id not in ours.encode("中国<eot>的 <s></s>")
        assert not {ours.specials["<s>"], ours.specials["</s>"]} & {*ours.encode("中国<eot>的 <s></s>")}

    def test_their_text_is_the_tokens_when_asked(self) -> None:
        ours = made()
        ids = ours.encode("中国<eot>fox", specials=True)
        assert ids == [*ours.encode("中国"), ours.eos_id, *ours.encode("fox")]
        assert ours.decode(ids) == "中国<eot>fox" and ours.token_bytes[ours.eos_id] == 0

    def test_one_that_is_a_word_is_refused(self) -> None:
        with pytest.raises(UserError, match="'fox' is one word of jieba's"):
            JiebaPieces(as_data(trained(symbol="fox"), ["fox"]), "made")

    def test_parts_get_the_ids_that_begin_in_them(self) -> None:
        ours = made()
        parts = ["今天 天", "气很好<eot>", "The quick", " brown\n", "", "好\ud800的"]
        found = ours.encode_parts([parts])[0]
        assert [i for ids in found for i in ids.tolist()] == ours.encode("".join(parts), specials=True)
        # The piece 天气 begins in the first part.
        assert [ours.decode(ids.tolist()) for ids in found[:5]] == [
            "今天 天气",
            "很好<eot>",
            "The quick",
            " brown\n",
            "",
        ]


class TestFiles:
    def test_what_is_saved_is_found_again(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.model").write_bytes(trained())
        ours = pangu_alpha(str(tmp_path))
        ours.save(tmp_path / "saved")
        for again in (load_tokenizer(tmp_path / "saved"), pangu_alpha(str(tmp_path / "saved"))):
            assert again.fingerprint == ours.fingerprint and again.eos_id == ours.eos_id
            assert [again.encode(text) for text in HARD] == [ours.encode(text) for text in HARD]

    def test_the_class_beside_a_model_file_asks_for_jieba(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.model").write_bytes(trained())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPTPanguTokenizer"}))
        assert file(str(tmp_path)).fingerprint == pangu_alpha(str(tmp_path)).fingerprint

    def test_other_programs_refuse_the_saved_file(self, tmp_path: Path) -> None:
        tokenizers: Any = pytest.importorskip("tokenizers")
        made().save(tmp_path)
        with pytest.raises(Exception, match="line 1 column"):
            tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"jieba": "0.39"}, "the version '0.39' is not supported, only 0.42.1"),
            ({"specials": "<eot>"}, "key specials"),
            ({"model": {"content": "?"}}, "key model.content"),
            ({"model": {"content": "AAAA"}}, "is no SentencePiece model"),
            ({"specials": ["<end>"]}, "'<end>' is none of its pieces"),
            ({"added_tokens": [{"id": 200, "content": "<x>"}]}, "files beside it add tokens"),
        ],
    )
    def test_a_damaged_file_is_refused(self, change: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            JiebaPieces(as_data(trained(), ["<eot>"]) | change, "made")

    def test_a_model_of_other_text_is_refused(self) -> None:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the quick brown fox", "a lazy dog"] * 9), model_writer=out, vocab_size=40,
            hard_vocab_limit=False, minloglevel=2, user_defined_symbols=["<eot>"],
        )  # fmt: skip
        with pytest.raises(UserError, match=r"gives U\+2582 and U\+2583"):
            made(out.getvalue())

    def test_a_path_that_is_none_names_the_key(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"needs a path: tokenizer\.path="):
            pangu_alpha()
        with pytest.raises(UserError, match=r"key tokenizer\.path: there is no file"):
            pangu_alpha(str(tmp_path / "none"))
        with pytest.raises(UserError, match=r"holds 0 \.model files"):
            pangu_alpha(str(tmp_path))

    def test_an_installation_without_jieba_names_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "jieba", None)
        with pytest.raises(UserError, match=r"jieba \(extra pangu\), which is not installed"):
            JiebaPieces(as_data(trained(), ["<eot>"]), "made")


def test_words_that_other_code_adds_to_jieba_change_nothing() -> None:
    before = words("深圳是中国的一个城市")
    jieba.dt.FREQ = dict(jieba_sentencepiece._cutter().FREQ)
    jieba.dt.total, jieba.dt.initialized = jieba_sentencepiece._cutter().total, True
    jieba.add_word("深圳是中国的一个城市")
    assert list(jieba.cut("深圳是中国的一个城市")) != before
    assert words("深圳是中国的一个城市") == before


class TestOtherForms:
    def test_gguf_is_refused_by_name(self) -> None:
        with pytest.raises(UserError, match=r"jieba cuts text into words first, which llama\.cpp cannot do"):
            vocabulary_keys(made(), 160)

    def test_a_directory_for_transformers_says_that_it_has_no_jieba(self, tmp_path: Path) -> None:
        ours = made()
        attention = component("attention", "gqa", num_kv_heads=1, head_dim=32)
        ffn = component("ffn", "swiglu", hidden_dim=32)
        sizes = {"embed_dim": 32, "num_layers": 1, "num_heads": 1, "max_seq_len": 64}
        model = llama(ours.vocab_size, attention=attention, ffn=ffn, **sizes)
        notes = export_hf(model, ours, tmp_path / "hf")
        assert any("which transformers refuses, since it has no jieba" in note for note in notes)
        assert load_tokenizer(tmp_path / "hf").fingerprint == ours.fingerprint

    def test_compress_is_refused_by_name(self) -> None:
        with pytest.raises(UserError, match="compress does not make smaller tokenizers of PanGu-alpha's"):
            Compressor(made())

    def test_its_table_has_the_pieces(self) -> None:
        assert tokenizer_tables(made())["tokens"][made().eos_id] == "<eot>"
