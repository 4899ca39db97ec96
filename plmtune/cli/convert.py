"""``plmtune convert``: a model directory from a GGUF file."""

from __future__ import annotations

from pathlib import Path

import click

from plmtune.errors import UserError


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the weights that are written.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="A directory with a tokenizer.json, in place of the file's own tokenizer.",
)
@click.option("--overwrite", is_flag=True, help="Replace a model that is at OUT.")
def convert(file: Path, out: Path, dtype: str, tokenizer: Path | None, overwrite: bool) -> None:
    """Write the model of a GGUF FILE (Llama's family or PLM), dequantized, as the model directory OUT.

    OUT then holds weights, tokenizer and chat template as Hugging Face has them, for init_from=OUT,
    plmtune generate and transformers.
    """
    import torch

    from plmtune.data.tokenizers import load_tokenizer
    from plmtune.models.gguf import convert as convert_file

    if file.is_dir():
        raise UserError(f"{file} is a directory. One in Hugging Face's form needs no conversion: init_from={file}.")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    other = load_tokenizer(tokenizer) if tokenizer else None
    made = convert_file(file, out, dtype=dtypes[dtype], tokenizer=other, overwrite=overwrite)
    forms = ", ".join(f"{count / made.num_parameters:.1%} {kind}" for kind, count in sorted(made.kinds.items()))
    click.echo(f"{out}: {made.num_parameters:,} parameters in {dtype}, from {forms}")
    for note in made.notes:
        click.echo(note)
