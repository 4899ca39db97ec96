"""How far work is: a line of a terminal, or lines of a pipe."""

import time

import pytest
from screen import Screen

from plmtune.io import terminal
from plmtune.io.progress import Progress, track


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
