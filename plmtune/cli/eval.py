"""``plmtune eval``: how good checkpoints are, by the tasks of lm-eval."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plmtune import dtypes
from plmtune.cli import options
from plmtune.cli.generate import refuse_without_chat, warn_of_pretrained
from plmtune.cli.options import option
from plmtune.config.names import check_model_path
from plmtune.errors import UserError
from plmtune.io import hub, terminal
from plmtune.io.tables import Column, Table, show
from plmtune.io.terminal import Progress

if TYPE_CHECKING:
    from plmtune.evaluation.tasks import Tasks


@click.command("eval")
@click.argument("checkpoints", nargs=-1, metavar="[CHECKPOINT]...")
@option("--tasks A,B", "Run these tasks, groups or tags of lm-eval; * is a wildcard.", "names")
@option("--suite NAME", "Run a suite: quick (minutes on a laptop) or plm (the 13 tasks of PLM's paper).")
@option("--list", "List suites and tasks, or only those that contain a given word.", "listing")
@option("--map", "Print a template of the map that --data takes for --tasks. Needs no network.", "mapping")
@option("--limit N", "Use the first N documents of each task (default: all).")
@option(
    "--num-fewshot K", "Put K examples before each question (default: the task's own number).", type=click.IntRange(0)
)
@option("--batch-size N", "Compute this many rows together; auto chooses by memory.", type=str, default="auto")
@option(
    "--max-new-tokens N",
    "Limit generated answers to N tokens (default: the task's own limit, at most half of the context).",
)
@option("--chat", "Apply the model's chat template.")
@options.chat_options
@option("--data PATH", "Read tasks' data from a local folder or map instead of the hub.")
@option("--include PATH", "Add a folder with tasks of your own (YAML, Python).")
@option("--unsafe-code", "Let tasks run code that the model wrote, in a sandbox.")
@option("--no-sandbox", "Run that code without the sandbox, at your own risk.")
@option("--out PATH", "Write the results to this folder.", default=Path("evaluations"))
@option("--all", "Show the members of groups as well.", "members")
@options.dtype_option
@options.device_option
def evaluate(
    checkpoints: tuple[str, ...],
    names: str | None,
    suite: str | None,
    listing: bool,
    mapping: bool,
    limit: int | None,
    batch_size: str,
    chat: bool,
    chat_template: str | None,
    system: str | None,
    data: Path | None,
    include: Path | None,
    unsafe_code: bool,
    no_sandbox: bool,
    out: Path,
    members: bool,
    dtype: str | None,
    device: str | None,
    **how: Any,
) -> None:
    """Evaluate checkpoints, model directories, runs or models of the hub (default: the newest finished run).

    Write the results to a JSON file in --out, and a table to stdout. The same command resumes an interrupted
    evaluation.

    \b
    plmtune eval --tasks gsm8k,humaneval
    plmtune eval runs/demo_sft/latest OTHER --suite quick --limit 100
    plmtune eval --list mmlu
    """
    for path in () if listing else checkpoints:
        check_model_path(path)

    from plmtune.evaluation.local_data import LocalData
    from plmtune.evaluation.tasks import SUITES, Tasks

    tasks = Tasks(include=include, data=LocalData.open(data) if data else None)
    if listing:
        _list(tasks, checkpoints)
        return
    if mapping:
        wanted = tasks.resolve(_names(names, suite, SUITES))
        if not (entries := [entry for name in wanted for entry in tasks.map_entries(name)]):
            raise UserError(f"{', '.join(wanted)}: written in Python, which does not say what it reads.")
        click.echo("\n".join(entries))
        return
    refuse_without_chat(chat, chat_template, system)
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise UserError(f"--batch-size {batch_size}: give auto, or how many answers are written at once.")
    rows = None if batch_size == "auto" else int(batch_size)
    wanted = tasks.resolve(_names(names, suite, SUITES))
    if needing := [name for name in wanted if tasks.needs_code(name)]:
        _allow_code(tasks, needing, allowed=unsafe_code, sandboxed=not no_sandbox)

    from plmtune.evaluation import result_table
    from plmtune.evaluation.evaluate import Settings, check_shares, evaluate_checkpoint, load_tasks
    from plmtune.models.checkpoint_files import checkpoint_directory
    from plmtune.training.distributed import broadcast_from_rank0, once_per_machine
    from plmtune.training.runtime import Runtime

    options.find_device(device)
    settings = Settings(limit=limit, batch_size=rows, chat=chat, chat_template=chat_template, system=system, **how)
    # Under torchrun each process takes its share of the documents.
    with Runtime.choose(device=device or "auto", precision="fp32").start() as runtime:
        log = terminal.say if runtime.is_main else lambda text: None
        # Rank 0 decides for all: a branch of the hub, or the newest run, may change a moment later.
        paths = broadcast_from_rank0(
            lambda: [hub.pin(path) for path in checkpoints] or [options.newest_run("eval CHECKPOINT")]
        )
        for path in paths:
            once_per_machine(functools.partial(checkpoint_directory, path))  # before the tasks, which may take a while
            if chat and runtime.is_main:
                warn_of_pretrained(path)
        loaded, failed = load_tasks(tasks, wanted, settings, log)
        check_shares(tasks, loaded, limit)
        measured = []
        for path in paths if loaded else []:
            try:
                with Progress(shown=runtime.is_main) as line:
                    result, file = evaluate_checkpoint(
                        path,
                        tasks,
                        loaded,
                        settings,
                        out=out,
                        failed=failed,
                        device=runtime.device,
                        dtype=dtypes.from_name(dtype) if dtype else None,
                        progress=functools.partial(_update, line, path),
                        log=log,
                    )
            except KeyboardInterrupt:
                log("interrupted; the same command resumes it")
                raise
            measured.append(result)
            log(f"result: {file}")
        if measured and runtime.is_main:
            show(*result_table.table(measured, all_tasks=members))
    if missing := sorted({name for result in measured for name in result["failed"]} | set(failed)):
        raise UserError(f"not measured, for the reasons above: {', '.join(missing)}.")


def _names(names: str | None, suite: str | None, suites: dict[str, tuple[str, ...]]) -> list[str]:
    if suite is not None and suite not in suites:
        raise UserError(f"--suite {suite}: there is none. Known: {', '.join(sorted(suites))}.")
    wanted = [*(suites[suite] if suite else ()), *(name.strip() for name in (names or "").split(",") if name.strip())]
    if not wanted:
        raise UserError("Name what to measure: --tasks gsm8k,arc_easy, or --suite quick. All: plmtune eval --list")
    return list(dict.fromkeys(wanted))


def _allow_code(tasks: Tasks, names: Sequence[str], *, allowed: bool, sandboxed: bool) -> None:
    """Ask once whether code that the model writes may run."""
    from plmtune.evaluation.code_eval import CodeRunner, missing, protection, running_code

    who = running_code(names)
    runner = CodeRunner("namespaces" if sandboxed else "limits")
    if sandboxed and (lacking := missing()):
        raise UserError(
            f"{who}, and there is no sandbox on this machine: {lacking}. Leave it out; or, if you would run by hand "
            "whatever the model writes, add --no-sandbox."
        )
    if not allowed:
        terminal.say(f"{who}. What protects this machine:\n{protection(runner.isolation)}")
        if not sys.stdin.isatty():
            raise UserError(f"{who}: add --unsafe-code to let it.")
        if not click.confirm("Run it?", err=True):
            raise UserError("not run. Leave these tasks out of --tasks.")
    tasks.code = runner


def _list(tasks: Tasks, words: Sequence[str]) -> None:
    from plmtune.evaluation.tasks import SUITES

    known = tasks.listing()
    found = [entry for entry in known if not words or any(word in entry.name for word in words)]
    if not found:
        raise UserError(f"No task has {' or '.join(words)} in its name. All of them: plmtune eval --list")
    if not words and sys.stdout.isatty():  # 14,000 lines are for a pipe
        suites = {name for members in SUITES.values() for name in members}
        found = [entry for entry in known if entry.kind == "suite" or entry.name in suites]
    table = Table([Column("name", key=True), "kind", Column("output", drop=1), Column("source", folds=True)])
    for entry in found:
        table.add(entry.name, entry.kind, entry.output, entry.source)
    if sys.stdout.isatty():
        show(table)
    else:  # for cut and awk
        for row in table.rows:
            click.echo("\t".join(cell.text for cell in row))
    if len(found) < len(known) and not words:
        terminal.say(f"and {len(known) - len(found):,} more: plmtune eval --list WORD")


def _update(line: Progress, path: str, kind: str, done: int, total: int) -> None:
    line.update(f"{done:,}/{total:,} {kind}", path, now=done == total)
