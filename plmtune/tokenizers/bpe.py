"""Byte-level BPE as ranks: what decides the ids of a text, and when ranks and a list of merges are equivalent.

A tokenizer.json lists merges, (left, right) pairs in order of priority. tiktoken knows only tokens and
their ranks: it joins any two neighbours whose bytes together are a token, lowest rank first. The two agree
on every text if and only if, for each token, joining its own bytes by rank passes through exactly the pair
that its merge names. (Sufficient: joins inside the span of a token never depend on what stands outside it,
so two neighbours that together are a token have always come about as they do when the token's bytes stand
alone.) `check_merges` proves that for a whole vocabulary in a fraction of a second, `recover_merges` finds
the pairs from the ranks.

tiktoken also encodes a piece of text that equals a token as this token, whether or not its bytes join to it
(`ignore_merges` in Llama 3's tokenizer.json). A token that its own bytes never join to then gets a rank after all
others; if the join does not end in two parts, that rank never applies.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

from plmtune.errors import UserError, refuse_pointer

Normalization = Literal["NFC", "NFD", "NFKC", "NFKD"]
Merge = tuple[int, int]  # ranks of the two parts

# Pre-tokenizers: merges never cross pieces. Each pattern matches at every character, in linear time.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's pattern after digits are split off (SmolLM2, StarCoder): a digit ends a run of spaces as the end does.
DIGITS_GPT2_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_PATTERN = r"[\s\S]"
COMPLETE_PATTERNS = frozenset(
    {GPT2_PATTERN, DIGITS_GPT2_PATTERN, QWEN2_PATTERN, LLAMA3_PATTERN, O200K_PATTERN, BYTE_PATTERN}
)

CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SINGLE_BYTES = tuple(bytes([value]) for value in range(256))
MAX_ID = 1 << 19  # the size of tables; the largest public vocabularies have half as many
_MAX_JOINS = 20_000_000  # steps, which take seconds
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Vocabulary:
    """Everything that decides the ids of a text.

    Ranks count the single bytes (in the order of their ids), then the merges in order; ids are independent of ranks.

    Attributes:
        tokens: bytes of each rank; after those of the merges, tokens that only a whole piece encodes to.
        ids: id of each rank.
        pattern: regular expression of the pieces; text that it does not match becomes pieces.
        normalization: Unicode form that text is normalized to first.
        specials: control tokens, id by text; in a document their text stays plain text by default.
        added: tokens that are found in any text before it is cut, id by text.
        normalized: those of specials and added that are found after the others, in normalized text.
        unreachable: ids with bytes that no text is encoded to.
        merges: the pair of each rank after the single bytes.
        where: the file, for messages.
    """

    tokens: Sequence[bytes]
    ids: Sequence[int]
    pattern: str
    normalization: Normalization | None = None
    specials: dict[str, int] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    unreachable: dict[int, bytes] = field(default_factory=dict)
    merges: Sequence[Merge] = ()
    normalized: frozenset[str] = frozenset()
    where: str = field(default="tokenizer.json", compare=False)

    @property
    def pieces(self) -> dict[int, bytes]:
        """The bytes of each id."""
        pieces = dict(zip(self.ids, self.tokens, strict=True)) | self.unreachable
        return pieces | {identity: text.encode() for text, identity in (self.specials | self.added).items()}

    @property
    def whole(self) -> Sequence[bytes]:
        """The tokens that only an equal piece of text encodes to."""
        return self.tokens[count_single_bytes(self.tokens) + len(self.merges) :]


# Characters that every version of Unicode since 3.2 has, so that all tables normalize them equally.
_STABLE = re.compile(
    "[\\x00-\u021f\u0250-\u02ad\u0300-\u034e\u0391-\u03a1\u03a3-\u03ce\u0400-\u0486\u05d0-\u05ea\u0621-\u063a\u0640-\u0655"
    "\u0905-\u0939\u0e01-\u0e3a\u1e00-\u1e9b\u2010-\u2052\u2190-\u21ff\u2200-\u22f1\u2500-\u2613\u3000-\u303f\u3041-\u3094"
    "\u3099-\u309e\u30a1-\u30fe\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff5e]*"
)


def normalize(form: Normalization | None, text: str) -> str:
    """Return a text in a Unicode form by the tables of the `tokenizers` library, which are not those of Python."""
    if form is None or text.isascii():
        return text
    if _STABLE.fullmatch(text):  # 75 times as fast
        return unicodedata.normalize(form, text)
    import tokenizers

    try:
        return str(getattr(tokenizers.normalizers, form)().normalize_str(text))
    except (UnicodeEncodeError, TypeError):  # half a surrogate pair
        return normalize(form, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def count_single_bytes(tokens: Sequence[bytes]) -> int:
    return next((rank for rank, token in enumerate(tokens) if len(token) > 1), len(tokens))


def _meets(left: int, right: int, merges: Sequence[Merge], ranks: dict[Merge, int], num_bytes: int) -> bool:
    """Whether joining the bytes of two tokens by rank ends in these two.

    Walks back through both tokens' merges, latest first, to check that no join across the border comes earlier (the
    test of a valid pair in GitHub's `bpe` crate).
    """
    limit = len(merges) + num_bytes
    while True:
        if ranks.get((left, right), limit) < limit:
            return False
        split_left = left > right
        if (left if split_left else right) < num_bytes:
            split_left = not split_left
        if split_left:
            if left < num_bytes:
                return True
            limit = left
            left = merges[left - num_bytes][1]
        else:
            if right < num_bytes:
                return True
            # At equal rank the leftmost pair is joined first, and the border lies left of it.
            limit = right + 1
            right = merges[right - num_bytes][0]


def check_merges(merges: Sequence[Merge], num_bytes: int) -> int | None:
    """Return the first rank whose merge is not how its bytes are joined by rank, or None if all are.

    Args:
        merges: parts of rank num_bytes, num_bytes + 1, ...; each part's rank is lower than its own.
    """
    ranks: dict[Merge, int] = {}
    for rank, (left, right) in enumerate(merges, start=num_bytes):
        if max(left, right) >= rank or not _meets(left, right, merges, ranks, num_bytes):
            return rank
        ranks[left, right] = rank
    return None


def recover_merges(tokens: Sequence[bytes]) -> tuple[list[bytes], list[Merge], list[bytes]]:
    """Return what joining by rank makes of each token's own bytes.

    Returns:
        the tokens that are reached, in the given order; the pair of each after the single bytes, as ranks in that
        order; and the other tokens, which no text is joined to.

    Raises:
        ValueError: if that takes too long.
    """
    num_bytes = count_single_bytes(tokens)
    merges, ranks, places = list[Merge](), dict[Merge, int](), list(range(num_bytes))
    rank_of = {token: rank for rank, token in enumerate(tokens[:num_bytes])}
    for place in range(num_bytes, len(tokens)):
        token = tokens[place]
        for cut in range(1, len(token)):
            left, right = rank_of.get(token[:cut]), rank_of.get(token[cut:])
            if left is not None and right is not None and _meets(left, right, merges, ranks, num_bytes):
                rank_of[token] = ranks[left, right] = len(places)
                merges.append((left, right))
                places.append(place)
                break
    if len(places) == len(tokens):
        return list(tokens), merges, []
    # Up to here each token has parts of lower rank.
    pairs = {places[num_bytes + at]: (places[left], places[right]) for at, (left, right) in enumerate(merges)}
    _join_others(tokens, {token: place for place, token in enumerate(tokens)}, pairs)
    reached = [*range(num_bytes), *sorted(pairs)]
    rank_at = {place: rank for rank, place in enumerate(reached)}
    return (
        [tokens[place] for place in reached],
        [(rank_at[left], rank_at[right]) for left, right in map(pairs.__getitem__, reached[num_bytes:])],
        [token for place, token in enumerate(tokens) if place not in rank_at],
    )


def _join_others(tokens: Sequence[bytes], place_of: dict[bytes, int], pairs: dict[int, Merge]) -> None:
    """Add to `pairs` tokens joined from parts of higher rank (as in Llama 3), and tokens that contain these."""
    others = [token for token in tokens if len(token) > 1 and place_of[token] not in pairs]
    joined = _join_all(others, place_of)
    late = [token for token, parts in joined.items() if len(parts) == 2]
    # A token that contains such a token may be joined in another way, or not at all.
    text, starts = b"".join(tokens), list(accumulate(map(len, tokens), initial=0))
    holding = set()
    for token in late:
        at = text.find(token)
        while at >= 0:
            holding.add(tokens[bisect_right(starts, at) - 1])
            at = text.find(token, at + 1)
    for token, parts in (joined | _join_all(holding - joined.keys(), place_of)).items():
        pairs.pop(place_of[token], None)
        if len(parts) == 2:
            pairs[place_of[token]] = place_of[parts[0]], place_of[parts[1]]


def _join_all(tokens: Collection[bytes], ranks: dict[bytes, int]) -> dict[bytes, list[bytes]]:
    """Return the last parts before the bytes of each token are joined to one, by rank."""
    if sum(len(token) ** 2 for token in tokens) > _MAX_JOINS:
        raise ValueError(f"{len(tokens):,} tokens are not reached by joining lower ones")
    return {token: _join(token, ranks) for token in tokens}


def _join(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        found = [(ranks[pair], at) for at in range(len(parts) - 1) if (pair := parts[at] + parts[at + 1]) in ranks]
        if not found:
            break
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def check_whole(tokens: Sequence[bytes], whole: Sequence[bytes]) -> bytes | None:
    """Return the first of `whole` that two neighbours would be joined to if it followed all tokens, or None.

    Args:
        tokens: of each rank, all joined from their own bytes.
        whole: tokens that only a whole piece of text may encode to.

    Raises:
        ValueError: if that takes too long.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return next((token for token, parts in _join_all(whole, ranks).items() if len(parts) == 2), None)


def read_file(path: Path) -> bytes:
    """Read a tokenizer's file of limited size."""
    try:
        if not path.is_file():
            raise UserError(f"Tokenizer file {path} does not exist or is no file.")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"Tokenizer file {path} has {size:,} bytes, more than the {MAX_FILE_BYTES:,} allowed.")
        refuse_pointer(path)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Tokenizer file {path} cannot be read: {error.strerror}.") from error


def from_ranks(
    ranks: dict[bytes, int],
    pattern: str,
    normalization: Normalization | None,
    specials: Sequence[str],
    where: str,
) -> Vocabulary:
    """Make a vocabulary from tiktoken's ranks, which are also the ids; the specials follow the last.

    Raises:
        UserError: if a byte is missing, an id is impossible or a token cannot be reached.
    """
    missing = [token for token in SINGLE_BYTES if token not in ranks]
    if missing:
        raise UserError(f"{where}: {len(missing)} of the 256 single bytes have no rank, the first {missing[0]!r}.")
    if len(set(ranks.values())) != len(ranks) or not 0 <= min(ranks.values()) <= max(ranks.values()) < MAX_ID:
        raise UserError(f"{where}: ranks must be different numbers from 0 to {MAX_ID - 1}.")
    tokens = sorted(ranks, key=lambda token: (len(token) > 1, ranks[token]))
    try:
        tokens, merges, whole = recover_merges(tokens)
    except ValueError as error:
        raise UserError(f"{where}: {error}; these are not the ranks of a byte-level BPE.") from error
    tokens += whole
    first = max(ranks.values()) + 1
    return Vocabulary(
        tokens,
        [ranks[token] for token in tokens],
        pattern,
        normalization,
        {special: first + index for index, special in enumerate(specials)},
        merges=merges,
    )


def read_tiktoken(path: Path, pattern: str, normalization: Normalization | None) -> Vocabulary:
    """Read a ``.tiktoken`` file: lines of a token in base64 and its rank; the ChatML tokens follow the last.

    Raises:
        UserError: naming file and line, if it is not one.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}, line {number}: not a token in base64 and its rank; is this a .tiktoken file?"
            ) from None
    ranks.pop(b"", None)
    return from_ranks(ranks, pattern, normalization, CHATML_SPECIALS, str(path))
