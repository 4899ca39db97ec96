"""``plmtune export``: a checkpoint in the form that another program runs, verified."""

from __future__ import annotations

from typing import Any

import click

from plmtune.cli.options import base_option, find_model, option, overwrite_option
from plmtune.io import terminal
from plmtune.io.tables import show


@click.command()
@click.argument("checkpoint", required=False)
@option("--to gguf|hf|executorch", "Choose the format.", required=True)
@option(
    "--quant TYPE[,TYPE]...",
    "Store numbers in these types. gguf: f32, f16, bf16, q8_0, q4_0, q4_k_m and others; hf: bf16, fp32, fp16; "
    "executorch: fp32, int8_dynamic, int8_dynamic_int4. Default: f16, bf16, int8_dynamic.",
)
@option("--out PATH", "Write to this folder (default: exports).")
@option("--name TEXT", "Name the files (default: after the checkpoint's directory).")
@option(
    "--as deepseek|deepseek2",
    "Write a PLM in another form. deepseek: a dense DeepSeek-V3, for vLLM and SGLang (hf); deepseek2: llama.cpp's "
    "architecture that caches the latent alone and has flash attention (gguf).",
    "as_",
)
@option("--adapters merge|keep", "Merge adapters into their base, or export them as adapters.", default="merge")
@base_option
@option("--context N", "Give the cache room for N tokens (executorch).", type=click.IntRange(2))
@option("--ollama", "Write a Modelfile beside each file, for ollama create (gguf).", is_flag=True)
@option("--no-verify", "Skip loading and comparing the files.")
@overwrite_option
def export(checkpoint: str | None, quant: str | None, no_verify: bool, **options: Any) -> None:
    """Write CHECKPOINT for llama.cpp (gguf), transformers and vLLM (hf), or ExecuTorch, and verify each file.

    CHECKPOINT defaults to the newest finished run.

    Each file is read and loaded by the program that will run it, and compared with the checkpoint: tensors, settings,
    probabilities, token ids, the chat prompt. One that fails is kept as NAME.unverified, and the exit code is 1.

    \b
    plmtune export runs/demo_sft/latest --to gguf --quant q8_0,q4_k_m
    plmtune export runs/demo_sft/latest --to gguf --as deepseek2
    plmtune export runs/demo_sft/latest --to hf --as deepseek
    plmtune export runs/demo_sft/latest --to executorch --quant int8_dynamic
    """
    checkpoint = find_model(checkpoint, "export CHECKPOINT --to FORM")

    from plmtune.export.export_model import export

    failed = False
    types = quant.split(",") if quant else ()
    for made in export(checkpoint, quant=types, verify=not no_verify, log=terminal.say, **options):
        if made.report is not None:
            show(made.report.table())
        show(*made.lines())
        if made.report is not None and not made.passed:
            failed = True
            terminal.say(f"plmtune: {made.path} is not the model of {checkpoint}: {made.report.verdict}")
    if failed:
        click.get_current_context().exit(1)
