"""Predicted beside measured: calibrate this machine, then predict models that the calibration did not see.

    python benchmarks/predicted.py                                  # a PLM and a llama of 100M with random weights
    python benchmarks/predicted.py --checkpoint DIR --json out.json # and a checkpoint, such as SmolLM2-135M

Each is quantized, saved, and measured by `plmtune.devices.measure` in a process of its own: decode tokens/s at each
context, from a cache that a short text fills over and over, and peak memory. Bar: median errors of at most 15%.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import plmtune
from plmtune.devices.calibrate import calibrate
from plmtune.devices.costs import ModelShape
from plmtune.devices.device import load_device, save_device
from plmtune.devices.measure import measure
from plmtune.devices.measured_models import SAMPLE
from plmtune.devices.predict import predict
from plmtune.io import provenance
from plmtune.models.adapters import read_model_config
from plmtune.models.hf import load_model, save_model
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.quantization.quantize import quantize
from plmtune.registry import Component, component
from plmtune.tokenizers.tokenizer_files import byte


def plm_100m() -> Decoder:
    """107M parameters in PLM's proportions: heads of 64 + 32 over a latent of 256."""
    attention = component("attention", "mla", kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
    return plm(
        32000,
        attention=attention,
        ffn=component("ffn", "squared_relu", hidden_dim=3072),
        embed_dim=768,
        num_layers=12,
        num_heads=12,
        max_seq_len=8192,
    )


def llama_100m() -> Decoder:
    """A llama of 105M parameters with three queries a key."""
    return llama(
        32000,
        attention=component("attention", "gqa", num_kv_heads=4),
        ffn=component("ffn", "swiglu", hidden_dim=2048),
        embed_dim=768,
        num_layers=13,
        num_heads=12,
        max_seq_len=8192,
    )


def save(make: Callable[[], Decoder], scheme: str, directory: Path) -> None:
    """Write a model in a scheme as `plmtune run quantize` would; the bytes' tokenizer goes with it."""
    model = make().to(torch.bfloat16).eval()
    if scheme != "bf16":
        quantize(model, Component("quantization", scheme)(model=model), scheme={"component": scheme})
    save_model(model, None, directory)
    byte().save(directory)


def bytes_before() -> int:
    """What a measuring process takes before it opens a model, which its measurement leaves out."""
    code = "import plmtune.devices.measure, psutil; print(psutil.Process().memory_info().rss)"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--schemes", default="bf16,int8,int4", help="with commas")
    parser.add_argument("--contexts", default="128,2048,4096", help="with commas")
    parser.add_argument("--new-tokens", type=int, default=16, help="of which the median counts")
    parser.add_argument("--checkpoint", type=Path, help="a model directory to take as well, in floating point")
    parser.add_argument("--device", help="a calibrated FILE.yaml; without it this machine is calibrated now")
    parser.add_argument("--save", type=Path, help="write the calibrated device here")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    device = load_device(given.device) if given.device else calibrate(with_llama_cpp=False, log=say)
    if given.save:
        save_device(device, given.save)
    contexts = [int(word) for word in given.contexts.split(",")]
    makers: dict[str, Callable[[], Decoder]] = {"plm_100m": plm_100m, "llama_100m": llama_100m}
    if given.checkpoint:
        directory = given.checkpoint
        read_model_config(directory)  # a mistake is said before minutes have passed
        makers[directory.name] = lambda: load_model(directory)
    machine = (
        f"{provenance.device_name(torch.device('cpu'))}, {given.threads} threads, torch {torch.__version__}, plmtune "
        f"{plmtune.__version__}, reads {device.bandwidth.value / 1e9:.1f} GB/s, load {psutil.getloadavg()[0]:.1f}"
    )
    print(machine)
    print(f"{'model':<12} {'scheme':<6} {'context':>7} {'predicted':>18} {'measured':>9} {'error':>6}   memory")
    rows: list[dict[str, Any]] = []
    before = bytes_before()
    for name, make in makers.items():
        model_shape = ModelShape.of(make())
        fitting = [context for context in contexts if context + given.new_tokens <= model_shape.max_seq_len]
        for scheme in given.schemes.split(","):
            folder = Path(tempfile.mkdtemp(prefix="predicted-"))
            try:
                save(make, scheme, folder / "model")
                measured = measure(
                    str(folder / "model"),
                    contexts=fitting,
                    new_tokens=given.new_tokens,
                    threads=given.threads,
                    read_prompt=False,
                    bandwidth=device.bandwidth.value,
                    device="cpu",
                )
            finally:
                shutil.rmtree(folder)
            for found in measured:
                guess = predict(model_shape, device, scheme=scheme, context=found.context, prompt=SAMPLE)
                assert guess.decode is not None
                memory = guess.peak - before
                row = {
                    "model": name,
                    "scheme": scheme,
                    "context": found.context,
                    "predicted": guess.decode,
                    "error_bar": guess.error,
                    "measured": found.decode,
                    "error": guess.decode / found.decode - 1,
                    "predicted_memory": memory,
                    "measured_memory": found.peak_memory,
                    "memory_error": memory / found.peak_memory - 1,
                }
                rows.append(row)
                bar = guess.decode * guess.error
                print(
                    f"{name:<12} {scheme:<6} {found.context:>7,} {guess.decode:>9.1f} ± {bar:<6.1f} "
                    f"{found.decode:>9.1f} {row['error']:>+6.0%}   {memory / 2**20:.0f} MiB, measured "
                    f"{found.peak_memory / 2**20:.0f}, {row['memory_error']:+.0%}",
                    flush=True,
                )
    medians = {key: statistics.median(abs(row[key]) for row in rows) for key in ("error", "memory_error")}
    print(
        f"median error of {len(rows)} points: decode {medians['error']:.0%}, memory {medians['memory_error']:.0%} "
        "(bar: 15%)"
    )
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "medians": medians, "points": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
