"""How --help is laid out: no word, option or command of it is broken at a terminal's edge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import click

from plmtune.io.terminal import wrap

_HYPHEN = "\u2011"  # where a hyphen must not end a line
_WORD = re.compile(r"""(?:--[a-z-]+ (?=[^-\s]))?(?:[^\s'"]|'[^']*'|"[^"]*")+""")  # an option keeps its value
# An example with a remark, two spaces or more apart.
_REMARKED = re.compile(r"(\S.*?) {2,}(\S.*)")


class Formatter(click.HelpFormatter):
    """click's, but for hyphens, which stay with their words, and examples, which are folded as a shell takes them."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        super().write_usage(prog, args.replace("-", _HYPHEN), prefix)

    def write_text(self, text: str) -> None:
        width = self.width - self.current_indent
        paragraphs = re.split(r"\n\s*\n", text)
        for number, paragraph in enumerate(paragraphs):
            first, _, rest = paragraph.partition("\n")
            if first.strip() == "\b":
                lines = [line for example in rest.split("\n") for line in _fold_example(example.strip(), width)]
                paragraphs[number] = "\n".join([first, *lines])
        super().write_text("\n\n".join(paragraphs).replace("-", _HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        col_max = min(col_max, self.width * 2 // 5)  # leave most of a narrow terminal to the texts
        super().write_dl([(name, text.replace("-", _HYPHEN)) for name, text in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        return super().getvalue().replace(_HYPHEN, "-")


class Context(click.Context):
    """A context whose help is laid out by `Formatter`, and that each mistake in its words names."""

    formatter_class = Formatter

    @contextmanager
    def scope(self, cleanup: bool = True) -> Iterator[click.Context]:
        """Add this context to an error of click's parser, which leaves it out."""
        with super().scope(cleanup) as ctx:
            try:
                yield ctx
            except click.UsageError as error:
                error.ctx = error.ctx or self
                raise


def lay_out(command: click.Command) -> click.Command:
    """Lay out the help of a command and its subcommands with `Formatter`."""
    command.context_class = Context
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        lay_out(inner)
    return command


def _fold_example(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    if remarked := _REMARKED.fullmatch(line):
        command, remark = remarked.groups()
        return [*_fold_example(command, width), *wrap(f"    {remark}", width)]
    lines = [""]
    for word in _WORD.findall(line):
        if len(f"{lines[-1]} {word} \\") > width and lines[-1].strip():
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines
