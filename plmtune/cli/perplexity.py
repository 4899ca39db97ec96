"""``plmtune perplexity``: how well a checkpoint predicts text."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from plmtune import dtypes
from plmtune.cli import options
from plmtune.cli.options import option
from plmtune.errors import UserError
from plmtune.io import terminal
from plmtune.io.terminal import Progress

if TYPE_CHECKING:
    from plmtune.evaluation.perplexity import Perplexity


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[CHECKPOINT] FILE|FOLDER|GLOB...")
@option("--window N", "Read N tokens at once (default: the model's context).")
@option(
    "--stride N", "Score the last N tokens of each window, given those before them (default: --window, the fastest)."
)
@options.text_options
@option("--limit-documents N", "Read at most N documents of each file.")
@options.dtype_option
@options.print_json_option
@options.device_option
@options.import_option
def perplexity(
    words: tuple[str, ...],
    window: int | None,
    stride: int | None,
    limit_documents: int | None,
    dtype: str | None,
    as_json: bool,
    device: str | None,
    **reading: Any,
) -> None:
    """Measure loss, perplexity and bits per byte of text, document by document.

    CHECKPOINT defaults to the newest finished run. A text file is one document; each row of a JSONL, CSV or Parquet
    file is one. Files may be compressed (.gz, .zst). Each token is scored once.

    \b
    plmtune perplexity runs/demo/latest book.txt
    plmtune perplexity runs/demo/latest book.txt --window 1024 --stride 512
    """
    checkpoint, files = options.model_first(words, "perplexity CHECKPOINT FILE...")
    if not files:
        raise UserError(f"Name the text to measure: plmtune perplexity {checkpoint} FILE...")

    import plmtune
    from plmtune.data.text_files import Files
    from plmtune.data.text_files import files as find
    from plmtune.evaluation.perplexity import Perplexity
    from plmtune.evaluation.perplexity import perplexity as measure
    from plmtune.evaluation.scoring import Scorer
    from plmtune.units import show_number_of

    skip_bad, separator = reading.pop("skip_bad"), reading.pop("separator")
    where = options.find_device(device)
    try:
        source = find(files, separator=separator, **reading)
    except (UserError, ValueError) as error:
        said = _in_options(str(error).rstrip("."))
        raise UserError(f"{said}{'' if said.endswith('?') else '.'} Nothing was measured.") from error
    assert isinstance(source, Files)  # its paths go with its streams
    model, tokenizer = plmtune.load(checkpoint, where, dtypes.from_name(dtype) if dtype else None)
    window = model.max_seq_len if window is None else window
    stride = window if stride is None else stride
    if window > model.max_seq_len:
        raise UserError(
            f"--window {window} is more than the {model.max_seq_len} tokens that {checkpoint} takes at once."
        )
    if stride > window:
        raise UserError(f"--stride {stride} is more than --window {window}: tokens between windows would be left out.")
    scorer = Scorer(model)
    measured: dict[str, Perplexity] = {}
    unread: list[str] = []
    for path, documents in zip(source.paths, source.streams(skip_bad), strict=True):
        try:
            _check_text(path, reading)
            with Progress() as line:
                line.update("reading", str(path))
                measured[str(path)] = measure(
                    model,
                    tokenizer,
                    islice(documents, limit_documents),
                    window=window,
                    stride=stride,
                    scorer=scorer,
                    progress=functools.partial(_update, line, str(path), time.monotonic()),
                )
        except UserError as error:  # of this file: the others are measured all the same
            unread.append(_in_options(str(error)))
        except ValueError as error:
            raise UserError(f"{path}: {error}.") from error
    total = sum(measured.values(), Perplexity())
    if not total.tokens:
        raise UserError("\n".join(unread) or f"{', '.join(files)}: there is no text to measure.")
    if source.skipped:
        terminal.say(f"{show_number_of(source.skipped, 'bad row')} left out")
    if source.unused:
        terminal.say(source.unused.describe())
    how = {"checkpoint": checkpoint, "window": window, "stride": stride}
    if as_json:
        files_of = {path: _figures(found) for path, found in measured.items()}
        click.echo(json.dumps({**how, "total": _figures(total), "files": files_of}, indent=2, allow_nan=False))
    else:
        _print(measured, total, window, stride)
    if unread:
        raise UserError("\n".join([*unread, f"Not measured: {len(unread)} of {len(source.paths)} files."]))


def _check_text(path: Path, reading: Mapping[str, Any]) -> None:
    """Refuse a binary file by its first bytes, before its encoding is blamed."""
    from plmtune.data.row_files import kind_of, read_bytes

    kind = kind_of(path) if reading["format"] == "auto" else reading["format"]
    wide = any(size in reading["encoding"] for size in ("16", "32"))
    if kind != "parquet" and not wide and b"\0" in next(read_bytes(path), b""):
        raise UserError(f"{path} looks binary: it holds zero bytes. If it is text in UTF-16, give --encoding utf-16.")


def _in_options(message: str) -> str:
    """Have what the reader of a config's data says name the options alone."""
    message = re.sub(r"encoding=(.*) \(--encoding\)", r"--encoding \1", message)
    message = message.replace("separator is the empty text; leave it out (null)", "--separator is empty: leave it out")
    return re.sub(r"\b(?:text_key|skip_bad) \((--[\w-]+)\)", r"\1", message)


def _update(line: Progress, path: str, began: float, found: Perplexity) -> None:
    rate = found.tokens / max(time.monotonic() - began, 1e-9)
    line.update(f"loss {found.loss:.4f}", f"{found.tokens:,} tokens", f"{rate:,.0f} tokens/s", path)


def _figures(found: Perplexity) -> dict[str, float | None]:
    """What JSON can hold of it: a file without text has no loss, and the worst perplexities are no number."""
    named = {name: getattr(found, name) for name in ("loss", "perplexity", "bits_per_byte")}
    figures: dict[str, float] = {**named, **asdict(found)}
    return {name: value if abs(value) < float("inf") else None for name, value in figures.items()}


def _print(measured: dict[str, Perplexity], total: Perplexity, window: int, stride: int) -> None:
    from plmtune.io.tables import Column, Table, numbers, show

    # name: the order in which a narrow terminal leaves it out; 0 stays
    figures = {"loss": 0, "perplexity": 0, "bits per byte": 0, "tokens": 3, "bytes": 1, "documents": 2}
    table = Table([Column("text", key=True), *numbers(figures)])
    rows = [*measured.items(), *([("all", total)] if len(measured) > 1 else [])]
    for name, found in rows:
        counts = (f"{count:,}" for count in (found.tokens, found.bytes, found.documents))
        rates = (f"{found.loss:.4f}", f"{found.perplexity:.2f}", f"{found.bits_per_byte:.4f}")
        table.add(name, *(rates if found.tokens else ("-", "-", "-")), *counts)
    context = f"; each token has at least {window - stride:,} before it in its document" if stride < window else ""
    show(table, f"window {window:,}, stride {stride:,} tokens{context}")
