import sys
import unicodedata
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmtune.tokenizers import cuts as module
from plmtune.tokenizers.bpe import (
    BYTE_PATTERN,
    DIGITS_GPT2_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    O200K_PATTERN,
    QWEN2_PATTERN,
)
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled

# Also patterns that look far ahead, leave text unmatched, or take a match back.
PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "digits": DIGITS_GPT2_PATTERN,
    "qwen2": QWEN2_PATTERN,
    "llama3": LLAMA3_PATTERN,
    "byte": BYTE_PATTERN,
    "o200k": O200K_PATTERN,
    "letters": r"\p{L}+",
    "blanks": r"[a-z ]+|.",
    "thousands": r"\p{N}{1,3}(?=(?:\p{N}{3})*[^\p{N}])|\p{N}|[^\p{N}]",
    "tags": r"<[^>]*>|[\s\S]",
    "lazy": r"'[\s\S]*?\.|\s+(?=\p{L})|(?>a+)b|[^\s]",
}
PARTS = (
    *(" a", " b", " c", "B", " ", "  ", "\n", "\n\n", "\r\n", "\t", "1", "23", "'s", "'", ".", "<", ">", "/"),
    *(
        "\u00e9",
        "e\u0301",
        "\u0301",
        "\u4f60",
        "\u2003",
        "\u1100\u1161",
        "\u11a8",
        "\ud55c",
        "\uff9e",
        "\u00a8",
        "\ufb01",
    ),
)
TEXTS = st.lists(st.sampled_from(PARTS), min_size=8, max_size=40).map("".join)
ADDED = ((), (" a", "\n\n", " a b c", "B\n"), ("1", " a", "c\u0301", "\ufb01"))


def tokenizer(pattern: str, form: str | None = None, added: tuple[str, ...] = ()) -> Tokenizer:
    held = bundled().vocabulary
    first = max(held.specials.values()) + 1
    ids = {text: first + index for index, text in enumerate(added)}
    late = frozenset(added[1:]) if added and added[0] == "1" and form else frozenset()
    return Tokenizer(replace(held, pattern=PATTERNS[pattern], normalization=form, added=ids, normalized=late))


@pytest.mark.parametrize(
    ("form", "added"),
    [(None, ADDED[0]), ("NFC", ADDED[1]), ("NFKD", ADDED[2]), ("NFC", ADDED[0])],
    ids=["plain", "added", "normalized", "nfc"],
)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("examples", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_the_ids_of_both_parts_are_those_of_the_whole(
    examples: int, pattern: str, form: str | None, added: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WINDOW", 24)
    made = tokenizer(pattern, form, added)
    found = Counter[bool]()

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(TEXTS, TEXTS)
    def check(text: str, more: str) -> None:
        cut = made.cuts.last(text)
        found[cut > 0] += 1
        whole = made.encode(text + more)
        assert made.encode(text[:cut]) + made.encode((text + more)[cut:]) == whole

    check()
    assert found[True] or pattern in ("tags", "lazy", "thousands")


@pytest.mark.parametrize("pattern", ["gpt2", "digits", "qwen2", "llama3", "byte", "o200k"])
def test_real_text_is_cut_near_its_end(pattern: str) -> None:
    made = tokenizer(pattern, "NFC")
    for text in (
        "The quick brown fox. " * 500,
        "Ein Fuß, ja.\n" * 500,
        "\u4f60\u597d\uff0c" * 900,
        "x = 1\n    y\n\n" * 500,
    ):
        assert len(text) - made.cuts.last(text) < 40


def test_nothing_is_cut_inside_a_piece_or_where_a_pattern_looks_behind() -> None:
    assert tokenizer("qwen2").cuts.last("x" * 10_000) == 0
    behind = Tokenizer(replace(bundled().vocabulary, pattern=r"(?<=a)b|[\s\S]"))
    assert behind.cuts.last("a b " * 1000) == 0


def test_a_negated_class_takes_what_it_takes_where_case_counts() -> None:
    """A pattern that ignores case in one part does not in others."""
    quoted = Tokenizer(replace(bundled().vocabulary, pattern=r"""(?i:'s)|"[^a-z"]*"|[\s\S]"""))
    text, more = '"' + "AB CD " * 1000, '" x'
    cut = quoted.cuts.last(text)
    assert quoted.encode(text[:cut]) + quoted.encode((text + more)[cut:]) == quoted.encode(text + more)


def test_characters_that_join_with_those_before_them_begin_nothing() -> None:
    for character in map(chr, range(sys.maxunicode + 1)):
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and parts[0][0] != "<":
            first, second = (chr(int(part, 16)) for part in parts)
            joined = unicodedata.normalize("NFC", first + second) == character
            assert not (joined and module._starts(second)), hex(ord(character))
