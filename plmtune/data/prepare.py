"""Text to token shards: the directory's name is a hash of everything that decides its content."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from plmtune.data.shard_manifest import FORMAT, SPLITS, Manifest, SplitCounts, dtype_for
from plmtune.data.shards import Shards, ShardWriter
from plmtune.data.sources import Piece, Prepared, Source
from plmtune.errors import UserError
from plmtune.io import checksummed_json, terminal
from plmtune.io.atomic import remove_empty_folders
from plmtune.io.lock import exclusive
from plmtune.io.signals import EXIT_STOPPED, StopSignals
from plmtune.io.spool import Document
from plmtune.io.terminal import Progress
from plmtune.ranges import AT_LEAST_1, SHARE, check
from plmtune.units import show_number_of

if TYPE_CHECKING:
    from plmtune.tokenizers.tokenizer import Tokenizer

GROUP = 1 << 22  # characters encoded at a time; a longer document is split, so that memory does not grow with it
_MAX_UNCUT = 16 << 20  # characters of a document that are searched for a place where it may be cut
_STATE = "progress.json"
_log = logging.getLogger(__name__)

Part = tuple[str, str, bool]  # split, a piece of a document, whether the document ends with it


class _Stopped(Exception):
    """A signal came."""


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    root: Path,
    *,
    holdout: float = 0.01,
    holdout_by: Literal["documents", "tail"] = "documents",
    skip_bad: bool = False,
    shard_tokens: int = 1 << 26,
    progress: bool = True,
) -> Path:
    """Encode a source into shards under `root`, unless they are there already; return their directory, NAME-HASH.

    Args:
        holdout: share kept for validation.
        holdout_by: documents: the hash of its text decides for each, so equal documents are in one split; the only
            document of a corpus is cut at its tail. tail: the last share of the characters of each file.
        skip_bad: count rows that cannot be read instead of raising.

    Raises:
        UserError: for text that cannot be read or is too short, and a `root` that cannot be written. Partial files
            are removed.
        SystemExit: with EXIT_STOPPED after a signal. Finished work is kept, and the same call resumes it.
    """
    check(SHARE, holdout=holdout)
    check(AT_LEAST_1, shard_tokens=shard_tokens)
    if isinstance(source, Prepared):
        Shards.open(source.directory, tokenizer_fingerprint=tokenizer.fingerprint, verify=False)
        return source.directory
    settings = {"holdout": holdout, "holdout_by": holdout_by, "skip_bad": skip_bad, "shard_tokens": shard_tokens}
    fingerprint = source.fingerprint()
    # "breaks": in earlier versions a document whose tail was held out had an end in both splits.
    key = json.dumps([FORMAT, "breaks", fingerprint, tokenizer.fingerprint, tokenizer.vocab_size, settings])
    target = root / f"{source.name}-{xxhash.xxh3_128_hexdigest(key.encode())[:12]}"
    if (target / "manifest.json").is_file():
        return target
    partial = root / f"{target.name}.partial"

    def encode(stop: StopSignals) -> None:
        def heed(pieces: Iterator[Piece]) -> Iterator[Piece]:
            for piece in pieces:
                if stop.heard:
                    raise _Stopped
                yield piece

        def streams() -> Iterator[Iterator[Piece]]:
            return map(heed, source.pieces(skip_bad))

        tail = holdout_by == "tail"
        parts = by_tail(streams, holdout) if tail else by_documents(chain.from_iterable(streams()), holdout, partial)
        with Progress(shown=progress) as line:
            counts = _write(parts, tokenizer, partial, shard_tokens, line, source.name)
        if not counts["train"].tokens:
            skipped = f" ({show_number_of(source.skipped, 'bad row')} left out)" if source.skipped else ""
            raise UserError(f"{source.describe()}: there is no text to train on{skipped}")
        tokenizer.save(partial / "tokenizer")  # the directory can be read without its config
        Manifest(
            format=FORMAT,
            name=source.name,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=dtype_for(tokenizer.vocab_size).str,
            source=fingerprint,
            source_description=source.describe(),
            settings=settings,
            skipped=source.skipped,
            unused=source.unused.counts,
            splits=counts,
        ).save(partial)
        (partial / _STATE).unlink(missing_ok=True)
        partial.replace(target)

    try:
        with remove_empty_folders(root):
            root.mkdir(parents=True, exist_ok=True)
            with exclusive(root / f".{target.name}.lock", f"prepares {target.name}"):
                if (target / "manifest.json").is_file():
                    return target  # another process prepared it while this one waited
                shutil.rmtree(target, ignore_errors=True)  # without a manifest
                partial.mkdir(exist_ok=True)
                _resumably(encode, source.name, partial)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror or error}") from error
    return target


def _resumably(encode: Callable[[StopSignals], None], name: str, partial: Path) -> None:
    """Encode into a directory that is removed at the end, unless a signal stops the encoding."""
    keep = False
    try:
        with StopSignals("keeping what is prepared; a second signal ends it at once.") as stop:
            encode(stop)
        if stop.heard:
            terminal.echo(f"{name}: stopped, all of it prepared. Run the same command again.", err=True)
            raise SystemExit(EXIT_STOPPED)
    except _Stopped:
        keep = (partial / _STATE).is_file()
        kept = f"; {partial} keeps what is prepared" if keep else ""
        terminal.echo(f"{name}: stopped{kept}. Run the same command again to resume.", err=True)
        raise SystemExit(EXIT_STOPPED) from None
    finally:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)  # not there after success


def _write(
    parts: Iterable[Part], tokenizer: Tokenizer, directory: Path, shard_tokens: int, line: Progress, name: str
) -> dict[str, SplitCounts]:
    """Encode the parts from where an earlier process stopped; the progress is saved with each shard."""
    writers, done = _resume(directory, dtype_for(tokenizer.vocab_size), shard_tokens)
    shards, characters, begun = 0, 0, time.monotonic()
    try:
        for number, group in enumerate(groups(parts, tokenizer), 1):
            if number > done:
                _encode(group, tokenizer, writers)
                done = number
            characters += sum(len(piece.text) for piece in group)
            tokens = sum(writer.counts.tokens for writer in writers.values()) / 1e6
            read = f"{characters / 1e6:.1f} million characters"
            line.update(f"{tokens:.1f} million tokens", read, f"{time.monotonic() - begun:.0f} s", name)
            if shards < (shards := sum(len(writer.counts.shards) for writer in writers.values())):
                _save_state(directory, writers, done)
        for writer in writers.values():
            writer.close()
    except _Stopped:
        if done:
            _save_state(directory, writers, done)
        raise
    finally:
        for writer in writers.values():
            writer.abandon()
    return {split: writer.counts for split, writer in writers.items()}


def _save_state(directory: Path, writers: dict[str, ShardWriter], done: int) -> None:
    state = {"groups": done, "of": GROUP, "splits": {split: writer.state() for split, writer in writers.items()}}
    checksummed_json.save(directory / _STATE, state)


def _resume(directory: Path, dtype: np.dtype[Any], shard_tokens: int) -> tuple[dict[str, ShardWriter], int]:
    """Return writers that resume where an earlier process stopped, and how many groups it encoded."""

    def new() -> dict[str, ShardWriter]:
        return {split: ShardWriter(directory, split, dtype, shard_tokens) for split in SPLITS}

    writers = new()
    try:
        state = checksummed_json.load(directory / _STATE)
        if state["of"] != GROUP:
            raise ValueError("it was made by another version")
        for split, writer in writers.items():
            writer.resume(state["splits"][split])
    except (OSError, ValueError, TypeError, KeyError) as error:
        if (directory / _STATE).exists():
            _log.warning("%s cannot be resumed (%s): preparing from the beginning", directory, error)
        writers = new()
    else:
        return writers, state["groups"]
    shutil.rmtree(directory)  # left by a process that was killed: this one holds the lock
    directory.mkdir()
    return writers, 0


def by_documents(pieces: Iterable[Piece], share: float, place: Path) -> Iterator[Part]:
    """Assign documents to splits by the hash of their text: those below `share` are held out.

    If none is below, the tail of the document with the lowest hash is held out, of the length that gives the share;
    this document waits until another is below. If all are below, the first is trained on up to its tail. A long
    document waits in a file in `place`.
    """
    if share == 0:
        yield from (("train", *piece) for piece in pieces)
        return
    lowest, total = 2.0, 0
    waiting: Document | None = None  # the lowest so far; none after a document fell below the share
    copies = 0  # of it, beside itself
    below = trained = False
    alone: list[Document] = []  # those below the share before there is any other
    for text in _documents(pieces, place):
        total += text.length
        value = text.share()
        if not trained and value < share:
            below = True
            alone.append(text)
            continue
        for held in alone:
            yield from _cut(held, 0)
        alone, trained = [], True
        if value < share:
            below = True
            yield from _cut(text, 0)
        elif below or value > lowest:
            yield from _cut(text, text.length)
            continue
        elif value == lowest:
            copies += 1
            continue
        # The waiting document is no longer the lowest.
        if waiting:
            for _ in range(copies + 1):
                yield from _cut(waiting, waiting.length)
        waiting, copies = None if below else text, 0
        lowest = value
    if waiting:
        for _ in range(copies):
            yield from _cut(waiting, waiting.length)
        yield from _cut(waiting, max(0, waiting.length - max(1, int(total * share))))
    for held in alone[1:]:
        yield from _cut(held, held.length if held.share() == alone[0].share() else 0)
    for held in alone[:1]:
        yield from _cut(held, held.length - max(1, int(held.length * share)))


def _documents(pieces: Iterable[Piece], place: Path) -> Iterator[Document]:
    document = Document(place)
    for text, ends in pieces:
        document.add(text)
        if ends:
            yield document
            document = Document(place)


def by_tail(read: Callable[[], Iterable[Iterable[Piece]]], share: float) -> Iterator[Part]:
    """Hold out the last share of the characters of each file. The first of two readings gives the lengths."""
    lengths = [sum(len(text) for text, _ in stream) for stream in read()]
    for length, stream in zip(lengths, read(), strict=True):
        left = int(length * (1 - share))
        for text, ends in stream:
            yield from _cut_piece(text, ends, left)
            left -= min(left, len(text))


def _cut(document: Document, at: int) -> Iterator[Part]:
    """Yield a document whose text from `at` on is held out."""
    left = document.length
    for text in document:
        left -= len(text)
        yield from _cut_piece(text, left == 0, at)
        at -= min(at, len(text))


def _cut_piece(text: str, ends: bool, at: int) -> Iterator[Part]:
    if at > 0:
        yield "train", text[:at], ends and at >= len(text)
    if at < len(text):
        yield "validation", text[at:], ends


class _Piece(NamedTuple):
    """A piece of a document; `begins` and `ends` mark the first and the last."""

    split: str
    text: str
    begins: bool
    ends: bool
    stops: bool = False  # the rest of the document is in the other split


def groups(parts: Iterable[Part], tokenizer: Tokenizer) -> Iterator[list[_Piece]]:
    """Collect pieces until there is enough work for all cores."""
    group: list[_Piece] = []
    size = 0
    for piece in _pieces(parts, tokenizer):
        group.append(piece)
        size += len(piece.text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _pieces(parts: Iterable[Part], tokenizer: Tokenizer) -> Iterator[_Piece]:
    """Join the parts of documents into pieces of at least `GROUP` characters, cut where the tokenizer cuts."""
    held: list[str] = []
    size, wanted, begins, before = 0, GROUP, True, ""
    for split, text, ends in parts:
        if held and split != before:  # the document is cut here
            yield _Piece(before, "".join(held), begins, ends=False, stops=True)
            held, size, wanted, begins = [], 0, GROUP, False
        before = split
        held.append(text)
        size += len(text)
        if not ends and size < wanted:
            continue
        whole = "".join(held)
        if ends:
            yield _Piece(split, whole, begins, True)
            held, size, wanted, begins = [], 0, GROUP, True
        elif cut := tokenizer.cuts.last(whole):
            yield _Piece(split, whole[:cut], begins, False)
            held, size, wanted, begins = [whole[cut:]], size - cut, GROUP, False
        elif size > _MAX_UNCUT:
            raise UserError(
                f"a document has {size:,} characters in which the tokenizer gives no place to cut it, beginning with "
                f"{whole[:40]!r}: it would be held in memory whole. Cut the text into documents with separator "
                "(--separator), or use another tokenizer"
            )
        else:
            held, wanted = [whole], size + GROUP


def _encode(group: list[_Piece], tokenizer: Tokenizer, writers: dict[str, ShardWriter]) -> None:
    # Where one token both ends and begins documents, it stands between them once.
    starts = [identity for identity in tokenizer.first_ids if identity != tokenizer.eos_id]
    bos, eos = np.array(starts, dtype=np.uint32), np.array([tokenizer.eos_id], dtype=np.uint32)
    rows: dict[str, list[NDArray[np.uint32]]] = {split: [] for split in writers}
    encoded = tokenizer.encode_batch([piece.text for piece in group])
    for (split, piece, begins, ends, stops), ids in zip(group, encoded, strict=True):
        counts = writers[split].counts
        counts.bytes += len(piece) if piece.isascii() else len(piece.encode("utf-8"))
        counts.documents += ends or stops
        rows[split] += [*([bos] if begins else []), ids, *([eos] if ends else [])]
        if stops:
            counts.breaks.append(counts.tokens + sum(map(len, rows[split])))
    for split, arrays in rows.items():
        ids = np.concatenate([np.empty(0, dtype=np.uint32), *arrays])
        if ids.size and int(ids.max()) >= tokenizer.vocab_size:
            raise ValueError(f"the tokenizer gave id {ids.max()}, beyond its vocab_size ({tokenizer.vocab_size})")
        writers[split].append(ids)


def open_sources(
    sources: Mapping[str, Source], tokenizer: Tokenizer, *, directory: str, **settings: Any
) -> dict[str, Shards]:
    """Open the token shards of each source, and make them first where they do not exist, by the section `preparation`.

    Every rank calls it; the first to hold the lock makes them and the others wait, without a time limit.
    """
    opened = {}
    for name, source in sources.items():
        try:
            made = prepare(source, tokenizer, Path(directory), **settings)
        except ValueError as error:
            raise UserError(f"key preparation: {error}") from error
        opened[name] = Shards.open(made, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)
    return opened
