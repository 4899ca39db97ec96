"""Learning-rate schedules: pure functions from a step to a factor of the base rate.

All are one shape with parts left out: a linear warmup, a stable stretch, a decay, then constant at the final
rate. A scheduler's state is its step alone, so a resumed run follows the schedule its config describes.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from plmtune.ranges import AT_LEAST_1, Range, check
from plmtune.registry import register
from plmtune.units import parse_count

DecayShape = Literal["linear", "cosine", "sqrt", "exponential"]


def resolve(name: str, length: int | str, num_steps: int, tokens_per_step: int) -> int:
    """Return a length in optimizer steps.

    Args:
        name: the setting's name, for messages.
        length: steps (100), a share of the run ("5%", rounded down so that shares of 100% always fit), or
            tokens ("2B tokens", "300M tokens", "10k tokens"; the nearest step, at least one).
        num_steps: optimizer steps of the whole run.
        tokens_per_step: tokens of one optimizer step over all processes.

    Raises:
        ValueError: if it is none of these or negative.
    """
    text = str(length).strip()
    try:
        if text.endswith("%") and 0 <= (share := Decimal(text[:-1])) <= 100:
            return int(share * num_steps / 100)
        if text.endswith(("token", "tokens")):
            return max(round(parse_count(text, name) / tokens_per_step), 1)
        if (steps := int(re.sub(r" ?steps?$", "", text))) >= 0:
            return steps
    except (ValueError, ArithmeticError):
        pass
    raise ValueError(f'{name} ({length}) is not a length: give steps (100), "5%", or "300M tokens"')


def factor(
    step: int,
    *,
    warmup: int = 0,
    stable: int = 0,
    decay: int = 0,
    shape: DecayShape = "cosine",
    final_factor: float = 1.0,
) -> float:
    """Return the factor of the base rate that optimizer step `step` (from 0) takes.

    factor = (step + 1) / warmup           warming up; the first step moves already, the last has 1
           = 1                             stable
           = shape(p) from 1 to final      decaying, p = share of the decay done after this step
           = final_factor                  ever after

    A decay to 0 reaches 0 after its last step, as in transformers' schedules: a step at rate 0 trains nothing.
    The shapes go from 1 to f: linear and cosine as named; sqrt is 1 - (1 - f) sqrt(p) (arXiv 2405.18392);
    exponential is f^p (MiniCPM, arXiv 2404.06395).
    """
    if step < warmup:
        return (step + 1) / warmup
    done = step + 1 - warmup - stable
    if done <= 0:
        return 1.0
    length = decay if final_factor else decay + 1
    if done >= length:
        return final_factor
    p = done / length
    if shape == "exponential":
        return float(final_factor**p)
    remaining = {"linear": 1 - p, "cosine": (1 + math.cos(math.pi * p)) / 2, "sqrt": 1 - math.sqrt(p)}[shape]
    return final_factor + (1 - final_factor) * remaining


def _schedule(
    optimizer: Optimizer, warmup: int, stable: int, decay: int, shape: DecayShape, final_factor: float
) -> LambdaLR:
    check(Range(least=0, most=1), final_factor=final_factor)
    if shape == "exponential" and decay and final_factor == 0:
        raise ValueError("final_factor (0) cannot be reached by decay_shape exponential: give one above 0")

    # A plain function: LambdaLR keeps no state of it, so the scheduler's state is numbers only.
    def rate(step: int) -> float:
        return factor(step, warmup=warmup, stable=stable, decay=decay, shape=shape, final_factor=final_factor)

    return LambdaLR(optimizer, rate)


@register("scheduler", "wsdc")
def wsdc(
    optimizer: Optimizer,
    num_steps: int,
    tokens_per_step: int,
    *,
    warmup: int | str = "1%",
    decay: int | str | None = None,
    constant: int | str = "5%",
    decay_shape: Literal["linear", "cosine", "sqrt", "exponential"] = "cosine",
    final_factor: float = 0.1,
    start: Literal["warmup", "stable", "decay"] = "warmup",
) -> LambdaLR:
    """Warmup-Stable-Decay-Constant (PLM, arXiv 2503.12167): the stable phase takes what the others leave.

    The paper publishes the phases, not their lengths or rates: every default here is ours.

    Args:
        num_steps: optimizer steps of this run; for a decay branched from a checkpoint, of the branch.
        tokens_per_step: tokens of one optimizer step over all processes.
        warmup, decay, constant: steps (int), a share of the run ("5%"), or tokens ("2B tokens"). A decay of
            None is 20% of the run, or with start=decay all that constant leaves.
        final_factor: rate at the end as a share of the base rate.
        start: where this run enters the schedule. "stable" skips the warmup; "decay" skips the stable phase
            too: it anneals a checkpoint of the stable phase.

    Raises:
        ValueError: if the phases do not fit into num_steps.
    """
    check(AT_LEAST_1, num_steps=num_steps, tokens_per_step=tokens_per_step)
    c = resolve("constant", constant, num_steps, tokens_per_step)
    w = resolve("warmup", warmup, num_steps, tokens_per_step) if start == "warmup" else 0
    rest = max(num_steps - c, 0) if start == "decay" else num_steps // 5
    d = rest if decay is None else resolve("decay", decay, num_steps, tokens_per_step)
    if w + d + c > num_steps:
        raise ValueError(f"warmup ({w}) + decay ({d}) + constant ({c}) steps exceed the run's {num_steps}")
    # Entering at the decay leaves no stable phase: what decay and constant do not fill is constant.
    stable = 0 if start == "decay" else num_steps - w - d - c
    if final_factor == 0 and (idle := num_steps - w - stable - d):
        raise ValueError(f"final_factor (0) trains nothing in the {idle} steps after the decay: give one above 0, or "
                         "constant=0 and a decay to the end")  # fmt: skip
    return _schedule(optimizer, w, stable, d, decay_shape, final_factor)


@register("scheduler", "wsd")
def wsd(
    optimizer: Optimizer,
    num_steps: int,
    tokens_per_step: int,
    *,
    warmup: int | str = "1%",
    decay: int | str | None = None,
    decay_shape: Literal["linear", "cosine", "sqrt", "exponential"] = "sqrt",
    final_factor: float = 0.0,
    start: Literal["warmup", "stable", "decay"] = "warmup",
) -> LambdaLR:
    """Warmup-Stable-Decay (MiniCPM, arXiv 2404.06395), by default with the 1-sqrt decay of arXiv 2405.18392.

    Args:
        num_steps, tokens_per_step, warmup, decay, decay_shape, final_factor, start: as for wsdc; a decay of
            None is 20% of the run, or with start=decay all of it.

    Raises:
        ValueError: if the phases do not fit into num_steps.
    """
    return wsdc(
        optimizer,
        num_steps,
        tokens_per_step,
        warmup=warmup,
        decay=decay,
        constant=0,
        decay_shape=decay_shape,
        final_factor=final_factor,
        start=start,
    )


@register("scheduler", "cosine")
def cosine(
    optimizer: Optimizer,
    num_steps: int,
    tokens_per_step: int,
    *,
    warmup: int | str = "1%",
    final_factor: float = 0.1,
) -> LambdaLR:
    """A warmup, then half a cosine down to final_factor at the last step (SGDR, arXiv 1608.03983).

    Raises:
        ValueError: if the warmup exceeds num_steps.
    """
    return _decay_after_warmup(optimizer, num_steps, tokens_per_step, warmup, "cosine", final_factor)


@register("scheduler", "linear")
def linear(
    optimizer: Optimizer,
    num_steps: int,
    tokens_per_step: int,
    *,
    warmup: int | str = "1%",
    final_factor: float = 0.0,
) -> LambdaLR:
    """A warmup, then a straight line down to final_factor at the last step.

    Raises:
        ValueError: if the warmup exceeds num_steps.
    """
    return _decay_after_warmup(optimizer, num_steps, tokens_per_step, warmup, "linear", final_factor)


@register("scheduler", "constant")
def constant(optimizer: Optimizer, num_steps: int, tokens_per_step: int, *, warmup: int | str = 0) -> LambdaLR:
    """A warmup, then the base rate to the end.

    Raises:
        ValueError: if the warmup exceeds num_steps.
    """
    return _decay_after_warmup(optimizer, num_steps, tokens_per_step, warmup, "linear", 1.0)


def _decay_after_warmup(
    optimizer: Optimizer,
    num_steps: int,
    tokens_per_step: int,
    warmup: int | str,
    shape: DecayShape,
    final_factor: float,
) -> LambdaLR:
    check(AT_LEAST_1, num_steps=num_steps, tokens_per_step=tokens_per_step)
    w = resolve("warmup", warmup, num_steps, tokens_per_step)
    if w > num_steps:
        raise ValueError(f"warmup ({w} steps) exceeds the run's {num_steps}")
    return _schedule(optimizer, w, 0, num_steps - w, shape, final_factor)
