"""Compressed tokenizers: text round-trips, kept tokens stay, and a teacher's ids are known."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import FAMILIES, TEXTS, tokenizer_json

from plmtune.tokenizers.bpe import Vocabulary
from plmtune.tokenizers.compress import Compressor, Order, embedding_share
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled, load_tokenizer

# Not st.text, whose tables of characters take seconds.
texts = st.lists(st.integers(0, 0x10FFFF)).map(lambda codes: "".join(map(chr, codes))) | st.binary().map(
    lambda data: data.decode("utf-8", errors="replace")
)
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@cache
def compressed(family: str, folder: Path) -> tuple[Tokenizer, Compressor, Order, Tokenizer]:
    """A family's tokenizer, and the half of it that its texts need most."""
    directory = folder / family
    directory.mkdir()
    (directory / "tokenizer.json").write_text(tokenizer_json(family), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": FAMILIES[family][1]}))
    whole = load_tokenizer(directory)
    compressor = Compressor(whole)
    order = compressor.order(counted(whole, TEXTS), whole.num_tokens)
    return whole, compressor, order, compressor.compress(order.ids[: (order.least + len(order.ids)) // 2])


@cache
def of_bundled() -> Compressor:
    return Compressor(bundled())


def counted(tokenizer: Tokenizer, written: list[str]) -> np.ndarray:
    ids = np.concatenate(tokenizer.encode_batch(written))
    return np.bincount(ids, minlength=tokenizer.vocab_size)


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_every_text_decodes_to_the_same_bytes_as_before(self, family: str, folder: Path) -> None:
        whole, _, _, made = compressed(family, folder)

        @few
        @given(texts)
        def check(text: str) -> None:
            assert made.decode_bytes(made.encode(text)) == whole.decode_bytes(whole.encode(text))

        check()
        for text in TEXTS:
            check.hypothesis.inner_test(text)

    def test_every_byte_string_round_trips(self, family: str, folder: Path) -> None:
        made = compressed(family, folder)[3]
        if not isinstance(made.vocabulary, Vocabulary):
            pytest.skip("the library takes text alone, whose round trip is tested above")
        ids = made.vocabulary.ids

        @few
        @given(st.binary(min_size=1))
        def check(data: bytes) -> None:
            ranks = made._engine._bpe._encode_single_piece(data)
            assert made.decode_bytes([ids[rank] for rank in ranks]) == data

        check()

    def test_the_text_of_each_kept_token_encodes_to_it_where_it_did_before(self, family: str, folder: Path) -> None:
        whole, _, _, made = compressed(family, folder)
        same = 0
        for new, old in enumerate(made.kept[0].ids):
            assert made.decode_bytes([new]) == whole.decode_bytes([old])
            text = whole.decode([old])
            if whole.encode(text) == [old]:
                assert made.encode(text) == [new], text
                same += 1
        assert same > 3

    def test_ids_are_those_of_the_tokenizers_library(self, family: str, folder: Path) -> None:
        made = compressed(family, folder)[3]
        made.save(folder / family / "made")
        theirs = tokenizers.Tokenizer.from_file(str(folder / family / "made" / "tokenizer.json"))
        for text in TEXTS:
            assert made.encode(text) == theirs.encode(text, add_special_tokens=False).ids
            assert made.with_bos(made.encode(text)) == theirs.encode(text).ids

    def test_a_saved_one_says_of_which_tokenizer_its_tokens_are(self, family: str, folder: Path) -> None:
        whole, _, _, made = compressed(family, folder)
        made.save(folder / family / "saved")
        again = load_tokenizer(folder / family / "saved")
        assert again.fingerprint == made.fingerprint
        assert [one.original for one in again.kept] == [whole.fingerprint]
        assert again.kept == made.kept

    def test_special_and_added_tokens_keep_their_texts(self, family: str, folder: Path) -> None:
        whole, _, _, made = compressed(family, folder)
        assert made.specials.keys() == whole.specials.keys()
        assert made.vocabulary.added.keys() == whole.vocabulary.added.keys()
        ids = made.kept[0].ids
        assert [ids[made.specials[text]] for text in whole.specials] == list(whole.specials.values())
        assert (ids[made.eos_id], made.bos, made.adds_bos) == (whole.eos_id, whole.bos, whole.adds_bos)
        assert tuple(ids[identity] for identity in made.first_ids) == whole.first_ids

    def test_every_beginning_of_the_order_is_a_tokenizer(self, family: str, folder: Path) -> None:
        _, compressor, order, _ = compressed(family, folder)
        for size in np.linspace(order.least, len(order.ids) - 1, 4).astype(int):
            assert compressor.compress(order.ids[:size]).num_tokens == size


class TestOrder:
    def test_tokens_follow_by_count_each_behind_its_parts(self) -> None:
        whole = of_bundled().tokenizer
        the, th = whole.encode(" the")[0], whole.encode(" th")[0]
        counts = np.zeros(whole.vocab_size, np.int64)
        counts[the] = 5
        order = of_bundled().order(counts)
        assert order.least == 256 + 3
        assert order.ids[-1] == the and th in order.ids
        assert order.coverage[-1] == 1 and order.coverage[-2] == 0

    def test_coverage_is_the_share_of_the_counted_tokens(self) -> None:
        whole = of_bundled().tokenizer
        counts = counted(whole, TEXTS)
        order = of_bundled().order(counts)
        for size in (order.least, 300, len(order.ids)):
            assert order.coverage[size] == pytest.approx(counts[list(order.ids[:size])].sum() / counts.sum())

    def test_a_rule_chooses_a_multiple_of_64(self) -> None:
        ids = range(1000)
        order = Order(ids, np.full(1000, 3), least=10)
        assert order.size_of_coverage(0.5) == 512  # 500 tokens reach it
        assert order.size_of_coverage(0.512) == 512
        assert order.size_of_coverage(1.0) == 1024
        # 200 rows of 4 are a fifth of 4000 parameters
        assert order.size_of_share(0.2, row=4, others=3200) == 192

    @pytest.mark.parametrize(
        ("size", "depth", "share"),
        [
            (8_000, 24, 2.97), (16_000, 23, 6.01), (32_000, 22, 11.79), (48_000, 20, 18.07), (72_000, 18, 26.88),
            (100_000, 15, 38.0),
        ],
    )  # fmt: skip
    def test_shares_are_those_of_the_paper(self, size: int, depth: int, share: float) -> None:
        width, hidden = 1792, 4864
        others = depth * (4 * width**2 + 3 * width * hidden)
        assert 100 * embedding_share(size, 2 * width, others) == pytest.approx(share, abs=0.1)

    def test_uncounted_tokens_fill_a_size(self) -> None:
        whole = of_bundled().tokenizer
        order = of_bundled().order(np.zeros(whole.vocab_size, np.int64), 500)
        assert len(order.ids) >= 500
        assert not order.counts.any()


class TestSeveralTimes:
    def test_ids_of_the_first_tokenizer_are_known_after_two_compressions(self, tmp_path: Path) -> None:
        whole = of_bundled().tokenizer
        counts = counted(whole, TEXTS)
        compressor = of_bundled()
        once = compressor.compress(compressor.order(counts, 1000).ids[:1000])
        compressor = Compressor(once)
        twice = compressor.compress(compressor.order(counted(once, TEXTS), 500).ids[:500])
        twice.save(tmp_path)
        for original, kept in zip((once, whole), load_tokenizer(tmp_path).kept, strict=True):
            assert kept.original == original.fingerprint
            assert [original.decode_bytes([old]) for old in kept.ids] == [twice.decode_bytes([i]) for i in range(500)]
