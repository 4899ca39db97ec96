"""Rows of conversations and preference pairs, from files or the hub, and the rows that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

from plmtune.data.hub import Hub
from plmtune.data.row_files import check_encoding, describe_files, hash_files
from plmtune.data.row_readers import find_row_files, read_rows
from plmtune.data.sources import Dataset
from plmtune.errors import UserError
from plmtune.ranges import AT_LEAST_1, NotEmpty, check
from plmtune.tokenizers.message import BadRow, Unused

REMEDY = "Correct them, or leave such rows out: chat.skip_bad=true"
_MOST_SHOWN = 8


class _Made(Protocol):
    @property
    def unused(self) -> tuple[str, ...]: ...


T = TypeVar("T", bound=_Made)


@dataclass
class Refused:
    """Rows that cannot be used, by reason: the end of a sentence that begins with a verb, as in `BadRow`."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, place: str, reason: str | BadRow) -> None:
        """Count a row at `place`, such as "train.jsonl, line 17"."""
        reason = str(reason)
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, place)

    def merge(self, other: Refused) -> None:
        """Add the counts of another."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.first.setdefault(reason, other.first[reason])

    def __len__(self) -> int:
        return sum(self.counts.values())

    def describe(self) -> str:
        """Return a line for each reason, the first place in front; the most frequent reasons, where there are many."""
        reasons = sorted(self.counts, key=lambda reason: -self.counts[reason])
        lines = []
        for reason in reasons[:_MOST_SHOWN]:
            others = self.counts[reason] - 1
            lines.append(f"{self.first[reason]} {reason}" + (f"; {others:,} more like it" if others else ""))
        if rest := sum(self.counts[reason] for reason in reasons[_MOST_SHOWN:]):
            lines.append(f"{rest:,} more for {len(reasons) - _MOST_SHOWN:,} other reasons")
        return "\n".join(lines)

    def raise_if_any(self, remedy: str, good: int | None = None) -> None:
        """Raise one UserError that lists all reasons, if anything was refused.

        Args:
            remedy: how the other rows can be used.
            good: the number of other rows, if known; with 0 the message has no remedy.
        """
        if self.counts:
            rows = "1 row" if len(self) == 1 else f"{len(self):,} rows"
            if good == 0:
                rows, remedy = ("the only row" if len(self) == 1 else f"all {rows}"), ""
            raise UserError("\n".join(filter(None, [f"{rows} cannot be used:", self.describe(), remedy])))


class Rows:
    """Rows of files or of a dataset of the hub.

    Attributes:
        name: of the dataset, or of the first file.
    """

    def __init__(
        self,
        paths: Sequence[str] = (),
        *,
        hub: str | None = None,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        encoding: str = "utf-8",
        max_rows: int | None = None,
    ) -> None:
        """Find the files.

        Args:
            paths, hub, subset, split, revision, encoding, max_rows: see `plmtune.data.conversations.conversations`.
        """
        if paths and hub is not None:
            raise UserError(f"data: give paths ({', '.join(paths)}) or hub ({hub}), not both")
        if not paths and hub is None:
            raise UserError(
                "data: paths is empty. Give files, data.paths=train.jsonl, or a dataset of the hub, data.hub=NAME. "
                "(plmtune run demo_sft, demo_dpo and demo_aries bring small data of their own.)"
            )
        check(AT_LEAST_1, max_rows=max_rows)
        check(NotEmpty(), hub=hub, subset=subset, split=split, revision=revision)
        others = {"subset": subset, "split": split if split != "train" else None, "revision": revision}
        if given := [f"{name}={value}" for name, value in others.items() if value is not None and hub is None]:
            raise UserError(f"data: {given[0]} goes with hub, a dataset of the Hugging Face hub; paths are read whole")
        if hub is not None and encoding != "utf-8":
            raise UserError(f"data: encoding={encoding} goes with paths; a dataset of the hub has none")
        check_encoding(encoding)
        self.encoding = encoding
        self.max_rows = max_rows
        self.files = find_row_files(paths) if hub is None else []
        self._hub = None
        if hub is not None:
            self._hub = Hub(hub, subset=subset, split=split, text_key="", revision=revision, limit=max_rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
        rows = self._hub.rows() if self._hub is not None else read_rows(self.files, self.encoding)
        return islice(rows, self.max_rows)

    def fingerprint(self) -> str:
        """Return a hash that changes when the rows do."""
        if self._hub is not None:
            return self._hub.fingerprint()
        return hash_files(self.files, [self.encoding, self.max_rows])

    def describe(self) -> str:
        return self._hub.describe() if self._hub is not None else describe_files(self.files)


class FromRows(Dataset):
    """Data that is made of rows.

    Attributes:
        refused: rows that the latest reading could not use.
    """

    refused: Refused

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.refused, self.unused = Refused(), Unused()

    def describe(self) -> str:
        return f"{self.name} of {self.rows.describe()}"

    def _read(self, convert: Callable[[dict[str, Any], str], T], skip_bad: bool) -> Iterator[T]:
        """Yield what `convert` makes of each row and its place; without `skip_bad` raise at the end for bad rows."""
        self.refused, self.unused = Refused(), Unused()
        good = 0
        for place, row in self.rows:
            try:
                if isinstance(row, BadRow):
                    raise row
                made = convert(row, place)
            except BadRow as error:
                self.refused.add(place, error)
                continue
            self.unused.add(made.unused)
            yield made
            good += 1
        if not skip_bad:
            self.refused.raise_if_any(REMEDY, good=good)
