"""Tables for terminals of any width, and for pipes.

A pipe gets every column on one line a row. On a terminal that is too narrow, these steps are taken until it fits:
headings wrap, prose is folded at spaces, a last column of prose goes below its row and the name of the row above it,
columns that may be dropped go and are named below the table. What still does not fit is printed as a list of fields for
each row. No word is broken: what names a row, such as a path, can be selected and copied. Only a word that is itself
wider than the terminal makes a line too wide.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len

from plmtune.io import terminal

_GAP = "  "
_FOLDED = 20  # prose is not folded narrower than this


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str  # the heading
    right: bool = False  # aligned at the right, as numbers are
    key: bool = False  # it names the row: never folded, on a line of its own where there is no room beside it
    folds: bool = False  # prose, which may take several lines
    drop: int = 0  # order in which columns are left out on a narrow terminal, 1 first; 0: never


@dataclass(frozen=True)
class Cell:
    """A text with a style: bold, dim, red or green."""

    text: str
    style: str = ""


class _Layout(NamedTuple):
    """Columns side by side with their widths, and columns on lines of their own, by index; None: none."""

    beside: list[int]
    widths: list[int]
    above: int | None
    below: int | None


def numbers(names: Mapping[str, int]) -> list[Column]:
    """Return a column of numbers for each name. The values give the order in which columns are dropped; 0: never."""
    return [Column(name, right=True, drop=drop) for name, drop in names.items()]


class Table:
    """Rows of text below headings, if these are shown, and a title.

    columns: a text stands for a column of that name, aligned at the left.
    """

    def __init__(self, columns: Sequence[Column | str], *, title: str = "", headings: bool = True) -> None:
        self.columns = [Column(one) if isinstance(one, str) else one for one in columns]
        self.title = title
        self.headings = headings
        self.rows: list[list[Cell]] = []

    def add(self, *cells: Cell | str) -> None:
        """Append a row."""
        assert len(cells) == len(self.columns)
        self.rows.append([cell if isinstance(cell, Cell) else Cell(cell) for cell in cells])

    def lines(self, width: int | None = None, *, styled: bool = False, encoding: str = "utf-8") -> list[str]:
        """Return the lines of the table; `width` is the terminal's, None: as a pipe gets them."""
        shown = [[Cell(_readable(cell.text, encoding), cell.style) for cell in row] for row in self.rows]
        lines = terminal.wrap(_readable(self.title, encoding), width) if self.title else []
        names = [_readable(column.name, encoding) if self.headings else "" for column in self.columns]
        layout = self._layout(names, shown, width)
        if layout is None:
            return [*lines, *self._records(names, shown, width or 80, styled)]
        if self.headings:
            lines += self._row([Cell(name, "bold") for name in names], layout, width, styled, bottom=True)
        before = None
        for row in shown:
            if layout.above is not None:  # said once for rows that follow each other
                name = row[layout.above]
                row[layout.above], before = Cell("") if name == before else name, name
            lines += self._row(row, layout, width, styled)
        kept = {*layout.beside, layout.above, layout.below}
        if dropped := ", ".join(name for i, name in enumerate(names) if i not in kept):
            lines += terminal.wrap(
                f"Not shown in {width} columns: {dropped}. A wider terminal or a pipe shows all.", width
            )
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _layout(self, names: list[str], rows: list[list[Cell]], width: int | None) -> _Layout | None:
        """Return the first layout that fits, None if none does."""
        columns = list(range(len(names)))
        key = next((i for i in columns if self.columns[i].key), None)
        prose = columns[-1] if self.columns[-1].folds and len(columns) > 1 else None
        while True:
            for above, below in dict.fromkeys([(None, None), (None, prose), (key, None), (key, prose)]):
                beside = [i for i in columns if i not in (above, below)]
                room = None if width is None else width - (len(_GAP) if above is not None else 0)
                if (widths := self._fit(beside, names, rows, room)) is not None:
                    return _Layout(beside, widths, above, below)
            droppable = sorted((self.columns[i].drop, i) for i in columns if self.columns[i].drop)
            if not droppable:
                return None
            columns.remove(droppable[0][1])

    def _fit(self, beside: list[int], names: list[str], rows: list[list[Cell]], width: int | None) -> list[int] | None:
        """Return the widths of columns side by side, or None if they do not fit."""
        content = [max((cell_len(row[i].text) for row in rows), default=0) for i in beside]
        full = [max(size, cell_len(names[i])) for size, i in zip(content, beside, strict=True)]
        room = None if width is None else width - len(_GAP) * (len(beside) - 1)
        if room is None or sum(full) <= room:
            return full
        wrapped = [max(size, _longest_word(names[i])) for size, i in zip(content, beside, strict=True)]
        if sum(wrapped) <= room:
            # The headings that are cut into the fewest lines keep their width.
            return _widen(wrapped, full, room)
        least = [
            max(min(size, _FOLDED), *(_longest_word(text) for text in (names[i], *(row[i].text for row in rows))))
            if self.columns[i].folds
            else size
            for size, i in zip(wrapped, beside, strict=True)
        ]
        return _widen(least, wrapped, room) if sum(least) <= room else None

    def _row(
        self, row: Sequence[Cell], layout: _Layout, width: int | None, styled: bool, *, bottom: bool = False
    ) -> Iterator[str]:
        indent = ""
        if layout.above is not None:
            indent = _GAP
            if row[layout.above].text:
                yield _styled(row[layout.above], styled)
        parts = [fold(row[i].text, width) for i, width in zip(layout.beside, layout.widths, strict=True)]
        height = max(map(len, parts), default=0)
        for number in range(height):
            line = indent
            for part, i, size in zip(parts, layout.beside, layout.widths, strict=True):
                at = number - (height - len(part)) if bottom else number
                text = part[at] if 0 <= at < len(part) else ""
                space = " " * (size - cell_len(text))
                text = _styled(Cell(text, row[i].style), styled)
                line += (space + text if self.columns[i].right else text + space) + _GAP
            if line.strip():
                yield line.rstrip()
        if layout.below is not None and row[layout.below].text:
            indent += _GAP
            for text in fold(row[layout.below].text, (width or 80) - len(indent)):
                yield indent + _styled(Cell(text, row[layout.below].style), styled)

    def _records(self, names: list[str], rows: list[list[Cell]], width: int, styled: bool) -> list[str]:
        widest = max(map(cell_len, names), default=0)
        lines: list[str] = []
        for row in rows:
            lines += [""] if lines else []
            for name, cell in zip(names, row, strict=True):
                room = width - widest - len(_GAP)
                beside = _longest_word(cell.text) <= room
                folded = fold(cell.text, room if beside else width) if cell.text else []
                if folded and name and not beside:
                    lines.append(name)
                for number, text in enumerate(folded):
                    head = "" if number else name
                    indent = head + " " * (widest - cell_len(head)) + _GAP if beside else ""
                    lines.append(indent + _styled(Cell(text, cell.style), styled))
        return lines


def show(*blocks: Table | str) -> None:
    """Print tables and prose to stdout in its width."""
    for block in blocks:
        if isinstance(block, Table):
            styled, encoding = terminal.coloured(sys.stdout), terminal.encoding(sys.stdout)
            lines = block.lines(terminal.columns(sys.stdout), styled=styled, encoding=encoding)
            print("\n".join(lines), flush=True)
        else:
            terminal.echo(block)


def fold(text: str, width: int) -> list[str]:
    """Break a text at spaces into lines of at most `width` columns. Longer words are not broken."""
    if cell_len(text) <= width:
        return [text]
    lines: list[str] = []
    for word in text.split():
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _widen(least: list[int], most: list[int], room: int) -> list[int]:
    """Share the room that `least` leaves: each column grows towards `most`, the narrowest ones first."""
    widths, left = list(least), room - sum(least)
    while left > 0 and (growing := [i for i, size in enumerate(widths) if size < most[i]]):
        narrowest = min(growing, key=lambda i: widths[i])
        widths[narrowest] += 1
        left -= 1
    return widths


def _styled(cell: Cell, styled: bool) -> str:
    return terminal.style(cell.text, cell.style) if styled else cell.text


def _readable(text: str, encoding: str) -> str:
    return terminal.encodable(terminal.visible(text).replace("\n", " "), encoding)
