"""PanGu-pi Pro's ladder in small: each formula on top of those before, at equal parameters and equal tokens.

    python benchmarks/pangu_pi_pro.py --text ../shared/data/pretrain/python311_docs_rst_11mb.txt --out runs/pangu_pi_pro
    python benchmarks/pangu_pi_pro.py --text FILE --quick      one seed, a few steps: tries the script

Rungs, each with all of the earlier ones: a vocabulary that is too large for the model; `plmtune tokenizer compress`;
the depth and width that win short proxies; weights cut from a larger model by `plmtune run prune`; a second round on
the sequences with the largest losses (`multi_round`); the larger model's distribution as the target (`distillation`).
Everything is trained by `plmtune run pretrain benchmarks/pangu_pi_pro.yaml`, and scored in bits a byte of the same
held-out documents, as `plmtune perplexity` does. The commands and what they print are in OUT/log.

A step that is finished is not made again: the same command resumes, also with more seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TextIO

from plmtune.recipes import pretrain, prune
from side_by_side import machine

import plmtune
from plmtune.config.compose import compose
from plmtune.errors import UserError
from plmtune.evaluation.perplexity import perplexity
from plmtune.tokenizers.tokenizer_files import load_tokenizer

OVERLAY = Path(__file__).with_suffix(".yaml")
STEP = 16 * 128  # tokens, as the overlay says
HEAD = 16  # width of a head, in every shape
TITLE = re.compile(r"^([=*#])\1{3,}\n.+\n\1{3,}\n", re.MULTILINE)  # of a document in reStructuredText


@dataclass(frozen=True)
class Shape:
    """Layers, width and neurons of a Llama whose embedding is its head."""

    num_layers: int
    embed_dim: int
    hidden_dim: int

    def __str__(self) -> str:
        return f"{self.num_layers} x {self.embed_dim}"

    def overrides(self) -> list[str]:
        heads = self.embed_dim // HEAD
        return [
            f"model.num_layers={self.num_layers}", f"model.embed_dim={self.embed_dim}", f"model.num_heads={heads}",
            f"model.attention.num_kv_heads={heads}", f"model.ffn.hidden_dim={self.hidden_dim}",
        ]  # fmt: skip


# 504,000 parameters each, within 0.3%, in a vocabulary of BIG or SMALL tokens. The first of SHAPES has BASE's layers:
# all that compression saves goes into width.
BIG, SMALL = 8192, 2560
BASE = Shape(4, 48, 128)
SHAPES = (Shape(4, 80, 204), Shape(3, 96, 170), Shape(7, 64, 168), Shape(14, 48, 125))
RATES = (1e-2, 2e-2, 4e-2)  # optimizer.lr of which proxies choose each model's, from random weights
INHERITED_RATES = (2.5e-3, 5e-3, 1e-2)  # and from inherited ones
CONTROLS = ("multi-round, uniform draw", "distillation in one round")  # beside the ladder, on top of inheritance


@dataclass(frozen=True)
class Budget:
    """Steps of each training, and bytes of text.

    Attributes:
        steps: of a rung; of a multi-round one in all its rounds.
        proxy: steps by which a learning rate and a shape are chosen.
        teacher: steps of the larger model.
        document, test: bytes of each training and of each held-out document.
        calibration: tokens that importances for the cut are measured on.
    """

    steps: int = 180
    proxy: int = 42
    teacher: int = 270
    document: int = 5_200
    test: int = 6_000
    calibration: int = 32_768


QUICK = Budget(steps=6, proxy=2, teacher=4, document=4_000, test=500, calibration=4_096)


@dataclass
class Result:
    """What a training cost and reached."""

    bits_per_byte: float
    parameters: int
    seconds: float
    cpu_seconds: float


class Ladder:
    """One directory of texts, tokenizers, models and results."""

    def __init__(self, out: Path, budget: Budget) -> None:
        self.out, self.budget = out.resolve(), budget
        self.shape, self.inherited_rate = SHAPES[0], INHERITED_RATES[0]
        self.rates = dict.fromkeys((BASE, *SHAPES), RATES[0])
        self.proxies: dict[str, float] = {}
        self.teacher: Result | None = None
        self.cut_score = math.nan

    # Text and tokenizers

    def prepare(self, texts: list[Path], others: list[Path]) -> None:
        """Write training, proxy and test documents, and both tokenizers."""
        made: dict[str, Any] = {"budget": asdict(self.budget), "shapes": [str(shape) for shape in (BASE, *SHAPES)]}
        made |= {"rates": [RATES, INHERITED_RATES], "vocabularies": [BIG, SMALL]}
        made["texts"] = {path.name: path.stat().st_size for path in (*texts, *others)}
        settings = json.loads(json.dumps(made))
        known = self.out / "settings.json"
        if known.exists() and json.loads(known.read_text()) != settings:
            raise SystemExit(f"{self.out} was made with other settings ({known}). Give another --out.")
        self.out.mkdir(parents=True, exist_ok=True)
        documents = [text for path in texts for text in split(path.read_text(encoding="utf-8"))]
        parts: dict[str, list[str]] = {"train": [], "proxy": [], "test": []}
        for number, text in enumerate(documents):
            name = {3: "test", 7: "proxy"}.get(number % 8, "train")
            parts[name].append(text[: self.budget.document if name == "train" else self.budget.test])
        if not all(parts.values()):
            raise SystemExit(f"{len(documents)} documents are too few: 8 are the least.")
        parts["all"] = [text for number, text in enumerate(documents) if number % 8 not in (3, 7)]
        for name, found in parts.items():
            rows = "".join(json.dumps({"text": text}) + "\n" for text in found)
            self.file(name).write_text(rows, encoding="utf-8")
        known.write_text(json.dumps(settings, indent=1) + "\n")
        if not self.tokenizer(BIG).exists():
            out = ["--out", self.tokenizer(BIG)]
            self.tokenize("train", self.file("all"), *others, "--vocab-size", BIG, *out)
        if not self.tokenizer(SMALL).exists():
            where = ["--vocab-size", SMALL, "--out", self.tokenizer(SMALL)]
            self.tokenize("compress", self.tokenizer(BIG), self.file("train"), *where)

    def file(self, name: str) -> Path:
        return self.out / f"{name}.jsonl"

    def documents(self, name: str) -> list[str]:
        return [json.loads(line)["text"] for line in self.file(name).read_text(encoding="utf-8").splitlines()]

    def tokenizer(self, size: int) -> Path:
        return self.out / f"tokenizer-{size}"

    def tokens(self, size: int) -> tuple[int, int]:
        """Tokens and bytes of the training text."""
        texts = self.documents("train")
        ids = load_tokenizer(self.tokenizer(size)).encode_batch(texts)
        return sum(map(len, ids)), sum(len(text.encode()) for text in texts)

    # Models

    def shaped(self, shape: Shape, vocabulary: int) -> list[str]:
        return [f"tokenizer.path={self.tokenizer(vocabulary)}", *shape.overrides()]

    def choose(self) -> None:
        """Choose by proxies the learning rate of each shape, and the shape of the third rung and all later ones."""
        self.rates[BASE], _ = self.best_rate(RATES, "large vocabulary", self.shaped(BASE, BIG))
        scores = {}
        for shape in SHAPES:
            self.rates[shape], scores[shape] = self.best_rate(RATES, str(shape), self.shaped(shape, SMALL))
        self.shape = min(SHAPES, key=lambda shape: scores[shape])

    def best_rate(self, rates: tuple[float, ...], name: str, overrides: list[str]) -> tuple[float, float]:
        """The rate whose proxy is best, and its bits a byte."""
        scores = {rate: self.proxy(f"{name}, lr {rate}", [*overrides, f"optimizer.lr={rate}"]) for rate in rates}
        return min(scores.items(), key=lambda found: found[1])

    def proxy(self, what: str, overrides: list[str]) -> float:
        """Bits a byte of the proxy documents after a short training."""
        place = f"proxies/{what.replace(', ', '-').replace(' ', '-')}"
        self.proxies[what] = self.train(place, 0, overrides, steps=self.budget.proxy, test="proxy").bits_per_byte
        return self.proxies[what]

    def cut(self) -> None:
        """Train a larger model, half as deep again and wider by a head, and cut it to the chosen shape."""
        shape, path = self.shape, self.out / "cut"
        larger = Shape(shape.num_layers * 3 // 2, shape.embed_dim + HEAD, shape.hidden_dim * 5 // 4)
        overrides = [*self.shaped(larger, SMALL), f"optimizer.lr={self.rates[shape]}"]
        self.teacher = self.train("teacher", 0, overrides, steps=self.budget.teacher)
        if not (path / "score.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            self.run(
                prune, f"checkpoint={self.out / 'teacher'}", f"run_dir={path}", "force=true",
                f"model.num_layers={shape.num_layers}", f"model.embed_dim={shape.embed_dim}",
                f"model.num_heads={shape.embed_dim // HEAD}", f"model.ffn.hidden_dim={shape.hidden_dim}",
                "data=files", f"data.paths=[{self.file('train')}]", "seq_len=128", "test_tokens=0",
                f"calibration_tokens={self.budget.calibration}",
            )  # fmt: skip
            (path / "score.json").write_text(json.dumps(self.score(path, "test")))
        self.cut_score = json.loads((path / "score.json").read_text())
        self.inherited_rate, _ = self.best_rate(INHERITED_RATES, "inheritance", self.inherited())

    def tuned(self, shape: Shape, vocabulary: int) -> list[str]:
        return [*self.shaped(shape, vocabulary), f"optimizer.lr={self.rates[shape]}"]

    def inherited(self) -> list[str]:
        return [*self.shaped(self.shape, SMALL), f"init_from={self.out / 'cut'}"]

    def rungs(self) -> dict[str, tuple[list[str], int]]:
        """Overrides of each rung, then of the controls, and the steps of the first round."""
        steps = self.budget.steps
        inherited = [*self.inherited(), f"optimizer.lr={self.inherited_rate}"]
        rounds, first = ["multi_round.rounds=2", "multi_round.keep=0.5"], steps * 2 // 3
        teacher = [
            "loss=forward_kl", f"distillation.teacher={self.out / 'teacher'}", "distillation.top_k=64",
            f"distillation.cache={self.out / 'cache'}",
        ]  # fmt: skip
        return {
            "large vocabulary": (self.tuned(BASE, BIG), steps),
            "compact tokenizer": (self.tuned(SHAPES[0], SMALL), steps),
            "depth and width": (self.tuned(self.shape, SMALL), steps),
            "inheritance": (inherited, steps),
            "multi-round": ([*inherited, *rounds], first),
            "distillation": ([*inherited, *rounds, *teacher], first),
            "multi-round, uniform draw": ([*inherited, *rounds, "multi_round.draw=uniform"], first),
            "distillation in one round": ([*inherited, *teacher], steps),
        }

    def train(self, name: str, seed: int, overrides: list[str], *, steps: int, test: str = "test") -> Result:
        """Train and score a model, or return what was found before."""
        run = self.out / name
        found = run.with_name(f"{run.name}.json")
        if found.exists():
            return Result(**json.loads(found.read_text()))
        shutil.rmtree(run, ignore_errors=True)  # of a script that was stopped
        wall, cpu = time.perf_counter(), time.process_time()
        self.run(
            pretrain, f"data.paths=[{self.file('train')}]", f"run_dir={run}", f"seed={seed}",
            f"preparation.directory={self.out / 'shards'}", f"phases=[{{name: main, steps: {steps}}}]",
            *overrides,
        )  # fmt: skip
        seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
        parameters = json.loads((run / "run.json").read_text())["parameters"]
        result = Result(self.score(run, test), parameters, seconds, cpu)
        found.write_text(json.dumps(asdict(result)) + "\n")
        print(f"{name}: {result.bits_per_byte:.4f} bits a byte, {seconds:.0f} s ({cpu:.0f} s of CPU)", flush=True)
        return result

    def score(self, path: Path, test: str) -> float:
        """Bits a byte, as ``plmtune perplexity MODEL FILE --window 128`` prints them."""
        model, tokenizer = plmtune.load(str(path), "cpu")
        return perplexity(model, tokenizer, self.documents(test), window=128).bits_per_byte

    def run(self, recipe: Any, *overrides: str) -> None:
        """Do what ``plmtune run`` does, in this process: importing torch takes as long as a tenth of a training."""
        name, files = recipe.CONFIG, [str(OVERLAY)] if recipe is pretrain else []
        with self.log() as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            print("$ plmtune run", name, *files, shlex.join(overrides))
            try:
                recipe.main(compose(name, files, list(overrides)))
            except UserError as error:
                raise SystemExit(f"plmtune run {name}: {error}") from error

    def tokenize(self, *words: object) -> None:
        """Run a command of ``plmtune tokenizer``."""
        with self.log() as log:
            print("$ plmtune tokenizer", *words, file=log, flush=True)
            command = [sys.executable, "-m", "plmtune", "tokenizer", *map(str, words)]
            code = subprocess.run(command, stdout=log, stderr=log).returncode
        if code:
            raise SystemExit(f"plmtune tokenizer {words[0]} failed ({code}): see the end of {self.out / 'log'}")

    def log(self) -> TextIO:
        return (self.out / "log").open("a", encoding="utf-8")


def split(text: str) -> list[str]:
    """Cut at titles of reStructuredText; a text with few of them at the blank line after each 16,000 characters."""
    cuts = [match.start() for match in TITLE.finditer(text)]
    if len(cuts) < 20:
        cuts = sorted({at + 2 for n in range(16_000, len(text), 16_000) if (at := text.find("\n\n", n)) > 0})
    documents = [text[first:last] for first, last in pairwise([0, *cuts, len(text)])]
    return [document for document in documents if len(document) >= 2_000]


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values) if len(values) > 1 else 0:.4f}"


def table(ladder: Ladder, found: dict[str, list[Result]]) -> str:
    """The rungs in Markdown; a gain is against the rung before, of a control against inheritance, with equal seeds."""
    made = {"large vocabulary": (BIG, BASE), "compact tokenizer": (SMALL, SHAPES[0])}
    columns = ["rung", "vocabulary", "layers x width", "parameters", "MB of text", "bits a byte", "gain", "CPU seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    before: list[float] = []
    for name, results in found.items():
        vocabulary, shape = made.get(name, (SMALL, ladder.shape))
        tokens, size = ladder.tokens(vocabulary)
        read = ladder.budget.steps * STEP * size / tokens / 1e6
        scores = [result.bits_per_byte for result in results]
        against = [result.bits_per_byte for result in found["inheritance"]] if name in CONTROLS else before
        gain = spread([old - new for old, new in zip(against, scores, strict=True)]) if against else ""
        cpu = mean(result.cpu_seconds for result in results)
        cells = [name, f"{vocabulary:,}", shape, f"{results[0].parameters:,}", f"{read:.2f}", spread(scores), gain]
        lines.append(f"| {' | '.join(map(str, cells))} | {cpu:.0f} |")
        before = scores
    return "\n".join(lines)


def report(ladder: Ladder) -> None:
    """What the table does not say: the text, the proxies, the larger model."""
    for vocabulary in (BIG, SMALL):
        tokens, size = ladder.tokens(vocabulary)
        print(f"{size:,} bytes of training text are {tokens:,} tokens of {vocabulary:,}")
    for what, score in ladder.proxies.items():
        print(f"proxy, {what}: {score:.4f}")
    print(f"chosen: {ladder.shape}; lr {ladder.rates[ladder.shape]}, {ladder.inherited_rate} from inherited weights")
    if larger := ladder.teacher:
        print(f"larger model: {larger.parameters:,} parameters, {larger.bits_per_byte:.4f}, {larger.cpu_seconds:.0f} s")
        print(f"cut to {ladder.shape}: {ladder.cut_score:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files of text in UTF-8")
    parser.add_argument("--tokenizer-text", type=Path, nargs="*", default=[], help="more text for the large vocabulary")
    parser.add_argument("--out", type=Path, default=Path("runs/pangu_pi_pro"), help="where everything is made and kept")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rungs", type=int, default=6, choices=range(1, 7), help="the first so many")
    parser.add_argument("--controls", action="store_true", help="a uniform draw, and distillation in one round, too")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps, in OUT/quick")
    options = parser.parse_args()
    for path in (*options.text, *options.tokenizer_text):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    budget, out, seeds = Budget(), options.out, [int(seed) for seed in options.seeds.split(",")]
    if options.quick:
        budget, out, seeds = QUICK, out / "quick", seeds[:1]
    ladder = Ladder(out, budget)
    ladder.prepare(options.text, options.tokenizer_text)
    ladder.choose()
    if options.controls or options.rungs > 3:
        ladder.cut()
    rungs = dict([*ladder.rungs().items()][: None if options.controls else options.rungs])
    found: dict[str, list[Result]] = {name: [] for name in rungs}
    for name, (overrides, steps) in rungs.items():
        for seed in seeds:
            place = f"seed{seed}/{name.replace(', ', '-').replace(' ', '-')}"
            found[name].append(ladder.train(place, seed, overrides, steps=steps))
    print(machine())
    print(table(ladder, found))
    report(ladder)


if __name__ == "__main__":
    main()
