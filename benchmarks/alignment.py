"""Does alignment work? Two ARIES rounds against two DPO rounds of a tiny model that answers and refines imperfectly.

The task: answer letters with the same letters, in any order ("c a f" with "f c a"). Supervised pairs are wrong on
purpose, a better answer having each letter wrong with 30%, a worse one with 70%, so that `loss=sft_refine` makes a
model that answers and refines at about that quality: there is room above, and nobody shows it. Then rounds: three
answers a prompt, judged by the letters they share with the right one, best against worst. Both losses start from the
same model, and take as many prompts, answers, pairs and epochs; what they see of each other's is nothing. The rewards
of direct and of refined answers are of held-out prompts, at temperature 1.

    python benchmarks/alignment.py --picture docs/pictures/alignment.png
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from side_by_side import machine

from plmtune.config import compose
from plmtune.io.metrics import read
from plmtune.models.hf import save_model
from plmtune.models.llama import llama
from plmtune.registry import component
from plmtune.tokenizers.train_bpe import train_bpe

LETTERS = "abcdefghijklmnop"
LENGTH = 4
HELD_OUT = 150
REFINE = "{{ answer }} > {{ prompt }}"
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def spoilt(prompt: str, share: float, draw: random.Random) -> str:
    """The prompt's letters in any order, each with a chance to be replaced by any letter at all."""
    letters = draw.sample(prompt.split(), LENGTH)
    return " ".join(draw.choice(LETTERS) if draw.random() < share else letter for letter in letters)


def prompts(count: int, draw: random.Random) -> Iterator[str]:
    for _ in range(count):
        yield " ".join(draw.sample(LETTERS, LENGTH))


def prepare(directory: Path, seed: int, *, pairs: int, asked: int) -> None:
    """Write the data, the templates and a model that knows nothing."""
    draw = random.Random(seed)
    with (directory / "pairs.jsonl").open("w") as file:
        for prompt in prompts(pairs, draw):
            better, worse = (spoilt(prompt, share, draw) for share in (0.3, 0.7))
            if better != worse:
                file.write(json.dumps({"prompt": prompt, "chosen": better, "rejected": worse}) + "\n")
    with (directory / "prompts.jsonl").open("w") as file:
        for prompt in prompts(asked, draw):
            file.write(json.dumps({"prompt": prompt, "completion": prompt}) + "\n")
    (directory / "chat.jinja").write_text(CHAT)
    (directory / "refine.jinja").write_text(REFINE)
    tokenizer = train_bpe(["user assistant " + " ".join(prompts(200, draw))] * 4, 286)
    # Drawn wider than a model that is to be large: so small a one begins to copy within a hundred steps, not hundreds.
    model = llama(
        tokenizer.vocab_size,
        attention=component("attention", "gqa", num_kv_heads=4),
        ffn=component("ffn", "swiglu", hidden_dim=128),
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        max_seq_len=128,
        init_std=0.1,
    )
    model.init_weights(torch.Generator().manual_seed(seed))
    save_model(model, model.config, directory / "blank")
    tokenizer.save(directory / "blank")


def run(recipe: str, name: str, directory: Path, run_name: str, overrides: list[str]) -> Path:
    """As ``plmtune run NAME overrides...``; the run's directory."""
    where = directory / run_name
    cfg = compose.compose(
        name,
        [],
        [
            f"run_dir={where}",
            f"chat.template={directory}/chat.jinja",
            f"refinement.template={directory}/refine.jinja",
            "logger=jsonl",
            *overrides,
        ],
    )
    importlib.import_module(f"plmtune.recipes.{recipe}").main(cfg)
    return where


def measured(where: Path) -> list[tuple[float, float]]:
    """(direct, refined) reward before any round, and after each."""
    entries = [entry for entry in read(where / "metrics.jsonl") if "after_round" in entry]
    return [(entry["direct"], entry["refined"]) for entry in sorted(entries, key=lambda entry: entry["after_round"])]


def trial(seed: int, options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Both losses from one supervised model."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory, seed, pairs=options.pairs, asked=options.prompts * options.rounds + HELD_OUT)
        sft = run(
            "sft",
            "demo_sft",
            directory,
            "sft",
            [
                "loss=sft_refine",
                "data=preferences",
                f"data.paths=[{directory}/pairs.jsonl]",
                f"init_from={directory}/blank",
                f"seed={seed}",
                f"phases=[{{name: main, steps: {options.sft_steps}}}]",
                "seq_len=64",
                "global_batch_size=32",
                "micro_batch_size=32",
                "optimizer.lr=1e-2",
                "validation.every=0",
                "checkpoint.every=0",
                "sample.max_new_tokens=0",
            ],
        )
        found = {}
        for loss, settings in {
            "aries": ["loss=aries", f"loss.beta_ref={options.beta_ref}", f"loss.alpha={options.alpha}"],
            "dpo": ["loss=dpo"],
        }.items():
            where = run(
                "preference",
                "demo_aries",
                directory,
                loss,
                [
                    *settings,
                    f"init_from={sft}",
                    "data=conversations",
                    f"data.paths=[{directory}/prompts.jsonl]",
                    f"seed={seed}",
                    f"rounds={options.rounds}",
                    f"prompts_per_round={options.prompts}",
                    f"chat.holdout={HELD_OUT / (options.prompts * options.rounds + HELD_OUT)}",
                    "reward=overlap",
                    "generation.turns=3",
                    "generation.max_new_tokens=10",
                    "generation.temperature=1.0",
                    "generation.top_p=1.0",
                    "generation.batch_size=64",
                    "seq_len=64",
                    "global_batch_size=32",
                    "micro_batch_size=16",
                    f"epochs={options.epochs}",
                    f"optimizer.lr={options.lr}",
                    f"reference_cache={directory}/reference",
                    "validation.every=0",
                    "checkpoint.every=0",
                ],
            )
            found[loss] = measured(where)
        return found


def draw_picture(trials: list[dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """Mean over seeds of both rewards after each round, with the spread from least to most."""
    from plmtune.io.figures import COLOURS, finish, new_figure

    figure = new_figure(8, 3.4)
    for axis, kind in zip(figure.subplots(1, 2, sharey=True), ("direct", "refined"), strict=True):
        for loss, colour in (("aries", COLOURS[0]), ("dpo", COLOURS[1])):
            columns = list(zip(*([rewards[kind == "refined"] for rewards in t[loss]] for t in trials), strict=True))
            means = [statistics.mean(column) for column in columns]
            axis.plot(range(len(means)), means, color=colour, marker="o", label=loss)
            axis.fill_between(range(len(means)), *zip(*map(_ends, columns), strict=True), color=colour, alpha=0.2)
        axis.set(title=f"{kind} answers", xlabel="rounds of training", xticks=range(len(means)))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("reward of held-out prompts")
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    finish(figure, path)


def _ends(column: tuple[float, ...]) -> tuple[float, float]:
    return min(column), max(column)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=8000, help="supervised pairs")
    parser.add_argument("--sft-steps", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=300, help="a round")
    parser.add_argument("--epochs", type=float, default=4.0, help="over a round's pairs")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--beta-ref", type=float, default=0.05)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    print(machine())
    trials = []
    for seed in options.seeds:
        began = time.perf_counter()
        trials.append(trial(seed, options))
        print(f"seed {seed}, {time.perf_counter() - began:.0f} s: {trials[-1]}")
    print("| reward | " + " | ".join(f"after round {number}" for number in range(options.rounds + 1)) + " |")
    print("|---|" + "---|" * (options.rounds + 1))
    for loss in ("aries", "dpo"):
        for index, kind in enumerate(("direct", "refined")):
            cells = []
            for number in range(options.rounds + 1):
                column = tuple(t[loss][number][index] for t in trials)
                low, high = _ends(column)
                cells.append(f"{statistics.mean(column):.3f} ({low:.3f} to {high:.3f})")
            print(f"| {loss}, {kind} | " + " | ".join(cells) + " |")
    if options.picture:
        draw_picture(trials, options.picture)


if __name__ == "__main__":
    main()
