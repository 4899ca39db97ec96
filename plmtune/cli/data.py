"""``plmtune data``: make token shards, and look at what they, conversations and pairs hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from plmtune.cli import short
from plmtune.cli.find_tokenizer import find_tokenizer
from plmtune.cli.options import PATH, import_option, option, text_options
from plmtune.errors import UserError, refuse_pipe
from plmtune.io import terminal

if TYPE_CHECKING:
    from rich.text import Text

    from plmtune.data.batches import Row
    from plmtune.data.shard_manifest import Manifest
    from plmtune.data.shards import Split
    from plmtune.data.sources import Source
    from plmtune.tokenizers.tokenizer import Tokenizer

_COLOURS = ("cyan", "yellow", "green", "magenta")


@click.group()
def data() -> None:
    """Prepare token shards; inspect them, conversations and preference pairs.

    \b
    plmtune data prepare corpus/*.txt
    plmtune data inspect chats.jsonl
    """


@data.command(short_help="Turn text, JSONL or Parquet files into token shards.")
@click.argument("files", nargs=-1, metavar="[FILE|FOLDER|GLOB]... | CONFIG.yaml [KEY=VALUE]...")
@option("--stdlib", "Read the Python standard library instead of files.")
@option("--tokenizer NAME|PATH", "Encode with this tokenizer (plmtune ls tokenizer).", default="bundled")
@option("--out DIR", "Write the shards to a directory in DIR.", default="runs/data")
@text_options
@option("--holdout FLOAT", "Keep this share for validation.", default=0.01)
@option("--holdout-by documents|tail", "Hold out whole documents, or the tail of each file.", default="documents")
@import_option
@click.pass_context
def prepare(
    context: click.Context, files: tuple[str, ...], stdlib: bool, tokenizer: str, out: Path, **reading: Any
) -> None:
    """Turn text, JSONL or Parquet files (also .gz, .zst) into token shards.

    \b
    plmtune data prepare corpus/*.txt --separator "\\n\\n"
    plmtune data prepare dump.jsonl.zst --text-key content --skip-bad
    plmtune data prepare conf/mine.yaml          every source of a config
    """
    if files and files[0].endswith((".yaml", ".yml")) and all("=" in text for text in files[1:]):
        goes = "goes with files; with a config set its key, as preparation.holdout=0.1"
        _refuse_given(context, context.params.keys() - {"files"}, goes)
        _prepare_from_config(files[0], files[1:])
        return
    if bool(files) == stdlib:
        raise UserError("Name files, folders or globs to prepare, or --stdlib (and not both)")
    from plmtune.registry import load

    how = {name: reading.pop(name) for name in ("holdout", "holdout_by", "skip_bad")}
    try:
        source: Source = load("data", "stdlib")() if stdlib else load("data", "files")(paths=files, **reading)
        _prepare({source.name: source}, find_tokenizer(tokenizer), out, **how)
    except ValueError as error:
        raise UserError(str(error)) from error


def _refuse_given(context: click.Context, names: Iterable[str], why: str) -> None:
    """Refuse those of the options that the person gave."""
    for name in sorted(names):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UserError(f"--{name.replace('_', '-')} {why}")


def _prepare_from_config(path: str, overrides: tuple[str, ...]) -> None:
    """Prepare every source of a run's config, as the run itself would."""
    from plmtune.config import compose
    from plmtune.data.sources import named_sources

    cfg = compose.compose(path, (), overrides)
    how = asdict(cfg.preparation)
    try:
        sources, tokenizer = named_sources(compose.build("data", cfg.data)), compose.build("tokenizer", cfg.tokenizer)
        _prepare(sources, tokenizer, Path(how.pop("directory")), **how)
    except ValueError as error:
        raise UserError(f"{path}, key preparation: {error}") from error


def _prepare(sources: dict[str, Source], tokenizer: Tokenizer, root: Path, **how: Any) -> None:
    from plmtune.data.prepare import prepare
    from plmtune.data.shards import Shards

    for name, source in sources.items():
        directory = prepare(source, tokenizer, root, **how)
        manifest = Shards.open(directory, tokenizer_fingerprint=tokenizer.fingerprint, verify=False).manifest
        train, validation = manifest.splits["train"], manifest.splits["validation"]
        terminal.echo(
            f"{name}: {train.tokens:,} training tokens, {validation.tokens:,} held out, "
            f"{manifest.documents:,} documents{manifest.left_out()}\n{short(directory)}"
        )


@data.command(short_help="Verify token shards, or show conversations, pairs or a round.")
@click.argument("path", type=PATH)
@option("--split train|validation", "Show this part of a prepared directory.", default="train")
@option("--document N", "Show the text of document N.", type=int)
@option("--window N", "Show window N with a colour for each document.", type=int)
@option("--seq-len N", "Use windows of N tokens.", type=int, default=128)
@option("--mask", "Show the attention mask of --window with documents kept apart.")
@option("--row N", "Show row N of a file.", default=1)
@option(
    "--tokenizer NAME|PATH", "Encode a file with this tokenizer, or that of a checkpoint or run.", default="bundled"
)
@option("--template NAME|FILE", "Render a file with this chat template (default: the tokenizer's own).")
@option("--train-on all|last", "Mark as trained all answers, or the last of each conversation.", default="all")
@import_option
@click.pass_context
def inspect(context: click.Context, path: Path, **options: Any) -> None:
    """Verify a prepared directory and show what it holds, or show a file of conversations, pairs or a round.

    \b
    plmtune data inspect runs/data/stdlib-ae3f084abd98 --window 7
    plmtune data inspect chats.jsonl --row 3 --tokenizer runs/demo_sft/latest
    plmtune data inspect runs/demo_aries/latest/rounds/01/chains.jsonl
    """
    of_files = {name: options.pop(name) for name in ("row", "tokenizer", "template", "train_on")}
    refuse_pipe(path)
    is_file = path.is_file() or (bool(path.suffix) and not path.exists())
    other = "a directory of prepared tokens" if is_file else "a file of conversations or pairs"
    _refuse_given(context, options if is_file else of_files, f"goes with {other}, which {path} is not")
    if is_file:
        from plmtune.cli.inspect_rows import inspect_rows

        inspect_rows(path, **of_files)
    elif path.is_dir() and not (path / "manifest.json").exists():
        raise UserError(
            f"{path} is no directory of prepared tokens: it has no manifest.json. To look at rows, name "
            "one of its files"
        )
    else:
        _inspect_shards(path, **options)


def _inspect_shards(
    directory: Path, split: str, document: int | None, window: int | None, seq_len: int, mask: bool
) -> None:
    from plmtune.cli.inspect_rows import console_of_stdout
    from plmtune.data.shards import Shards, Windows
    from plmtune.tokenizers.tokenizer_files import load_tokenizer

    if mask and window is None:
        raise UserError("--mask needs --window N")
    if seq_len < 1:
        raise UserError(f"--seq-len {seq_len} must be at least 1")
    shards = Shards.open(directory)
    console = console_of_stdout()
    chosen: Split = getattr(shards, split)
    if document is None and window is None:
        _summary(shards.manifest)
        return
    tokenizer = load_tokenizer(directory / "tokenizer")
    if tokenizer.fingerprint != shards.manifest.tokenizer:
        raise UserError(
            f"{directory / 'tokenizer'} is damaged or another: its fingerprint is {tokenizer.fingerprint}, and the "
            f"manifest says {shards.manifest.tokenizer}. Prepare the text again"
        )
    rows = Windows(shards, chosen, seq_len, document_mask=True, whole=True)
    for name, asked, count in (("document", document, chosen.num_documents), ("window", window, rows.num_rows)):
        if asked is not None and not 0 <= asked < count:
            raise UserError(f"--{name} {asked}: {split} holds {name}s 0 to {count - 1}")
    if document is not None:
        ids = chosen.document(document, shards.eos_id)
        ids = ids[ids != shards.eos_id]
        text = terminal.shown(tokenizer.decode(ids.tolist()), sys.stdout)
        console.print(terminal.encodable(text, console.encoding), markup=False)
    if window is not None:
        row = rows.row(window)
        console.print(_coloured(row.tokens.tolist(), tokenizer))
        if mask:
            _print_mask(console, row)


def _summary(manifest: Manifest) -> None:
    from plmtune.io.tables import Table, numbers, show

    figures = {"tokens": 0, "documents": 0, "bytes": 0, "bytes/token": 1, "shards": 2}
    table = Table(["split", *numbers(figures)])
    for name, counts in manifest.splits.items():
        ratio = f"{counts.bytes / counts.tokens:.2f}" if counts.tokens else "-"
        counted = (f"{n:,}" for n in (counts.tokens, counts.documents, counts.bytes))
        table.add(name, *counted, ratio, str(len(counts.shards)))
    settings = ", ".join(f"{key} {value}" for key, value in manifest.settings.items())
    show(
        table,
        f"source: {manifest.source_description} ({manifest.source})",
        f"tokenizer: {manifest.tokenizer}, {manifest.vocab_size:,} rows, {manifest.dtype}",
        f"settings: {settings}{manifest.left_out() or '; no rows left out'}",
        "every shard has its size and hash, every id is in the vocabulary",
    )


def _coloured(ids: list[int], tokenizer: Tokenizer) -> Text:
    """Text of the ids, each document in the next colour behind the end token of the last."""
    from rich.text import Text

    def said(ids: list[int]) -> str:
        text = terminal.shown(tokenizer.decode(ids), sys.stdout)
        return terminal.encodable(text, terminal.encoding(sys.stdout))

    text = Text()
    start = documents = 0
    for index, token in enumerate(ids):
        if token == tokenizer.eos_id:
            text.append(said(ids[start:index]), style=_COLOURS[documents % len(_COLOURS)])
            text.append(said([token]) + "\n", style="reverse")
            start, documents = index + 1, documents + 1
    text.append(said(ids[start:]), style=_COLOURS[documents % len(_COLOURS)])
    return text


def _print_mask(console: Any, row: Row) -> None:
    from plmtune.data.batches import make_batch
    from plmtune.modules.segments import Segments

    segments = make_batch([row]).mask
    assert isinstance(segments, Segments)
    (mask,) = segments.dense
    # At most 64 rows of 64 signs, fewer on a narrow terminal: every stride-th token.
    stride = -(-len(mask) // min(64, terminal.columns(sys.stdout) or 64))
    for signs in mask[::stride, ::stride].tolist():
        console.print("".join("█" if seen else "." for seen in signs))
    if stride > 1:
        console.print(f"one sign stands for {stride} tokens")
