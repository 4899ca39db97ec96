"""What ``plmtune tokenizer compress`` does: count, choose a size, show the choice, write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plmtune.cli.find_tokenizer import find_tokenizer
from plmtune.cli.options import names_files
from plmtune.data.token_counts import count_tokens, find_data
from plmtune.errors import UserError
from plmtune.io import hub, terminal
from plmtune.io.tables import Cell, Table, numbers, show
from plmtune.models.directory import check_free, new_directory
from plmtune.ranges import Range
from plmtune.registry import describe_components
from plmtune.tokenizers.compress import Compressor, Order, embedding_share
from plmtune.tokenizers.compress_plot import draw
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.units import show_count, show_number_of

_SIZES = (512, 1024, 2048, 4096, 8192, 16384, 24576, 32768, 49152, 65536, 98304, 131072, 196608, 262144)
_SHARE = Range(above=0, most=1)


@dataclass(frozen=True)
class Rule:
    """The one option that chooses the size of the vocabulary."""

    vocab_size: int | None
    coverage: float | None
    share: float | None

    @classmethod
    def of(cls, vocab_size: int | None, coverage: float | None, share: float | None) -> Rule:
        """Check what was given; UserError if it is not one option, or an impossible number."""
        given = {"--vocab-size": vocab_size, "--coverage": coverage, "--max-embedding-share": share}
        names = [f"{name} {value}" for name, value in given.items() if value is not None]
        if len(names) != 1:
            said = f"{' and '.join(names)} are given" if names else "none is given"
            raise UserError(
                f"Give one of --vocab-size N, --coverage X and --max-embedding-share X, which chooses the size: {said}."
            )
        for name, value in (("--coverage", coverage), ("--max-embedding-share", share)):
            if value is not None and not (_SHARE.allows(value) and (name == "--coverage" or value < 1)):
                most = "at most 1" if name == "--coverage" else "below 1"
                raise UserError(f"{name} {value} must be above 0 and {most}: 0.95 is 95%.")
        return cls(vocab_size, coverage, share)


@dataclass(frozen=True)
class _Model:
    """A checkpoint whose rows are gathered.

    Attributes:
        keys: config.json, and generation_config.json if there is one, by the name of the file.
        row, others: its parameters a token, and all that do not depend on the vocabulary.
    """

    directory: Path
    keys: dict[str, dict[str, Any]]
    row: int
    others: int
    num_rows: int


def compress_tokenizer(
    source: str, names: tuple[str, ...], out: Path, rule: Rule, *, overwrite: bool, **reading: Any
) -> None:
    """Compress a tokenizer, or a checkpoint with its tokenizer, by the tokens of data; see the command."""
    skip_bad = reading.pop("skip_bad")
    check_free(out, overwrite)
    tokenizer, model = _open(source)
    if rule.share is not None and model is None:
        raise UserError(
            f"--max-embedding-share {rule.share}: {source} is a tokenizer without a model, whose parameters would be "
            "compared. Give a checkpoint, or --vocab-size N."
        )
    compressor = Compressor(tokenizer, _named_ids(model))
    _check_size(rule, compressor, tokenizer, model, source)
    try:
        data = find_data(names, tokenizer, **reading)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    counted = count_tokens(data, skip_bad=skip_bad)
    order = compressor.order(counted.counts)
    size = _choose(rule, order, model)
    if size > len(order.ids):
        order = compressor.order(counted.counts, size)
    if size > len(order.ids):
        counted.notes.append(f"Text is encoded to {len(order.ids):,} of the tokens; all of these stay.")
        size = len(order.ids)
    if size >= tokenizer.num_tokens:
        raise UserError(f"{source}: all {tokenizer.num_tokens:,} tokens are needed for that. Nothing is written.")
    made = compressor.compress(order.ids[:size])
    notes = [*counted.notes, *_notes(compressor, order, size)]
    _show(order, size, tokenizer, model, counted.tokens)
    with new_directory(out, overwrite=overwrite) as directory:
        made.save(directory)
        if model is not None:
            _write_model(model, made, directory)
            if padding := model.num_rows - tokenizer.num_tokens:
                notes.append(f"{show_number_of(padding, 'padding row')} of the model left out.")
        title = f"{Path(source).name}: {show_count(counted.tokens)} tokens counted"
        parameters = None if model is None else (model.row, model.others)
        draw(order, size, tokenizer.num_tokens, parameters, directory / "vocabulary.png", title)
    terminal.echo(f"{out}: {size:,} of {tokenizer.num_tokens:,} tokens; plot: {out / 'vocabulary.png'}")
    for note in notes:
        terminal.echo(note)


def _open(source: str) -> tuple[Tokenizer, _Model | None]:
    """Return a tokenizer, and the model if `source` is a checkpoint."""
    named = source in describe_components()["tokenizer"]
    if named or names_files(source) or not (Path(source).exists() or hub.parse(source)):
        return find_tokenizer(source), None
    from plmtune.models import adapters
    from plmtune.models.checkpoint_files import CONFIG, checkpoint_directory, read_json
    from plmtune.models.hf_config import read_formats
    from plmtune.models.kept_rows import row_parameters

    directory = checkpoint_directory(source)
    tokenizer = adapters.load_model_tokenizer(directory)
    if adapters.holds_adapters(directory):
        raise UserError(
            f"{directory} holds adapters, which stand beside all rows of their base. Merge them first: plmtune merge "
            f"{source} OUT"
        )
    if read_formats(directory)[0]:
        raise UserError(
            f"{directory} holds a quantized model, whose rows cannot be gathered. Compress the checkpoint that was "
            "quantized, and quantize the result."
        )
    config = adapters.read_model_config(directory)
    files = [name for name in (CONFIG, "generation_config.json") if (directory / name).is_file()]
    keys = {name: read_json(directory, name) for name in files}
    row, others = row_parameters(config, str(directory / CONFIG))
    if tokenizer.num_tokens > config["vocab_size"]:
        raise UserError(
            f"{directory} has {config['vocab_size']:,} rows for the {tokenizer.num_tokens:,} tokens of its tokenizer."
        )
    return tokenizer, _Model(directory, keys, row, others, config["vocab_size"])


def _named_ids(model: _Model | None) -> set[int]:
    if model is None:
        return set()
    from plmtune.models.kept_rows import named_ids, refuse_sequences

    for name, keys in model.keys.items():
        refuse_sequences(keys, model.directory / name)
    return {identity for keys in model.keys.values() for identity in named_ids(keys)}


def _check_size(rule: Rule, compressor: Compressor, tokenizer: Tokenizer, model: _Model | None, source: str) -> None:
    """Refuse what cannot be reached, before any text is read."""
    least = len(compressor.always)
    size = rule.vocab_size
    if size is not None and size < least:
        raise UserError(
            f"--vocab-size {size:,} is below the {least:,} tokens of {source} that always stay: "
            f"{compressor.describe()}."
        )
    if size is not None and size >= tokenizer.num_tokens:
        raise UserError(f"--vocab-size {size:,} must be below the {tokenizer.num_tokens:,} tokens of {source}.")
    if rule.share is not None and model is not None:
        share = embedding_share(least, model.row, model.others)
        now = embedding_share(model.num_rows, model.row, model.others)
        if rule.share < share:
            raise UserError(
                f"--max-embedding-share {rule.share} cannot be reached: the {least:,} tokens of {source} that always "
                f"stay ({compressor.describe()}) have {share:.2%} of the parameters."
            )
        if rule.share >= now:
            raise UserError(
                f"--max-embedding-share {rule.share}: embedding and head of {source} have {now:.1%} of its parameters "
                "as they are. There is nothing to compress."
            )


def _choose(rule: Rule, order: Order, model: _Model | None) -> int:
    if rule.vocab_size is not None:
        return rule.vocab_size
    if rule.coverage is not None:
        return order.size_of_coverage(rule.coverage)
    assert rule.share is not None and model is not None
    return order.size_of_share(rule.share, model.row, model.others)


def _notes(compressor: Compressor, order: Order, size: int) -> list[str]:
    notes = []
    if lacking := len(compressor.lacking_bytes):
        notes.append(f"The tokenizer has no token for {show_number_of(lacking, 'byte')} of UTF-8, before and after.")
    if not compressor.num_bytes:
        notes.append("The tokenizer has no tokens of bytes: all its single characters stay.")
    if unseen := int((order.counts[order.least : size] == 0).sum()):
        notes.append(f"{unseen:,} of the tokens do not occur in the data: parts of others, and what fills the size.")
    return notes


def _show(order: Order, size: int, tokenizer: Tokenizer, model: _Model | None, tokens: int) -> None:
    """Print coverage and shares at several sizes."""
    rows = tokenizer.num_tokens if model is None else model.num_rows
    sizes = sorted({*(each for each in _SIZES if order.least < each < tokenizer.num_tokens), size})
    names = {"vocabulary": 0, "coverage": 0} | ({} if model is None else {"embedding and head": 0, "parameters": 1})
    table = Table([*numbers(names), ""])
    for each in [*sizes, rows]:
        coverage = order.coverage[min(each, len(order.ids))]
        cells = [f"{each:,}", f"{coverage:.2%}"]
        if model is not None:
            share = embedding_share(each, model.row, model.others)
            cells += [f"{share:.2%}", show_count(each * model.row + model.others)]
        mark = "chosen" if each == size else "now" if each == rows else ""
        table.add(*(Cell(cell, "bold" if mark == "chosen" else "") for cell in (*cells, mark)))
    show(table, f"{tokens:,} tokens counted")


def _write_model(model: _Model, made: Tokenizer, directory: Path) -> None:
    from plmtune.models import hf
    from plmtune.models.checkpoint_files import CONFIG, write_json
    from plmtune.models.kept_rows import keep_rows, renumbered

    ids = made.kept[0].ids
    new = {old: at for at, old in enumerate(ids)}
    loaded = hf.load_model(model.directory)
    keep_rows(loaded, ids)
    keys = {name: renumbered(held, new) for name, held in model.keys.items()}
    own = ("plmtune", "quantization_config")
    loaded.source_keys = {name: value for name, value in keys.pop(CONFIG).items() if name not in own}
    loaded.source_keys["vocab_size"] = len(ids)
    hf.save_model(loaded, None, directory)
    for name, held in keys.items():
        write_json(directory / name, held)
