"""What a stream can show, and how far work is: a line of a terminal, or lines of a pipe."""

import io
import logging
import os
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from screen import Screen

from plmtune import cli
from plmtune.cli.generate import stream
from plmtune.io import terminal
from plmtune.io.tables import Table, show
from plmtune.io.terminal import Progress, encodable, track, wrap


class TestStreams:
    def test_a_pipe_has_no_width_even_where_the_shell_exports_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "60")
        assert terminal.columns(io.StringIO()) is None
        assert terminal.columns(Screen()) == 60

    @pytest.mark.parametrize("given", ["", "0", "-3", "wide"])
    def test_a_width_that_makes_no_sense_is_80(self, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
        monkeypatch.setenv("COLUMNS", given)
        assert terminal.columns(Screen()) == 80

    @pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
    def test_colours_are_for_terminals_that_have_them(
        self, screen: Screen, monkeypatch: pytest.MonkeyPatch, name: str, value: str
    ) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert terminal.coloured(screen) and not terminal.coloured(io.StringIO())
        monkeypatch.setenv(name, value)
        assert not terminal.coloured(screen)

    @pytest.mark.parametrize(
        ("text", "shown"),
        [("0.5 ± 0.1 · ok", "0.5 +- 0.1 | ok"), ("score ↑", "score ^"), ("é", r"\xe9"), ("\udcff", r"\udcff")],
    )
    def test_what_ascii_lacks_is_spelled_out(self, text: str, shown: str) -> None:
        assert encodable(text, "ascii") == shown

    def test_what_is_said_neither_moves_a_cursor_nor_sets_a_title(self, screen: Screen) -> None:
        terminal.echo("no file a\x1b[2K\x1b]0;title\x07\rb\x9b31m.txt\nsecond line\tend")
        assert screen.getvalue() == "no file a\\x1b[2K\\x1b]0;title\\x07\\x0db\\x9b31m.txt\nsecond line\tend\n"

    @pytest.mark.parametrize(
        "environment",
        [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    )
    def test_no_command_ends_over_a_character(self, environment: dict[str, str]) -> None:
        code = (
            "import sys, click, plmtune.cli\n"
            "@click.command()\n"
            "def command():\n"
            "    print('\\xb1 \\u597d')\n"
            "    raise plmtune.errors.UserError('no file \\u27e6\\xe9\\u27e7')\n"
            "plmtune.cli.cli = command\nsys.argv = ['plmtune']\nplmtune.cli.main()"
        )
        left = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_", "LANG"))}
        done = subprocess.run([sys.executable, "-c", code], env=left | environment, capture_output=True, check=False)
        assert (done.returncode, done.stdout) == (2, b"+- \\u597d\n"), done.stderr
        assert done.stderr == b"plmtune: no file [[\\xe9]]\n"


class TestWrap:
    def test_lines_end_at_words_and_go_on_indented(self) -> None:
        assert wrap("  a sentence of some words", 14) == ["  a sentence", "    of some", "    words"]
        assert wrap("a sentence of some words", None) == ["a sentence of some words"]

    def test_a_path_and_a_command_stay_whole_to_be_copied(self) -> None:
        path = "runs/" + "a" * 40
        assert path in wrap(f"written to {path} at last", 30)[1]
        lines = wrap("It stopped. Go on with it: plmtune resume runs/pretrain/20261121-060957 --allow-data-change", 40)
        assert lines[-1] == "  plmtune resume runs/pretrain/20261121-060957 --allow-data-change"
        lines = wrap("Resume it: plmtune resume runs/pretrain/latest --allow-data-change. Or start a new run", 30)
        assert lines == [
            "Resume it:",
            "  plmtune resume runs/pretrain/latest --allow-data-change.",
            "  Or start a new run",
        ]
        command = """/opt/python3.11 -c "import datasets; datasets.load_dataset('piqa')\""""
        assert wrap(f"Run {command} and bring it", 40) == [
            "Run",
            f"  {command}",
            "  and bring it",
        ]
        assert wrap('try it: llama-cli -m a.gguf -p "Once upon"', 30)[1] == '  llama-cli -m a.gguf -p "Once upon"'

    def test_a_comment_of_yaml_stays_one(self) -> None:
        wrapped = wrap("  test: a.jsonl  # columns: question, answerKey", 36)
        assert wrapped == ["  test: a.jsonl  # columns:", "    # question, answerKey"]


CONTROLS = [
    "\x1b[2J", "\x1b]0;title\x07", "\r", "\b", "\x00", "\x7f", "\x9b31m",
    "\u202e", "\u2066", "\u200f", "\u2028", "\ud800",
]  # fmt: skip


class TestControls:
    """Names and texts of others cannot move the cursor of a terminal or turn the order of letters round."""

    @given(st.lists(st.one_of(st.text(max_size=5), st.sampled_from(CONTROLS))).map("".join))
    def test_none_is_left_and_all_else_stays(self, text: str) -> None:
        said = terminal.visible(text)
        assert all(ch in "\n\t" or unicodedata.category(ch) not in ("Cc", "Cs", "Zl", "Zp") for ch in said)
        assert not set(said) & set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
        assert terminal.visible(said) == said
        if text.isprintable():
            assert said == text

    @pytest.mark.parametrize("control", CONTROLS)
    def test_prose_errors_and_tables_spell_them_out(self, control: str, capsys: pytest.CaptureFixture[str]) -> None:
        terminal.echo(f"a{control}b")
        terminal.echo(f"a{control}b", err=True)
        terminal.Warnings().handle(logging.makeLogRecord({"msg": "a%sb", "args": (control,)}))
        table = Table(["name"], title=f"t{control}t")
        table.add(f"a{control}b")
        show(table)
        said = "".join(capsys.readouterr())
        assert not set(control) & set(said) - set("[2J]0;title31m")
        assert said.count("\\x" if ord(control[0]) < 256 else "\\u") >= 5

    @pytest.mark.parametrize("is_terminal", [True, False])
    def test_what_a_model_writes_is_spelled_out_for_a_terminal_alone(
        self, is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
        stream(["one\n\t", "\x1b[31m", "\u202e"])
        assert capsys.readouterr().out == ("one\n\t\\x1b[31m\\u202e\n" if is_terminal else "one\n\t\x1b[31m\u202e\n")

    @pytest.mark.parametrize(
        "words",
        [["generate"], ["validate"], ["runs"], ["data", "inspect"], ["tokenizer", "inspect"], ["checkpoints"], ["card"],
         ["eval", "--tasks"], ["eval", "--suite"], ["plan"], ["verify"], ["convert"], ["ls"], ["cp"], ["perplexity"]],
    )  # fmt: skip
    def test_no_command_prints_those_of_its_arguments(
        self, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["plmtune", *words, "x\x1b[2J\u202ey"])
        monkeypatch.setattr(terminal, "use_plain_characters", lambda: None)
        with pytest.raises(SystemExit):
            cli.main()
        said = "".join(capsys.readouterr())
        assert said and "\x1b" not in said and "\u202e" not in said


class TestProgress:
    @pytest.mark.parametrize("width", [30, 60, 80, 120])
    def test_it_never_wraps_and_always_shows_its_first_part(
        self, screen: Screen, monkeypatch: pytest.MonkeyPatch, width: int
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        Progress().update(
            "step 635/635 · loss 4.1187", "ETA 0:00", "5.35K tok/s", "lr 2.00e-04", "MFU 35.3%", "569.06 MiB"
        )
        (drawn,) = screen.drawn
        assert len(drawn) < width and drawn.startswith("step 635/635 · loss 4.1187")
        assert ("MiB" in drawn) == (width == 120) and ("ETA" in drawn) == (width > 30)

    def test_other_output_stands_above_it(self, screen: Screen) -> None:
        line = Progress()
        line.update("step 1")
        terminal.echo("a message", err=True)
        line.close(keep=True)
        assert screen.drawn == ["step 1", "a message", "step 1", "step 1"]
        assert screen.getvalue().endswith("step 1\n")

    def test_it_leaves_nothing_when_it_is_cleared(self, screen: Screen) -> None:
        line = Progress()
        line.update("reading")
        line.close()
        assert screen.getvalue().endswith("\r\033[2K")

    def test_a_dumb_terminal_and_a_pipe_get_plain_lines_now_and_then(
        self, screen: Screen, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TERM", "dumb")
        line = Progress(every=1000)
        for step in range(5):
            line.update(f"step {step}", "loss 1.0", now=step in (0, 4))
        line.close(keep=True)
        assert screen.getvalue() == "step 0 · loss 1.0\nstep 4 · loss 1.0\n"
        monkeypatch.setenv("COLUMNS", "20")
        line.update("step 1,234/12,000", "ETA 0:00", now=True)
        assert screen.getvalue().splitlines()[-1] == "step 1,234/12,000"

    def test_one_that_is_not_shown_is_silent(self, screen: Screen) -> None:
        line = Progress(shown=False)
        line.update("step 1", now=True)
        line.close(keep=True)
        assert screen.getvalue() == ""

    def test_an_error_leaves_it_as_it_is(self, screen: Screen) -> None:
        with pytest.raises(KeyboardInterrupt), Progress() as line:
            line.update("loss 4.1")
            raise KeyboardInterrupt
        assert screen.getvalue().endswith("loss 4.1\n")

    def test_a_pipe_gets_the_last_state_if_it_got_an_earlier_one(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for first in (True, False):
            with Progress(every=1000) as line:
                line.update("1 of 3", now=first)
                line.update("3 of 3")
        assert capsys.readouterr().err == "1 of 3\n3 of 3\n"


class TestTrack:
    @pytest.mark.parametrize(
        ("seconds", "lines"), [(5.0, ["2 rows", "4 rows", "5 rows"]), (3.0, ["4 rows", "5 rows"]), (1.0, [])]
    )
    def test_shows_how_many_have_passed_and_at_last_all_of_them(
        self, seconds: float, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        moments = iter(range(9))
        monkeypatch.setattr(time, "monotonic", lambda: next(moments) * seconds)
        assert list(track("abcde", "rows")) == list("abcde")
        assert capsys.readouterr().err.splitlines() == lines
