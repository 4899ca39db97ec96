"""A small corpus, and the command line as a person uses it."""

import contextlib
import copy
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import xxhash
from tuning import compose

from plmtune import cli
from plmtune.errors import UserError
from plmtune.io.metrics import read, without_timing
from plmtune.tokenizers import tokenizer_files
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training.plot import draw_curves

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


DRAWING = [f"plmtune.recipes.{name}.draw_curves" for name in ("pretrain", "sft", "preference")]


def reading_once() -> Callable[[Path], Tokenizer]:
    """What reads a tokenizer.json, but the same one once; a run of few steps spends a third of its time on it."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json")
    read, known = tokenizer_files._read_json, {}

    def find(path: Path) -> Tokenizer:
        files = [path.with_name(name) for name in names]
        key = (path.name, *(file.read_bytes() if file.is_file() else None for file in files))
        if key not in known:
            known[key] = read(path)
        return copy.copy(known[key])

    return find


@contextlib.contextmanager
def nothing_beside() -> Iterator[None]:
    """No curves, which take longer to draw than most of these runs to train, and no measured matrix product."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWING:
            patch.setattr(name, lambda *arguments: None)
        patch.setattr("plmtune.training.machine._measured_flops", lambda *arguments: 1e11)
        patch.setattr(tokenizer_files, "_read_json", reading_once())
        yield


@pytest.fixture(scope="module", autouse=True)
def short_runs() -> Iterator[None]:
    """Only tests of the drawing draw."""
    with nothing_beside():
        yield


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw curves.png, as they do elsewhere."""
    for name in DRAWING:
        monkeypatch.setattr(name, draw_curves)


@pytest.fixture(scope="session")
def corpus_text() -> str:
    """A few kilobytes of English that every Python has."""
    import this

    zen = "".join(this.d.get(c, c) for c in this.s)
    return "\n\n".join(f"{number}. {zen}" for number in range(40))


def write_corpus(place: Path, text: str) -> None:
    """40 documents."""
    (place / "corpus").mkdir()
    for index, document in enumerate(text.split("\n\n")):
        (place / "corpus" / f"{index:02}.txt").write_text(document)


@pytest.fixture
def place(tmp_path: Path, corpus_text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with a corpus of 40 documents, as the working directory."""
    write_corpus(tmp_path, corpus_text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus_text: str) -> Path:
    """The directory of a run that nothing disturbed, made once for all tests that compare with it."""
    place = tmp_path_factory.mktemp("whole")
    write_corpus(place, corpus_text)
    with contextlib.chdir(place), nothing_beside():  # of the session, so made before what is of a module
        start("run_dir=whole")
    return place / "whole"


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


def ends_with(*arguments: str) -> object:
    """The exit code of ``plmtune ARGUMENTS`` in this process, which has imported all that a new one would import."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["plmtune", *arguments])
        cli.main()
    return ended.value.code


def start(*overrides: str, **options: Any) -> float:
    """Run the recipe in this process."""
    small = [text for text in SMALL if "data=mix" not in overrides or not text.startswith("data")]
    cfg = compose("pretrain", *small, *overrides)
    return importlib.import_module(f"plmtune.recipes.{cfg.recipe}").main(cfg, **options)


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        start(*overrides)
    return str(caught.value)


def weights(run: Path) -> str:
    """What a run learned: hashes of parameters and moments of its newest checkpoint, random state and schedule."""
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    files = sorted(newest.glob("*.safetensors"))
    state = json.loads((newest / "state.json").read_text())
    rest = json.dumps([state["random"], state["scheduler"], state["step"]])
    return rest + "".join(xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in files)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [without_timing(entry) for entry in read(run / "metrics.jsonl")]


def kill_at(place: Path, step: int, run: str, *overrides: str, processes: int = 1) -> None:
    """Start a run and SIGKILL every process of it as soon as its metrics reach `step`."""
    process = subprocess.Popen(
        command("run", "pretrain", *SMALL, f"run_dir={run}", *overrides, processes=processes),
        cwd=place, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    path = place / run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and any(f'"step": {step}' in line for line in path.read_text().splitlines()):
            break
        time.sleep(0.002)
    kill_all(process)


def kill_all(process: "subprocess.Popen[Any]") -> None:
    """SIGKILL a process and, as torchrun puts its workers into sessions of their own, whatever it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)  # else it could finish while the processes it has started are looked for
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object], place: str = "train_step") -> None:
    """Do something in the middle of a recipe's method, where its step is `step`."""
    recipe = importlib.import_module("plmtune.recipes.pretrain").Pretrain
    original = getattr(recipe, place)

    def wrapped(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.step + (place == "train_step") == step:  # an update makes the step that comes next
            act()
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(recipe, place, wrapped)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, *overrides: str) -> None:
    """Start a run in this process and stop it after `step` by a signal."""
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            start(*overrides)
    assert stopped.value.code == 75
