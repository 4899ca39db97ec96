"""The tasks that a recipe measures while it trains, found before the run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plmtune.config.schema import EvaluationConfig
from plmtune.errors import UserError
from plmtune.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from plmtune.evaluation.during import Evaluations


def open_evaluations(
    cfg: EvaluationConfig, model: Any, tokenizer: Tokenizer | None, strategy: str, *, template: str | None = None
) -> Evaluations | None:
    """Find the tasks of `eval.tasks`, and check them; None where there are none.

    Args:
        model: on the meta device; None where it is not known yet.
    """
    if not cfg.tasks:
        return None
    if strategy in ("fsdp", "hsdp"):
        raise UserError(
            f"key eval.tasks: tasks are measured on whole models, not under {strategy}: strategy=ddp, or "
            "plmtune eval afterwards."
        )
    longest = cfg.max_new_tokens
    if longest is not None and model is not None and longest >= model.max_seq_len:
        raise UserError(
            f"key eval.max_new_tokens: {longest} must be below the model's max_seq_len ({model.max_seq_len}), "
            "which holds the question, too."
        )
    from plmtune.evaluation.during import Evaluations  # lm-eval takes seconds to import

    return Evaluations(cfg, tokenizer, template=template)
