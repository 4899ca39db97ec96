"""The tokenizers of each family against the `tokenizers` library."""

import json
from pathlib import Path

import pytest
import tokenizers as reference
from made_tokenizers import FAMILIES, TEXTS, tokenizer_json

from plmtune.errors import UserError
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.library import Library
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import load_tokenizer

# Of these tiktoken runs the file.
RANKS = {"GPT-2", "Qwen2, Qwen3", "SmolLM3", "Mistral (Tekken)"}
HARD = [
    *TEXTS,
    *(
        "",
        " ",
        "  ",
        "\n",
        "a",
        " a",
        "a ",
        "  a  b   c    ",
        "\t\ttabs\t",
        "\n\n\n\nlines\r\n\r\n",
        " " * 70,
        "\n" * 40,
    ),
    "Hello world! 12345, it's they'LL we'Re I'm don't 'S theand foxes qx xqx",
    "你好，世界 12３４５ ٣٤ ½ Ⅷ 五\u3000全角\u00a0nbsp\u2003em \x85\u2028end",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 flags 🇨🇳🇺🇸 skin 👍🏽 zwj\u200d\u200b bom\ufeff \ufffd \U0010ffff \x00\x01\x7f",
    "▁▁ \u2581a <0x41> <0x0A> <tool><tool>s<tool>sx <table>\n\n<table>  x",
    "for (int i = 0; i < n; ++i) {\n    a[i] = b[i] ? c : d; // ok\n}\n",
]


def written(family: str, place: Path) -> Path:
    (place / "tokenizer.json").write_text(tokenizer_json(family), encoding="utf-8")
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": FAMILIES[family][1]}))
    return place


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def hard(self, tokenizer: Tokenizer) -> list[str]:
        return [*HARD, *(f"a{s} b {s}{s}\n{s}" for s in (*tokenizer.specials, *tokenizer.vocabulary.added))]

    def test_ids_are_those_of_the_library(self, family: str, tmp_path: Path) -> None:
        ours, theirs = load_tokenizer(written(family, tmp_path)), reference.Tokenizer.from_str(tokenizer_json(family))
        assert isinstance(ours.vocabulary, Library) == (family not in RANKS)
        texts = self.hard(ours)
        found = [ours.encode(text, specials=True) for text in texts]
        assert found == [ids.ids for ids in theirs.encode_batch(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in ours.encode_batch(texts, specials=True)] == found
        if not ours.with_bos([])[1:]:
            assert [ours.with_bos(ids) for ids in found] == [ids.ids for ids in theirs.encode_batch(texts)]
        decoded = [ids for text, ids in zip(texts, found, strict=True) if "<tool>" not in text]
        assert [ours.decode(ids) for ids in decoded] == theirs.decode_batch(decoded, skip_special_tokens=False)

    def test_the_text_of_special_tokens_is_text(self, family: str, tmp_path: Path) -> None:
        ours = load_tokenizer(written(family, tmp_path))
        for text in self.hard(ours):
            ids = ours.encode(text)
            assert not {*ids} & ({*ours.specials.values()} - {ours.specials.get("<unk>")}), text
        for text in HARD:
            if not any(special in text for special in ours.specials):
                assert ours.encode(text) == ours.encode(text, specials=True)

    def test_a_saved_one_is_the_same(self, family: str, tmp_path: Path) -> None:
        ours = load_tokenizer(written(family, tmp_path))
        ours.save(tmp_path / "saved")
        again = load_tokenizer(tmp_path / "saved")
        assert (again.fingerprint, again.adds_bos, again.end_ids) == (ours.fingerprint, ours.adds_bos, ours.end_ids)
        assert [again.encode(text, specials=True) for text in HARD] == [ours.encode(t, specials=True) for t in HARD]

    def test_a_conversation_has_the_ids_of_its_text(self, family: str, tmp_path: Path) -> None:
        ours, theirs = load_tokenizer(written(family, tmp_path)), reference.Tokenizer.from_str(tokenizer_json(family))
        source = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        template = ChatTemplate(source, ours, "x")
        turns = [Message("user", "hello the fox"), Message("assistant", "a  dog 你好")]
        ids, trained = template.encode(turns)
        text = f"user: hello the fox{ours.eos}\nassistant: a  dog 你好{ours.eos}\n"
        if isinstance(ours.vocabulary, Library):
            assert ids.tolist() == ours.with_bos(theirs.encode(text, add_special_tokens=False).ids)
            assert ours.decode(ids[trained].tolist()).strip().startswith("a")
        assert trained.any() and ids[trained][-1] == ours.eos_id
        assert template.encode_answer("a  dog 你好").tolist() == ids[trained].tolist()


class TestBounds:
    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("pre_tokenizer", {"Regex": "(a|aa)+$"}, "can take exponential time"),
            ("pre_tokenizer", {"Regex": "(a)\\1"}, "can take exponential time"),
            ("pre_tokenizer", {"Regex": "(?:a{999}){999}"}, "repeats parts"),
            ("pre_tokenizer", {"Regex": "(((("}, "does not read it"),
            ("normalizer", "a" * 100, "times as long"),
            ("normalizer", None, "more than 64 steps"),
            ("decoder", "WordPiece", "decoder WordPiece is not supported"),
        ],
    )
    def test_what_takes_time_or_memory_without_limit_is_refused(
        self, key: str, value: object, said: str, tmp_path: Path
    ) -> None:
        data = json.loads(tokenizer_json("Llama 2, TinyLlama"))
        if key == "pre_tokenizer":
            data[key] = {"type": "Split", "pattern": value, "behavior": "Isolated", "invert": False}
        elif key == "decoder":
            data[key] = {"type": value}
        else:
            step = {"type": "Replace", "pattern": {"String": "a"}, "content": value or "b"}
            data[key] = {"type": "Sequence", "normalizers": [step] * (1 if value else 65)}
        written("Llama 2, TinyLlama", tmp_path)
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match=said):
            load_tokenizer(tmp_path)
