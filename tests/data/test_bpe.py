"""Ranks and merges: when they say the same, and how one is had from the other."""

import random
from itertools import pairwise

import pytest

from plmtune.data.bpe import (
    GPT2_PATTERN,
    QWEN2_PATTERN,
    SINGLE_BYTES,
    check_merges,
    from_ranks,
    read_tiktoken,
    recover_merges,
)
from plmtune.errors import UserError


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


def reachable(tokens: list[bytes]) -> list[bytes]:
    kept: list[bytes] = []
    for token in tokens:
        rank_of = {held: rank for rank, held in enumerate(kept)}
        if len(token) == 1 or len(joined_by_rank(token, rank_of, len(kept))) == 2:
            kept.append(token)
    return kept


class TestRecoverMerges:
    @pytest.mark.parametrize("seed", range(40))
    def test_pairs_are_the_last_two_parts_of_a_naive_join(self, seed: int) -> None:
        tokens = reachable(random_vocabulary(seed))
        rank_of = {token: rank for rank, token in enumerate(tokens)}
        num_bytes = sum(len(token) == 1 for token in tokens)
        merges = recover_merges(tokens)
        for rank, (left, right) in enumerate(merges, start=num_bytes):
            assert [tokens[left], tokens[right]] == joined_by_rank(tokens[rank], rank_of, rank)
        assert check_merges(merges, num_bytes) is None

    @pytest.mark.parametrize("seed", range(40))
    def test_a_token_is_refused_exactly_when_a_naive_join_does_not_reach_it(self, seed: int) -> None:
        tokens = random_vocabulary(seed)
        if reachable(tokens) == tokens:
            recover_merges(tokens)
        else:
            with pytest.raises(ValueError, match="never reached"):
                recover_merges(tokens)

    def test_a_token_that_a_lower_rank_always_breaks_is_named(self) -> None:
        # b c joins first, so a b never stands beside c.
        with pytest.raises(ValueError, match=r"b'abcd' of rank 6"):
            recover_merges([b"a", b"b", b"c", b"d", b"bc", b"ab", b"abcd"])


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
