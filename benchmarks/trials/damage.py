"""Bar 3: one flipped bit or a cut end in any file that a run starts from, found before a step is taken."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plmtune.config.compose import build
from plmtune.config.typed_config import load_config
from plmtune.data.shards import Shards
from plmtune.errors import UserError
from plmtune.io import manifest
from plmtune.io.run_directory import read_record, verify_config
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.training.resume_checks import config_digest
from plmtune.training.run_setup import open_run
from plmtune.training.runtime import Runtime
from plmtune.training.trainer_state import latest_valid, read_trainer_state

from .place import Place, differing, last_step, outcome
from .tally import Tally

CHECKPOINT = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "manifest.json",
)
DATA = ("train-00000.bin", "validation-00000.bin", "manifest.json")

Check = Callable[[], list[str]]  # complaints about how damage is met


@contextlib.contextmanager
def damaged(path: Path, generator: random.Random, number: int) -> Iterator[str]:
    """Flip one bit of a file, or every other time cut its end off, and make it whole again afterwards."""
    content = path.read_bytes()
    if number % 2 == 0:
        bit = generator.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        how = f"bit {bit} flipped"
    else:
        size = generator.randrange(len(content))
        os.truncate(path, size)
        how = f"cut to {size} bytes"
    try:
        yield f"{path.name}, {how}"
    finally:
        path.write_bytes(content)


def flipped(place: Place, count: int, generator: random.Random) -> Tally:
    """Damage to each kind of file, met by what a run calls when it starts."""
    tally = Tally(
        "a flipped bit or a cut end",
        "the file is named, and the checkpoint before is taken; data and config.yaml are refused",
    )
    run = shutil.copytree(place.whole(), place.path / "flipped")
    (data,) = (place.path / "runs" / "data").glob("*/manifest.json")
    for path, check in _checks(run, data.parent):
        for number in range(count):
            with damaged(path, generator, number) as how:
                try:
                    complaints = check()
                except Exception as error:  # a traceback is what a person must not see
                    complaints = [f"{type(error).__name__}: {error}"]
            tally.add(how, complaints)
        tally.saw(f"{path.parent.name}/{path.name}", count)
    return tally


def flipped_command(place: Place, count: int, generator: random.Random) -> Tally:
    """The same through ``plmtune resume``."""
    tally = Tally(
        "the same, by plmtune resume",
        "a checkpoint's file: named, and the run ends equal to an undisturbed one; data, config.yaml: exit code 2, "
        "no step taken",
    )
    whole = place.whole()
    expected = outcome(whole)
    (data,) = (place.path / "runs" / "data").glob("*/manifest.json")
    for number in range(count):
        for kind in (*CHECKPOINT, "latest", *(f"data/{name}" for name in DATA), "config.yaml", "run.json"):
            name = "flipped-again"
            run = shutil.copytree(whole, place.path / name)
            newest = checkpoint_directory(run)
            name_of_file = kind.removeprefix("data/")
            folder = data.parent if kind.startswith("data/") else newest if kind in CHECKPOINT else run
            folder = run / "checkpoints" if kind == "latest" else folder
            with damaged(folder / name_of_file, generator, number) as how:
                code, said = place.run("resume", name)
                if kind == "config.yaml" or kind.startswith("data/"):
                    complaints = [] if code == 2 else [f"exit code {code}"]
                    if name_of_file not in said:
                        complaints.append(f"the file is not named: {said[-300:]}")
                    if (run / "metrics.jsonl").read_bytes() != (whole / "metrics.jsonl").read_bytes():
                        complaints.append("a step was taken")
                elif kind == "run.json" and code == 2:
                    complaints = [] if last_step(run) == last_step(whole) else ["a step was taken"]
                else:
                    complaints = [f"exit code {code}: {said[-300:]}"] if code else differing(run, expected)
                    if kind in CHECKPOINT and f"{newest.name}/{kind}" not in said:
                        complaints.append(f"the file is not named: {said[-300:]}")
            tally.add(how, complaints)
            shutil.rmtree(run)
    return tally


def _checks(run: Path, data: Path) -> Iterator[tuple[Path, Check]]:
    """Each kind of file, with what must be true when it is damaged."""
    newest = checkpoint_directory(run)
    older = max(path for path in newest.parent.glob("step-*") if path != newest)
    cfg = load_config(run / "config.yaml")
    tokenizer = build("tokenizer", cfg.tokenizer)

    def falls_back(name: str) -> list[str]:
        with _warnings() as said:
            found = latest_valid(newest.parent)
        complaints = [] if found == older else [f"{found} was taken"]
        return complaints if any(name in text for text in said) else [*complaints, f"it is not named: {said}"]

    def is_a_hint() -> list[str]:
        manifest.check_files(checkpoint_directory(run))  # what is generated with is whole
        return [] if latest_valid(newest.parent) == newest else ["the newest was not taken"]

    def refused(name: str, start: Callable[[], Any]) -> list[str]:
        try:
            start()
        except UserError as error:
            return [] if name in str(error) else [f"it is not named: {error}"]
        return ["it was not found"]

    def open_data() -> Any:
        return Shards.open(data, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)

    for name in CHECKPOINT:
        yield newest / name, lambda name=name: falls_back(name)  # type: ignore[misc]
    yield newest.parent / "latest", is_a_hint
    for name in DATA:
        yield data / name, lambda name=name: refused(name, open_data)  # type: ignore[misc]
    yield run / "config.yaml", lambda: refused("config.yaml", lambda: verify_config(run))
    with Runtime.choose(device="cpu", precision="fp32", seed=cfg.seed).start() as runtime:
        witness = _Witness(run, runtime, read_trainer_state(newest)["state"])
        yield run / "run.json", witness.of_a_damaged_record
        (run / "run.json").unlink()
        yield run / "config.yaml", witness.of_a_damaged_config


class _Witness:
    """The run at `run` opened as a resumed run opens it, where run.json cannot be trusted or is gone."""

    def __init__(self, run: Path, runtime: Runtime, saved: dict[str, Any]) -> None:
        self.run = run
        self.runtime = runtime
        self.saved = saved
        self.digest = config_digest(load_config(run / "config.yaml"))
        self.data = dict(read_record(run)["data"])

    def of_a_damaged_record(self) -> list[str]:
        """Opened or refused, in words; and other data is refused in any case."""
        self._open(self.data)
        other = {name: fingerprint[::-1] for name, fingerprint in self.data.items()}
        return ["other data was taken"] if self._open(other) else []

    def of_a_damaged_config(self) -> list[str]:
        """Refused, unless what decides what is learned is still the same."""
        if self._open(self.data) and config_digest(load_config(self.run / "config.yaml")) != self.digest:
            return ["another config was taken"]
        return []

    def _open(self, data: dict[str, str]) -> bool:
        record = self.run / "run.json"
        before = record.read_bytes() if record.exists() else None
        with _warnings():
            try:
                cfg = load_config(self.run / "config.yaml")
                cfg.run_dir, cfg.resume = str(self.run), True
                open_run(cfg, self.runtime, data, self.saved).close()
            except UserError:
                return False
        record.unlink()  # opening has written it anew
        if before is not None:
            record.write_bytes(before)
        return True


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What plmtune warns of, instead of showing it."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("plmtune")
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
