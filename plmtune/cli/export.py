"""``plmtune export``: a checkpoint in the form that another program runs, verified."""

from __future__ import annotations

from pathlib import Path

import click

from plmtune.cli.options import base_option, find_model, overwrite_option
from plmtune.io import terminal
from plmtune.io.tables import show


@click.command()
@click.argument("checkpoint", required=False)
@click.option("--to", required=True, type=click.Choice(["gguf", "hf", "executorch"]), help="Choose the format.")
@click.option(
    "--quant",
    metavar="TYPE[,TYPE]...",
    help="Store numbers in these types. gguf: f32, f16, bf16, q8_0, q4_0, q4_k_m and others; hf: bf16, fp32, fp16; "
    "executorch: fp32, int8_dynamic, int8_dynamic_int4. Default: f16, bf16, int8_dynamic.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write to this folder (default: exports).")
@click.option("--name", help="Name the files (default: after the checkpoint's directory).")
@click.option(
    "--as", "as_", type=click.Choice(["deepseek"]), help="Write a PLM as a dense DeepSeek-V3, for vLLM and SGLang (hf)."
)
@click.option(
    "--adapters",
    type=click.Choice(["merge", "keep"]),
    default="merge",
    show_default=True,
    help="Merge adapters into their base, or export them as adapters.",
)
@base_option
@click.option("--context", type=click.IntRange(2), metavar="N", help="Give the cache room for N tokens (executorch).")
@click.option("--no-verify", is_flag=True, help="Skip loading and comparing the files.")
@overwrite_option
def export(
    checkpoint: str | None,
    to: str,
    quant: str | None,
    out: Path | None,
    name: str | None,
    as_: str | None,
    adapters: str,
    base: Path | None,
    context: int | None,
    no_verify: bool,
    overwrite: bool,
) -> None:
    """Write CHECKPOINT for llama.cpp (gguf), transformers and vLLM (hf), or ExecuTorch, and verify each file.

    CHECKPOINT defaults to the newest finished run.

    Each file is read and loaded by the program that will run it, and compared with the checkpoint: tensors, settings,
    probabilities, token ids, the chat prompt. One that fails is kept as NAME.unverified, and the exit code is 1.

    \b
    plmtune export runs/demo_sft/latest --to gguf --quant q8_0,q4_k_m
    plmtune export runs/demo_sft/latest --to hf --as deepseek
    plmtune export runs/demo_sft/latest --to executorch --quant int8_dynamic
    """
    checkpoint = find_model(checkpoint, "export CHECKPOINT --to FORM")

    from plmtune.export.export_model import export

    failed = False
    for made in export(
        checkpoint,
        to,  # type: ignore[arg-type]
        quant=quant.split(",") if quant else (),
        out=out,
        name=name,
        as_=as_,  # type: ignore[arg-type]
        adapters=adapters,  # type: ignore[arg-type]
        base=base,
        context=context,
        overwrite=overwrite,
        verify=not no_verify,
        log=terminal.say,
    ):
        if made.report is not None:
            show(made.report.table())
        show(*made.lines())
        if made.report is not None and not made.passed:
            failed = True
            terminal.say(f"plmtune: {made.path} is not the model of {checkpoint}: {made.report.verdict}")
    if failed:
        click.get_current_context().exit(1)
