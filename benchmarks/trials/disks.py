"""Bar 4: a disk that fills up under a real run, and a limit on the size of its files."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from plmtune.io.manifest import step_path
from plmtune.io.run_directory import read_record

from .place import SMALL, Job, Place, differing, last_step, left_behind, newest_step, outcome, reach, torn
from .tally import Tally

UNLIMITED = resource.RLIM_INFINITY


def limited(place: Place, count: int, generator: random.Random) -> Tally:
    """A limit on the size of files (ulimit -f) that a running run meets in its next save."""
    tally = Tally(
        "files may not grow, in a save",
        "exit code 2; path, reason and bytes needed are told; earlier checkpoints whole, nothing partial; status "
        "failed; resumed, all equals an undisturbed run's",
    )
    whole = place.whole()
    expected = outcome(whole)
    size = (step_path(whole / "checkpoints", newest_step(whole)) / "optimizer.safetensors").stat().st_size
    for number in range(count):
        name = f"limited-{number}"
        run = place.path / name
        job = place.start("run", "pretrain", *SMALL, f"run_dir={name}")
        job.until((run / "checkpoints" / "latest").exists)
        limit = generator.randrange(30_000, size)  # metrics.jsonl still fits, the moments do not
        resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (limit, UNLIMITED))
        complaints = _ended(job, run, "File too large")
        code, said = place.run("resume", name)
        complaints += [f"resume ended with {code}: {said[-500:]}"] if code else differing(run, expected)
        tally.add(f"at {limit:,} bytes", complaints)
    return tally


def full(place: Place, count: int, generator: random.Random) -> Tally:
    """A small disk that is filled up, but for some bytes, while a run is in training."""
    tally = Tally(
        "disk full, in a save",
        "exit code 2; path and bytes needed are told; earlier checkpoints whole, nothing partial; resumed with room, "
        "all equals an undisturbed run's",
    )
    whole = place.whole()
    expected = outcome(whole)
    newest = step_path(whole / "checkpoints", newest_step(whole))
    tensors = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    with small_disk(place.path / "disk", 40 << 20) as disk:
        for number in range(count):
            run = disk / f"full-{number}"
            job = place.start("run", "pretrain", *SMALL, f"run_dir={run}")
            job.until((run / "checkpoints" / "latest").exists)
            # Too little for the tensors, told before anything is written; or enough for them and not for the rest.
            left = generator.randrange(8192, tensors) if number % 2 == 0 else tensors + generator.randrange(16384)
            fill(disk, left)
            complaints = _ended(job, run, "")
            tally.saw("refused before writing" if "bytes are free" in job.said() else "while writing")
            (disk / "ballast").unlink()
            code, said = place.run("resume", str(run))
            complaints += [f"resume ended with {code}: {said[-500:]}"] if code else differing(run, expected)
            tally.add(f"{left:,} bytes left", complaints)
            shutil.rmtree(run)
    return tally


def full_metrics(place: Place, count: int, generator: random.Random) -> Tally:
    """A disk without room for another line of metrics, while checkpoints go to another one."""
    tally = Tally(
        "disk full, in metrics.jsonl",
        "exit code 2; the file is named; the last finished step is saved; resumed with room, all equals an undisturbed "
        "run's but for the lines that found no room",
    )
    expected = outcome(place.whole())
    with small_disk(place.path / "disk", 1 << 20) as disk:
        for number in range(count):
            run, checkpoints = disk / f"metrics-{number}", place.path / f"metrics-{number}"
            checkpoints.mkdir()
            run.mkdir()
            (run / "checkpoints").symlink_to(checkpoints)
            job = place.start("run", "pretrain", *SMALL, f"run_dir={run}")
            reach(job, run, generator.randrange(1, 10))  # the sixteenth line or so wants a page that is not there
            fill(disk, 0)
            complaints = [] if (code := job.wait()) == 2 else [f"exit code {code}"]
            if "metrics.jsonl cannot be written: No space left" not in (said := job.said()):
                complaints.append(f"the file is not named: {said[-300:]}")
            last, saved = last_step(run), newest_step(run)
            if saved < last:
                complaints.append(f"step {last} was logged, and step {saved} saved")
            complaints += [*torn(run / "checkpoints"), *left_behind(run)]
            (disk / "ballast").unlink()
            code, said = place.run("resume", str(run))
            lines = [json.loads(expected["metrics"]), json.loads(outcome(run)["metrics"])]
            lost = [line for line in lines[0] if line not in lines[1]]
            tally.saw("lines lost", len(lost))
            if any(not last <= line["step"] <= saved for line in lost):
                complaints.append(f"lines are missing that could be written: {lost}")
            there = {**expected, "metrics": json.dumps([line for line in lines[0] if line not in lost])}
            complaints += [f"resume ended with {code}: {said[-500:]}"] if code else differing(run, there)
            tally.add(f"after step {last}", complaints)
            shutil.rmtree(run)
    return tally


def can_mount() -> bool:
    """Whether a small disk can be made here: in name spaces of its own, without being root."""
    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def small_disk(mount: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes at `mount`, seen by one process alone, and by others through /proc."""
    mount.mkdir(exist_ok=True)
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && echo ready && exec sleep 100000'
    holder = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(size), str(mount)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            raise RuntimeError("a small disk cannot be mounted here")
        yield Path(f"/proc/{holder.pid}/root{mount}")
    finally:
        holder.kill()
        holder.wait()


def fill(disk: Path, left: int) -> None:
    """Leave `left` free bytes, or a page less, on a disk."""
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while (free := shutil.disk_usage(disk).free) > left:
            file.write(bytes(min(free - left, 1 << 20)))


def _ended(job: Job, run: Path, reason: str) -> list[str]:
    """Complaints about a run that had no room for its next checkpoint."""
    complaints = [] if (code := job.wait()) == 2 else [f"exit code {code}"]
    said = job.said()
    for part in (f"{run.name}/checkpoints/step-", "cannot be written", "It needs about", reason):
        if part not in said:
            complaints.append(f"{part!r} is not told: {said[-300:]}")
    if "Traceback" in said:
        complaints.append(f"a traceback: {said[-300:]}")
    if (status := read_record(run).get("status")) != "failed":
        complaints.append(f"run.json says {status}, not failed")
    return [*complaints, *torn(run / "checkpoints"), *left_behind(run)]
