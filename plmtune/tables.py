"""Tables for terminals of any width, and for pipes.

A pipe gets every column on one line a row. On a terminal that is too narrow, these steps are taken until it fits:
headings wrap, columns that fold are narrowed, columns that may be dropped go and are named below the table. What still
does not fit is printed as a list of fields for each row. Numbers are never cut or broken.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells

from plmtune import terminal

_GAP = "  "
_FOLDED = 16  # a folding column is not made narrower than this for the sake of its longest word


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: the heading.
        right: aligned at the right, as numbers are.
        folds: text that may take several lines, such as a path or a remark.
        drop: order in which columns are left out on a narrow terminal, 1 first; 0: never.
    """

    name: str
    right: bool = False
    folds: bool = False
    drop: int = 0


@dataclass(frozen=True)
class Cell:
    """A text with a style: bold, dim, red or green."""

    text: str
    style: str = ""


def numbers(names: Mapping[str, int]) -> list[Column]:
    """Return a column of numbers for each name; the values are the order in which columns are left out, 0: never."""
    return [Column(name, right=True, drop=drop) for name, drop in names.items()]


class Table:
    """Rows of text below headings.

    Args:
        columns: a text stands for a column of that name, aligned at the left.
        title: a line above the table.
        headings: whether the names of the columns are shown.
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
        """Return the lines of the table, none of them wider than `width`; None: as a pipe gets them."""
        shown = [[Cell(_readable(cell.text, encoding), cell.style) for cell in row] for row in self.rows]
        title = terminal.wrap(_readable(self.title, encoding), width) if self.title else []
        names = [_readable(column.name, encoding) if self.headings else "" for column in self.columns]
        kept = list(range(len(self.columns)))
        while True:
            widths = self._fit(kept, names, shown, width)
            if widths is not None:
                break
            droppable = sorted((self.columns[i].drop, i) for i in kept if self.columns[i].drop)
            if not droppable:
                return [*title, *self._records(names, shown, width, styled)]
            kept.remove(droppable[0][1])
        lines = list(title)
        if self.headings:
            lines += self._row([Cell(names[i], "bold") for i in kept], kept, widths, styled, bottom=True)
        for row in shown:
            lines += self._row([row[i] for i in kept], kept, widths, styled)
        if len(kept) < len(names):
            dropped = ", ".join(name for i, name in enumerate(names) if i not in kept)
            note = f"Not shown in {width} columns: {dropped}. A wider terminal or a pipe shows all."
            lines += terminal.wrap(note, width)
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _fit(self, kept: list[int], names: list[str], rows: list[list[Cell]], width: int | None) -> list[int] | None:
        """Return the widths of the kept columns, or None if they do not fit."""
        content = [max((cell_len(row[i].text) for row in rows), default=0) for i in kept]
        full = [max(size, cell_len(names[i])) for size, i in zip(content, kept, strict=True)]
        room = None if width is None else width - len(_GAP) * (len(kept) - 1)
        if room is None or sum(full) <= room:
            return full
        wrapped = [max(size, _longest(names[i], r"\s+")) for size, i in zip(content, kept, strict=True)]
        if sum(wrapped) <= room:
            # The headings that are cut into the fewest lines keep their width.
            return _widen(wrapped, full, room)
        least = [
            max(min(max((_longest(row[i].text) for row in rows), default=0), _FOLDED), _longest(names[i], r"\s+"))
            if self.columns[i].folds
            else size
            for size, i in zip(wrapped, kept, strict=True)
        ]
        return _widen(least, wrapped, room) if sum(least) <= room else None

    def _row(
        self, cells: list[Cell], kept: list[int], widths: list[int], styled: bool, *, bottom: bool = False
    ) -> list[str]:
        parts = [fold(cell.text, width) for cell, width in zip(cells, widths, strict=True)]
        height = max(map(len, parts), default=0)
        lines = []
        for number in range(height):
            line = ""
            for part, cell, i, width in zip(parts, cells, kept, widths, strict=True):
                at = number - (height - len(part)) if bottom else number
                text = part[at] if 0 <= at < len(part) else ""
                space = " " * (width - cell_len(text))
                text = terminal.style(text, cell.style) if styled else text
                line += (space + text if self.columns[i].right else text + space) + _GAP
            lines.append(line.rstrip())
        return lines

    def _records(self, names: list[str], rows: list[list[Cell]], width: int | None, styled: bool) -> list[str]:
        widest = max(map(cell_len, names), default=0)
        room = max((width or 80) - widest - len(_GAP), 8)
        lines: list[str] = []
        for row in rows:
            lines += [""] if lines else []
            for name, cell in zip(names, row, strict=True):
                for number, text in enumerate(fold(cell.text, room) if cell.text else []):
                    head = "" if number else name
                    text = terminal.style(text, cell.style) if styled else text
                    lines.append(head + " " * (widest - cell_len(head)) + _GAP + text)
        return lines


def show(*blocks: Table | str) -> None:
    """Print tables and prose to stdout, as wide as it is."""
    for block in blocks:
        if isinstance(block, Table):
            styled, encoding = terminal.coloured(sys.stdout), terminal.encoding(sys.stdout)
            lines = block.lines(terminal.columns(sys.stdout), styled=styled, encoding=encoding)
            print("\n".join(lines), flush=True)
        else:
            terminal.echo(block)


def fold(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` columns.

    It breaks at spaces and after a slash; a name that is longer, after a sign in it; else where the line is full.
    """
    if cell_len(text) <= width:
        return [text]
    lines = [""]
    for piece in _pieces(text):
        for part in _parts(piece, width):
            if cell_len((lines[-1] + part).rstrip()) > width:
                lines.append("")
            lines[-1] += part if lines[-1] else part.lstrip()
    return [line.rstrip() for line in lines]


def _pieces(text: str) -> list[str]:
    return re.findall(r"\s+|[^\s/]*/|[^\s/]+", text)


def _parts(piece: str, width: int) -> list[str]:
    if cell_len(piece) <= width or piece.isspace():
        return [piece]
    parts = re.findall(r"[^-_=,:]*[-_=,:]+|[^-_=,:]+", piece)
    return [line for part in parts for line in (chop_cells(part, width) if cell_len(part) > width else [part])]


def _longest(text: str, separator: str | None = None) -> int:
    return max(map(cell_len, re.split(separator, text) if separator else _pieces(text)), default=0)


def _widen(least: list[int], most: list[int], room: int) -> list[int]:
    """Share the room that `least` leaves: each column grows towards `most`, the narrowest ones first."""
    widths, left = list(least), room - sum(least)
    while left > 0 and (growing := [i for i, size in enumerate(widths) if size < most[i]]):
        narrowest = min(growing, key=lambda i: widths[i])
        widths[narrowest] += 1
        left -= 1
    return widths


def _readable(text: str, encoding: str) -> str:
    return terminal.encodable(terminal.visible(text).replace("\n", " "), encoding)
