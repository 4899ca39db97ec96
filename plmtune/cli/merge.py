"""``plmtune merge``: adapters and their base, as one plain model."""

from __future__ import annotations

from pathlib import Path

import click

from plmtune import dtypes
from plmtune.cli.options import PATH, base_option, option, overwrite_option
from plmtune.config.names import check_model_path
from plmtune.errors import UserError
from plmtune.io import terminal


@click.command()
@click.argument("checkpoint")
@click.argument("out", type=PATH)
@base_option
@option("--dtype fp32|bf16|fp16", "Write the weights in this dtype (default: that of the adapters).")
@overwrite_option
def merge(checkpoint: str, out: Path, base: Path | None, dtype: str | None, overwrite: bool) -> None:
    """Write the adapters of CHECKPOINT (or of a run's newest) and their base as the plain model directory OUT.

    \b
    plmtune merge runs/sft/latest models/merged
    """
    from plmtune.models.directory import check_free, new_directory

    check_model_path(checkpoint)
    check_free(out, overwrite)

    from plmtune.models.adapters import holds_adapters, load_model, load_model_tokenizer
    from plmtune.models.checkpoint_files import checkpoint_directory
    from plmtune.models.hf import save_model

    found = checkpoint_directory(checkpoint)
    if not holds_adapters(found):
        raise UserError(f"{found} holds no adapters: it is a whole model already, or none.")
    with new_directory(out, overwrite=overwrite) as temporary:
        tokenizer = load_model_tokenizer(found, base)
        model = load_model(found, dtype=dtypes.from_name(dtype) if dtype else None, base=base)
        save_model(model, None, temporary)
        tokenizer.save(temporary)
    terminal.echo(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, adapters of {found} merged")
