"""Compare the ids of tokenizers with llama.cpp's, each written as a GGUF file and read back.

    python benchmarks/gguf_tokenizers.py DIRECTORY... [--random 1000]

DIRECTORY holds a tokenizer.json or a tokenizer.model, or folders with them. Beside the texts that an export is verified
on, random ones of several scripts and of the tokenizer's own special tokens are compared. It needs xllamacpp.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

from plmtune.errors import UserError
from plmtune.export import probe_texts
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.runtimes import open_runtime
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gguf_sentencepiece import as_in_llama_cpp
from plmtune.models.gguf_tokenizer import read_tokenizer
from plmtune.models.llama import llama
from plmtune.registry import component
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import load_tokenizer

SCRIPTS = (
    *(
        "abcdefghij XYZ  \n\t.,;:!?'\"()",
        "0123456789 .,",
        "你好世界今天天气很好。，",
        "αβγδ Привет мир שלום",
        "\n\n\n  \t\t  ",
    ),
    *("😀👍🏽🇩🇪\u200d\ufeff\x00\x01\x7f", "éüñ ǅ ﬁ Ⅷ ½ \u00a0\u3000", "theandofinginerisonatre "),
)


def random_texts(tokenizer: Tokenizer, count: int) -> list[str]:
    """Texts of up to eight runs of one script or a special token, none of which begins with bos."""
    chance = random.Random(0)
    whole = [*list(tokenizer.specials)[:20], *list(tokenizer.vocabulary.added)[:60]]
    texts: list[str] = []
    while len(texts) < count:
        parts = []
        for _ in range(chance.randint(1, 8)):
            script = chance.choice(SCRIPTS)
            run = "".join(chance.choice(script) for _ in range(chance.randint(1, 25)))
            parts.append(chance.choice(whole) if whole and chance.random() < 0.15 else run)
        if tokenizer.specials.get(parts[0]) != tokenizer.bos_id or tokenizer.bos_id is None:
            texts.append("".join(parts))
    return texts


def compare(tokenizer: Tokenizer, path: Path, count: int) -> str:
    """Write a small model with a tokenizer; return what differs."""
    with torch.device("cpu"):
        model = llama(
            tokenizer.vocab_size,
            attention=component("attention", "gqa", num_kv_heads=1, head_dim=32),
            ffn=component("ffn", "swiglu", hidden_dim=32),
            embed_dim=32,
            num_layers=1,
            num_heads=1,
            max_seq_len=512,
        )
    notes = write_gguf(model, tokenizer, path, kind="F16", name=path.stem)
    lines = [*probe_texts.lines(tuple(tokenizer.specials)), *probe_texts.DECOMPOSED]
    lines += random_texts(tokenizer, count)
    with opened_gguf(path) as file:
        kind, pre = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        back = read_tokenizer(file, tokenizer.vocab_size)
    with open_runtime(path, threads=1, prefer="xllamacpp") as runtime:
        theirs = [runtime.encode(line) for line in lines]

    def differing(one: Tokenizer) -> list[int]:
        ours = [one.with_bos(one.encode(line, specials=True)) for line in lines]
        return [at for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]

    counts = {
        "checkpoint": differing(tokenizer),
        "checkpoint with llama.cpp's spaces": differing(as_in_llama_cpp(tokenizer)),
        "read back": differing(back),
    }
    said = "; ".join(
        f"{name} {len(other)}" + (f" {lines[other[0]]!r:.50}" if other else "") for name, other in counts.items()
    )
    return f"{kind}/{pre}, of {len(lines)} texts differ: {said}" + "".join(f"\n    note: {note}" for note in notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", metavar="DIRECTORY")
    parser.add_argument("--random", type=int, default=1000, metavar="N", help="Compare so many random texts, too.")
    options = parser.parse_args()
    names = ("tokenizer.json", "tokenizer.model")
    found = dict.fromkeys(
        file.parent for place in options.places for name in names for file in sorted(Path(place).rglob(name))
    )
    for directory in found:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = compare(load_tokenizer(directory), Path(folder) / "model.gguf", options.random)
            except UserError as error:
                said = f"refused: {error}"
        print(f"{directory}: {said}\n    ({time.perf_counter() - begun:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
