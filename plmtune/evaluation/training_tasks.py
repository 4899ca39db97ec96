"""The tasks that a recipe measures while it trains, found before the run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plmtune.config.sections import EvaluationConfig
from plmtune.errors import UserError
from plmtune.training.preflight import TrainingPlan

if TYPE_CHECKING:
    from plmtune.evaluation.during import Evaluations


def open_evaluations(
    cfg: EvaluationConfig, plan: TrainingPlan, strategy: str, *, template: str | None = None
) -> Evaluations | None:
    """Find the tasks of `eval.tasks`, and check them; None where there are none.

    Args:
        plan: of the run; its model may be unknown yet.
    """
    if not cfg.tasks:
        return None
    if strategy not in ("none", "ddp"):
        raise UserError(
            f"key eval.tasks: tasks are measured on whole models, not under {strategy}: strategy=ddp, or "
            "plmtune eval afterwards."
        )
    longest = cfg.max_new_tokens
    if longest is not None and plan.model is not None and longest >= plan.model.max_seq_len:
        raise UserError(
            f"key eval.max_new_tokens: {longest} must be below the model's max_seq_len ({plan.model.max_seq_len}), "
            "which holds the question, too."
        )
    from plmtune.evaluation.during import Evaluations  # lm-eval takes seconds to import

    return Evaluations(cfg, plan.tokenizer, template=template)
