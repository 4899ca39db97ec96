"""``plmtune convert``: a model directory from a GGUF file."""

from __future__ import annotations

from pathlib import Path

import click

from plmtune import dtypes
from plmtune.cli.options import PATH, option, overwrite_option
from plmtune.errors import UserError
from plmtune.io import hub, terminal


@click.command()
@click.argument("file", type=PATH)
@click.argument("out", type=PATH)
@option("--dtype fp32|bf16|fp16", "Write the weights in this dtype.", default="fp32")
@option("--tokenizer PATH", "Use the tokenizer.json of this directory instead of the file's tokenizer.")
@overwrite_option
def convert(file: Path, out: Path, dtype: str, tokenizer: Path | None, overwrite: bool) -> None:
    """Write the model of a GGUF FILE (Llama's family or PLM), dequantized, as the model directory OUT.

    OUT then holds weights, tokenizer and chat template as Hugging Face has them, for init_from=OUT,
    plmtune generate and transformers.

    \b
    plmtune convert model.gguf models/mine
    plmtune convert model.gguf models/mine --dtype bf16
    """
    from plmtune.models.directory import check_free

    if file.is_dir():
        raise UserError(f"{file} is a directory. One in Hugging Face's form needs no conversion: init_from={file}.")
    if not file.is_file():
        hint = f" A model of the Hugging Face hub needs no conversion: init_from={file}." if hub.parse(file) else ""
        raise UserError(f"There is no file {file} (seen from {Path.cwd()}).{hint}")
    check_free(out, overwrite)

    from plmtune.models.gguf import convert as convert_file
    from plmtune.tokenizers.tokenizer_files import load_tokenizer

    other = load_tokenizer(tokenizer) if tokenizer else None
    made = convert_file(file, out, dtype=dtypes.from_name(dtype), tokenizer=other, overwrite=overwrite)
    shares = {kind: count / made.num_parameters for kind, count in sorted(made.kinds.items())}
    forms = ", ".join(f"{share:.1%} {kind}" for kind, share in shares.items() if share >= 0.001)
    terminal.echo(f"{out}: {made.num_parameters:,} parameters in {dtype}, from {forms}")
    for note in made.notes:
        terminal.echo(note)
    if load_tokenizer(out).chat_template is not None:
        terminal.echo(f'try it: plmtune generate {out} --chat --prompt "Hello"')
