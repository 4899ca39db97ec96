"""What quantization-aware training recovers of the loss that rounding costs, and what it costs itself.

    python benchmarks/qat.py RUN [--quick] [--seeds 1 2 3] [--schemes int4 harsh] [--out qat.json] [-- OVERRIDES]

RUN is a pretrained model, such as the run of `make demo` (runs/demo/latest). For each seed `demo_sft` fine-tunes it
plainly, and once for each scheme with the scheme's rounding in the forward: the same data, order and steps. The plain
one is then stored in the scheme's integers by plain rounding, the other one likewise; all losses are of the same
held-out conversations, in nats a token.

    recovered = (rounded - trained for it) / (rounded - float)

Beside it stands what `plmtune run quantize` does without training: ranges fitted to text.

int4: the default, groups of 32 and an embedding of 8 bits. g128: groups of 128, embedding and head too. harsh: one
scale and zero for a whole row, of embedding and head too. A step's cost is measured on the model of RUN by random
tokens, sides alternated in one process. OVERRIDES are those of `plmtune run demo_sft`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from plmtune.recipes.sft import Sft, preflight
from side_by_side import machine, medians

from plmtune.config.compose import build, compose
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.models.hf import load_model
from plmtune.quantization import qat
from plmtune.quantization.calibrate import second_moments
from plmtune.quantization.quantize import quantize
from plmtune.registry import Component, component
from plmtune.training import launcher

SCHEMES = {
    "int4": component("quantization", "int4"),
    "g128": component("quantization", "int4", group_size=128, embedding="int4_g128"),
    "harsh": component("quantization", "mixed", rules={"*": "int4"}),
}
FIXED = [
    "logger=jsonl",
    "validation={every: 0, tokens: 1000000}",
    "checkpoint={every: 0, keep: 1}",
    "sample.max_new_tokens=0",
    "log_every=100000",
]


def tune(origin: Path, seed: int, scheme: Component | None, place: Path, overrides: list[str]) -> Any:
    """Fine-tune; returns the recipe, its model as it was trained."""
    cfg = compose("demo_sft", (), [f"init_from={origin}", f"seed={seed}", f"run_dir={place}", *FIXED, *overrides])
    cfg.quantization = scheme and Component(scheme.group, scheme.name, scheme.settings | {"qat": True})
    made: list[Any] = []

    def make(*parts: Any) -> Any:
        made.append(Sft(*parts))
        return made[0]

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        launcher.launch(cfg, preflight, make, lambda run, cfg: None)
    return made[0]


def loss(recipe: Any, model: Any) -> float:
    recipe.model = recipe.trained = model
    return float(recipe.validate()["validation_loss"])


def compare(origin: Path, seed: int, schemes: list[str], overrides: list[str], shown: Any) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        recipe = tune(origin, seed, None, Path(scratch) / "plain", overrides)
        plain = recipe.model
        unrounded = loss(recipe, plain)
        for name in schemes:
            rounded = copy.deepcopy(plain)
            plan = SCHEMES[name](model=rounded)
            read = [batch.tokens for step in range(4) for batch in recipe.data.step(step)]
            moments = second_moments(plain, read, plan)
            fitted = copy.deepcopy(plain)
            quantize(fitted, plan, second_moments=moments)
            quantize(rounded, plan)
            trained = copy.deepcopy(plain)
            in_training = tune(origin, seed, SCHEMES[name], Path(scratch) / name, overrides).model
            trained.load_state_dict(in_training.state_dict())
            without = loss(recipe, trained)
            quantize(trained, plan)
            row: dict[str, Any] = {"scheme": name, "seed": seed, "float": unrounded, "rounded": loss(recipe, rounded)}
            row |= {"fitted": loss(recipe, fitted), "qat": loss(recipe, trained), "qat_float": without}
            row["recovered"] = (row["rounded"] - row["qat"]) / (row["rounded"] - row["float"])
            rows.append(row)
            shown(row)
    return rows


def cost(origin: Path, seq_len: int, rounds: int) -> dict[str, float]:
    """Seconds of a training step of two micro-batches of 4 rows: plain, rounded once, rounded in each forward."""
    ids = torch.randint(0, 1000, (2, 4, seq_len), generator=torch.Generator().manual_seed(0))
    sides: dict[str, Any] = {}
    for name, around in (
        ("plain", None),
        ("rounded once a step", qat.fake_quant_frozen),
        ("in each forward", contextlib.nullcontext),
    ):
        model: Any = load_model(checkpoint_directory(origin), dtype=torch.float32)
        if around is not None:
            qat.insert_fake_quantize(model, SCHEMES["int4"](model=model))
        sides[name] = _step(model, around or contextlib.nullcontext, ids)
    return medians(sides, rounds=rounds, seconds=0.1)


def _step(model: Any, around: Any, ids: torch.Tensor) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    summed = build("loss", component("loss", "cross_entropy"))

    def step() -> None:
        with around(model):
            for rows in ids:
                hidden = model(rows[:, :-1], hidden=True).flatten(0, 1)
                (summed(hidden, model.head_weight, rows[:, 1:].flatten()) / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a pretrained run or model directory")
    parser.add_argument("--quick", action="store_true", help="a few steps, to try the script")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=["int4", "harsh"])
    parser.add_argument("--seq-len", type=int, default=512, help="of the steps whose cost is measured")
    parser.add_argument("--rounds", type=int, default=5, help="of the same")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("overrides", nargs="*", help="after --: overrides of plmtune run demo_sft")
    given = parser.parse_args()
    overrides = ["runtime.precision=fp32", *given.overrides]
    seeds = given.seeds
    if given.quick:
        seeds, overrides = seeds[:1], [*overrides, "phases=[{name: main, steps: 3}]"]
    print(machine())
    heads = "".join(f"{head:>9}" for head in ("float", "rounded", "fitted", "QAT"))
    print(f"{'scheme':8}{'seed':>5}{heads}{'QAT, unrounded':>16}{'recovered':>11}")

    def show(row: dict[str, Any]) -> None:
        losses = "".join(f"{row[key]:9.4f}" for key in ("float", "rounded", "fitted", "qat"))
        print(f"{row['scheme']:8}{row['seed']:>5}{losses}{row['qat_float']:16.4f}{row['recovered']:11.0%}", flush=True)

    rows = [row for seed in seeds for row in compare(given.run, seed, given.schemes, overrides, show)]
    for name in given.schemes:
        found = [row["recovered"] for row in rows if row["scheme"] == name]
        print(f"{name}: {statistics.median(found):.0%} recovered, median of {len(found)} ({min(found):.0%} at least)")
    seconds = cost(given.run, given.seq_len, 1 if given.quick else given.rounds)
    for name, value in seconds.items():
        print(f"a step, {name}: {value:.3f} s, {value / seconds['plain']:.2f}x")
    if given.out:
        document = {"machine": machine(), "overrides": overrides, "losses": rows, "step_seconds": seconds}
        given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
