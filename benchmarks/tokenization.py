"""Tokenization: plmtune's encode_batch against the `tokenizers` library's: same vocabulary, text and ids.

    python benchmarks/tokenization.py [--quick] [--data DIRECTORY]

The vocabulary is Qwen2's (151,643 ranks) where DIRECTORY holds tokenizers/qwen.tiktoken, else the bundled
one; the text is DIRECTORY/pretrain (English reStructuredText, Chinese poetry) where it is there, else the
standard library. Both sides keep their defaults and all cores; every other round turns the order round.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import tokenizers
from side_by_side import machine, medians

from plmtune.registry import load
from plmtune.tokenizers.bpe import Vocabulary
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled, qwen2

DATA = Path(__file__).parents[2] / "shared" / "data"
DOCUMENT_CHARS = 4_000  # about the mean of a web corpus


def documents(text: str, limit: int) -> list[str]:
    """Cut a corpus after the line that fills a document."""
    cut, start = [], 0
    while start < min(len(text), limit):
        end = text.find("\n", start + DOCUMENT_CHARS) + 1 or len(text)
        cut.append(text[start:end])
        start = end
    return cut


def corpora(data: Path, limit: int) -> dict[str, list[str]]:
    names = {"English rst": "python311_docs_rst_11mb.txt", "Chinese poetry": "zh_poetry_10mb.txt"}
    found = {name: data / "pretrain" / file for name, file in names.items()}
    texts = {name: path.read_text(encoding="utf-8") for name, path in found.items() if path.is_file()}
    return {name: documents(text, limit) for name, text in texts.items()} or {
        "standard library": documents("\n".join(load("data", "stdlib")().documents(False)), limit)
    }


def measure(ours: Tokenizer, theirs: tokenizers.Tokenizer, texts: list[str], rounds: int) -> dict[str, float]:
    """Median seconds of each side, after a look that the ids are equal."""
    # The same pieces, by a pattern that is not known to take time in proportion to the text.
    assert isinstance(ours.vocabulary, Vocabulary)
    unknown = Tokenizer(replace(ours.vocabulary, pattern=rf"{ours.vocabulary.pattern}|[\s\S]"))
    for ids, same, encoding in zip(
        ours.encode_batch(texts), unknown.encode_batch(texts), theirs.encode_batch_fast(texts), strict=True
    ):
        assert ids.tolist() == same.tolist() == encoding.ids
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.encode_batch(texts),
        "unknown pattern": lambda: unknown.encode_batch(texts),
        "encode_batch": lambda: theirs.encode_batch(texts, add_special_tokens=False),
        "encode_batch_fast": lambda: theirs.encode_batch_fast(texts, add_special_tokens=False),
    }
    return medians(calls, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less text, fewer rounds")
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    ranks = args.data / "tokenizers" / "qwen.tiktoken"
    ours = qwen2(str(ranks)) if ranks.is_file() else bundled()
    with tempfile.TemporaryDirectory() as folder:
        ours.save(Path(folder))
        theirs = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    print(machine())
    print(f"tiktoken {version('tiktoken')}, tokenizers {version('tokenizers')}, {ours.num_tokens:,} tokens\n")
    print("corpus                MB        ours  encode_batch  ratio  encode_batch_fast  ratio  unknown pattern  ratio")
    for name, texts in corpora(args.data, 1_000_000 if args.quick else 8_000_000).items():
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        seconds = measure(ours, theirs, texts, 3 if args.quick else 7)
        rate = {side: megabytes / value for side, value in seconds.items()}
        print(
            f"{name:<18}{megabytes:>6.1f}{rate['ours']:>7.1f} MB/s"
            f"{rate['encode_batch']:>9.1f} MB/s{rate['ours'] / rate['encode_batch']:>6.1f}x"
            f"{rate['encode_batch_fast']:>14.1f} MB/s{rate['ours'] / rate['encode_batch_fast']:>6.1f}x"
            f"{rate['unknown pattern']:>12.1f} MB/s{rate['unknown pattern'] / rate['ours']:>6.2f}x"
        )


if __name__ == "__main__":
    main()
