"""Evaluation on tasks during training."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from plmtune.config.sections import EvaluationConfig
from plmtune.errors import UserError
from plmtune.evaluation import evaluate, result_table, results
from plmtune.evaluation.code_eval import CodeRunner, missing, running_code
from plmtune.evaluation.local_data import LocalData
from plmtune.evaluation.result_cache import ResultCache
from plmtune.evaluation.tasks import Tasks
from plmtune.models.digest import model_digest
from plmtune.modules.attributes import eval_mode
from plmtune.modules.decoder import Decoder
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training import distributed
from plmtune.training.determinism import preserve_random_state
from plmtune.training.monitor import RunMonitor
from plmtune.training.runtime import Runtime


class _Stopped(BaseException):
    """The run was asked to stop; not an error of a task."""


class Evaluations:
    """The tasks of `eval.tasks`, loaded before training starts.

    Args:
        cfg: the section `eval`.
        template: chat template, with `eval.chat`.
    """

    def __init__(self, cfg: EvaluationConfig, tokenizer: Tokenizer | None, *, template: str | None = None) -> None:
        self.every = cfg.every
        self.tokenizer = tokenizer
        self.settings = evaluate.Settings(
            limit=cfg.limit or None,
            num_fewshot=cfg.num_fewshot,
            batch_size=cfg.batch_size,
            chat=cfg.chat,
            chat_template=template,
            max_new_tokens=cfg.max_new_tokens,
        )
        try:  # a dry run may have no tokenizer
            self.template = find_template(template, tokenizer) if cfg.chat and tokenizer else None
        except UserError as error:
            raise UserError(f"key eval.chat: {error}") from error
        self.tasks = Tasks(data=LocalData.open(Path(cfg.data)) if cfg.data else None)
        try:
            names = self.tasks.resolve(cfg.tasks)
            if needing := [name for name in names if self.tasks.needs_code(name)]:
                if not cfg.unsafe_code:
                    raise UserError(f"{running_code(needing)}: eval.unsafe_code=true lets it, in a sandbox")
                if lacking := missing():
                    raise UserError(f"{running_code(needing)}, and there is no sandbox on this machine: {lacking}")
                self.tasks.code = CodeRunner("namespaces")
            self.loaded = {name: self.tasks.load(name, num_fewshot=cfg.num_fewshot) for name in names}
            evaluate.check_shares(self.tasks, self.loaded, self.settings.limit)
        except UserError as error:
            raise UserError(f"key eval.tasks: {error}") from error

    def due(self, step: int, num_steps: int) -> bool:
        """Whether to evaluate after `step`."""
        return step == num_steps or bool(self.every and step and step % self.every == 0)

    def measure(self, model: Decoder, runtime: Runtime, directory: Path, step: int, monitor: RunMonitor) -> bool:
        """Evaluate the tasks, and log ``eval/TASK/METRIC``. Collective: every rank must call it.

        Args:
            directory: the run's; it gets the result and, after an interruption, the answers so far.
            monitor: shows the progress; a single process also stops when it says so.

        Returns:
            Whether all tasks are measured; False if a signal asks the run to stop.
        """
        file = results.step_file(directory, step)
        try:
            with monitor.paused():
                # Results of bf16 weights differ from those of fp32 weights computed in bf16.
                digest = f"{model_digest(model)} {runtime.compute_dtype}"
                about = evaluate.describe_model(directory.name, directory, model, digest, directory, step)
                known = distributed.broadcast_from_rank0(lambda: self._known(file, digest))
                measured = known or self._measure(model, runtime, file, monitor, about)
        except _Stopped:
            return False
        if measured:
            monitor.log(step, measured)
        return True

    def _measure(
        self, model: Decoder, runtime: Runtime, file: Path, monitor: RunMonitor, about: dict[str, Any]
    ) -> dict[str, float]:
        """Return the values to log, the same on every rank."""
        pending = file.parent / "pending" / f"rank{runtime.rank}.sqlite"

        def progress(kind: str, done: int, total: int) -> None:
            monitor.working(f"evaluating: {done:,}/{total:,} {kind}")
            if runtime.world_size == 1 and monitor.should_stop():
                raise _Stopped

        assert self.tokenizer is not None
        # lm-eval seeds the generators that training uses.
        with preserve_random_state(runtime.device), runtime.autocast(), eval_mode(model):
            torch.use_deterministic_algorithms(False)  # sampling has no deterministic kernel on a GPU
            with ResultCache(pending) as cache:
                lm = self.settings.open(model, self.tokenizer, self.template, cache, about["digest"])
                lm.progress, lm.log = progress, monitor.message
                result = evaluate.evaluate(
                    lm, self.tasks, self.loaded, self.settings, about=about, failed={}, file=file
                )
        for old in pending.parent.glob(f"{pending.name}*"):
            old.unlink()
        with contextlib.suppress(OSError):  # other ranks are not done
            pending.parent.rmdir()
        values: dict[str, float] = distributed.broadcast_from_rank0(lambda: _values(result))
        return values

    def catch_up(
        self, model: Decoder, runtime: Runtime, directory: Path, step: int, num_steps: int, monitor: RunMonitor
    ) -> bool:
        """Measure the tasks due after `step` if a stopped run has no complete result of them; see `measure`."""
        file = results.step_file(directory, step)
        if not self.due(step, num_steps) or distributed.broadcast_from_rank0(lambda: bool(self._known(file))):
            return True
        measured = self.measure(model, runtime, directory, step, monitor)
        if measured and monitor.should_stop():
            monitor.raise_failure()  # there may be no further step that does
        return measured

    def _known(self, file: Path, digest: str | None = None) -> dict[str, float]:
        """Return the values of a complete result of these tasks; empty if there is none, or one of another model."""
        try:
            result = results.load(file)
        except UserError:  # missing or damaged: evaluate
            return {}
        matches = result["status"] == "complete" and result["settings"] == self.settings.describe(self.loaded)
        return _values(result) if matches and digest in (None, result["model"]["digest"]) else {}


def _values(result: dict[str, Any]) -> dict[str, float]:
    """Return the metrics to log: those of a group, not of each of its tasks."""
    found = [(line, result_table.score(result, line)) for line in result_table.lines([result])]
    return {
        f"eval/{line.task}/{line.metric.removesuffix(',none')}": one.value
        for line, one in found
        if one is not None and one.value is not None
    }
