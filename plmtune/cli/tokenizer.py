"""`plmtune tokenizer`: train a BPE, compress a tokenizer, and look at what one does to a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plmtune.cli.find_tokenizer import find_tokenizer
from plmtune.cli.options import PATH, option, overwrite_option, text_key_option, text_options
from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.terminal import Progress

if TYPE_CHECKING:
    from plmtune.data.sources import Piece

_BLOCK_CHARS = 16_384
_LINE_CHARS = 1 << 22  # a longer line is cut
_HOLDOUT_EVERY = 50
_HOLDOUT_CHARS = 4_000_000


@click.group()
def tokenizer() -> None:
    """Train, compress and inspect tokenizers.

    \b
    plmtune tokenizer train corpus/*.txt --vocab-size 8192 --out tokenizers/mine
    plmtune tokenizer compress runs/demo/latest corpus/*.txt --coverage 0.95 --out models/compact
    plmtune tokenizer inspect bundled "def main():"
    """


@tokenizer.command(short_help="Train a byte-level BPE on files or the standard library.")
@click.argument("files", nargs=-1, type=PATH)
@option("--vocab-size N", "Learn a vocabulary of N tokens, with bytes and special tokens.", type=int, required=True)
@option("--out PATH", "Write the tokenizer to this directory.", required=True)
@option("--stdlib", "Train on the Python standard library.")
@text_key_option
@option("--skip-bad", "Skip and count broken rows instead of stopping.")
def train(files: tuple[Path, ...], vocab_size: int, out: Path, stdlib: bool, text_key: str, skip_bad: bool) -> None:
    """Train a byte-level BPE on FILES (text, JSONL, Parquet) or on the Python standard library.

    Every 50th block of text is held out to measure bytes per token. The directory then serves
    as tokenizer=file tokenizer.path=DIRECTORY.

    \b
    plmtune tokenizer train corpus/*.txt --vocab-size 8192 --out tokenizers/mine
    """
    if bool(files) == stdlib:
        raise UserError("Give FILES or --stdlib to train on, one of the two.")
    if (out / "tokenizer.json").exists():
        raise UserError(f"{out} holds a tokenizer already: choose another directory or remove it.")
    from plmtune.registry import load
    from plmtune.tokenizers.train_bpe import train_bpe

    if stdlib:
        source = load("data", "stdlib")()
    else:
        source = load("data", "files")(paths=[str(path) for path in files], text_key=text_key)
    held_out: list[str] = []
    chars = 0

    def blocks() -> Iterator[str]:
        nonlocal chars
        left = _HOLDOUT_CHARS
        for number, block in enumerate(_blocks(chain.from_iterable(source.pieces(skip_bad))), start=1):
            if number % _HOLDOUT_EVERY == 0 and left > 0:
                held_out.append(block)
                left -= len(block)
            else:
                chars += len(block)
                line.update(f"{chars / 1e6:.1f} million characters read")
                yield block
        line.update(f"{chars / 1e6:.1f} million characters read; learning merges")

    with Progress() as line:
        try:
            made = train_bpe(blocks(), vocab_size)
        except ValueError as error:
            raise UserError(f"tokenizer train: {error}.") from error
    made.save(out)
    terminal.echo(f"{out}: {made.num_tokens:,} tokens, learned from {chars:,} characters")
    if held_out:
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in held_out)
        num_tokens = sum(len(ids) for ids in made.encode_batch(held_out))
        terminal.echo(f"{num_bytes / num_tokens:.3f} bytes a token on {num_bytes:,} bytes of held-out text")
    else:
        terminal.echo(f"no text was held out: fewer than {_HOLDOUT_EVERY} blocks of {_BLOCK_CHARS:,} characters")


@tokenizer.command(short_help="Keep a tokenizer's most frequent tokens, and their rows of a model.")
@click.argument("source", metavar="CHECKPOINT|TOKENIZER")
@click.argument("names", nargs=-1, metavar="FILE|FOLDER|GLOB...")
@option("--out DIR", "Write the tokenizer, and the checkpoint if one is given, to this directory.", required=True)
@option("--vocab-size N", "Keep N tokens.")
@option("--coverage SHARE", "Keep as many tokens as cover this share of the counted ones.", type=float)
@option(
    "--max-embedding-share SHARE", "Keep as many as give embedding and head this share of all parameters.", type=float
)
@text_options
@overwrite_option
def compress(
    source: str,
    names: tuple[str, ...],
    out: Path,
    vocab_size: int | None,
    coverage: float | None,
    max_embedding_share: float | None,
    overwrite: bool,
    **reading: Any,
) -> None:
    """Count the tokens of text, and keep the most frequent ones of a tokenizer, or of a checkpoint and its tokenizer.

    The data are text files, rows with text, conversations, or shards of plmtune data prepare. All bytes, special and
    added tokens stay, and with each token the parts that it is joined from, so every text can still be encoded. The
    rows of the kept tokens are gathered from the checkpoint.

    \b
    plmtune tokenizer compress runs/demo/latest corpus/*.txt --coverage 0.95 --out models/compact
    plmtune tokenizer compress qwen.tiktoken corpus/*.txt --vocab-size 32768 --out tokenizers/compact
    """
    from plmtune.cli.compress_tokenizer import Rule, compress_tokenizer

    rule = Rule.of(vocab_size, coverage, max_embedding_share)
    compress_tokenizer(source, names, out, rule, overwrite=overwrite, **reading)


@tokenizer.command(short_help="Show the ids and pieces of a text.")
@click.argument("name")
@click.argument("text")
@option("--specials", "Encode special tokens in TEXT as special tokens.")
def inspect(name: str, text: str, specials: bool) -> None:
    """Show the ids and pieces of TEXT; NAME is bundled, byte, qwen2, or a tokenizer's file or directory.

    \b
    plmtune tokenizer inspect bundled "def main():"
    """
    found = find_tokenizer(name)
    ids = found.encode(text, specials=specials)
    terminal.echo(f"{found.num_tokens:,} tokens in {found.vocab_size:,} rows, end of document {found.eos_id}")
    terminal.echo(f"{len(ids)} ids for {len(text.encode('utf-8', 'replace'))} bytes")
    for identity in ids:
        piece = found.decode_bytes([identity])
        try:
            shown = repr(piece.decode("utf-8"))
        except UnicodeDecodeError:
            shown = repr(piece)  # part of a character
        terminal.echo(f"{identity:>8}  {shown}")


def _blocks(pieces: Iterable[Piece]) -> Iterator[str]:
    """Cut documents after the line that fills a block, so that a part of one large file can be held out."""
    rest = ""
    for text, ends in pieces:
        rest, start = rest + text, 0
        while end := rest.find("\n", start + _BLOCK_CHARS) + 1:
            yield rest[start:end]
            start = end
        rest = rest[start:]
        if rest and (ends or len(rest) > _LINE_CHARS):
            yield rest
            rest = ""
