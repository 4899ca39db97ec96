"""Finds places where a long text may be cut without changing its ids, whatever follows.

A pattern's matches can look far ahead. The regular expression is therefore read as an automaton whose states are its
character classes. Started in all states at once, it has no state left at a place that no earlier match reaches or looks
beyond. From there on the matches from every place are followed until they meet; there the text is cut.
"""

from __future__ import annotations

import contextlib
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import regex

from plmtune.tokenizers.bpe import COMPLETE_PATTERNS, normalize

_WINDOW = 2048  # characters searched for one cut
_SECONDS = 1.0  # of CPU time for one cut, with a pattern that is not known to be linear
_TRIES = 64  # windows searched, from the end of a text
# One character of a pattern: a class, an escape or itself.
_ATOM = regex.compile(
    r"\[\^?\]?(?:\\[pP]\{[^}]*\}|\\.|[^\]\\])*\]|\\[pP]\{[^}]*\}|\\[^A-Za-z0-9]|\\[rntfsSdD]|[^\\\[\]]"
)
_GROUP = regex.compile(r"\((?:\?(?:[=!>:]|-?[ims]+:))?(?!\?)")
_COUNT = regex.compile(r"(?:[*+?]|\{[0-9]*,?[0-9]*\})[?+]?")


class _Automaton:
    """Over-approximates the text that a pattern consumes or looks at: repeats are unbounded."""

    def __init__(self, pattern: str) -> None:
        """Read a pattern; ValueError for unsupported syntax such as look-behind."""
        self._pattern, self._at = pattern, 0
        self._atoms: list[Any] = []
        self._follow: list[set[int]] = []
        # If case is ignored somewhere: a negated class then matches less, and any other class more.
        self._flags = (0, regex.IGNORECASE) if "(?i" in pattern else (0,)
        _, self.first, _ = self._alternatives()
        if self._at < len(pattern):
            raise ValueError(f"{pattern[self._at]!r} is not read")
        self.all = frozenset(range(len(self._atoms)))

    def after(self, states: frozenset[int]) -> set[int]:
        """Return the states that may follow these."""
        return set().union(*(self._follow[state] for state in states))

    def over(self, states: set[int], character: str) -> frozenset[int]:
        """Return those of the states that consume a character."""
        return frozenset(states & self._taking(character))

    @lru_cache(1 << 12)  # noqa: B019 (an automaton lives as long as its tokenizer)
    def _taking(self, character: str) -> frozenset[int]:
        return frozenset(i for i, atom in enumerate(self._atoms) if any(form.fullmatch(character) for form in atom))

    def _alternatives(self) -> tuple[bool, set[int], set[int]]:
        """Return whether the pattern up to the end of a group may be empty, its first states, its last states."""
        empty, first, last = self._sequence()
        while self._pattern[self._at : self._at + 1] == "|":
            self._at += 1
            other = self._sequence()
            empty, first, last = empty or other[0], first | other[1], last | other[2]
        return empty, first, last

    def _sequence(self) -> tuple[bool, set[int], set[int]]:
        empty, first, last = True, set[int](), set[int]()
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            part = self._counted()
            for state in last:
                self._follow[state] |= part[1]
            first |= part[1] if empty else set()
            last = part[2] | (last if part[0] else set())
            empty = empty and part[0]
        return empty, first, last

    def _counted(self) -> tuple[bool, set[int], set[int]]:
        looking = self._pattern.startswith(("(?=", "(?!"), self._at)
        empty, first, last = self._one()
        if found := _COUNT.match(self._pattern, self._at):
            self._at = found.end()
            count = found.group()
            empty = empty or count[0] in "?*" or count[:2] in ("{0", "{,")
            if count[0] != "?":
                for state in last:
                    self._follow[state] |= first
        return empty or looking, first, last  # a look-ahead consumes nothing

    def _one(self) -> tuple[bool, set[int], set[int]]:
        if found := _GROUP.match(self._pattern, self._at):
            self._at = found.end()
            part = self._alternatives()
            if self._pattern[self._at : self._at + 1] != ")":
                raise ValueError("a group is not closed, or not read")
            self._at += 1
            return part
        found = _ATOM.match(self._pattern, self._at)
        if found is None or found.group() in tuple("()*+?{}^$"):
            raise ValueError(f"{self._pattern[self._at :]!r:.20} is not read")
        self._at = found.end()
        self._atoms.append([regex.compile(found.group(), flags | regex.DOTALL) for flags in self._flags])
        self._follow.append(set())
        state = len(self._atoms) - 1
        return False, {state}, {state}


class _Fixed:
    """Texts that are found before a pattern is applied.

    Attributes:
        longest: characters of the longest.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        held = list(texts)
        self.longest = max(map(len, held), default=0)
        self._any = re.compile("|".join(map(re.escape, held))) if held else None

    def between(self, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the stretches of a part of a text that none of them touches, last first."""
        touched, at = [], max(0, start - self.longest)
        while self._any is not None and (found := self._any.search(text, at)) and found.start() < end:
            touched.append((found.start(), found.start() + self.longest))  # a longer one may begin there
            at = found.start() + 1
        for first, beyond in reversed(touched):
            if beyond < end:
                yield max(start, beyond), end
            end = min(end, first)
        if start < end:
            yield start, end


class Cuts:
    """The places where texts of one tokenizer may be cut.

    Args:
        pattern: regular expression of the pieces; None: no place is certain.
        complete: the same, extended to match any text.
        fixed: texts that are found before the pattern is applied.
        late: texts that are found after them, in normalized text.
        form: Unicode normalization form.
    """

    def __init__(
        self, pattern: str | None, complete: str, fixed: Iterable[str], late: Iterable[str], form: str | None
    ) -> None:
        self._automaton: _Automaton | None = None
        if pattern is None:
            return
        self._form: Any = form
        self._fixed, self._late = _Fixed(fixed), _Fixed(late)
        self._pattern = regex.compile(pattern) if complete != pattern else None
        self._pieces = regex.compile(complete)
        # Always fails, so that a partial match is a try that reached the end of the text.
        self._tries = regex.compile(f"(?:{complete})(?!)")
        self._is_linear = pattern in COMPLETE_PATTERNS
        self._deadline = 0.0
        with contextlib.suppress(ValueError):
            self._automaton = _Automaton(pattern)

    def last(self, text: str) -> int:
        """Return the last place where a text may be cut; 0 if there is none."""
        if self._automaton is None:
            return 0
        self._deadline = time.thread_time() + _SECONDS
        try:
            return self._last(text)
        except TimeoutError:  # the encoding reports it
            self._automaton = None
            return 0

    def _last(self, text: str) -> int:
        end = len(text) - self._fixed.longest  # the text after it may be the beginning of a fixed one
        for _ in range(_TRIES):
            start = max(0, end - _WINDOW)
            for low, high in self._fixed.between(text, start, end):
                if cut := self._cut(text[low:high]):
                    return low + cut
            if start == 0:
                break
            end = start + _WINDOW // 8
        return 0

    def _cut(self, raw: str) -> int:
        """Return the last place in a stretch of text whose ends may lie inside pieces; 0 if there is none."""
        text, places = self._normalized(raw)
        reach = self._late.longest
        for low, high in self._late.between(text, reach, len(text) - reach):
            if at := self._cut_between(text[low:high], {at - low for at in places if low <= at < high}):
                return places[low + at]
        return 0

    def _cut_between(self, text: str, places: set[int]) -> int:
        """Do the same in a stretch without fixed texts, at one of `places`."""
        begin = min(places, default=None)
        if begin is None or (crossed := self._crossed(text, begin)) is None:
            return 0
        heads, matches = set(range(begin, crossed + 1)), dict[int, int]()
        while len(heads) > 1 or max(heads) < crossed:
            head = min(heads)
            heads.remove(head)
            end = self._end(text, head)
            if end is None:
                return 0
            matches[head] = end
            heads.add(end)
        chain = [*heads]
        while (end := self._end(text, chain[-1])) is not None:
            matches[chain[-1]] = end
            chain.append(end)
        for at in reversed(chain):
            # A piece before a cut sees the end of a text instead of what follows.
            if at in places and all(
                self._match(self._pieces, text, head, at).end() == end for head, end in matches.items() if head < at
            ):
                return at
        return 0

    def _match(
        self, pattern: regex.Pattern[str], text: str, at: int, end: int | None = None, partial: bool = False
    ) -> Any:
        """Match a pattern, which may backtrack exponentially, before the deadline."""
        left = None if self._is_linear else self._deadline - time.thread_time()
        if left is not None and left <= 0:
            raise TimeoutError
        return pattern.match(text, at, len(text) if end is None else end, partial=partial, timeout=left)

    def _end(self, text: str, at: int) -> int | None:
        """Return the end of the piece that begins at a place; None if it is not certain or there is none."""
        found = self._match(self._pieces, text, at)
        sure = found is not None and self._match(self._tries, text, at, partial=True) is None
        return int(found.end()) if sure and found.end() > at else None

    def _crossed(self, text: str, begin: int) -> int | None:
        """Return the first place that no match from before `begin` reaches or looks beyond; None if there is none."""
        automaton = self._automaton
        assert automaton is not None
        states = automaton.all
        unmatched = self._pattern is not None  # text that the pattern does not match extends to the next match
        for at in range(begin, len(text)):
            if not states and not unmatched:
                return at
            following = automaton.after(states) | (automaton.first if unmatched else set())
            states = automaton.over(following, text[at])
            if unmatched and self._pattern is not None and at > begin:
                found = self._match(self._pattern, text, at)
                unmatched = not found or self._match(self._tries, text, at, partial=True) is not None
        return None

    def _normalized(self, raw: str) -> tuple[str, dict[int, int]]:
        """Return the normalized text, and places where it may be cut: place in it -> place in `raw`."""
        if self._form is None:
            return raw, {at: at for at in range(len(raw))}
        starts = [at for at, character in enumerate(raw) if _starts(character)]
        text, places = "", dict[int, int]()
        for at, end in pairwise(starts):  # the last may combine with what follows
            places[len(text)] = at
            text += normalize(self._form, raw[at:end])
        return text, places


@lru_cache(1 << 14)
def _starts(character: str) -> bool:
    """Whether a character never combines with those before it, in any Unicode form."""
    if character.isascii():
        return True
    first = unicodedata.normalize("NFKD", character)[0]
    joins = unicodedata.combining(first) or unicodedata.category(first)[0] == "M" or "\u1160" <= first <= "\u11ff"
    return not joins and first.isprintable() | first.isspace()
