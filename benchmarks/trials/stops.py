"""Bars 1, 5 and 10: real runs that are killed, asked to stop, or started twice; what they end with is compared."""

from __future__ import annotations

import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

from plmtune.io.run_directory import read_record
from plmtune.io.signals import EXIT_STOPPED

from .place import (
    SMALL,
    STEPS,
    Job,
    Place,
    attempts,
    differing,
    last_step,
    left_behind,
    newest_step,
    outcome,
    reach,
)
from .tally import Tally

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Steps of a second or so: a second signal then finds the step of the first one unfinished.
SLOW = ["seq_len=256", "global_batch_size=64", "phases=[{name: main, steps: 2}]", "checkpoint.every=0"]
ENDLESS = ["phases=[{name: main, steps: 100000}]"]


def killed(place: Place, count: int, generator: random.Random, *, fork: bool = False) -> Tally:
    """SIGKILL at a random step and at a random moment, in turn; every third is killed again while it is resumed."""
    tally = Tally(
        "SIGKILL of a run, then resume",
        "parameters, moments, random generators, schedule, order hash and metrics equal an undisturbed run's",
    )
    whole = place.whole()
    expected, seconds = outcome(whole), duration(whole)
    for number in range(count):
        name = f"killed-{number}"
        run = place.path / name
        began = ["run", "pretrain", *SMALL, f"run_dir={name}"]
        complaints = ["it ended before it could be killed, five times"]
        for _ in range(5):
            job = place.start(*began, fork=fork)
            if number % 2 == 0:
                reach(job, run, generator.randrange(1, STEPS))
                time.sleep(generator.uniform(0, seconds / STEPS))
            else:
                job.until(run.is_dir)
                time.sleep(generator.uniform(0, 0.9 * seconds))
            if _kill(job, run, tally):
                complaints = []
                break
            shutil.rmtree(run)
        if number % 3 == 2 and (run / "config.yaml").is_file():
            before = attempts(run)
            job = place.start("resume", name, fork=fork)
            job.until(partial(_begun_again, run, before))
            time.sleep(generator.uniform(0, 0.5 * seconds))
            if not _kill(job, run, tally):
                tally.saw("ended before the second kill")
        # Killed before config.yaml was written, it is no run yet, and is started again.
        code, said = place.run(*(["resume", name] if (run / "config.yaml").is_file() else began), fork=fork)
        complaints += [f"resume ended with {code}: {said[-500:]}"] if code else differing(run, expected)
        tally.add(name, complaints)
    return tally


def _kill(job: Job, run: Path, tally: Tally) -> bool:
    """Kill a process; returns whether it had not ended by itself."""
    job.send(signal.SIGKILL)
    if job.wait() != -signal.SIGKILL:
        return False
    step, saved = last_step(run), newest_step(run)
    saving = any((run / "checkpoints").glob(".tmp-*"))
    tally.saw("killed during a save" if saving else "killed between saves" if step else "killed before a step")
    tally.at_most("steps repeated", step - saved)
    return True


def signalled(place: Place, count: int, generator: random.Random) -> Tally:
    """Each signal that asks to stop, `count` times at a random moment."""
    tally = Tally(
        "SIGTERM, SIGUSR1, SIGINT, then resume",
        f"exit code {EXIT_STOPPED}; the last finished step is saved; resumed, all equals an undisturbed run's",
    )
    whole = place.whole()
    expected, seconds = outcome(whole), duration(whole)
    for number, chosen in enumerate(SIGNALS * count):
        name = f"signalled-{number}"
        run = place.path / name
        job = place.start("run", "pretrain", *SMALL, f"run_dir={name}")
        reach(job, run, generator.randrange(1, STEPS - 8))
        time.sleep(generator.uniform(0, 3 * seconds / STEPS))
        job.send(chosen)
        complaints = [] if (code := job.wait()) == EXIT_STOPPED else [f"exit code {code}"]
        if (last := last_step(run)) != newest_step(run):
            complaints.append(f"step {last} was finished, and step {newest_step(run)} saved")
        if (status := read_record(run).get("status")) != "stopped":
            complaints.append(f"run.json says {status}, not stopped")
        if f"plmtune resume {name}" not in job.said():
            complaints.append("it did not say how to go on")
        complaints += left_behind(run)
        code, said = place.run("resume", name)
        complaints += [f"resume ended with {code}: {said[-500:]}"] if code else differing(run, expected)
        tally.add(f"{chosen.name} after step {last}", complaints)
    return tally


def signalled_twice(place: Place, count: int, generator: random.Random) -> Tally:
    """A second signal while the first one's step is being finished."""
    tally = Tally(
        "a second signal, then resume", "exit code 128 + signal, at once; resumed, all equals an undisturbed run's"
    )
    expected = outcome(place.whole(*SLOW))
    for number in range(count):
        name = f"signalled-twice-{number}"
        run = place.path / name
        job = place.start("run", "pretrain", *SMALL, *SLOW, f"run_dir={name}")
        job.until((run / "metrics.jsonl").exists)
        time.sleep(generator.uniform(0, 0.2))
        first, second = generator.choice(SIGNALS), generator.choice(SIGNALS)
        job.send(first)
        job.until(partial(_heard, job))
        began = time.perf_counter()
        job.send(second)
        complaints = [] if (code := job.wait()) == 128 + second else [f"exit code {code}"]
        tally.at_most("seconds to the end", time.perf_counter() - began)
        code, said = place.run("resume", name)
        complaints += [f"resume ended with {code}: {said[-500:]}"] if code else differing(run, expected)
        tally.add(f"{first.name}, then {second.name}", complaints)
    return tally


def locked(place: Place, count: int, generator: random.Random, *, fork: bool = False) -> Tally:
    """A second process on a directory in use, by ``run`` and by ``resume``; and after a kill, on one that is free."""
    tally = Tally(
        "two runs on one directory",
        "the second ends with 2 and names the first; the first goes on; after its SIGKILL resume starts at once",
    )
    for number in range(count):
        name = f"locked-{number}"
        run = place.path / name
        began = ["run", "pretrain", *SMALL, *ENDLESS, f"run_dir={name}"]
        holder = place.start(*began)
        reach(holder, run, generator.randrange(1, 10))
        complaints = []
        for words in (began, ["resume", name]):
            start = time.perf_counter()
            code, said = place.run(*words, fork=fork)
            took = time.perf_counter() - start
            tally.at_most(f"seconds to the refusal of {words[0]}", took)
            if code != 2 or f"{name} is in use by process {holder.pid}" not in said:
                complaints.append(f"a second {words[0]} ended with {code}: {said[-300:]}")
        step = last_step(run)
        if not reach(holder, run, step + 1):
            complaints.append("the first did not go on")
        holder.send(signal.SIGKILL)
        holder.wait()
        resumed = place.start("resume", name)
        if not reach(resumed, run, last_step(run) + 1):
            complaints.append(f"after a SIGKILL resume ended: {resumed.said()[-300:]}")
        resumed.send(signal.SIGTERM)
        if resumed.wait() != EXIT_STOPPED:
            complaints.append(f"after a SIGKILL resume ended: {resumed.said()[-300:]}")
        tally.add(name, complaints)
    return tally


def started_together(place: Place, count: int, generator: random.Random) -> Tally:
    """Two ``run`` of one directory that does not exist yet, started within milliseconds."""
    tally = Tally("two runs started at once", "one ends as if alone, the other ends with 2 and trains nothing")
    expected = outcome(place.whole())
    for number in range(count):
        name = f"together-{number}"
        jobs = []
        for _ in range(2):
            jobs.append(place.start("run", "pretrain", *SMALL, f"run_dir={name}"))
            time.sleep(generator.uniform(0, 0.01))
        codes = [job.wait() for job in jobs]
        complaints = [] if sorted(codes) == [0, 2] else [f"exit codes {codes}: {jobs[0].said()} {jobs[1].said()}"]
        tally.add(name, [*complaints, *differing(place.path / name, expected)])
    return tally


def _begun_again(run: Path, before: int) -> bool:
    return attempts(run) > before


def _heard(job: Job) -> bool:
    return "finishing the step" in job.said()


def duration(run: Path) -> float:
    """Seconds from a run's beginning to its last step."""
    return (run / "metrics.jsonl").stat().st_mtime - (run / "config.yaml").stat().st_mtime
