"""Rows of text for recipes that change a trained model: to calibrate on, to choose by, and to measure on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plmtune.data.examples import refuse_other_kinds
from plmtune.data.sources import Prepared, Source, named_sources
from plmtune.errors import UserError
from plmtune.tokenizers.tokenizer import Tokenizer

_POOL = 1_000_000  # tokens of the data that rows are spread over


@dataclass(frozen=True)
class TextRows:
    """Rows of ids, [n, s]; no row is in two of the three.

    Attributes:
        calibration: rows that ranges or importances come from.
        mix: rows that sensitivities are measured on, by which a mix is chosen.
        test: rows that the loss is measured on.
        fingerprints: source name -> hash of its documents.
        description: of the sources, for a person.
    """

    calibration: Tensor
    mix: Tensor
    test: Tensor
    fingerprints: dict[str, str] = field(default_factory=dict)
    description: str = ""

    @property
    def num_test_predictions(self) -> int:
        """Tokens that the loss is measured on: all of `test` but the first of each row."""
        return self.test.numel() - len(self.test)


def text_sources(data: Any) -> dict[str, Source]:
    """The sources of a `data` component by name."""
    sources = named_sources(data)
    for name, source in sources.items():
        refuse_other_kinds(name, source, (Source,))
        if isinstance(source, Prepared):
            raise UserError(f"key data: source {name} holds tokens; this run takes text (data=files, hub, stdlib).")
    return sources


def read_rows(
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    calibration_tokens: int,
    mix_tokens: int,
    test_tokens: int,
    calibration_key: str = "calibration_tokens",
) -> TextRows:
    """Read rows, spread over the data's first million tokens.

    Args:
        seq_len: tokens a row.
        calibration_tokens, test_tokens: rounded up to whole rows.
        mix_tokens: rounded down, to one row at least; 0: none.
        calibration_key: the key that calibration_tokens comes from, for messages.
    """
    calibration, test = (-(-n // seq_len) for n in (calibration_tokens, test_tokens))
    mix = max(1, mix_tokens // seq_len) if mix_tokens else 0
    sources = sources if calibration + test else {}
    ids = _read_tokens(sources, tokenizer, max(_POOL, 4 * seq_len * max(calibration, test + mix)))
    rows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    # Every other row is for measuring, whatever the calibration takes: losses of several schemes are of one text.
    first, measured = (rows[0::2], rows[1::2]) if test + mix else (rows, rows[:0])
    chosen = spread(torch.arange(len(measured)), test)
    others = torch.ones(len(measured), dtype=torch.bool).index_fill(0, chosen, False)
    found = TextRows(
        spread(first, calibration),
        spread(measured[others], mix),
        measured[chosen],
        {name: source.fingerprint() for name, source in sources.items()},
        "; ".join(source.describe() for source in sources.values()),
    )
    if len(found.calibration) < calibration or len(found.test) < test or len(found.mix) < mix:
        more = f" with sensitivity.tokens ({mix_tokens:,})" if mix else ""
        asked = f"{calibration_key} ({calibration_tokens:,})"
        if test + mix:
            asked += f" and test_tokens ({test_tokens:,}){more} are taken of one half of it each"
        else:
            asked += " is taken of it"
        raise UserError(
            f"key data: the text has {len(ids):,} tokens, and {asked}, in rows of {seq_len}. Give more text, or ask "
            "for fewer."
        )
    return found


def _read_tokens(sources: Mapping[str, Source], tokenizer: Tokenizer, wanted: int) -> Tensor:
    """About `wanted` tokens of whole documents: an equal share of each source, and more where another has fewer."""
    ids: list[Any] = []
    for left, source in zip(range(len(sources), 0, -1), sources.values(), strict=True):
        have = sum(map(len, ids))
        until = have + -(-(wanted - have) // left)
        for text in source.documents():
            if have >= until:
                break
            ids.append(np.asarray([*tokenizer.with_bos(tokenizer.encode(text)), tokenizer.eos_id], dtype=np.int64))
            have += len(ids[-1])
    return torch.from_numpy(np.concatenate(ids)) if ids else torch.empty(0, dtype=torch.long)


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` of the rows at even distances; all, where they are fewer."""
    return rows[torch.arange(count) * len(rows) // max(1, count)] if count <= len(rows) else rows
