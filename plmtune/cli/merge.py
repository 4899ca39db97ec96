"""``plmtune merge``: adapters and their base, or several whole models, as one plain model."""

from __future__ import annotations

import math
from pathlib import Path

import click

from plmtune import dtypes
from plmtune.cli.options import PATH, option, overwrite_option
from plmtune.config.names import check_model_path
from plmtune.errors import UserError
from plmtune.io import terminal

_NEEDS_BASE = ("task_arithmetic", "ties")


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.argument("out", type=PATH)
@option("--method average|slerp|task_arithmetic|ties", "Merge several whole models in this way.")
@option("--weights TEXT", "Weigh the models so, as in 0.3,0.7 (default: 1 each).")
@option("--density SHARE", "ties: keep this share of each tensor's differences to the base (default: 0.2).", type=float)
@option(
    "--base PATH",
    "Read the base from this directory: of adapters (default: the one that they name), or for task_arithmetic and ties "
    "the model that the others were trained from.",
)
@option(
    "--dtype fp32|bf16|fp16", "Write the weights in this dtype (default: that of the adapters, or the first model)."
)
@option("--ema", "Write the averaged weights that CHECKPOINT has beside its own (of a run with ema.decay).")
@overwrite_option
def merge(
    checkpoints: tuple[str, ...],
    out: Path,
    method: str | None,
    weights: str | None,
    density: float | None,
    base: Path | None,
    ema: bool,
    dtype: str | None,
    overwrite: bool,
) -> None:
    """Write the adapters of CHECKPOINT (or of a run's newest) and their base as the plain model directory OUT.

    With several CHECKPOINTs, whole models of one shape and tokenizer, and --method: write them as one model.

    \b
    plmtune merge runs/sft/latest models/merged
    plmtune merge runs/a/latest runs/b/latest models/soup --method average
    plmtune merge runs/demo/latest models/averaged --ema
    plmtune merge math code models/both --method ties --base models/base
    """
    from plmtune.models.directory import check_free, new_directory

    for checkpoint in checkpoints:
        check_model_path(checkpoint)
    factors = _check(checkpoints, method, weights, density, base, ema)
    check_free(out, overwrite)

    from plmtune.models import merging
    from plmtune.models.adapters import holds_adapters, load_model, load_model_tokenizer
    from plmtune.models.checkpoint_files import checkpoint_directory
    from plmtune.models.hf import save_model
    from plmtune.training.ema import load_average

    found = [checkpoint_directory(checkpoint) for checkpoint in checkpoints]
    if method is None and not ema and not holds_adapters(found[0]):
        raise UserError(
            f"{found[0]} holds no adapters. To merge whole models give several and --method; to write the averaged "
            "weights of a run with ema.decay give --ema."
        )
    with new_directory(out, overwrite=overwrite) as temporary:
        if ema:
            tokenizer, model = load_model_tokenizer(found[0]), load_average(found[0])
            done = f"the EMA weights of {found[0]}"
        elif method is None:
            tokenizer, model = load_model_tokenizer(found[0], base), load_model(found[0], base=base)
            done = f"adapters of {found[0]} merged"
        else:
            chosen = merging.ties(density or 0.2) if method == "ties" else getattr(merging, method)
            tokenizer = load_model_tokenizer(found[0])
            model = merging.merge_models(found, chosen, factors, checkpoint_directory(base) if base else None)
            done = f"{method} of {' and '.join(map(str, found))}"
        if dtype:
            model = model.to(dtypes.from_name(dtype))
        save_model(model, None, temporary)
        tokenizer.save(temporary)
    terminal.echo(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {done}")


def _check(
    checkpoints: tuple[str, ...],
    method: str | None,
    weights: str | None,
    density: float | None,
    base: Path | None,
    ema: bool,
) -> list[float]:
    """Refuse options that do not fit each other; returns the models' weights."""
    if ema and (method or base or len(checkpoints) > 1):
        raise UserError("--ema writes the averaged weights of one CHECKPOINT: leave out --method, --base and others.")
    if method is None:
        if len(checkpoints) > 1:
            raise UserError(
                f"{len(checkpoints)} models are given. Say how to merge them with --method: average, slerp, "
                "task_arithmetic or ties. (The last path is the directory to write.)"
            )
        options = {"weights": weights, "density": density}
        if given := next((name for name, value in options.items() if value is not None), None):
            raise UserError(f"--{given} belongs to --method, which merges several models.")
        return []
    if len(checkpoints) < 2 or (method == "slerp" and len(checkpoints) > 2):
        wanted = "two models" if method == "slerp" else "at least two models"
        raise UserError(f"--method {method} merges {wanted}, and {len(checkpoints)} is given before OUT.")
    if (base is not None) != (method in _NEEDS_BASE):
        needs = "needs --base DIR, the model that they were trained from" if base is None else "has no base"
        raise UserError(f"--method {method} {needs}.")
    if density is not None and (method != "ties" or not 0 < density <= 1):
        raise UserError(f"--density ({density:g}) belongs to --method ties, and is above 0 and at most 1.")
    try:
        factors = [float(text) for text in weights.split(",")] if weights is not None else [1.0] * len(checkpoints)
    except ValueError as error:
        raise UserError(f"--weights {weights}: give a number for each model, as in 0.3,0.7.") from error
    if len(factors) != len(checkpoints) or not all(map(math.isfinite, factors)):
        raise UserError(f"--weights {weights}: give a finite number for each of the {len(checkpoints)} models.")
    if method != "task_arithmetic" and (min(factors) < 0 or sum(factors) <= 0):
        raise UserError(f"--weights {weights}: none may be negative with {method}, and one must be above 0.")
    return factors
