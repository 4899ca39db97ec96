from types import SimpleNamespace

import pytest
from screen import Screen

from plmtune.io import terminal


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen()
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stdout=screen, stderr=screen))  # pytest sets its own again
    monkeypatch.setenv("TERM", "xterm-256color")
    return screen
