"""``plmtune bench``: how fast models and files are on this machine, and how much memory they take."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plmtune.cli import options
from plmtune.cli.options import option
from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.units import show_number_of

if TYPE_CHECKING:
    from plmtune.devices.measure import Measurement


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@option("--contexts TEXT", "Measure at these numbers of tokens in the cache, separated by commas.", default="128,2048")
@option("--new-tokens N", "Generate N tokens at each context.", default=32)
@options.threads_option
@options.dtype_option
@option(
    "--sparse auto|on|off",
    "Skip the zeros of squared ReLU; auto: in layers where that is measured to be faster.",
    default="off",
)
@option("--decode-only", "Fill the cache with a repeated short text: faster, without a time to first token.")
@option("--flash-attention both|on|off", "Use llama.cpp's flash attention for .gguf files.", default="both")
@option(
    "--device TEXT",
    "Run plmtune's models on this device (default: cuda if there is one). Exported files run on the CPU.",
)
@options.json_option
@option("--plot FILE.png", "Plot speed by context.")
@option("--calibrate FILE.yaml", "Measure this machine and save it as a device for plmtune plan. Takes about a minute.")
@options.overwrite_option
@options.import_option
def bench(
    targets: tuple[str, ...],
    contexts: str,
    decode_only: bool,
    flash_attention: str,
    device: str | None,
    json_path: Path | None,
    plot: Path | None,
    calibrate: Path | None,
    overwrite: bool,
    **how: Any,
) -> None:
    """Measure time to first token, tokens/s, peak memory and the share of this machine's bandwidth.

    TARGET is a checkpoint or a run, quantized or not, a .gguf or .pte file, a directory that transformers reads, or
    model=NAME, a config with random weights; without one: the newest finished run. Each is measured in a process of
    its own, one after the other.

    \b
    plmtune bench runs/demo_sft/latest exports/sft-q4_0.gguf --contexts 128,2048
    plmtune bench runs/quantize/latest --sparse auto --plot speed.png
    plmtune bench model=plm_150m --dtype bf16 --decode-only
    plmtune bench --calibrate mine.yaml
    """
    if flash_attention != "both" and not any(target.endswith(".gguf") for target in targets):
        raise UserError("--flash-attention is for .gguf files, and no TARGET is one. Leave it out.")
    lengths = options.lengths_of(contexts, "--contexts")
    for path, suffixes in ((json_path, (".json",)), (plot, (".png",)), (calibrate, (".yaml", ".yml"))):
        if path is not None and path.exists() and not overwrite:
            raise UserError(f"{path} is there already. Give --overwrite to replace it, or another name.")
        options.check_output(path, *suffixes)

    if not targets and calibrate is None:
        targets = (options.newest_run("bench TARGET..."),)

    import torch

    from plmtune.devices.measure import measure, read_bandwidth
    from plmtune.io import provenance
    from plmtune.io.atomic import write_atomically

    where = options.find_device(device)
    if how["threads"] is not None:
        torch.set_num_threads(how["threads"])
    if calibrate is not None:
        from plmtune.devices.calibrate import calibrate as find
        from plmtune.devices.device import save_device

        save_device(find(log=terminal.say), calibrate)
        terminal.say(f"wrote {calibrate}: plmtune plan CONFIG --device {calibrate}")
        if not targets:
            return
    bandwidth = read_bandwidth(where)
    found: list[Measurement] = []
    failed: list[str] = []
    for target in targets:
        try:
            for setting in _flash_settings(target, flash_attention):
                found += measure(
                    target,
                    contexts=lengths,
                    read_prompt=not decode_only,
                    bandwidth=bandwidth,
                    device=str(where),
                    flash_attention=setting,
                    log=terminal.say,
                    **how,
                )
        except UserError as error:  # of this target: the others are measured all the same
            failed.append(str(error))
    if found:
        name, threads = provenance.device_name(where), found[0].threads
        _print(found, f"{name}, {show_number_of(threads, 'thread')}, reads {bandwidth / 1e9:.1f} GB/s")
        _print_forms(found)
        if json_path is not None:
            entries = {
                "when": provenance.now(),
                "device": name,
                "bandwidth": bandwidth,
                "threads": threads,
                "versions": provenance.versions(("plmtune", "torch", "llama-cpp-python", "xllamacpp", "executorch")),
                "new_tokens": how["new_tokens"],
                "measurements": [asdict(entry) for entry in found],
            }
            write_atomically(json_path, json.dumps(entries, indent=2) + "\n", user_error=True)
        if plot is not None:
            from plmtune.devices.measure_plot import draw

            draw(found, plot, f"{name}, {show_number_of(threads, 'thread')}")
    if failed:
        raise UserError("\n".join([*failed, *([f"Not measured: {len(failed)} of {len(targets)}."] if found else [])]))


def _flash_settings(target: str, asked: str) -> tuple[bool | None, ...]:
    from plmtune.export.runtimes.gguf_facts import flash_settings

    if not target.endswith(".gguf") or not Path(target).is_file():
        return (None,)
    settings = flash_settings(Path(target))
    return settings if asked == "both" else (asked == "on",)


def _print_forms(found: list[Measurement]) -> None:
    """Print what each PLM's GGUF file would take in llama.cpp's other architecture for it, at the longest context."""
    from plmtune.devices.latent_form import comparison, of_file
    from plmtune.io.tables import show

    longest = {entry.target: entry.context for entry in found}  # they come in order
    for target, context in longest.items():
        forms = of_file(Path(target)) if target.endswith(".gguf") and Path(target).is_file() else None
        if forms is not None:
            own, other, is_second = forms
            how = "as deepseek2 it takes" if is_second else "plmtune export --to gguf --as deepseek2 would take"
            show(f"{target}: {how} {comparison(own, other, context)}")


def _print(found: list[Measurement], machine: str) -> None:
    from plmtune import native
    from plmtune.io.tables import Column, Table, numbers, show
    from plmtune.units import show_bytes

    # name: the order in which a narrow terminal leaves it out; 0 stays
    figures = {"context": 0, "first token": 4, "prefill/s": 3, "decode/s": 0, "peak memory": 5}
    figures |= {"read a token": 2, "of bandwidth": 1}
    table = Table([Column("target", key=True), Column("runtime"), Column("weights", folds=True), *numbers(figures)])
    for entry in found:
        read = None if entry.weight_bytes is None else entry.weight_bytes + (entry.cache_bytes or 0)
        on = f", {entry.sparse[0]} of {entry.sparse[1]} sparse" if entry.sparse and entry.sparse[0] else ""
        table.add(
            entry.target,
            entry.runtime,
            entry.weights + on,
            f"{entry.context:,}",
            "-" if entry.first_token is None else f"{entry.first_token:.3f} s",
            "-" if entry.prefill is None else f"{entry.prefill:,.0f}",
            f"{entry.decode:,.1f}",
            show_bytes(entry.peak_memory),
            "-" if read is None else show_bytes(read),
            "-" if entry.share is None else f"{entry.share:.0%}",
        )
    how = "decode/s from the median token; peak memory is what the process took on top of its start"
    show(table, f"{machine}; {how}")
    if why := native.unavailable_reason():
        show(f"ours decodes without its own kernels: {why}")
