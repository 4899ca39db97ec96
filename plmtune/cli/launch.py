"""``plmtune launch``: start or submit ``plmtune run`` on many processes, after a check of its config."""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from plmtune.cli.options import divide, option, recipe_file, several, without_collecting
from plmtune.cli.run import run
from plmtune.errors import UserError
from plmtune.io import terminal

_RAW = {"allow_interspersed_args": False}  # what stands behind run belongs to run
_command = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="run NAME [FILE.yaml] [KEY=VALUE]...")
_sizes = several(
    option("--nodes N", "Use N nodes.", default=1),
    option("--processes N", "Start N processes on all nodes together, equally many on each.", required=True),
)
_write = option("--write FILE.yaml", "Write this file.", "path", required=True)
_no_check = option("--no-check", "Check keys and values only: data and models are not on this machine.")


@click.group()
def launch() -> None:
    """Start plmtune run on many processes: here, on Slurm, or by a file for SkyPilot or Kubernetes.

    The config is checked first, as plmtune validate does, for that number of processes: a mistake is found before a job
    is queued. The output of each rank is kept in RUN_DIR/ranks. plmtune runs shows how jobs stand in the queue.

    \b
    plmtune launch local --processes 2 run demo
    plmtune launch slurm --nodes 2 --processes 16 --gpus --time 8h run pretrain conf/plm_1.8b.yaml
    plmtune launch skypilot --nodes 2 --processes 16 --accelerators H100 --write task.yaml run pretrain mine.yaml
    """


@launch.command(context_settings=_RAW, short_help="Start the processes on this machine.")
@option("--processes N", "Start N processes (default: one a GPU).")
@option("--max-restarts INTEGER", "After a failure start all processes again, so often at most; they resume the run.",
        type=click.IntRange(0), default=0)  # fmt: skip
@_command
def local(words: tuple[str, ...], processes: int | None, max_restarts: int) -> None:
    """Start plmtune run on several processes of this machine, through torch.distributed's agent (torchrun).

    The output of rank 0 is shown, and that of each rank is kept in RUN_DIR/ranks. The exit code is that of the run: 75
    if it was stopped by a signal (Ctrl-C) and saved.

    \b
    plmtune launch local --processes 2 run demo
    plmtune launch local --max-restarts 3 run pretrain conf/plm_1.8b.yaml runtime.strategy=fsdp
    """
    _refuse_inside()
    command = _parse(words)
    if command.multirun:
        raise UserError(
            "plmtune launch local starts one run. Give run -m without launch: its jobs follow each other, or run side "
            "by side with hydra/launcher=joblib."
        )
    with without_collecting():
        from plmtune.launch.local import count_processes, refuse_too_few_gpus, run_processes
        from plmtune.launch.record import Launch

        count = count_processes(processes)
        cfg = _check(command, count, count)
        refuse_too_few_gpus(count, cfg.runtime.device)
    run_dir = _run_dir(cfg)
    arguments = command.with_overrides(run_dir=run_dir)
    Launch("local", str(os.getpid()), 1, count, arguments).write(run_dir)
    raise SystemExit(run_processes(arguments, run_dir, processes=count, max_restarts=max_restarts))


@launch.command(context_settings=_RAW, short_help="Submit a job to Slurm.")
@_sizes
@option("--time TEXT", "Set this time limit: 90m, 8h, 1d12h.", "limit", required=True)
@option("--partition TEXT", "Submit to this partition.")
@option("--account TEXT", "Charge this account.")
@option("--qos TEXT", "Use this quality of service.")
@option("--gpus", "Request a GPU for each process.")
@option("--cpus N", "Request N CPU cores for each process.")
@option("--memory FLOAT", "Request this memory on each node, in GiB.", type=click.FloatRange(0, min_open=True))
@option("--stop-before TEXT", "Save and stop this long before the time limit.", default="2m")
@option("--max-requeues INTEGER", "Queue the job again after a stop, so often at most.",
        type=click.IntRange(0), default=100)  # fmt: skip
@option("--setup TEXT", "Run this shell command on the first node before. Can be given several times.", multiple=True)
@option("--sbatch KEY=VALUE", "Pass another option to sbatch. Can be given several times.", multiple=True, type=str)
@_command
def slurm(
    words: tuple[str, ...],
    nodes: int,
    processes: int,
    limit: str,
    gpus: bool,
    cpus: int | None,
    memory: float | None,
    stop_before: str,
    max_requeues: int,
    setup: tuple[str, ...],
    sbatch: tuple[str, ...],
    partition: str | None,
    account: str | None,
    qos: str | None,
) -> None:
    """Submit plmtune run as a job of Slurm, through submitit.

    Before the time limit, and when Slurm preempts the job, the run saves and stops; the job is queued again and resumes
    the run.

    \b
    plmtune launch slurm --nodes 2 --processes 16 --gpus --time 8h run pretrain conf/plm_1.8b.yaml
    plmtune launch slurm --processes 2 --time 30m run demo
    """
    _refuse_inside()
    command = _parse(words)
    from plmtune.launch import slurm as backend

    minutes, before = backend.minutes_of(limit, "--time"), backend.minutes_of(stop_before, "--stop-before")
    if before >= minutes:
        raise UserError(f"--stop-before {stop_before} must be shorter than --time {limit}.")
    per_node = _per_node(nodes, processes)
    more = backend.settings_of(sbatch)
    backend.refuse_without_slurm()
    if command.multirun:
        raise UserError("plmtune launch slurm submits one run. Submit each run of run -m by a launch of its own.")
    cfg = _check(command, processes, per_node, elsewhere=True)
    run_dir = _run_dir(cfg)
    arguments = command.with_overrides(run_dir=run_dir, resume="true")
    from plmtune.launch.record import Launch

    job = backend.submit(
        arguments,
        run_dir,
        name=cfg.name,
        nodes=nodes,
        processes=processes,
        minutes=minutes,
        stop_before=before,
        requeues=max_requeues,
        memory_gb=memory,
        setup=setup,
        sbatch=more,
        partition=partition,
        account=account,
        qos=qos,
        gpus=gpus,
        cpus=cpus,
    )
    Launch("slurm", job, nodes, processes, arguments).write(run_dir)
    terminal.echo(f"Job {job} is queued: {run_dir}\nState: plmtune runs {run_dir}. End it: scancel {job}")


@launch.command(context_settings=_RAW, short_help="Write a task of SkyPilot.")
@_sizes
@option("--accelerators TEXT", "Request this kind of accelerator, one a process, such as H100.", type=str)
@option("--infra TEXT", "Use this cloud, region or Kubernetes context, such as aws/us-east-1.")
@option("--storage TEXT", "Keep runs in this bucket, such as s3://my-runs.")
@option("--spot", "Use spot instances.")
@_write
@_no_check
@_command
def skypilot(
    words: tuple[str, ...],
    nodes: int,
    processes: int,
    accelerators: str | None,
    infra: str | None,
    storage: str | None,
    spot: bool,
    path: Path,
    no_check: bool,
) -> None:
    """Write a task of SkyPilot that runs plmtune run; nothing is submitted.

    \b
    plmtune launch skypilot --nodes 2 --processes 16 --accelerators H100 --write task.yaml run pretrain mine.yaml
    """
    command, per_node, cfg = _check_elsewhere(words, nodes, processes, path, no_check)
    from plmtune.launch.manifests import skypilot_task, write_manifest

    run_dir = _run_dir(cfg)
    task = skypilot_task(
        command.with_overrides(run_dir=run_dir, resume="true"),
        name=cfg.name,
        nodes=nodes,
        processes_per_node=per_node,
        accelerators=accelerators,
        infra=infra,
        storage=storage,
        spot=spot,
    )
    write_manifest(path, task, "sky jobs launch")
    terminal.echo(f"{path} written. Submit it: sky jobs launch {path}")


@launch.command(context_settings=_RAW, short_help="Write a PyTorchJob of Kubeflow.")
@_sizes
@option("--image TEXT", "Run this container image, which has plmtune.", required=True)
@option("--volume TEXT", "Keep runs on this persistent volume claim.", required=True)
@option("--namespace TEXT", "Create the job in this namespace.")
@option("--gpus", "Request a GPU for each process.")
@option("--cpus N", "Request N CPU cores for each process.")
@option("--memory FLOAT", "Request this memory for each node, in GiB.", type=click.FloatRange(0, min_open=True))
@_write
@_no_check
@_command
def kubernetes(
    words: tuple[str, ...],
    nodes: int,
    processes: int,
    image: str,
    volume: str,
    namespace: str | None,
    gpus: bool,
    cpus: int | None,
    memory: float | None,
    path: Path,
    no_check: bool,
) -> None:
    """Write a PyTorchJob of Kubeflow's training operator that runs plmtune run; nothing is submitted.

    \b
    plmtune launch kubernetes --processes 8 --gpus --image me/plmtune:1 --volume runs --write job.yaml run demo
    """
    command, per_node, cfg = _check_elsewhere(words, nodes, processes, path, no_check)
    from plmtune.launch.manifests import pytorch_job, write_manifest

    run_dir = _run_dir(cfg)
    job = pytorch_job(
        command.with_overrides(run_dir=run_dir, resume="true"),
        name=cfg.name,
        nodes=nodes,
        processes_per_node=per_node,
        image=image,
        volume=volume,
        namespace=namespace,
        gpus=gpus,
        cpus=cpus,
        memory_gb=memory,
    )
    write_manifest(path, job, "kubectl create -f")
    terminal.echo(f"{path} written. Submit it: kubectl create -f {path}")


@dataclass(frozen=True)
class _Command:
    """``run ...`` as it was typed, and what it says."""

    words: tuple[str, ...]
    name: str
    arguments: tuple[str, ...]
    multirun: bool
    force: bool

    def with_overrides(self, **overrides: object) -> list[str]:
        """The words of the command, in which each of these overrides replaces one that was typed."""
        kept = [word for word in self.words if word.partition("=")[0] not in overrides]
        return [*kept, *(f"{key}={value}" for key, value in overrides.items())]


def _parse(words: Sequence[str]) -> _Command:
    """Let ``plmtune run`` read its words."""
    if not words or words[0] != "run":
        raise UserError(
            "plmtune launch starts plmtune run: write run NAME [FILE.yaml] [KEY=VALUE] at the end"
            + (f", not {words[0]:.80}." if words else ".")
        )
    given = run.make_context("run", list(words[1:]), parent=click.get_current_context().find_root()).params
    for flag in ("dry_run", "sensitivity"):
        if given[flag]:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} needs one process: plmtune {shlex.join(words)}")
    return _Command(tuple(words), given["name"], given["arguments"], given["multirun"], given["force"])


def _refuse_inside() -> None:
    """Refuse to launch from a process of a launch."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "plmtune launch starts all processes itself: give it alone, and not under torchrun or another launch."
        )


def _per_node(nodes: int, processes: int) -> int:
    if processes % nodes:
        raise UserError(f"--processes {processes} do not divide among --nodes {nodes}: each node starts equally many.")
    return processes // nodes


@contextlib.contextmanager
def _as_rank_0(processes: int, per_node: int) -> Iterator[None]:
    """What torchrun would set for the first of the processes, so that a config is checked for that many."""
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": per_node}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check(
    command: _Command, processes: int, per_node: int, *, elsewhere: bool = False, only_keys: bool = False
) -> Any:
    """Check what the command would run, as plmtune validate does, for that many processes; returns its config.

    Args:
        elsewhere: it runs on other machines, so that a GPU that is not here is no mistake.
        only_keys: check keys and values, and not what they name.
    """
    overlays, overrides = divide(command.arguments)
    with without_collecting():
        module = recipe_file(command.name) if command.name.endswith(".py") else None

        from plmtune.config import compose, primary

        if module is None:
            primary.find_config(command.name)  # before torch is imported
        cfg = compose.compose(module.CONFIG if module else command.name, overlays, overrides)
        if not hasattr(cfg, "runtime"):
            raise UserError(f"{command.name}: the recipe {cfg.recipe} runs in one process: plmtune run {command.name}")
        if only_keys:
            return cfg
        recipe = module or importlib.import_module(f"plmtune.recipes.{cfg.recipe}")
        device = cfg.runtime.device
        if elsewhere and device.startswith("cuda"):
            cfg.runtime.device = "auto"

        from plmtune.cli.validate import check

        with _as_rank_0(processes, per_node):
            said = check(recipe, cfg)
        cfg.runtime.device = device
    terminal.echo(f"{' '.join([command.name, *overlays])} on {processes} processes: valid. {said}")
    return cfg


def _check_elsewhere(
    words: Sequence[str], nodes: int, processes: int, path: Path, no_check: bool
) -> tuple[_Command, int, Any]:
    if path.suffix not in (".yaml", ".yml") or not path.absolute().parent.is_dir():
        raise UserError(f"--write {path}: must be a .yaml file in a folder that is there.")
    command, per_node = _parse(words), _per_node(nodes, processes)
    if command.multirun:
        raise UserError("run -m cannot be written as one file: write a file for each run.")
    return command, per_node, _check(command, processes, per_node, elsewhere=True, only_keys=no_check)


def _run_dir(cfg: Any) -> Path:
    """Where the run will be: `run_dir`, or a new directory as plmtune run would name it."""
    if cfg.run_dir:
        return Path(cfg.run_dir)
    path = Path("runs") / cfg.name / f"{datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{datetime.now():%Y%m%d-%H%M%S}-{number}")
    return path
