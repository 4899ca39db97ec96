"""Evaluation of a checkpoint on tasks; the result file is written after each task."""

from __future__ import annotations

import functools
import os
import random
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.evaluator
import torch
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from plmtune.errors import UserError
from plmtune.evaluation import results
from plmtune.evaluation.language_model import LanguageModel
from plmtune.evaluation.model_facts import run_of
from plmtune.evaluation.result_cache import ResultCache
from plmtune.evaluation.tasks import Tasks, quiet
from plmtune.inference.kernel_choice import prepack
from plmtune.io.provenance import git_state, now
from plmtune.models.adapters import load_model, load_model_tokenizer
from plmtune.models.checkpoint_files import checkpoint_directory, model_name
from plmtune.models.digest import model_digest
from plmtune.tokenizers.chat_template import find_template
from plmtune.training import distributed
from plmtune.training.state import seed_everything

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder
    from plmtune.tokenizers.chat_template import ChatTemplate
    from plmtune.tokenizers.tokenizer import Tokenizer

# Samples of the bootstrap for metrics without a formula for the standard error; lm-eval's 100,000 take minutes.
_BOOTSTRAP = 1000

Progress = Callable[[str, int, int], None]  # kind, number done, total
Log = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation.

    Attributes:
        limit: documents a task; None: all.
        num_fewshot: examples before each question; None: the task's own number.
        batch_size: rows that are generated together; None: by memory.
        chat: ask questions as messages in the model's chat template.
        chat_template: replaces the tokenizer's own.
        system: the system message, with `chat`.
        max_new_tokens: longest answer; None: the task's own, as far as the model's context allows.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    chat: bool = False
    chat_template: str | None = None
    system: str | None = None
    max_new_tokens: int | None = None

    def describe(self, names: Iterable[str]) -> dict[str, Any]:
        values = {"tasks": list(names), **asdict(self)}
        if self.max_new_tokens is None:  # as in results of earlier versions, which can be resumed
            del values["max_new_tokens"]
        return values

    def open(
        self, model: Decoder, tokenizer: Tokenizer, template: ChatTemplate | None, cache: ResultCache, digest: str
    ) -> LanguageModel:
        own: dict[str, Any] = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
        return LanguageModel(model, tokenizer, template=template, cache=cache, digest=digest, **own)


def load_tasks(
    tasks: Tasks, names: Sequence[str], settings: Settings, log: Log
) -> tuple[dict[str, Any], dict[str, str]]:
    """Build each task with its data; return them by name, and why the others cannot be built."""
    loaded, failed = {}, {}
    for name in names:
        try:
            loaded[name] = tasks.load(name, num_fewshot=settings.num_fewshot)
        except UserError as error:
            failed[name] = str(error)
            log(f"{name}: {error}")
    return loaded, failed


def evaluate_checkpoint(
    path: str | Path,
    tasks: Tasks,
    loaded: Mapping[str, Any],
    settings: Settings,
    *,
    out: Path,
    failed: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress,
    log: Log,
) -> tuple[dict[str, Any], Path]:
    """Evaluate a checkpoint; the result so far is written after each task.

    Args:
        path: a checkpoint, a model directory or a run.
        loaded: from `load_tasks`.
        out: the folder of results and of the cache, from which an interrupted evaluation resumes.
        failed: tasks that cannot be measured, with reasons, for the result.

    Returns:
        The result (see `plmtune.evaluation.results`), and its file.
    """
    directory = checkpoint_directory(path)
    tokenizer = load_model_tokenizer(directory)
    try:
        template = find_template(settings.chat_template, tokenizer, "--chat-template ") if settings.chat else None
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    model = load_model(directory, device, dtype).eval()
    # Special tokens may have no row (Gemma's of images): no text holds them.
    without_row = sum(token >= model.vocab_size for token in tokenizer.specials.values())
    if tokenizer.num_tokens - without_row > model.vocab_size:
        raise UserError(
            f"{directory}: its tokenizer has {tokenizer.num_tokens:,} tokens, its model rows for "
            f"{model.vocab_size:,}. They are not of one model."
        )
    most = settings.max_new_tokens
    if most is not None and most >= model.max_seq_len:
        raise UserError(
            f"--max-new-tokens {most:,} must be below the context of {path}, {model.max_seq_len:,} tokens, which holds "
            "the question, too."
        )
    run, step = run_of(directory) or (None, None)
    # pretrain-20261121-101500-step500, or the checkpoint's folder
    name = f"{run.parent.name}-{run.name}-step{step}" if run else model_name(directory)
    about = describe_model(name, path, model, model_digest(model), run, step)
    prepack(model)
    file = out / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    out.mkdir(parents=True, exist_ok=True)
    with ResultCache(out / "cache" / f"{about['digest'][:16]}.sqlite") as cache:
        lm = settings.open(model, tokenizer, template, cache, about["digest"])
        lm.progress, lm.log = progress, log
        return evaluate(lm, tasks, loaded, settings, about=about, failed=failed, file=file), file


def evaluate(
    lm: LanguageModel,
    tasks: Tasks,
    loaded: Mapping[str, Any],
    settings: Settings,
    *,
    about: Mapping[str, Any],
    failed: Mapping[str, str],
    file: Path,
) -> dict[str, Any]:
    """Evaluate one task after the other, and write the result after each."""
    result: dict[str, Any] = {
        "format": results.FORMAT,
        "version": results.VERSION,
        "status": "partial",
        "model": dict(about),
        "settings": settings.describe([*loaded, *failed]),
        "environment": results.environment(lm.device, lm.model.dtype),
        "git": git_state(),
        "started": now(),
        "seconds": 0.0,
        "tasks": {},
        "groups": {},
        "failed": dict(failed),
        "samples": {},
    }
    began, progress = time.perf_counter(), lm.progress
    for name, task in loaded.items():
        lm.progress = functools.partial(lambda name, kind, *counts: progress(f"{name} ({kind})", *counts), name)
        start, cut = time.perf_counter(), lm.num_truncated
        try:
            raw = run_task(lm, tasks, task, settings)
            found, groups, samples = results.collect(raw) if raw else ({}, {}, {})
        except MemoryError:
            raise
        except Exception as error:
            # A task's function may raise anything; the other tasks, and a training run, continue.
            if lm.world_size > 1:  # the others wait for this one
                raise
            result["failed"][name] = _in_words(error)
            lm.log(f"{name}: {result['failed'][name]}")
            found, groups, samples = {}, {}, {}
        seconds = time.perf_counter() - start
        truncated = sum(lm.gather_object(lm.num_truncated - cut) or ())
        if truncated:
            lm.log(f"{name}: {truncated:,} requests were longer than the model's context and lost their beginning")
        built = _flat(tasks, task)["tasks"]
        for inner, entry in found.items():
            entry["data"] = _data(tasks, inner, built[inner])
        for entry in (*found.values(), *groups.values()):
            # Tasks of a group are measured together: the time is the group's.
            alone = len(found) == 1 or entry is groups.get(name)
            entry |= {"seconds": round(seconds, 2) if alone else None, "truncated": truncated if alone else None}
        result["tasks"] |= found
        result["groups"] |= groups
        result["samples"] |= samples
        result["seconds"] = round(time.perf_counter() - began, 2)
        result["status"] = "complete" if name == list(loaded)[-1] else "partial"
        if lm.rank == 0:
            results.save(result, file)
    return result


def check_shares(tasks: Tasks, loaded: Mapping[str, Any], limit: int | None) -> None:
    """Raise UserError, on every rank, for tasks with fewer documents than processes, which would wait for ever."""
    world_size = distributed.world_size()
    for task in loaded.values() if world_size > 1 else ():
        for name, each in _flat(tasks, task)["tasks"].items():
            documents = min(limit or len(each.eval_docs), len(each.eval_docs))
            if documents < world_size:
                what = f"{documents} documents cannot be shared by {world_size} processes"
                raise UserError(f"{name}: {what}. Start fewer, or raise the limit.")


def run_task(lm: LM, tasks: Tasks, task: Any, settings: Settings) -> Any:
    """Return the output of lm-eval's `simple_evaluate`, which takes 10 seconds more; None on ranks other than 0."""
    loaded = _flat(tasks, task)
    for each in loaded["tasks"].values():
        own = each.get_config("num_fewshot")
        if settings.num_fewshot is not None and own != 0:  # 0: the task allows none
            each.set_config("num_fewshot", settings.num_fewshot)
        elif own is None:
            each.set_config("num_fewshot", 0)
        each.set_fewshot_seed(DEFAULT_OTHER_SEED)
    seed_everything(DEFAULT_OTHER_SEED)
    random.seed(DEFAULT_RANDOM_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap would fork this process with the model
    with quiet():
        return lm_eval.evaluator.evaluate(
            lm,
            loaded,
            limit=settings.limit,
            bootstrap_iters=_BOOTSTRAP,
            system_instruction=settings.system,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=True,  # permission was checked before the task was loaded
        )


def _flat(tasks: Tasks, task: Any) -> Any:
    """Return a task, a group or the tasks of a tag in lm-eval's form: tasks by name, and groups."""
    return tasks.manager.load(list(task) if isinstance(task, list) else [task])


def _in_words(error: Exception) -> str:
    """Return the message of an error; with kind and place unless it is a UserError."""
    *_, last = traceback.extract_tb(error.__traceback__)
    place = f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
    return str(error) if isinstance(error, UserError) else place


def describe_model(
    name: str, path: str | Path, model: Decoder, digest: str, run: Path | None = None, step: int | None = None
) -> dict[str, Any]:
    """Return the description of a model for a result."""
    return {
        "name": name,
        "path": str(path),
        "digest": digest,
        "parameters": model.num_parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "step": step,
        "run": None if run is None else str(run),
    }


def _data(tasks: Tasks, name: str, task: Any) -> str:
    """Return the origin of a task's documents."""
    if files := tasks.data.describe(name):
        return f"{files} ({tasks.data.fingerprint(name)})"
    kwargs, path = task.get_config("dataset_kwargs") or {}, task.get_config("dataset_path")
    if path and kwargs.get("revision"):
        path = f"{path}@{kwargs['revision']}"
    return " ".join(str(part) for part in (path, task.get_config("dataset_name"), kwargs.get("data_files")) if part)
