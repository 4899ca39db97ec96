"""A small corpus, and the command line as a person uses it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = [
    "model=plm_tiny",
    "tokenizer=byte",
    "data=files",
    "data.paths=[corpus]",
    "optimizer=adamw",
    "scheduler=wsdc",
    "runtime.precision=fp32",
    "logger=jsonl",
    "seq_len=32",
    "global_batch_size=4",
    "micro_batch_size=2",
    "phases=[{name: main, steps: 12}]",
    "log_every=1",
    "validation={every: 6, tokens: 500}",
    "checkpoint={every: 3, keep: 0}",
    "sample.max_new_tokens=0",
]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def corpus_text() -> str:
    """A few kilobytes of English that every Python has."""
    import this

    zen = "".join(this.d.get(c, c) for c in this.s)
    return "\n\n".join(f"{number}. {zen}" for number in range(40))


@pytest.fixture
def place(tmp_path: Path, corpus_text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with a corpus of 40 documents, as the working directory."""
    (tmp_path / "corpus").mkdir()
    for index, document in enumerate(corpus_text.split("\n\n")):
        (tmp_path / "corpus" / f"{index:02}.txt").write_text(document)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(*arguments: str, processes: int = 1) -> list[str]:
    """``plmtune ARGUMENTS``, under torchrun for several processes."""
    if processes == 1:
        return [sys.executable, "-m", "plmtune", *arguments]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, "-m", *torchrun, "-m", "plmtune", *arguments]


@pytest.fixture
def plmtune(place: Path) -> Run:
    """Run a command to its end in the working directory."""

    def run(*arguments: str, processes: int = 1) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command(*arguments, processes=processes),
            cwd=place,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run
