"""The loss of a model on rows of text, without the logits of all tokens at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from plmtune.modules.decoder import Decoder

CHUNK = 512  # tokens whose logits are held at once


@torch.no_grad()
def mean_loss(model: Decoder, batches: Iterable[Tensor]) -> float:
    """Mean loss in nats a token of batches of ids, [b, s]; each token is predicted from those before it in its row."""
    nats, tokens = 0.0, 0
    for ids in batches:
        targets = ids[:, 1:].flatten()
        for part, expected in zip(log_probs(model, model(ids, hidden=True)), targets.split(CHUNK), strict=True):
            nats -= sum_of(part, expected)
        tokens += len(targets)
    return nats / tokens if tokens else math.nan


def log_probs(model: Decoder, hidden: Tensor) -> Iterator[Tensor]:
    """fp32 log-probabilities of the token after each but a row's last, [CHUNK, v] at a time."""
    for part in hidden[:, :-1].flatten(0, 1).split(CHUNK):
        yield model.logits(part).log_softmax(-1)


def sum_of(log_probs: Tensor, targets: Tensor) -> float:
    return float(log_probs.gather(1, targets[:, None]).double().sum())
