"""What tensor parallelism does to each module, by name; each module says it in its `parallel_plan()`.

The styles, for a tp dimension of n processes (Megatron-LM, arXiv 1909.08053; sequence parallelism, arXiv 2205.05198).
Between layers each process has s / n tokens of hidden states.

    colwise          a Linear's rows of the weight, [out / n, in], and bias [out / n]; the output's last dimension
    rowwise          a Linear's columns of the weight, [out, in / n], whole bias; partial sums are reduce-scattered over
                     the sequence
    replicate        whole weights, whole input and output on every process
    sequence         a norm over the tokens that the process has; whole weights
    sequence_gather  the same, and its output is gathered to s tokens
    heads            a norm of each head; whole weights
    gather           no weights: the module's input, s / n tokens, is gathered to s
    embedding        rows of the table, [rows / n, width]; the output is reduce-scattered over the sequence
    embedding_whole  rows of the table; every process gets the output of all s tokens
    embedding_width  columns of the table, [rows, width / n]; the output's last dimension
    head             rows of the vocabulary projection, [v / n, d], which a loss reads (loss parallelism)
    parameter_rows   a parameter of the module's own, divided by its first dimension
    parameter_whole  a parameter of the module's own, whole on every process
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

Style = Literal[
    "colwise",
    "rowwise",
    "replicate",
    "sequence",
    "sequence_gather",
    "heads",
    "gather",
    "embedding",
    "embedding_whole",
    "embedding_width",
    "head",
    "parameter_rows",
    "parameter_whole",
]
STYLES: tuple[str, ...] = get_args(Style)

# The dimension of a style's weight (and, for colwise, its bias) that is divided; None: whole on every process.
_DIVIDED: dict[str, int | None] = {
    "colwise": 0,
    "rowwise": 1,
    "embedding": 0,
    "embedding_whole": 0,
    "embedding_width": 1,
    "head": 0,
    "parameter_rows": 0,
}


def full_plan(model: nn.Module) -> dict[str, Style]:
    """The style of each module and parameter that some module's `parallel_plan` names, by its full name.

    Raises:
        ValueError: if a module with parameters is in no plan, with its class.
    """
    plan: dict[str, Style] = {}
    for prefix, module in model.named_modules():
        of_module = getattr(module, "parallel_plan", None)
        for name, style in (of_module() if of_module else {}).items():
            plan[f"{prefix}.{name}" if prefix else name] = style
    for name, module in model.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            if name not in plan and f"{name}.{parameter}" not in plan:
                raise ValueError(f"a {type(module).__name__} ({name}) does not say how tensor parallelism divides it")
    return plan


def divided_dimension(plan: dict[str, Style], parameter: str) -> int | None:
    """The dimension of a parameter, by its full name, that tensor parallelism divides; None: none."""
    module, _, name = parameter.rpartition(".")
    style = plan.get(parameter) or plan[module]
    if name == "bias" and style == "rowwise":
        return None
    return _DIVIDED.get(style)
