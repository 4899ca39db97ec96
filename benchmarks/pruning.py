"""Importances side by side: the loss of one teacher after cutting by each, and after the same training.

A teacher is trained on the standard library as bytes, cut to one smaller shape by each importance, and each cut is
trained further on equal tokens. There are two controls: the same shape from random weights, and, beside a mask whose
weights train with it, Taylor's cut trained further on the tokens of both. All losses are of the same held-out text, in
nats a byte. A seed decides the teacher's weights, the order of its text, the masks and the training.

    OMP_NUM_THREADS=1 python benchmarks/pruning.py --seeds 1,2,3
    OMP_NUM_THREADS=1 python benchmarks/pruning.py --rank      also: what each importance says of single units
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from plmtune.recipes import pretrain, prune

import plmtune
from plmtune.config.compose import compose
from plmtune.data.sources import stdlib
from plmtune.io.tables import Column, Table
from plmtune.models.text_loss import mean_loss
from plmtune.pruning.groups import groups_of
from plmtune.pruning.masked import masked
from plmtune.pruning.width import importance

METHODS = ("l1", "l2", "activation", "taylor")
TRAINED = "mask, weights too"
SEQ_LEN = 128
TEST_ROWS = 256
TEACHER = [
    "model=llama", "tokenizer=byte", "model.embed_dim=64", "model.num_layers=6", "model.num_heads=4",
    "model.attention.num_kv_heads=4", "model.ffn.hidden_dim=160", "model.max_seq_len=256",
    "model.tie_embeddings=true",
]  # fmt: skip
HEAD_DIM = 16
SMALLER = {
    "width": ["model.embed_dim=56", "model.ffn.hidden_dim=136", "model.num_heads=3"],
    "half": ["model.embed_dim=48", "model.ffn.hidden_dim=96", "model.num_heads=3", "force=true"],
    "depth": ["model.num_layers=4"],
}
TRAINING = [
    "data=files", f"seq_len={SEQ_LEN}", "global_batch_size=16", "micro_batch_size=16", "validation.every=0",
    "checkpoint.every=0", "sample.max_new_tokens=0", "logger=jsonl", "optimizer=adamw", "scheduler=cosine",
    "runtime.precision=fp32",  # three times as fast as bf16 at this width
]  # fmt: skip


def write_text(work: Path) -> None:
    """train.txt and test.txt: every twentieth document is for measuring."""
    texts: dict[str, list[str]] = {"train": [], "test": []}
    for number, text in enumerate(stdlib().documents()):
        texts["test" if number % 20 == 7 else "train"].append(text)
    for name, found in texts.items():
        (work / f"{name}.txt").write_text("\n\n".join(found), encoding="utf-8")


def quietly(recipe: object, name: str, log: Path, *overrides: str) -> float:
    """Run a recipe in this process; returns its score."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return float(recipe.main(compose(name, (), list(overrides))) or 0)  # type: ignore[attr-defined]


def train(run: Path, work: Path, steps: int, lr: float, seed: int, *overrides: str) -> None:
    quietly(
        pretrain, "demo", work / "log", *TRAINING, f"data.paths=[{work / 'train.txt'}]", f"optimizer.lr={lr}",
        f"phases=[{{name: main, steps: {steps}}}]", f"seed={seed}", f"run_dir={run}",
        f"preparation.directory={work / 'shards'}", *overrides,
    )  # fmt: skip


def loss_of(model_directory: Path, rows: torch.Tensor) -> float:
    model, _ = plmtune.load(model_directory, "cpu")
    return mean_loss(model.float().eval(), rows.split(16))


def scratch_of(pruned: Path) -> list[str]:
    """The overrides that give the pruned shape random weights."""
    sizes = json.loads((pruned / "prune.json").read_text())["sizes"]
    return [*TEACHER, *(f"model.{name}={size}" for name, size in sizes.items()), f"model.attention.head_dim={HEAD_DIM}"]


def one_seed(seed: int, shape: str, options: argparse.Namespace, rows: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Loss after cutting and after training, by method; of the teacher the second is NaN, of the control the first."""
    work, place = options.work, options.work / f"seed{seed}"
    teacher, nan = place / "teacher", float("nan")
    if not (teacher / "curves.png").exists():
        train(teacher, work, options.steps, 3e-3, seed, *TEACHER)
    found = {"teacher": (loss_of(teacher, rows), nan)}
    ways = {name: [f"importance={name}"] for name in METHODS}
    ways["mask"] = ["importance=mask"]
    ways[TRAINED] = ["importance=mask", f"mask.weights_lr={options.weights_lr}"]
    if shape == "depth":
        ways = {name: [f"depth.importance={name}"] for name in ("influence", "skip", "mask")}
    for name, overrides in ways.items():
        cut, healed = (place / f"{shape}-{name.replace(', ', '-').replace(' ', '-')}{end}" for end in ("", "-healed"))
        begun = time.process_time()
        quietly(
            prune, "prune", work / "log", f"checkpoint={teacher}", f"run_dir={cut}", *SMALLER[shape], *overrides,
            "data=files", f"data.paths=[{work / 'train.txt'}]", f"seq_len={SEQ_LEN}", "test_tokens=0",
            f"calibration_tokens={options.calibration}", f"mask.steps={options.mask_steps}", f"mask.seed={seed}",
            f"mask.tokens={max(options.calibration, mask_tokens(options))}",
        )  # fmt: skip
        cost = time.process_time() - begun
        train(healed, work, options.heal, 1e-3, seed + 100, f"init_from={cut}", "model=null", "tokenizer=byte")
        found[name] = loss_of(cut, rows), loss_of(healed, rows)
        print(
            f"seed {seed}, {shape} by {name}: {found[name][0]:.4f} -> {found[name][1]:.4f}; {cost:.1f} s of CPU to cut",
            flush=True,
        )
        if TRAINED in ways and name == "taylor":
            longer, steps = place / f"{shape}-longer", options.heal + mask_tokens(options) // (16 * SEQ_LEN)
            train(longer, work, steps, 1e-3, seed + 100, f"init_from={cut}", "model=null", "tokenizer=byte")
            found[f"taylor, {steps} steps"] = nan, loss_of(longer, rows)
    scratch = place / f"{shape}-scratch"
    train(scratch, work, options.heal, 3e-3, seed + 100, *scratch_of(cut))
    found["random weights"] = nan, loss_of(scratch, rows)
    return found


def mask_tokens(options: argparse.Namespace) -> int:
    """Tokens that a mask is learned on; a step has 8 rows."""
    return int(options.mask_steps * 8 * SEQ_LEN)


@torch.no_grad()
def ranks_table(teacher: Path, rows: torch.Tensor) -> Table:
    """Spearman correlation of each importance with the rise of the loss without one unit, over the units of a kind."""
    model, _ = plmtune.load(teacher, "cpu")
    model = model.float().eval()
    groups, batches = groups_of(model), rows[::8].split(16)
    whole = mean_loss(model, batches)
    chosen = {"channels": ["channels"], "heads": [name for name in groups if name.endswith(".heads")],
              "neurons": ["layers.2.neurons"]}  # fmt: skip
    rises: dict[str, torch.Tensor] = {}
    for name in (name for names in chosen.values() for name in names):
        found = []
        for unit in range(groups[name].units):
            gone = torch.ones(groups[name].units)
            gone[unit] = 0
            one = {name: gone}
            with masked(model, one.copy):
                found.append(mean_loss(model, batches) - whole)
        rises[name] = torch.tensor(found)
    table = Table(["", *(Column(kind, right=True) for kind in chosen)], title="Spearman correlation with the true rise")
    for method in METHODS:
        with torch.enable_grad():
            scores = importance(model, groups, method, rows[1::2].split(16))  # type: ignore[arg-type]
        cells = []
        for names in chosen.values():
            each = [spearman(scores[name], rises[name]) for name in names if len(rises[name]) > 4]
            together = [torch.cat([values[name] for name in names]) for values in (scores, rises)]
            cells.append(f"{mean(each) if each else spearman(*together):.2f}")
        table.add(method, *cells)
    return table


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def table_of(results: list[dict[str, tuple[float, float]]], shape: str) -> Table:
    table = Table(
        ["", Column("after the cut", right=True), Column("after training", right=True)],
        title=f"{shape}: nats a byte of held-out text, mean and standard deviation of {len(results)} seeds",
    )
    for name in results[0]:
        cells = []
        for part in (0, 1):
            values = [result[name][part] for result in results]
            known = values[0] == values[0]
            spread = stdev(values) if known and len(values) > 1 else 0.0
            cells.append(f"{mean(values):.4f} ± {spread:.4f}" if known else "")
        table.add(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--shapes", default="width,depth")
    parser.add_argument("--steps", type=int, default=400, help="of the teacher")
    parser.add_argument("--heal", type=int, default=60, help="steps of training after the cut")
    parser.add_argument("--mask-steps", type=int, default=200)
    parser.add_argument("--weights-lr", type=float, default=1e-3, help="of the mask whose weights train")
    parser.add_argument("--rank", action="store_true")
    parser.add_argument("--calibration", type=int, default=65_536)
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    write_text(options.work)
    data = (options.work / "test.txt").read_bytes()
    rows = torch.tensor([*data[: len(data) // SEQ_LEN * SEQ_LEN]]).view(-1, SEQ_LEN)
    rows = rows[:: len(rows) // TEST_ROWS][:TEST_ROWS]
    begun = time.perf_counter()
    results: dict[str, list[dict[str, tuple[float, float]]]] = {shape: [] for shape in options.shapes.split(",")}
    for seed in map(int, options.seeds.split(",")):
        for shape, found in results.items():
            found.append(one_seed(seed, shape, options, rows))
            (options.work / "results.json").write_text(json.dumps(results, indent=1))
            print(table_of(found, shape), flush=True)
    if options.rank:
        print(ranks_table(options.work / f"seed{options.seeds.split(',')[0]}" / "teacher", rows))
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
