"""Tokenizers against the `tokenizers` library and the known answers of Qwen2."""

import copy
import json
import random
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as reference

from plmtune.errors import UserError
from plmtune.tokenizers import bpe, tokenizer_json, tokenizer_json_writer
from plmtune.tokenizers.bpe import (
    CHATML_SPECIALS,
    COMPLETE_PATTERNS,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    O200K_PATTERN,
    QWEN2_PATTERN,
    Vocabulary,
    normalize,
)
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled, byte, file, load_tokenizer, qwen2
from plmtune.tokenizers.train_bpe import train_bpe

QWEN = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "qwen.tiktoken"
needs_qwen = pytest.mark.skipif(not QWEN.is_file(), reason="needs ../shared/data/tokenizers/qwen.tiktoken")
ASSETS = Path(tokenizer_json.__file__).parent / "assets"

MIXED = [
    "",
    " ",
    "Hello world! 12345, it's they'LL we'Re I'm don't 'ſ 'S",
    "你好，世界。床前明月光，疑是地上霜。 12３４５ ٣٤ ½ Ⅷ 五",
    "def f(x: int) -> str:\n\treturn f'{x:>10}'  # done\n\n\n    if x != 0x1F:\r\n        pass\r\n",
    "  leading, trailing  \n \n\t \n   \t\tmixed\u00a0\u2003\u3000spaces \x85\u2028end   ",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 flags 🇨🇳🇺🇸 skin 👍🏽 zwj\u200d\u200b bom\ufeff",
    "cafe\u0301 café ﬁ ﷺ Å Å \u1e9b\u0323 각 각 ༀ ค่ำ हिन्दी עברית العربية ไทย",
    "\x00\x01\x7f\x1b[0m \ufffd \U0010ffff \ue000 \U000e0001",
    "a" * 300 + "=" * 200 + " " * 150 + "\n" * 90 + "x1" * 50,
    "<|endoftext|> <|im_start|>user\nhi<|im_end|>",
    "$^|\\(){}[]+*?.-_~`'\"@#%&;:<>/ ... --- ==> != 'tis ''s",
]
EVERY_KIND = [f"a{chr(c)}b" for c in range(1, 0x30000, 101) if not 0xD800 <= c < 0xE000]


def whole_file() -> dict[str, Any]:
    return json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8"))


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [cut, byte_level(use_regex=False)]}


def byte_level(**changes: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True} | changes


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


PRE_TOKENIZERS = {
    "gpt2": byte_level(),
    "qwen2": split(QWEN2_PATTERN),
    "llama3": split(LLAMA3_PATTERN),
    "gpt4o": split(O200K_PATTERN),
    "gpt4 as kept matches": split(LLAMA3_PATTERN, "Removed", True),
    "smollm2": sequence({"type": "Digits", "individual_digits": True}, byte_level()),
    "digits by a pattern": sequence(split(r"\p{N}")["pretokenizers"][0], byte_level()),
    "gaps between matches": split(r"\p{L}+|[0-9]{1,2}"),
    "gaps and places ahead": split(r"\p{L}+(?=\s)|(?<=\s)[0-9]+(?!\d)"),
}


def ids_of(theirs: reference.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]


def both(data: dict[str, Any]) -> tuple[Tokenizer, reference.Tokenizer]:
    return Tokenizer(tokenizer_json.parse(data, "x")), reference.Tokenizer.from_str(json.dumps(data))


def random_file(seed: int, ignore_merges: bool, many: bool) -> dict[str, Any]:
    """Each token is the join of two others, of any place: some never act, some are overtaken."""
    generator = random.Random(seed)
    tokens, merges = ["a", "b", "c"], []
    for _ in range(12):
        for _ in range(generator.randint(1, 3) if many else 1):
            left, right = generator.choice(tokens), generator.choice(tokens)
            if len(left + right) <= 8 and (many or left + right not in tokens) and [left, right] not in merges:
                merges.append([left, right])
                tokens += [left + right] * (left + right not in tokens)
    if seed % 2:
        generator.shuffle(merges)
    if seed % 3 == 0:
        tokens += ["cabacab"] * ("cabacab" not in tokens)  # a token without a merge
    data = tokenizer_json_writer.skeleton(GPT2_PATTERN, None)
    vocab = {char: identity for identity, char in enumerate(sorted(tokenizer_json.byte_chars().values()))}
    vocab |= {token: 300 + index for index, token in enumerate(token for token in tokens if len(token) > 1)}
    data["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    data["added_tokens"] = [tokenizer_json_writer.added_token(len(vocab), "<|endoftext|>", special=True)]
    if len(vocab) in vocab.values():
        data["model"]["vocab"]["<|endoftext|>"] = 999
        data["added_tokens"][0]["id"] = 999
    return data


class TestIdsEqualTheTokenizersLibrary:
    @pytest.mark.parametrize("normalizer", [None, "NFC"])
    @pytest.mark.parametrize("name", PRE_TOKENIZERS)
    def test_for_each_form_of_pre_tokenizer(self, name: str, normalizer: str | None) -> None:
        data = whole_file() | {"pre_tokenizer": PRE_TOKENIZERS[name]}
        data["normalizer"] = {"type": normalizer} if normalizer else None
        ours, theirs = both(data)
        texts = MIXED + EVERY_KIND
        assert [ours.encode(text, specials=True) for text in texts] == ids_of(theirs, texts)

    @pytest.mark.parametrize("form", ["NFD", "NFKC", "NFKD"])
    def test_for_other_normal_forms(self, form: str) -> None:
        ours, theirs = both(whole_file() | {"normalizer": {"type": "Sequence", "normalizers": [{"type": form}]}})
        assert [ours.encode(text, specials=True) for text in MIXED] == ids_of(theirs, MIXED)

    def test_with_ids_that_are_not_in_merge_order(self) -> None:
        data = whole_file()
        old = data["model"]["vocab"]
        ids = np.random.default_rng(0).permutation(len(old)).tolist()
        data["model"]["vocab"] = {token: ids[identity] + 7 for token, identity in old.items()}
        data["added_tokens"] = [
            entry | {"id": data["model"]["vocab"][entry["content"]]} for entry in data["added_tokens"]
        ]
        ours, theirs = both(data)
        assert [ours.encode(text, specials=True) for text in MIXED] == ids_of(theirs, MIXED)
        assert ours.decode(ours.encode(MIXED[4])) == MIXED[4]

    def test_with_merges_as_strings_and_every_split_listed(self) -> None:
        # As files converted from ranks are (Llama 3): every split of a token, in order of rank.
        data = whole_file()
        vocab = data["model"]["vocab"]
        data["model"]["merges"] = [
            f"{token[:cut]} {token[cut:]}"
            for token in sorted(vocab, key=vocab.__getitem__)
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab
        ]
        data["model"]["ignore_merges"] = True
        assert len(data["model"]["merges"]) > len(vocab)
        ours, theirs = both(data)
        assert [ours.encode(text, specials=True) for text in MIXED] == ids_of(theirs, MIXED)
        assert ours.fingerprint == bundled().fingerprint

    def test_with_merges_in_another_order(self) -> None:
        data = whole_file()
        data["model"]["merges"].reverse()
        ours, theirs = both(data)
        assert [ours.encode(text, specials=True) for text in MIXED] == ids_of(theirs, MIXED)

    def test_with_bytes_that_have_no_token(self) -> None:
        data = whole_file()
        vocab, gone = (
            data["model"]["vocab"],
            [tokenizer_json.to_chars(bytes([b])) for b in (0xF0, 0xE5, 0xC0, 0x7A)],
        )
        data["model"]["merges"] = [
            merge for merge in data["model"]["merges"] if not any(char in "".join(merge) for char in gone)
        ]
        left = {"".join(merge) for merge in data["model"]["merges"]} | {*CHATML_SPECIALS}
        data["model"]["vocab"] = {t: i for t, i in vocab.items() if t in left or (len(t) == 1 and t not in gone)}
        ours, theirs = both(data)
        texts = [*MIXED, "sizzle zip z", "a👍b", "床"]
        assert [ours.encode(text, specials=True) for text in texts] == ids_of(theirs, texts)

    def test_with_added_tokens_that_are_not_special(self) -> None:
        data = whole_file()
        data["added_tokens"] += [
            tokenizer_json_writer.added_token(4096, "<tool>", special=False),
            tokenizer_json_writer.added_token(4097, "<tool>s", special=False),
        ]
        ours, theirs = both(data)
        texts = ["a <tool>b<tool>s <tool", "<tool>"]
        assert [ours.encode(text) for text in texts] == ids_of(theirs, texts)
        assert [ids.tolist() for ids in ours.encode_batch(texts)] == ids_of(theirs, texts)
        assert ours.decode(ours.encode(texts[0])) == texts[0]

    def test_with_added_tokens_that_are_sought_in_two_passes(self, tmp_path: Path) -> None:
        data = whole_file() | {"normalizer": {"type": "NFC"}}
        new = [
            ("zqx", False, True),
            ("xyq", False, False),
            ("<|im_start|>assistant", False, True),
            ("caf\u00e9", True, True),
        ]
        data["added_tokens"] += [
            tokenizer_json_writer.added_token(4096 + index, text, special=special, normalized=normalized)
            for index, (text, special, normalized) in enumerate(new)
        ]
        ours, theirs = both(data)
        texts = ["zqxyq", "<|im_start|>assistant", "cafe\u0301 caf\u00e9 zqx", "azqx\u0301", "xyqzqx"]
        assert [ours.encode(text, specials=True) for text in texts] == ids_of(theirs, texts)
        ours.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert [again.encode(text, specials=True) for text in texts] == ids_of(theirs, texts)
        assert again.fingerprint == ours.fingerprint

    def test_with_tokens_that_only_the_configuration_adds_or_changes(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole_file()))
        added = {
            "4094": {"content": "<|im_start|>", "special": True, "normalized": True},
            "4096": {"content": "<extra>", "special": False, "normalized": False},
            "4097": {"content": "<|im_start|>x", "special": True, "normalized": False},
        }
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
        ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in ("a<extra>b", "<|im_start|>x y", "<|im_start|>y"):
            assert ours.encode(text, specials=True) == theirs(text)["input_ids"]
        added["4099"] = added.pop("4096")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
        with pytest.raises(UserError, match=r"has the id 4097 where the .tokenizers. library gives it 4096"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("ignore_merges", [False, True])
    @pytest.mark.parametrize("many", [False, True])
    def test_with_tokens_that_their_merges_never_make(self, ignore_merges: bool, many: bool, tmp_path: Path) -> None:
        """Random lists of merges over three letters: the ids of the library, or a refusal."""
        read = 0
        for seed in range(40):
            data = random_file(seed, ignore_merges, many)
            try:
                ours = Tokenizer(tokenizer_json.parse(data, "x"))
            except UserError as error:
                assert "expressed by ranks" in str(error) or "of two parts that no merge joins" in str(error)
                continue
            read += 1
            theirs = reference.Tokenizer.from_str(json.dumps(data))
            generator = random.Random(seed)
            texts = ["".join(generator.choices("abc ", k=generator.randint(1, 12))) for _ in range(200)]
            texts += list(data["model"]["vocab"])
            assert [ours.encode(text) for text in texts] == ids_of(theirs, texts), seed
            ours.save(tmp_path)
            again = load_tokenizer(tmp_path)
            assert [again.encode(text) for text in texts] == ids_of(theirs, texts), seed
            assert again.fingerprint == ours.fingerprint
        assert read > 8

    def test_where_the_pattern_runs_out_of_stack(self) -> None:
        ours, theirs = both(whole_file())
        text = "a" + " " * 400_000 + "b"
        assert ours.encode(text) == ids_of(theirs, [text])[0]


class TestQwen2:
    @needs_qwen
    @pytest.mark.parametrize(
        ("text", "ids"),
        [
            ("Hello world! 12345", [9707, 1879, 0, 220, 16, 17, 18, 19, 20]),
            ("你好，世界", [108386, 3837, 99489]),
            ("<|im_start|>user\nhi<|im_end|>\n", [151644, 872, 198, 6023, 151645, 198]),
        ],
    )
    def test_known_answers(self, text: str, ids: list[int], qwen: Tokenizer) -> None:
        assert qwen.encode(text, specials=True) == ids

    @needs_qwen
    def test_rows_beyond_the_tokens_have_no_text(self, qwen: Tokenizer) -> None:
        assert (qwen.num_tokens, qwen.vocab_size, qwen.eos_id) == (151646, 151936, 151643)
        assert qwen.decode([9707, 151646, 151935]) == "Hello"
        assert not qwen.token_bytes[151643:].any()

    @pytest.mark.slow  # 150,000 tokens, read four times
    @needs_qwen
    def test_a_saved_one_is_read_equally_by_us_and_by_the_library(self, qwen: Tokenizer, tmp_path: Path) -> None:
        qwen.save(tmp_path)
        again, theirs = (
            load_tokenizer(tmp_path),
            reference.Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        )
        assert (again.fingerprint, again.vocab_size) == (qwen.fingerprint, 151936)
        assert again.chat_template == qwen.chat_template
        texts = MIXED + EVERY_KIND
        assert [qwen.encode(text, specials=True) for text in texts] == ids_of(theirs, texts)
        assert qwen2(str(tmp_path)).fingerprint == qwen.fingerprint

    def test_another_tokenizer_in_its_place_is_refused(self) -> None:
        with pytest.raises(UserError, match="is not Qwen2's tokenizer"):
            qwen2(str(ASSETS))

    def test_without_a_hub_it_says_what_to_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("huggingface_hub")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*tokenizer.path=FILE"):
            qwen2()


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return qwen2(str(QWEN))


class TestBundled:
    def test_has_4096_tokens_in_a_small_file(self) -> None:
        found = bundled()
        assert found.vocab_size == found.num_tokens == 4096
        assert found.specials == {"<|endoftext|>": 4093, "<|im_start|>": 4094, "<|im_end|>": 4095}
        assert (ASSETS / "tokenizer.json").stat().st_size < 150_000

    def test_covers_more_than_three_bytes_of_python_a_token(self) -> None:
        text = Path(json.__file__).read_text(encoding="utf-8")
        assert len(text.encode()) / len(bundled().encode(text)) > 3


class TestTokenizer:
    def test_decoding_gives_the_text_back_in_normal_form(self) -> None:
        found = bundled()
        for text in MIXED[:5]:
            assert found.decode(found.encode(text)) == text
        assert found.decode(found.encode("cafe\u0301")) == "café"

    def test_special_text_stays_text_unless_asked_for(self) -> None:
        found = bundled()
        plain, special = found.encode("<|im_end|>"), found.encode("<|im_end|>", specials=True)
        assert special == [4095] and len(plain) > 1 and max(plain) < 4093
        assert found.decode(plain) == found.decode(special) == "<|im_end|>"

    def test_token_bytes_sum_to_the_length_of_the_text(self) -> None:
        found = bundled()
        ids = found.encode(MIXED[3] + MIXED[6])
        assert found.token_bytes[ids].sum() == len(found.decode_bytes(ids))
        assert found.token_bytes.dtype == np.int32 and found.token_bytes[found.eos_id] == 0

    def test_a_batch_equals_one_by_one_also_where_texts_are_cut(self) -> None:
        found = bundled()
        large = "\n".join(f"line {i} is\n\n \n  here\r\n{i}\nAnd Zed\n" for i in range(40_000))
        batch = found.encode_batch([*MIXED, large, "x" * 400_000])
        assert all(ids.dtype == np.uint32 for ids in batch)
        assert [ids.tolist() for ids in batch] == [found.encode(t) for t in [*MIXED, large, "x" * 400_000]]
        assert found.encode_batch([]) == []

    def test_half_a_surrogate_pair_becomes_the_replacement_character(self) -> None:
        found = bundled()
        assert found.encode("a\ud800b") == found.encode("a\ufffdb")
        assert found.decode(found.encode("\ud83d\ude00")) == "😀"

    def test_threads_share_one_tokenizer(self) -> None:
        found = bundled()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(found.encode, MIXED * 8)) == [found.encode(text) for text in MIXED * 8]

    def test_an_id_outside_of_the_rows_is_refused(self) -> None:
        for identity in (-1, 4096):
            with pytest.raises(ValueError, match=f"id {identity} is outside of the tokenizer's 4096 rows"):
                bundled().decode(iter([0, identity]))

    def test_too_few_rows_and_an_unknown_end_are_refused(self) -> None:
        vocabulary = bundled().vocabulary
        with pytest.raises(ValueError, match=r"vocab_size \(4000\) is below the tokenizer's 4096"):
            Tokenizer(vocabulary, vocab_size=4000)
        with pytest.raises(ValueError, match=r"Did you mean <\|endoftext\|>"):
            Tokenizer(vocabulary, eos="<|endoftex|>")

    @pytest.mark.parametrize("change", ["pattern", "normalization", "id", "eos"])
    def test_the_fingerprint_changes_with_what_decides_the_ids(self, change: str) -> None:
        held, eos = bundled().vocabulary, "<|endoftext|>"
        settings = {name: getattr(held, name) for name in held.__dataclass_fields__}
        match change:
            case "pattern":
                settings["pattern"] = GPT2_PATTERN
            case "normalization":
                settings["normalization"] = None
            case "id":
                settings["ids"] = [*held.ids[:-2], held.ids[-1], held.ids[-2]]
            case "eos":
                eos = "<|im_end|>"
        assert Tokenizer(Vocabulary(**settings), eos=eos).fingerprint != bundled().fingerprint


class TestByte:
    def test_ids_are_the_bytes(self) -> None:
        found = byte()
        assert (found.vocab_size, found.eos_id) == (257, 256)
        assert found.encode("aé中\n\n") == list("aé中\n\n".encode())

    def test_saved_and_read_it_is_the_same(self, tmp_path: Path) -> None:
        byte().save(tmp_path)
        assert load_tokenizer(tmp_path).fingerprint == byte().fingerprint


class TestDirectories:
    def test_transformers_reads_what_is_saved(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        found = bundled()
        found.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert theirs(MIXED[2])["input_ids"] == found.encode(MIXED[2])
        assert theirs.eos_token_id == found.eos_id
        shown = theirs.apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
        )
        assert shown == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_nothing_but_the_two_files_is_left(self, tmp_path: Path) -> None:
        bundled().save(tmp_path / "new")
        bundled().save(tmp_path / "new")
        names = sorted(path.name for path in (tmp_path / "new").iterdir())
        assert names == ["tokenizer.json", "tokenizer_config.json"]

    def test_a_foreign_checkpoint_has_end_template_and_rows_in_its_own_files(self, tmp_path: Path) -> None:
        bundled().save(tmp_path)
        config = {"eos_token": {"content": "<|im_end|>", "special": True}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 4224}))
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
        found = file(str(tmp_path))
        assert (found.eos_id, found.vocab_size, found.chat_template) == (4095, 4224, "{{ messages }}")

    @pytest.mark.parametrize(
        ("generation", "config", "ends"),
        [
            (None, None, [4095]),
            ({"eos_token_id": [4095, 4093]}, {"eos_token_id": 7}, [4095, 4093]),
            ({"eos_token_id": None}, {"eos_token_id": 4093}, [4095, 4093]),
            (None, {"eos_token_id": [4095, 4094]}, [4095, 4094]),
        ],
    )
    def test_answers_end_where_the_files_beside_say(
        self, generation: dict | None, config: dict | None, ends: list[int], tmp_path: Path
    ) -> None:
        bundled().save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
        for name, held in (("generation_config.json", generation), ("config.json", config)):
            if held is not None:
                (tmp_path / name).write_text(json.dumps(held))
        found = load_tokenizer(tmp_path)
        assert list(found.end_ids) == ends
        found.save(tmp_path / "again")
        assert load_tokenizer(tmp_path / "again").end_ids == found.end_ids

    @pytest.mark.parametrize("ends", ["x", [True], {"a": 1}, [1.5], -1, [1 << 40]])
    def test_an_end_that_is_no_token_is_named(self, ends: Any, tmp_path: Path) -> None:
        bundled().save(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id .* is no token id"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("held", "template"),
        [
            ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}], "y"),
            ([{"name": "tool_use", "template": "x"}], None),
            ([3, None], None),
            (7, None),
        ],
    )
    def test_of_several_templates_the_one_named_default_counts(
        self, held: Any, template: str | None, tmp_path: Path
    ) -> None:
        bundled().save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": held}))
        assert load_tokenizer(tmp_path).chat_template == template

    @needs_qwen
    def test_a_tiktoken_file_is_read_with_the_pattern_named(self) -> None:
        found = file(str(QWEN), pattern="llama3")
        assert found.vocabulary.pattern == LLAMA3_PATTERN and found.vocabulary.normalization is None
        assert found.vocab_size == 151646


def broken(change: str) -> dict[str, Any]:
    data = copy.deepcopy(whole_file())
    model = data["model"]
    match change:
        case "unigram":
            model["type"] = "Unigram"
        case "no vocab":
            del model["vocab"]
        case "no merges":
            del model["merges"]
        case "byte_fallback":
            model["byte_fallback"] = True
        case "dropout":
            model["dropout"] = 0.1
        case "end_of_word_suffix":
            model["end_of_word_suffix"] = "</w>"
        case "Lowercase":
            data["normalizer"] = {"type": "Lowercase"}
        case "Metaspace":
            data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        case "ByteLevel":
            data["pre_tokenizer"] = None
        case "add_prefix_space":
            data["pre_tokenizer"] = byte_level(add_prefix_space=True)
        case "one regular expression":
            data["pre_tokenizer"] = sequence(
                split(r"\p{N}{1,3}")["pretokenizers"][0], *split(QWEN2_PATTERN)["pretokenizers"]
            )
        case "Removed":
            data["pre_tokenizer"] = split(r"\s+", "Removed")
        case "differs":
            data["pre_tokenizer"] = split(r"\w+")
        case "empty text":
            data["pre_tokenizer"] = split(r"\p{L}*")
        case "no regular expression":
            data["pre_tokenizer"] = split(r"(\p{L}")
        case "lstrip":
            data["added_tokens"][0]["lstrip"] = True
        case "the id 300 where":
            data["added_tokens"][0]["id"] = 300
        case "id 4097 of another":
            model["vocab"]["zqzqzq"] = 4097
            data["added_tokens"].append(tokenizer_json_writer.added_token(4097, "<tool>", special=False))
        case "ignore_merges":
            model["ignore_merges"] = True
            model["vocab"]["theand"] = 4999  # of "the" and "and", which no merge joins
        case "one id to two":
            model["vocab"]["zqzqzq"] = 300
        case "ids from 0":
            model["vocab"]["zqzqzq"] = 1 << 50
        case "merge 0 names":
            model["merges"][0] = ["nowhere", "seen"]
        case "merge 3 is not a pair":
            model["merges"][3] = "a b c"
        case "unk_token":
            model["unk_token"] = "!"
            model["merges"] = [merge for merge in model["merges"] if "z" not in "".join(merge)]
            del model["vocab"]["z"]
    return data


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("Lowercase", "normalizer Lowercase"),
            ("byte_fallback", None),
            ("Metaspace", None),
            ("ByteLevel", "no ByteLevel pre-tokenizer"),
            ("add_prefix_space", None),
            ("one regular expression", None),
            ("Removed", None),
            ("differs", r"'\\\\w' in the pre-tokenizer's pattern differs between"),
            ("empty text", None),
            ("lstrip", None),
            ("ignore_merges", None),
            ("unk_token", None),
        ],
    )
    def test_what_ranks_cannot_say_is_run_by_the_library(self, change: str, said: str | None, tmp_path: Path) -> None:
        data = broken(change)
        with pytest.raises(UserError, match=said or change):
            tokenizer_json.parse(data, "x")
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        ours, theirs = load_tokenizer(tmp_path), reference.Tokenizer.from_str(json.dumps(data))
        assert [ours.encode(text, specials=True) for text in MIXED] == ids_of(theirs, MIXED)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("unigram", "model.vocab must list tokens with their scores"),
            ("no vocab", "model.vocab must be"),
            ("no merges", "only BPE and Unigram are"),
            ("dropout", None),
            ("end_of_word_suffix", None),
            ("no regular expression", "does not read it"),
            ("the id 300 where", None),
            ("id 4097 of another", None),
            ("one id to two", None),
            ("ids from 0", None),
            ("merge 0 names", "does not read it.*nowhere"),
            ("merge 3 is not a pair", None),
        ],
    )
    def test_what_neither_engine_gives_is_refused_by_name(self, change: str, said: str | None, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(broken(change)))
        with pytest.raises(UserError, match=said or change) as caught:
            load_tokenizer(tmp_path)
        assert "tokenizer.json" in str(caught.value)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"PK\x03\x04" + b"\0" * 100,
            b"\xff\xfe{}",
            b"[" * 100_000,
            b"[]",
            b"{}",
            b'{"model": 3}',
            b"null",
        ],
    )
    def test_a_file_that_is_no_tokenizer_is_named(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_bytes(data)
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)

    def test_a_file_of_absurd_size_is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / "tokenizer.json").open("wb") as sparse:
            sparse.truncate(1 << 33)
        with pytest.raises(UserError, match="8,589,934,592 bytes"):
            load_tokenizer(tmp_path)

    def test_a_directory_without_a_tokenizer_and_a_path_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"has no tokenizer: .* Copy those of the model into it"):
            load_tokenizer(tmp_path)
        (tmp_path / "vocab.json").touch()
        with pytest.raises(UserError, match=r"transformers makes a tokenizer.json of its vocab.json: Auto"):
            load_tokenizer(tmp_path)
        for name in "ab":
            (tmp_path / f"{name}.tiktoken").touch()
        with pytest.raises(UserError, match=r"holds 2 .tiktoken files. Name one of them: .*a.tiktoken"):
            load_tokenizer(tmp_path)
        with pytest.raises(UserError, match="there is no file or directory"):
            file(str(tmp_path / "tokenizer.json"))
        with pytest.raises(UserError, match="needs a path"):
            file()

    @pytest.mark.parametrize("rows", [0, -1, 1 << 60, "4096", True, 100])
    def test_an_impossible_number_of_rows_is_refused(self, rows: Any, tmp_path: Path) -> None:
        bundled().save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"padded_vocab_size": rows}))
        with pytest.raises(UserError, match=r"rows|below"):
            load_tokenizer(tmp_path)

    def test_an_end_token_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        bundled().save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_ends|>"}')
        with pytest.raises(UserError, match=r"eos_token '<\|im_ends\|>'.*Did you mean <\|im_end\|>"):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole_file() | {"added_tokens": []}))
        (tmp_path / "tokenizer_config.json").unlink()
        with pytest.raises(UserError, match="which token ends a document"):
            load_tokenizer(tmp_path)


class TestTrainBpe:
    TEXTS = ("the cat sat on the mat, the rat sat on the cat\n" * 20, "你好，你好，世界\n" * 20)

    def test_the_same_texts_give_the_same_tokenizer(self) -> None:
        first, second = train_bpe(iter(self.TEXTS), 280), train_bpe(iter(self.TEXTS), 280)
        assert first.fingerprint == second.fingerprint
        assert (first.num_tokens, first.eos_id) == (280, 277)
        assert len(first.encode(" the cat")) < len(" the cat")

    @pytest.mark.parametrize("size", [100, 259])
    def test_a_vocabulary_without_room_is_refused(self, size: int) -> None:
        with pytest.raises(ValueError, match=rf"vocab_size \({size}\) must exceed 256 bytes and 3"):
            train_bpe(self.TEXTS, size)

    def test_more_tokens_than_the_text_gives_are_refused_with_both_numbers(self) -> None:
        with pytest.raises(ValueError, match=r"vocab_size \(9000\) is more than this text gives \(287\)"):
            train_bpe(self.TEXTS, 9000)


class TestBeginning:
    """The token before a text: where transformers puts one, every text that a model reads begins with it."""

    def with_bos(self, adds_bos: bool) -> Tokenizer:
        held = bundled()
        return Tokenizer(held.vocabulary, eos=held.eos, bos="<|im_start|>", adds_bos=adds_bos)

    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_transformers_puts_it_where_we_say_it_does(self, adds_bos: bool, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        self.with_bos(adds_bos).save(tmp_path)
        ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert (ours.bos_id, ours.adds_bos) == (theirs.bos_token_id, adds_bos)
        assert theirs("a text")["input_ids"] == [ours.bos_id] * adds_bos + ours.encode("a text")

    def test_the_library_puts_it_there_too(self, tmp_path: Path) -> None:
        library = pytest.importorskip("tokenizers")
        self.with_bos(True).save(tmp_path)
        found = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert found.encode("a").ids == [4094, *bundled().encode("a")]

    def test_it_is_found_in_the_post_processor_alone(self, tmp_path: Path) -> None:
        self.with_bos(True).save(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        assert (load_tokenizer(tmp_path).bos, load_tokenizer(tmp_path).adds_bos) == ("<|im_start|>", True)

    @pytest.mark.parametrize("flag", [False, True])
    @pytest.mark.parametrize("processor", [False, True])
    @pytest.mark.parametrize(
        "name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GemmaTokenizer", "GPT2Tokenizer"]
    )
    def test_the_post_processor_decides_and_no_flag(
        self, name: str, flag: bool, processor: bool, tmp_path: Path
    ) -> None:
        transformers = pytest.importorskip("transformers")
        self.with_bos(processor).save(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config |= {"add_bos_token": flag, "tokenizer_class": name}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        begins = transformers.AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"][0] == 4094
        assert load_tokenizer(tmp_path).adds_bos == begins == processor

    def test_a_fingerprint_changes_only_where_it_is_put(self) -> None:
        assert self.with_bos(False).fingerprint == bundled().fingerprint != self.with_bos(True).fingerprint
        assert self.with_bos(True).encode("a") == bundled().encode("a")

    def test_it_is_put_exactly_once(self) -> None:
        assert self.with_bos(True).with_bos([7]) == self.with_bos(True).with_bos([4094, 7]) == [4094, 7]
        assert self.with_bos(True).with_bos([]) == [4094]
        assert self.with_bos(False).with_bos([7]) == [7]
        assert (self.with_bos(True).start_ids, self.with_bos(False).start_ids) == ((4094,), (bundled().eos_id,))

    def test_one_that_is_no_special_token_is_refused_where_it_would_be_put(self, tmp_path: Path) -> None:
        bundled().save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
        assert load_tokenizer(tmp_path).bos_id is None
        self.with_bos(True).save(tmp_path)
        written = (tmp_path / "tokenizer.json").read_text().replace('"id": "<|im_start|>"', '"id": "<s>"')
        (tmp_path / "tokenizer.json").write_text(written.replace('"id":"<|im_start|>"', '"id":"<s>"'))
        with pytest.raises(UserError, match="bos '<s>' is no special token"):
            load_tokenizer(tmp_path)


def beside(place: Path, **files: Any) -> Path:
    """The bundled tokenizer with other files, by name without .json."""
    bundled().save(place)
    for name, content in files.items():
        (place / f"{name}.json").write_text(json.dumps(content))
    return place


class TestFilesBeside:
    @pytest.mark.parametrize("ranks", [True, False])
    def test_all_tokens_before_a_text_are_kept(self, ranks: bool, tmp_path: Path) -> None:
        theirs = reference.Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
        theirs.post_processor = reference.processors.TemplateProcessing(
            single="<|im_start|> <|im_end|> $A", special_tokens=[("<|im_start|>", 4094), ("<|im_end|>", 4095)]
        )
        if not ranks:
            theirs.normalizer = reference.normalizers.Lowercase()
        theirs.save(str(tmp_path / "tokenizer.json"))
        ours = load_tokenizer(tmp_path)
        assert ours.with_bos(ours.encode("a b")) == theirs.encode("a b").ids == ours.with_bos(theirs.encode("a b").ids)
        assert (ours.first_ids, ours.start_ids, ours.bos) == ((4094, 4095), (4094, 4095), "<|im_start|>")
        ours.save(tmp_path / "saved")
        again = load_tokenizer(tmp_path / "saved")
        assert (again.first_ids, again.fingerprint) == (ours.first_ids, ours.fingerprint)
        assert reference.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json")).encode("a").ids[:2] == [
            4094,
            4095,
        ]

    def test_an_answer_ends_at_each_token_that_a_file_names(self, tmp_path: Path) -> None:
        place = beside(
            tmp_path,
            config={"eos_token_id": [2, 4094]},
            generation_config={"eos_token_id": [4095, 300]},
            special_tokens_map={"eos_token": {"content": "<|im_end|>"}},
        )
        # 2 is the default of LlamaConfig, here a letter.
        assert load_tokenizer(place).end_ids == (4093, 4095, 300, 4094)
        (place / "generation_config.json").unlink()
        assert load_tokenizer(place).end_ids == (4093, 2, 4094, 4095)

    def test_special_tokens_that_only_these_files_name(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "additional_special_tokens": ["<new>", "the"],
        }
        place = beside(tmp_path, tokenizer_config=config, special_tokens_map={"bos_token": "<|im_start|>"})
        ours, theirs = load_tokenizer(place), transformers.AutoTokenizer.from_pretrained(place)
        for text in ("a<new>b the", "<|im_start|>x"):
            assert ours.encode(text, specials=True) == theirs(text)["input_ids"]
        assert (ours.specials["<new>"], ours.bos) == (4096, "<|im_start|>")

    def test_a_special_token_without_a_row_is_left_out_and_said_where_nothing_uses_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<image>"]}
        place = beside(tmp_path, tokenizer_config=config, config={"vocab_size": 4096})
        ours = load_tokenizer(place)
        said = "1 special token without a row in the model left out: <image>."
        assert said in " ".join(capsys.readouterr().err.split())
        assert (ours.num_tokens, ours.fingerprint) == (4096, bundled().fingerprint)
        assert ours.encode("a<image>", specials=True) == bundled().encode("a<image>")
        for used in ({"bos_token": "<image>"}, {"chat_template": "{{ '<image>' }}"}):
            with pytest.raises(UserError, match=r"token 4096, '<image>', has no row in the model\. Take the model"):
                load_tokenizer(beside(tmp_path, tokenizer_config=config | used))
        with pytest.raises(UserError, match="has no row"):
            load_tokenizer(beside(tmp_path, tokenizer_config=config, config={"vocab_size": 4000}))

    def test_tokens_of_added_tokens_json(self, tmp_path: Path) -> None:
        place = beside(tmp_path, added_tokens={"<tool>": 4096}, tokenizer_config={})
        assert load_tokenizer(place).encode("a<tool>")[-1] == 4096
        with pytest.raises(UserError, match="has the id 5000 where"):
            load_tokenizer(beside(tmp_path, added_tokens={"<tool>": 5000}, tokenizer_config={}))


class TestNormalization:
    @pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
    def test_is_the_library_s_whatever_the_tables_of_python_are(self, form: Any) -> None:
        theirs = getattr(reference.normalizers, form)()
        for start in range(0, 0x110000, 64):
            text = "".join(map(chr, range(start, start + 64)))
            if not 0xD800 <= start < 0xE000:
                assert normalize(form, text) == theirs.normalize_str(text)
        assert normalize(form, "\ud800\U0001f600") == "\ufffd\U0001f600"

    def test_python_s_own_are_used_for_characters_of_unicode_3(self) -> None:
        stable = [char for char in map(chr, range(0x110000)) if bpe._STABLE.fullmatch(char)]
        assert len(stable) > 30_000
        assert "Cn" not in {unicodedata.ucd_3_2_0.category(char) for char in stable}


class TestBatchesWithSpecials:
    def test_they_are_the_ids_of_each_text_alone(self) -> None:
        texts = ["<|im_start|>user\nhi<|im_end|>", "plain", "", "<|im_start|>" + "a b\n" * 90_000]
        found = [ids.tolist() for ids in bundled().encode_batch(texts, specials=True)]
        assert found == [bundled().encode(text, specials=True) for text in texts]


class TestCuts:
    """Where a text may be cut: what comes before it is encoded once for all that goes on from it."""

    PARTS = (
        *(" a", " b", " c", "B", " ", "  ", "\n", "\r\n", "\t", "1", "23", "'s", "'", "."),
        *("\u00e9", "e\u0301", "\u4f60", "\u2003", "<|im_end|>"),
    )

    @pytest.mark.parametrize("pattern", sorted(COMPLETE_PATTERNS))
    def test_the_ids_of_both_parts_are_those_of_the_whole(self, pattern: str) -> None:
        held = bundled().vocabulary
        tokenizer = Tokenizer(replace(held, pattern=pattern))
        draw = random.Random(0)
        found = 0
        for _ in range(800):
            text = "".join(draw.choices(self.PARTS, k=draw.randint(1, 12)))
            cut = tokenizer.last_cut(text)
            found += cut > 0
            parts = [tokenizer.encode(part, specials=True) for part in (text[:cut], text[cut:])]
            assert [*chain(*parts)] == tokenizer.encode(text, specials=True), text
        assert found > 200

    def test_of_unknown_patterns_nothing_is_sure(self) -> None:
        tokenizer = Tokenizer(replace(bundled().vocabulary, pattern=r"[a-z ]+|."))
        assert (tokenizer.last_cut("one two three"), bundled().last_cut("one two three ")) == (0, 7)


WRONG = (None, True, -1, 1.5, "x", [1], {"x": 1}, [{}])


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a tokenizer.json; of its tables and lists the first entries."""
    yield place
    if isinstance(value, dict | list):
        for key in [*value][:30] if isinstance(value, dict) else range(min(2, len(value))):
            yield from _places(value[key], (*place, key))


def _put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    value = copy.copy(value)
    value[place[0]] = _put(value[place[0]], place[1:], new)
    return value


class TestWrongTypes:
    """Whatever stands under whichever key: a tokenizer, or a sentence that names the file."""

    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        directory = tmp_path_factory.mktemp("wrong")
        byte().save(directory)
        return directory

    def tried(self, place: Path, name: str, content: Any) -> None:
        before = (place / name).read_bytes()
        (place / name).write_text(json.dumps(content))
        try:
            load_tokenizer(place)
        except UserError as error:
            assert str(place) in str(error)
        finally:
            (place / name).write_bytes(before)

    @pytest.mark.parametrize(
        "key",
        [
            "version",
            "truncation",
            "padding",
            "added_tokens",
            "normalizer",
            "pre_tokenizer",
            "post_processor",
            "decoder",
            "model",
        ],
    )
    def test_of_each_key_of_a_tokenizer_json(self, place: Path, key: str) -> None:
        held = json.loads((place / "tokenizer.json").read_text())
        (eos,) = held["added_tokens"]
        held["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
        held["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": eos["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {eos["content"]: {"id": eos["content"], "ids": [eos["id"]], "tokens": [eos["content"]]}},
        }
        for where in _places(held.get(key), (key,)):
            if where[1:2] in (("vocab",), ("merges",)) and len(where) > 3:
                continue
            for wrong in WRONG:
                self.tried(place, "tokenizer.json", _put({key: None} | held, where, wrong))

    def test_of_each_key_of_its_configuration(self, place: Path) -> None:
        held = json.loads((place / "tokenizer_config.json").read_text())
        more = ("bos_token", "add_bos_token", "chat_template", "added_tokens_decoder", "model_max_length")
        for key in (*held, *more):
            for wrong in (*WRONG, {"content": 5}, {"content": "<|im_end|>"}):
                self.tried(place, "tokenizer_config.json", held | {key: wrong})

    def test_a_normalizer_that_is_a_number_is_named(self, place: Path) -> None:
        held = json.loads((place / "tokenizer.json").read_text())
        held["normalizer"] = {"type": "Sequence", "normalizers": 5}
        before = (place / "tokenizer.json").read_bytes()
        (place / "tokenizer.json").write_text(json.dumps(held))
        with pytest.raises(UserError, match=r"tokenizer.json: normalizer.normalizers must be a list, not 5"):
            load_tokenizer(place)
        (place / "tokenizer.json").write_bytes(before)
