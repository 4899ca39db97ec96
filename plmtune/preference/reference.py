"""Log-probabilities of a fixed reference: computed once, kept on disk under a key of all that they follow from.

A directory holds for each key KEY.safetensors, the numbers, and KEY.json, checksummed, written last, with the former's
length and checksum. The key is a hash of the weights themselves, the arithmetic, and each id, position and mask that
goes in: with any other of them it is another key, so numbers of another reference are never found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from plmtune.errors import UserError
from plmtune.io import checksummed_json, safetensors_writer, terminal
from plmtune.io.atomic import atomic_write
from plmtune.models.digest import add_tensor
from plmtune.training.distributed import broadcast_from_rank0, gather_texts, reduce_sum

if TYPE_CHECKING:
    from plmtune.preference.comparison_batch import ComparisonBatch

_VERSION = 2  # of the files and of the input of the key's hash
# Field of a batch -> the name under which it is hashed, so that caches of earlier versions fit.
_INPUTS = {name: name for name in ("tokens", "input_pos", "mask", "positions", "targets", "completion", "index")}
_INPUTS["positions"] = "places"


def reference_log_probs(
    model_digest: str,
    batches: Callable[[], Iterable[ComparisonBatch]],
    compute: Callable[[ComparisonBatch], Tensor],
    directory: str | Path,
    num: int,
    *,
    arithmetic: str,
    log: Callable[[str], None] | None = None,
) -> Tensor:
    """The reference's log-probabilities of each comparison's answers, read from the cache or computed and cached.

    Every rank must call it; only rank 0 reads and writes.

    Args:
        model_digest: `plmtune.models.digest.model_digest` of the reference.
        batches: returns this rank's share of all comparisons (`PreferenceBatches.all`): the same number of batches on
            every rank, some perhaps empty. Called twice, to hash and to compute, so that they are never all in memory.
        compute: (batch) -> log-probabilities of its answers, [2n], in the order of `lengths`.
        directory: of the cache.
        num: comparisons in the data; `batch.index` is below it.
        arithmetic: device and dtype of the computation.
        log: takes a line about a damaged file; None: print it to standard error.

    Returns:
        Tensor: fp32 on the CPU, [num, 2]: chosen, rejected; 0 for an answer without tokens, NaN for a comparison
        that is in no batch.

    Raises:
        UserError: if a number is not finite, or the directory cannot be written.
    """
    log = log or partial(terminal.echo, err=True)
    path = Path(directory) / f"{_key(model_digest, batches(), num, arithmetic)}.safetensors"
    values = torch.zeros(num, 2)

    def find() -> bool:
        held = _read(path, num, log)
        if held is not None:
            values.copy_(held)
        return held is not None

    if broadcast_from_rank0(find):
        return reduce_sum(values)  # the others hold zeros
    values = _compute(batches(), compute, num)
    broadcast_from_rank0(lambda: _write(path, values))
    return values


def _key(model_digest: str, batches: Iterable[ComparisonBatch], num: int, arithmetic: str) -> str:
    """The key, equal on every rank and for any number of ranks. It depends on the rows, as rounding does."""
    mine = []
    for batch in batches:
        digest = xxhash.xxh3_128()
        for field, name in _INPUTS.items():
            add_tensor(digest, name, getattr(batch, field))
        mine.append(digest.hexdigest() if len(batch.index) else "")
    shares = [json.loads(text) for text in gather_texts(json.dumps(mine))]
    in_turn = [digest for digests in zip(*shares, strict=True) for digest in digests if digest]
    # Versions of torch may round differently.
    parts = [_VERSION, model_digest, arithmetic, torch.__version__, num, *in_turn]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


@torch.no_grad()
def _compute(batches: Iterable[ComparisonBatch], compute: Callable[[ComparisonBatch], Tensor], num: int) -> Tensor:
    """[num, 2] on every rank."""
    values, times = torch.zeros(num, 2), torch.zeros(num)
    for batch in batches:
        index = batch.index.cpu()
        values.index_add_(0, index, compute(batch).float().cpu().view(-1, 2))
        times.index_add_(0, index, torch.ones(len(index)))
    reduce_sum(values)
    reduce_sum(times)
    values /= times.clamp(min=1)[:, None]  # the mean, where a comparison is in several batches
    bad = (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        chosen, rejected = values[bad[0]].tolist()
        raise UserError(
            f"The reference gives the answers of comparison {bad[0]} the log-probabilities {chosen} and {rejected}; "
            f"{len(bad)} of {num} comparisons have one that is not finite. Has the model's training diverged?"
        )
    values[times == 0] = float("nan")  # it is in no batch
    return values


def _read(path: Path, num: int, log: Callable[[str], None]) -> Tensor | None:
    """The cached numbers; None if there are none, or, with a logged line, if they cannot be used."""
    note = path.with_suffix(".json")
    if not note.exists():  # written last
        return None
    try:
        document = checksummed_json.load(note)
        if document.get("key") != path.stem:
            raise ValueError(f"it is of the key {document.get('key')}")
        file, size = document["file"], path.stat().st_size
        if size != file["bytes"]:
            raise ValueError(f"{path.name} has {size:,} bytes instead of {file['bytes']:,}")
        data = path.read_bytes()
        if xxhash.xxh3_128_hexdigest(data) != file["xxh3_128"]:
            raise ValueError(f"{path.name} does not match its checksum")
        values = load_tensors(data)["log_probs"]
        if values.shape != (num, 2) or values.dtype != torch.float32:
            raise ValueError(f"{path.name} holds {values.dtype} {list(values.shape)}, not {[num, 2]}")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        log(f"{note}: the reference's log-probabilities kept here cannot be used ({error}); they are computed again.")
        return None
    return values


def _write(path: Path, values: Tensor) -> dict[str, Any]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            file = safetensors_writer.write(temporary, {"log_probs": values})
        checksummed_json.save(path.with_suffix(".json"), {"key": path.stem, "file": file})
    except OSError as error:
        raise UserError(f"The reference's log-probabilities cannot be kept: {error}. See reference_cache.") from error
    return file
