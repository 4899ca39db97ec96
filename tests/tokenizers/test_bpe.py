"""Ranks and merges: when they say the same, and how one is had from the other."""

import random
from itertools import pairwise

import pytest

from plmtune.errors import UserError
from plmtune.tokenizers.bpe import (
    GPT2_PATTERN,
    QWEN2_PATTERN,
    SINGLE_BYTES,
    check_merges,
    from_ranks,
    read_tiktoken,
    recover_merges,
)
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import load_tokenizer


def joined_by_rank(token: bytes, rank_of: dict[bytes, int], limit: int) -> list[bytes]:
    """BPE written naively, with the ranks below a limit."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [(rank_of.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, place = min(pairs, default=(limit, 0))
        if rank >= limit:
            return parts
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def random_vocabulary(seed: int) -> list[bytes]:
    """Tokens over a small alphabet, each the join of two earlier ones: chains and overlaps abound."""
    generator = random.Random(seed)
    tokens = [bytes([97 + i]) for i in range(generator.choice([1, 2, 3]))]
    for _ in range(60):
        token = generator.choice(tokens) + generator.choice(tokens)
        if token not in tokens and len(token) <= 12:
            tokens.append(token)
    return tokens


def joined_by_pair(text: bytes, tokens: list[bytes], merges: list[tuple[int, int]]) -> list[bytes]:
    """BPE written naively, where only listed pairs are joined."""
    num_bytes = len(tokens) - len(merges)
    places = {(tokens[a], tokens[b]): place for place, (a, b) in enumerate(merges, start=num_bytes)}
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        place, at = min(((places.get(pair, 999), i) for i, pair in enumerate(pairwise(parts))), default=(999, 0))
        if place == 999:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


class TestRecoverMerges:
    @pytest.mark.parametrize("shuffled", [False, True])
    @pytest.mark.parametrize("seed", range(40))
    def test_pairs_join_any_text_as_ranks_do(self, seed: int, shuffled: bool) -> None:
        tokens = random_vocabulary(seed)
        num_bytes = sum(len(token) == 1 for token in tokens)
        generator = random.Random(seed)
        if shuffled:  # parts may then rank behind what they make
            tokens[num_bytes:] = generator.sample(tokens[num_bytes:], len(tokens) - num_bytes)
        reached, merges, whole = recover_merges(tokens)
        assert sorted([*reached, *whole]) == sorted(tokens) and reached == [t for t in tokens if t in set(reached)]
        rank_of = {token: rank for rank, token in enumerate(tokens)}
        texts = [b"".join(generator.choices(tokens[:num_bytes], k=generator.randint(1, 20))) for _ in range(30)]
        for text in [*texts, *tokens]:
            parts = joined_by_rank(text, rank_of, len(tokens))
            assert parts == joined_by_pair(text, reached, merges)
            assert not set(parts) & set(whole)

    def test_a_token_that_a_lower_rank_always_breaks_is_given_apart(self) -> None:
        # b c joins first, so a b never stands beside c.
        assert recover_merges([b"a", b"b", b"c", b"d", b"bc", b"ab", b"abcd"])[2] == [b"abcd"]

    def test_it_comes_to_an_end(self) -> None:
        tokens = [b"a", b"b", *(b"a" + b"b" * 200 + str(i).encode() for i in range(2000))]
        with pytest.raises(ValueError, match="2,000 tokens are not reached by joining lower ones"):
            recover_merges(tokens)


class TestCheckMerges:
    def test_a_merge_that_ranks_would_not_follow_is_found(self) -> None:
        # ranks: 0 a, 1 b, 2 c, 3 bc, 4 ab, 5 (ab, c). By rank, abc is (a, bc).
        assert check_merges([(1, 2), (0, 1), (4, 2)], 3) == 5
        assert check_merges([(1, 2), (0, 1), (0, 3)], 3) is None

    def test_a_merge_of_a_later_token_is_found(self) -> None:
        assert check_merges([(3, 1), (0, 1)], 2) == 2


class TestRanks:
    def test_bytes_come_first_whatever_their_ids(self) -> None:
        ranks = {byte: 255 - i for i, byte in enumerate(SINGLE_BYTES)} | {b"ab": 300, b"abc": 301}
        held = from_ranks(ranks, GPT2_PATTERN, None, ["<|end|>"], "here")
        assert held.tokens[0] == b"\xff"
        assert [held.tokens[rank] for rank in held.merges[1]] == [b"ab", b"c"]
        assert (held.ids[-1], held.specials) == (301, {"<|end|>": 302})

    def test_a_token_that_its_bytes_never_join_to_is_given_by_a_whole_piece(self, tmp_path) -> None:
        ranks = {byte: byte[0] for byte in SINGLE_BYTES} | {b"bc": 256, b"ab": 257, b"abcd": 258, b"dd": 259}
        held = from_ranks(ranks, GPT2_PATTERN, None, ["<|endoftext|>"], "here")
        assert (held.whole, held.ids[-1]) == ([b"abcd"], 258)
        found = Tokenizer(held)
        assert (found.encode("abcd"), found.encode("abcddd")) == ([258], [97, 256, 259, 100])
        found.save(tmp_path)
        assert load_tokenizer(tmp_path).encode("abcd abcd") == [258, 32, 97, 256, 100]

    def test_a_token_of_parts_that_rank_behind_it_keeps_its_rank(self, tmp_path) -> None:
        ranks = {byte: byte[0] for byte in SINGLE_BYTES} | {b"abc": 256, b"cd": 257, b"ab": 258}
        found = Tokenizer(from_ranks(ranks, GPT2_PATTERN, None, ["<|endoftext|>"], "here"))
        assert (found.encode("xabc"), found.encode("xabcd")) == ([120, 256], [120, 258, 257])
        found.save(tmp_path)
        assert load_tokenizer(tmp_path).encode("xabc xabcd") == [120, 256, 32, 120, 258, 257]

    def test_a_missing_byte_is_named(self) -> None:
        with pytest.raises(UserError, match=r"1 of the 256 single bytes have no rank, the first b'\\x00'"):
            from_ranks({byte: byte[0] for byte in SINGLE_BYTES[1:]}, GPT2_PATTERN, None, [], "here")

    def test_an_absurd_rank_is_refused(self) -> None:
        ranks = {byte: byte[0] for byte in SINGLE_BYTES} | {b"ab": 1 << 40}
        with pytest.raises(UserError, match="different numbers"):
            from_ranks(ranks, GPT2_PATTERN, None, [], "here")


class TestReadTiktoken:
    @pytest.mark.parametrize("line", [b"not base64 at all", b"IQ== one", b"PK\x03\x04\xff", b"IQ=="])
    def test_a_broken_line_is_named(self, tmp_path, line: bytes) -> None:
        path = tmp_path / "broken.tiktoken"
        path.write_bytes(b"IQ== 0\n\n" + line)
        with pytest.raises(UserError, match=r"broken.tiktoken, line 3"):
            read_tiktoken(path, QWEN2_PATTERN, "NFC")

    def test_an_empty_file_and_a_missing_one_are_refused(self, tmp_path) -> None:
        (tmp_path / "empty.tiktoken").touch()
        with pytest.raises(UserError, match="256 of the 256"):
            read_tiktoken(tmp_path / "empty.tiktoken", QWEN2_PATTERN, "NFC")
        with pytest.raises(UserError, match="does not exist"):
            read_tiktoken(tmp_path / "none.tiktoken", QWEN2_PATTERN, "NFC")
