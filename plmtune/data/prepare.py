"""Text to token shards, once: the directory's name is a hash of everything that decides its content."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from plmtune import terminal
from plmtune.atomic import making
from plmtune.data.lock import exclusive
from plmtune.data.manifest import FORMAT, SPLITS, Manifest, SplitCounts, dtype_for
from plmtune.data.shards import Shards, ShardWriter
from plmtune.data.sources import Prepared, Source
from plmtune.errors import UserError

if TYPE_CHECKING:
    from plmtune.data.tokenizers import Tokenizer

# Characters encoded at a time. A longer document goes in pieces, so that memory does not grow with it.
GROUP = 1 << 22


class Part(NamedTuple):
    """A document or a piece of one; `begins` and `ends` say whether it is the first and the last.

    stops: the document goes on in the other split.
    """

    split: str
    text: str
    begins: bool = True
    ends: bool = True
    stops: bool = False


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
    """Encode a source into shards under `root`, or find that this was done before.

    Args:
        holdout: share kept for validation.
        holdout_by: documents: each goes by the hash of its text, so equal documents never stand on both
            sides; the only document of a corpus is cut at its tail. tail: the last share of the characters of
            each file.
        skip_bad: count rows that cannot be read instead of raising.
        shard_tokens: tokens a shard file.
        progress: show on standard error how far it is.

    Returns:
        The directory, NAME-HASH.

    Raises:
        UserError: for text that cannot be read or is too little, and a `root` that cannot be written. Nothing
            half-written stays behind.
        ValueError: for a share outside [0, 1).
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout ({holdout}) must be at least 0 and below 1: it is the share kept for validation")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens ({shard_tokens}) must be at least 1")
    if isinstance(source, Prepared):
        Shards.open(source.directory, tokenizer_fingerprint=tokenizer.fingerprint, verify=False)
        return source.directory
    settings = {
        "holdout": holdout,
        "holdout_by": holdout_by,
        "skip_bad": skip_bad,
        "shard_tokens": shard_tokens,
        "group": GROUP,
    }
    fingerprint = source.fingerprint()
    # "breaks": before, a document whose tail was held out had an end on both sides.
    key = json.dumps([FORMAT, "breaks", fingerprint, tokenizer.fingerprint, tokenizer.vocab_size, settings])
    root = Path(root)
    target = root / f"{source.name}-{xxhash.xxh3_128_hexdigest(key.encode())[:12]}"
    if (target / "manifest.json").is_file():
        return target
    try:
        with making(root), _locked(root, target.name):
            if (target / "manifest.json").is_file():
                return target  # another process made it while this one waited
            for stale in [target, *root.glob(f".{target.name}.*.tmp")]:
                shutil.rmtree(stale, ignore_errors=True)  # of a process that was killed: the lock is ours
            temporary = root / f".{target.name}.{os.getpid()}.tmp"
            temporary.mkdir()
            try:
                parts = (
                    by_tail(source, holdout, skip_bad)
                    if holdout_by == "tail"
                    else by_documents(source.documents(skip_bad), holdout)
                )
                with _showing(source.name, shown=progress) as advance:
                    counts = _write(parts, tokenizer, temporary, shard_tokens, advance)
                if not counts["train"].tokens:
                    skipped = f" ({source.skipped} bad rows left out)" if source.skipped else ""
                    raise UserError(f"{source.describe()}: there is no text to train on{skipped}")
                tokenizer.save(temporary / "tokenizer")  # so that the directory explains itself
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
                    splits=counts,
                ).save(temporary)
                temporary.replace(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror or error}") from error
    return target


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f".{name}.lock", f"prepares {name}"):
        yield


def _write(
    parts: Iterable[Part],
    tokenizer: Tokenizer,
    directory: Path,
    shard_tokens: int,
    advance: Callable[[int, int], None],
) -> dict[str, SplitCounts]:
    dtype = dtype_for(tokenizer.vocab_size)
    writers = {split: ShardWriter(directory, split, dtype, shard_tokens) for split in SPLITS}
    try:
        for group in _groups(parts):
            _encode(group, tokenizer, writers)
            advance(sum(len(piece.text) for piece in group), sum(w.counts.tokens for w in writers.values()))
    finally:
        for writer in writers.values():
            writer.close()
    return {split: writer.counts for split, writer in writers.items()}


def by_documents(documents: Iterable[str], share: float) -> Iterator[Part]:
    """Assign documents to splits by the hash of their text: those that fall below `share` are held out.

    Where none does, the tail of the one with the lowest hash is, so much that the share is held out: it waits until
    another falls below.
    """
    if share == 0:
        yield from (Part("train", text) for text in documents)
        return
    lowest, total = 2.0, 0
    waiting: list[str] = []  # the lowest so far, with its copies; empty once a document fell below the share
    below = False
    for text in documents:
        total += len(text)
        value = xxhash.xxh3_64_intdigest(text.encode("utf-8"), seed=1) / 2**64
        if value < share:
            below = True
            yield Part("validation", text)
        elif below or value > lowest:
            yield Part("train", text)
            continue
        elif value == lowest:
            waiting.append(text)
            continue
        # Whatever waited is no longer the lowest.
        yield from (Part("train", held) for held in waiting)
        waiting = [] if below else [text]
        lowest = value
    if waiting:
        *copies, last = waiting
        yield from (Part("train", held) for held in copies)
        yield from _cut(last, len(last) - max(1, int(total * share)))


def by_tail(source: Source, share: float, skip_bad: bool) -> Iterator[Part]:
    """Hold out the last share of the characters of each file. Reads twice: once to know the lengths."""
    lengths = [sum(map(len, stream)) for stream in source.streams(skip_bad)]
    for length, stream in zip(lengths, source.streams(skip_bad), strict=True):
        left = int(length * (1 - share))
        for text in stream:
            yield from _cut(text, min(left, len(text)))
            left -= min(left, len(text))


def _cut(text: str, at: int) -> Iterator[Part]:
    """A document, of which what stands from `at` on is held out: it begins on one side and ends on the other."""
    if at > 0:
        yield Part("train", text[:at], ends=at >= len(text), stops=at < len(text))
    if at < len(text):
        yield Part("validation", text[at:], begins=at <= 0)


def pieces(text: str) -> Iterator[str]:
    """Cut a long text after line ends that no white space follows, where BPE patterns cut as well."""
    start = 0
    while len(text) - start > GROUP:
        at = start + GROUP
        while (at := text.rfind("\n", start, at)) > start and text[at + 1].isspace():
            pass
        end = at + 1 if at > start else start + GROUP
        yield text[start:end]
        start = end
    yield text[start:]


def _groups(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Collect pieces until there is enough work for all cores."""
    group: list[Part] = []
    size = 0
    for split, text, begins, ends, stops in parts:
        whole = list(pieces(text))
        for index, piece in enumerate(whole, 1):
            first, last = index == 1, index == len(whole)
            group.append(Part(split, piece, begins and first, ends and last, stops and last))
            size += len(piece)
            if size >= GROUP:
                yield group
                group, size = [], 0
    if group:
        yield group


def _encode(group: list[Part], tokenizer: Tokenizer, writers: dict[str, ShardWriter]) -> None:
    eos = np.array([tokenizer.eos_id], dtype=np.uint32)
    # Where the same token ends and begins documents, the end of one is the beginning of the next.
    bos = np.array([tokenizer.start_id] if tokenizer.start_id != tokenizer.eos_id else [], dtype=np.uint32)
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
        if not ids.size:
            continue
        if int(ids.max()) >= tokenizer.vocab_size:
            raise ValueError(f"the tokenizer gave id {ids.max()}, beyond its vocab_size ({tokenizer.vocab_size})")
        writers[split].append(ids)


@contextmanager
def _showing(name: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    line, characters, begun = terminal.Line(shown=shown), 0, time.monotonic()

    def advance(more: int, tokens: int) -> None:
        nonlocal characters
        characters += more
        seconds = time.monotonic() - begun
        read = f"{characters / 1e6:.1f} million characters"
        line.update(f"{tokens / 1e6:.1f} million tokens", read, f"{seconds:.0f} s", name)

    try:
        yield advance
    finally:
        line.close()
