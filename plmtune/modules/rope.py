"""Rotary position embedding (arXiv 2104.09864), for interleaved and for half-split pairs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from plmtune.modules.rope_scaling import LongRope, RopeScaling, plain_frequencies
from plmtune.ranges import Range, check


class RotaryEmbedding:
    """Turn pairs of numbers by an angle that grows with the position.

    Not a module: the tables follow from the settings, so they are neither saved nor moved. They are made once
    for each device, shared by all layers, when first used (so a model built on meta needs no repair).

    Args:
        dim: numbers a head that are turned.
        max_seq_len: positions.
        theta: base of the geometric series of frequencies.
        interleaved: pairs are neighbours (PLM, GGUF) rather than dim / 2 apart (Hugging Face's Llama).
        scaling: how the frequencies are scaled; None: not.

    Raises:
        ValueError: if dim is odd, or a scaling does not fit it.
    """

    def __init__(
        self, dim: int, max_seq_len: int, *, theta: float, interleaved: bool, scaling: RopeScaling | None = None
    ) -> None:
        if dim < 2 or dim % 2:
            raise ValueError(f"RoPE turns pairs, so its width must be even and at least 2, not {dim}")
        check(Range(above=0, most=1e12), rope_theta=theta)
        if isinstance(scaling, LongRope):
            scaling.check_dim(dim)
        self.settings = (dim, max_seq_len, float(theta), interleaved)
        self.scaling = scaling
        # Viewed as pairs, the partner of each number is its neighbour along one dimension.
        self.pair_shape, self.pair_dim = ((-1, 2), -1) if interleaved else ((2, -1), -2)

    def tables(self, device: torch.device, length: int = 0) -> tuple[Tensor, Tensor]:
        """cos and signed sin in fp32, both [max_seq_len, dim] in the order of x, for a sequence of `length` tokens."""
        key = self.scaling.key(length) if self.scaling is not None else None
        return rope_tables(*self.settings, device, self.scaling, key)

    def __call__(self, x: Tensor, input_pos: Tensor | None = None, start: int = 0) -> Tensor:
        """Turn x (Tensor), [b, s, h, dim], at input_pos [b, s], or else at start, start + 1, ...

        Where the length of a text decides the frequencies, positions that count up are one text.
        """
        if input_pos is None:
            end = start + x.shape[1]
            cos, sin = self.tables(x.device, end)
            cos, sin = cos[start:end, None], sin[start:end, None]  # [s, 1, dim]
        elif self.scaling is not None and self.scaling.by_length:
            cos, sin = self._tables_by_length(input_pos, self.scaling)
        else:
            cos, sin = self.tables(x.device)
            cos, sin = cos[input_pos, None], sin[input_pos, None]  # [b, s, 1, dim], or one row for all
        # (a, b) -> (a cos - b sin, b cos + a sin): the sign of each sin stands in the table.
        swapped = x.unflatten(-1, self.pair_shape).flip(self.pair_dim).flatten(-2)
        return torch.addcmul(x * cos, swapped, sin).to(x.dtype)

    def _tables_by_length(self, input_pos: Tensor, scaling: RopeScaling) -> tuple[Tensor, Tensor]:
        """cos and signed sin, [b, s, 1, dim], each text turned as it is by itself."""
        dim, _, theta, interleaved = self.settings
        lengths, which = _lengths(input_pos).unique(return_inverse=True)
        plain = plain_frequencies(dim, theta, input_pos.device)
        frequency = torch.stack([scaling.frequencies(plain, theta, scaling.key(n)) for n in lengths.tolist()])
        angle = input_pos[..., None] * frequency[which]  # [b, s, dim / 2]
        cos, sin = _cos_sin(angle, scaling.attention_factor, interleaved)
        return cos[:, :, None], sin[:, :, None]


def _lengths(input_pos: Tensor) -> Tensor:
    """The length of each token's text, [b, s], from positions [b, s]: a text's count up by one."""
    b, s = input_pos.shape
    last = torch.ones(b, s, dtype=torch.bool, device=input_pos.device)
    last[:, :-1] = input_pos[:, 1:] != input_pos[:, :-1] + 1
    places = torch.arange(s, device=input_pos.device).expand(b, s)
    end = torch.where(last, places, s).flip(1).cummin(1).values.flip(1)  # where the text of each token ends
    return input_pos.gather(1, end) + 1


def _cos_sin(angle: Tensor, factor: float, interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and signed sin in fp32, [..., dim] in the order of x, of angle (Tensor), [..., dim / 2] in fp64."""
    cos, sin = (angle.cos() * factor).float(), (angle.sin() * factor).float()
    order = -1 if interleaved else -2
    return torch.stack((cos, cos), order).flatten(-2), torch.stack((-sin, sin), order).flatten(-2)


def rope_tables(
    dim: int,
    max_seq_len: int,
    theta: float,
    interleaved: bool,
    device: torch.device,
    scaling: RopeScaling | None = None,
    key: int | None = None,
) -> tuple[Tensor, Tensor]:
    return _cached_tables(dim, max_seq_len, theta, interleaved, device, scaling, key)


@lru_cache(maxsize=16)
def _cached_tables(
    dim: int,
    max_seq_len: int,
    theta: float,
    interleaved: bool,
    device: torch.device,
    scaling: RopeScaling | None,
    key: int | None,
) -> tuple[Tensor, Tensor]:
    """cos and signed sin in fp32, both [max_seq_len, dim] in the order of x."""
    # Tables made while generating must also serve training, which inference tensors cannot; those made while
    # torch.export traces must hold numbers, for it and for later calls.
    with torch.inference_mode(False), _disable_current_modes():
        frequency = plain_frequencies(dim, theta, device)
        if scaling is not None:
            frequency = scaling.frequencies(frequency, theta, key)
        angle = torch.arange(max_seq_len, device=device, dtype=torch.float64)[:, None] * frequency
        return _cos_sin(angle, scaling.attention_factor if scaling is not None else 1.0, interleaved)
