"""What --help and tables look like at the widths that terminals have."""

import re
from collections.abc import Callable

import pytest

from plmtune.cli import COMMANDS, cli

PATHS = [(), *((name,) for name in COMMANDS)]
PATHS += [("launch", "local"), ("launch", "slurm"), ("launch", "skypilot"), ("launch", "kubernetes")]
PATHS += [("data", "prepare"), ("data", "inspect"), ("tokenizer", "train"), ("tokenizer", "inspect")]


Show = Callable[[tuple[str, ...], int], str]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    def shown(path: tuple[str, ...], width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        cli.main([*path, "--help"], prog_name="plmtune", standalone_mode=False)
        return capsys.readouterr().out

    return shown


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_fits_every_terminal_and_breaks_no_word(path: tuple[str, ...], show: Show) -> None:
    words = set(show(path, 120).replace(" \\\n", "\n").split())
    for width in (60, 80, 120):
        text = show(path, width)
        assert max(map(len, text.splitlines())) <= width, text
        assert set(text.replace(" \\\n", "\n").split()) == words, width


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_shows_an_example_and_cuts_no_text(path: tuple[str, ...], show: Show) -> None:
    text = show(path, 80)
    assert re.search(rf"(  |\| ){' '.join(['plmtune', *path])}[ \n]", text.split("Options:")[0].partition("\n\n")[2]), (
        text
    )
    assert not re.search(r"\.\.\.$", text.partition("Commands:")[2], re.MULTILINE)
