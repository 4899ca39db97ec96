"""Signals that end a command."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

WRITER = """
import os, time
from pathlib import Path
import plmtune.cli
from plmtune.io.atomic import atomic_write

def write(**_):
    with atomic_write(Path("model.gguf")) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), NUMBER)
        time.sleep(30)

plmtune.cli.cli.main = write
plmtune.cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_a_signal_ends_leaves_nothing_half_written(number, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", WRITER.replace("NUMBER", str(int(number)))], cwd=tmp_path, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr, list(tmp_path.iterdir())) == (128 + number, "", [])


def test_a_command_under_nohup_survives_its_terminal(tmp_path):
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + WRITER.replace("NUMBER", "signal.SIGHUP")
    ended = subprocess.run([sys.executable, "-c", code.replace("time.sleep(30)", "")], cwd=tmp_path)
    assert ended.returncode == 0 and (tmp_path / "model.gguf").read_text() == "half"
