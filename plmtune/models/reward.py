"""Reward models: a decoder whose `score` layer reads one number from the hidden state of a text's last token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from plmtune.errors import UserError
from plmtune.models.adapters import load_model
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.models.hf_names import SCORE
from plmtune.modules.decoder import Decoder


def head_scores(model: Decoder, hidden: Tensor, ends: Tensor) -> Tensor:
    """The score of each text from the hidden state at its end, in fp32, [n].

    Args:
        model: with a score head.
        hidden (Tensor): normed hidden states, [t, d].
        ends (Tensor): where each text's last token stands, [n].
    """
    # In fp32 even under autocast: the loss is of differences, of which bf16's eight bits would leave little.
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden[ends].float(), model.score.weight.float())[:, 0]


def load_reward_model(directory: str | Path, device: torch.device | str = "cpu") -> Decoder:
    """Load a model with a score head from a checkpoint, a model directory, or a run (its newest checkpoint).

    Raises:
        UserError: if it cannot be loaded or has no score head.
    """
    found = checkpoint_directory(directory)
    model = load_model(found, device).eval()
    if not hasattr(model, "score"):
        raise UserError(
            f"{found} is no reward model: it has no tensor {SCORE}. "
            "Train one with loss=bradley_terry, or give the directory of one."
        )
    return model


@torch.inference_mode()
def score(model: Decoder, sequences: Sequence[Sequence[int] | NDArray], *, batch_size: int = 16) -> list[float]:
    """The score of each sequence of ids, in their order.

    Args:
        model: with a score head.
        sequences: ids, the last one where a text ends.
        batch_size: sequences a forward; those of like length go together.

    Raises:
        ValueError: if a sequence is empty or longer than the model's max_seq_len, or the model has no score head.
    """
    if not hasattr(model, "score"):
        raise ValueError("the model has no score head")
    for index, ids in enumerate(sequences):
        if not 1 <= len(ids) <= model.max_seq_len:
            raise ValueError(f"sequence {index} has {len(ids)} tokens; it must have 1 to {model.max_seq_len}")
    device = model.score.weight.device
    scores = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))  # the longest would fail first
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        lengths = torch.tensor([len(sequences[index]) for index in chosen])
        tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        for row, index in zip(tokens, chosen, strict=True):
            row[: len(sequences[index])] = torch.as_tensor(sequences[index])
        # Padding stands behind each end, where causal attention does not look.
        # Its positions matter where RoPE's frequencies depend on each text's length.
        positions = torch.arange(tokens.shape[1]).minimum(lengths[:, None] - 1) if model.rope_key(1) else None
        input_pos = positions if positions is None else positions.to(device)
        hidden = model(tokens.to(device), input_pos=input_pos, hidden=True)  # [b, s, d]
        ends = torch.arange(len(chosen)) * tokens.shape[1] + lengths - 1
        found = head_scores(model, hidden.flatten(0, 1), ends.to(device))
        for index, value in zip(chosen, found.tolist(), strict=True):
            scores[index] = value
    return scores
