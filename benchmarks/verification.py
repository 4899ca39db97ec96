"""What `plmtune verify` says of right files and of wrong ones: no right one is to fail, and each wrong one is.

Right: a model in many types of GGUF on three texts, and five random models of odd sizes. Wrong: ten faults, each in a
file of a random Llama. K-quants are made by llama.cpp's own quantizer, where the package llama-cpp-python is installed.

    plmtune convert FILE.gguf smollm2
    python benchmarks/verification.py smollm2 --texts prose.txt code.txt
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine

from plmtune.export.gguf_quantize import quantize_gguf
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.lint import WRITTEN
from plmtune.export.verify import Report, verify
from plmtune.extras import installed
from plmtune.models.gguf_layout import to_halves
from plmtune.models.hf import load_model, save_model
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled, load_tokenizer

TYPES = "f32,f16,bf16,q8_0,q6_k,q5_1,q5_k_m,q4_k_m,q4_0"
OF_RANDOM = "f32,f16,bf16,q8_0,q5_1,q4_0"


def random_llama(embed_dim: int, heads: int, kv_heads: int, head_dim: int, hidden: int, std: float, **more: Any) -> Any:
    tied = more.pop("tied", True)
    model = llama(
        bundled().vocab_size,
        attention=component("attention", "gqa", num_kv_heads=kv_heads, head_dim=head_dim, **more),
        ffn=component("ffn", "swiglu", hidden_dim=hidden),
        embed_dim=embed_dim,
        num_layers=3,
        num_heads=heads,
        max_seq_len=512,
        tie_embeddings=tied,
        init_std=std,
    )
    return with_drawn_vectors(model)


def random_plm() -> Any:
    options = {"kv_lora_rank": 48, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20}
    model = plm(
        bundled().vocab_size,
        attention=component("attention", "mla", **options),
        ffn=component("ffn", "squared_relu", hidden_dim=224),
        embed_dim=96,
        num_layers=3,
        num_heads=3,
        max_seq_len=512,
        init_std=0.15,
    )
    return with_drawn_vectors(model)


def with_drawn_vectors(model: Decoder) -> Decoder:
    """Biases and norms that are no zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.2 * drawn if name.endswith("bias") else 1 + 0.2 * drawn
    return model.eval()


RANDOM: dict[str, Callable[[], Any]] = {
    "Llama 64 wide, biases": lambda: random_llama(64, 4, 2, 16, 160, 0.15, bias=True),
    "Llama 100 wide, heads of 20, untied": lambda: random_llama(100, 5, 1, 20, 270, 0.1, tied=False),
    "Llama 256 wide, heads of 64": lambda: random_llama(256, 4, 4, 64, 768, 0.08),
    "Llama 72 wide, sharp": lambda: random_llama(72, 3, 3, 24, 96, 0.5),
    "PLM 96 wide, heads of 32 and 20": random_plm,
}


def make(model: Decoder, tokenizer: Tokenizer, path: Path, kind: str) -> bool:
    """Write a file of a type; False where the package for it is missing."""
    if kind.upper() in WRITTEN:
        write_gguf(model, tokenizer, path, kind=kind.upper())
        return True
    if not installed("llama_cpp"):
        return False
    whole = path.with_suffix(".whole.gguf")
    write_gguf(model, tokenizer, whole, kind="F32")
    quantize_gguf(whole, path, kind.upper())
    whole.unlink()
    return True


def line(name: str, text: str, report: Report, seconds: float) -> str:
    values = {check.name: check for check in report.checks}
    kl = values.get("KL from the export's own numbers")
    shown = f"{kl.value:9.2g} {kl.threshold:9.2g} {kl.value / (kl.threshold or 1):6.2f}" if kl else " " * 26
    cost = [f"{check.value:8.2g}" for check in report.checks if check.threshold is None]
    verdict = "passed" if report.passed else "FAILED"
    return (
        f"{name:36} {text:10} {report.positions:4} {shown} {verdict}  {' '.join(cost)} {seconds:6.1f} s  {report.cause}"
    )


def right(model: Decoder, source: Path, kinds: str, name: str, texts: dict[str, str | None], options: Any) -> int:
    """Verify a model in each type on each text; returns how many failed."""
    failed, tokenizer = 0, load_tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds.split(","):
            path = Path(folder) / f"model-{kind.upper()}.gguf"
            if not make(model, tokenizer, path, kind):
                print(f"{name}, {kind.upper()}: not made, llama-cpp-python is not installed")
                continue
            for text, content in texts.items():
                begun = time.perf_counter()
                report = verify(path, source, kind=kind, text=content, **options)
                print(line(f"{name}, {kind.upper()}", text, report, time.perf_counter() - begun), flush=True)
                failed += not report.passed
            path.unlink()
    return failed


def layers(model: Decoder) -> list[Any]:
    return list(model.layers)


def permuted_heads(model: Decoder) -> None:
    for layer in layers(model):
        for projection, heads in ((layer.attention.q_proj, 4), (layer.attention.k_proj, 2)):
            projection.weight.data = to_halves(projection.weight.data, heads)


def rope_base(model: Decoder) -> None:
    model.config["attention"]["rope_theta"] = 10000.0


def swapped_tensors(model: Decoder) -> None:
    first, second = (layer.ffn.up_proj.weight for layer in layers(model)[:2])
    first.data, second.data = second.data, first.data


def other_eps(model: Decoder) -> None:
    model.config["norm"]["eps"] = 1e-3


def missing_bias(model: Decoder) -> None:
    for layer in layers(model):
        layer.attention.q_proj.bias = None


def rounded_norms(model: Decoder) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.bfloat16().float()


def nothing(model: Decoder) -> None:
    pass


def other_pre_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    from plmtune.tokenizers.bpe import GPT2_PATTERN, Vocabulary

    assert isinstance(tokenizer.vocabulary, Vocabulary)
    return like(tokenizer, vocabulary=replace(tokenizer.vocabulary, pattern=GPT2_PATTERN))


def other_template(tokenizer: Tokenizer) -> Tokenizer:
    template = (tokenizer.chat_template or "").replace("You are a helpful assistant.", "Be brief.")
    return like(tokenizer, chat_template=template)


def like(tokenizer: Tokenizer, *, vocabulary: Any = None, chat_template: str | None = None) -> Tokenizer:
    return Tokenizer(
        vocabulary or tokenizer.vocabulary,
        eos=tokenizer.eos,
        vocab_size=tokenizer.vocab_size,
        chat_template=chat_template or tokenizer.chat_template,
    )


def shorter(tokenizer: Tokenizer) -> Tokenizer:
    """What says of itself that it is short enough for a model of fewer rows; its last tokens are not written."""
    cut = like(tokenizer)
    cut.num_tokens -= 64
    return cut


def cut_vocabulary(model: Decoder) -> None:
    model.vocab_size -= 64
    model.config["vocab_size"] -= 64
    model.tok_embeddings.weight.data = model.tok_embeddings.weight.data[:-64].clone()


# name -> (what is done to the model, to the tokenizer, the type that is written, words of the cause)
Fault = tuple[Callable[[Decoder], None], Callable[[Tokenizer], Tokenizer] | None, str, str]
WRONG: dict[str, Fault] = {
    "permuted heads": (permuted_heads, None, "F32", "q_proj.weight (and 5 more): its rows are in another order"),
    "RoPE's base": (rope_base, None, "F32", "attention.rope_theta is 10000 in the export, 100000 here"),
    "swapped tensors": (swapped_tensors, None, "F32", "it holds layers.1.ffn.up_proj.weight"),
    "pre-tokenizer": (nothing, other_pre_tokenizer, "F32", "tokenizer.ggml.pre is gpt-2, the checkpoint's is qwen2"),
    "F16 named Q4_0": (nothing, None, "F16", "it is called Q4_0, and says of itself that it is F16"),
    "cut vocabulary": (cut_vocabulary, shorter, "F32", "the export has 4,032 rows of the vocabulary"),
    "chat template": (nothing, other_template, "F32", "the export's chat template is another one"),
    "norms' eps": (other_eps, None, "F32", "norm.eps is 0.001 in the export, 1e-05 here"),
    "missing biases": (missing_bias, None, "F32", "the export lacks blk.0.attn_q.bias and 2 more"),
    "norms rounded to bf16": (rounded_norms, None, "F32", "its numbers were rounded to bfloat16"),
}


def write_wrong(name: str, model: Decoder, tokenizer: Tokenizer, path: Path) -> None:
    """Write `model` with one of the faults of WRONG."""
    spoil, of_tokenizer, kind, _ = WRONG[name]
    model = copy.deepcopy(model)
    model.config = copy.deepcopy(model.config)
    spoil(model)
    write_gguf(model, of_tokenizer(tokenizer) if of_tokenizer else tokenizer, path, kind=kind)


def wrong(source: Path, model: Decoder, options: Any) -> int:
    """Verify a file with each fault; returns how many pass, or fail without their cause."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, (*_, kind, words) in WRONG.items():
            path = Path(folder) / f"model-{'Q4_0' if kind == 'F16' else kind}.gguf"
            write_wrong(name, model, bundled(), path)
            report = verify(path, source, **options)
            named = words in report.cause
            missed += report.passed or not named
            print(f"{name:24} {'PASSED' if report.passed else 'failed'}: {report.verdict}", flush=True)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a model of real weights; none: random ones alone")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="beside the page in the package")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--runtime", default=None)
    arguments = parser.parse_args()
    texts: dict[str, str | None] = {"page": None}
    texts |= {path.stem[:10]: path.read_text(encoding="utf-8")[:20_000] for path in arguments.texts}
    options = {"threads": arguments.threads, "prefer": arguments.runtime}
    print(machine())
    print(
        "file, text, positions, KL from own numbers, at most, share, verdict, cost (KL, other tokens, perplexity), time"
    )
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, build) in enumerate(RANDOM.items()):
            torch.manual_seed(number)
            model, source = build(), Path(folder) / str(number)
            save_model(model, None, source)
            bundled().save(source)
            failed += right(model, source, OF_RANDOM, name, {"page": None}, options)
        print("\nwrong files of the first:")
        source = Path(folder) / "0"
        missed = wrong(source, load_model(source), options)
    if arguments.checkpoint:
        model = load_model(arguments.checkpoint, dtype=torch.float32).eval()
        failed += right(model, arguments.checkpoint, arguments.types, arguments.checkpoint.name, texts, options)
    print(f"\n{failed} right files rejected, {missed} of {len(WRONG)} wrong ones passed or without their cause")
    sys.exit(bool(failed or missed))


if __name__ == "__main__":
    main()
