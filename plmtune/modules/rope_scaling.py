"""Scaling of RoPE's frequencies, for contexts longer than those of pretraining; equations as in transformers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plmtune.ranges import AT_LEAST_1, NOT_NEGATIVE, Range, check
from plmtune.registry import register

_FACTOR = Range(above=0, most=1e6)


class RopeScaling:
    """How the frequencies differ from RoPE's own; equal settings make equal objects, so that layers share tables.

    Attributes:
        attention_factor: multiplies cos and sin.
        softmax_factor: multiplies the scale of attention's scores in MLA.
    """

    attention_factor = 1.0
    softmax_factor = 1.0
    rereads = False  # whether a text whose key changes as it grows is read again from its first token

    def frequencies(self, plain: Tensor, theta: float, key: int | None) -> Tensor:
        """Return the frequencies for RoPE's own, plain (Tensor), [dim / 2] in fp64, and the `key` of a length."""
        raise NotImplementedError

    def key(self, length: int) -> int | None:
        """What of a sequence's length decides the frequencies; None where they never change."""
        return None

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the sequence's length."""
        return type(self).key is not RopeScaling.key

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


@register("rope_scaling", "none")
def none() -> None:
    """RoPE's own frequencies, theta^(-2i / dim)."""


@register("rope_scaling", "linear")
class Linear(RopeScaling):
    """All frequencies divided by one factor (position interpolation, arXiv 2306.15595).

    Args:
        factor: how many times longer the context becomes.
    """

    def __init__(self, *, factor: float = 2.0) -> None:
        check(_FACTOR, factor=factor)
        self.factor = factor

    def frequencies(self, plain: Tensor, theta: float, key: int | None) -> Tensor:
        return plain / self.factor


@register("rope_scaling", "dynamic")
class Dynamic(RopeScaling):
    """A base that grows with the sequence beyond the original length (dynamic NTK).

    theta' = theta (factor length / original - (factor - 1))^(dim / (dim - 2)).

    Args:
        factor: as in the equation.
        original_max_seq_len: longest sequence of pretraining.
    """

    def __init__(self, *, factor: float = 2.0, original_max_seq_len: int = 4096) -> None:
        check(_FACTOR, factor=factor)
        check(AT_LEAST_1, original_max_seq_len=original_max_seq_len)
        self.factor, self.original = factor, original_max_seq_len

    def key(self, length: int) -> int:
        return max(length, self.original)

    def frequencies(self, plain: Tensor, theta: float, key: int | None) -> Tensor:
        assert key is not None
        dim = 2 * len(plain)
        growth = self.factor * key / self.original - (self.factor - 1)
        if key == self.original or dim == 2:
            return plain
        return plain_frequencies(dim, theta * growth ** (dim / (dim - 2)), plain.device)


@register("rope_scaling", "llama3")
class Llama3(RopeScaling):
    """Low frequencies divided by a factor, high ones kept, those between interpolated (Llama 3.1, arXiv 2407.21783).

    Args:
        factor: divides frequencies whose wavelength exceeds original_max_seq_len / low_freq_factor.
        low_freq_factor, high_freq_factor: bounds of the interpolated part, in wavelengths a pretraining context.
        original_max_seq_len: longest sequence of pretraining.
    """

    def __init__(
        self,
        *,
        factor: float = 8.0,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        original_max_seq_len: int = 8192,
    ) -> None:
        check(_FACTOR, factor=factor, low_freq_factor=low_freq_factor, high_freq_factor=high_freq_factor)
        check(AT_LEAST_1, original_max_seq_len=original_max_seq_len)
        if low_freq_factor >= high_freq_factor:
            raise ValueError(f"low_freq_factor ({low_freq_factor}) must be below high_freq_factor ({high_freq_factor})")
        self.factor, self.low, self.high = factor, low_freq_factor, high_freq_factor
        self.original = original_max_seq_len

    def frequencies(self, plain: Tensor, theta: float, key: int | None) -> Tensor:
        turns = self.original * plain / (2 * math.pi)  # in a pretraining context
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return plain * (kept + (1 - kept) / self.factor)


@register("rope_scaling", "yarn")
class Yarn(RopeScaling):
    """YaRN (arXiv 2309.00071): frequencies interpolated by parts, attention sharpened.

    Args:
        factor: how many times longer the context becomes.
        original_max_seq_len: longest sequence of pretraining.
        beta_fast, beta_slow: turns in a pretraining context between which frequencies are interpolated.
        attention_factor: of cos and sin; None: 0.1 ln(factor) + 1.
        mscale, mscale_all_dim: DeepSeek's form of it (arXiv 2405.04434): attention_factor is the quotient of
            0.1 m ln(factor) + 1 for both, and MLA's scores are multiplied by the square of the second.
        truncate: round the bounds to whole dimensions.
    """

    def __init__(
        self,
        *,
        factor: float = 4.0,
        original_max_seq_len: int = 32768,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        truncate: bool = True,
    ) -> None:
        check(_FACTOR, factor=factor, beta_fast=beta_fast, beta_slow=beta_slow, attention_factor=attention_factor)
        check(NOT_NEGATIVE, mscale=mscale, mscale_all_dim=mscale_all_dim)
        check(AT_LEAST_1, original_max_seq_len=original_max_seq_len)
        self.factor, self.original, self.truncate = factor, original_max_seq_len, truncate
        self.fast, self.slow = beta_fast, beta_slow
        if attention_factor is not None:
            self.attention_factor = attention_factor
        elif mscale and mscale_all_dim:
            self.attention_factor = self._sharpness(mscale) / self._sharpness(mscale_all_dim)
        else:
            self.attention_factor = self._sharpness(1.0)
        self.softmax_factor = self._sharpness(mscale_all_dim) ** 2 if mscale_all_dim else 1.0

    def _sharpness(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def frequencies(self, plain: Tensor, theta: float, key: int | None) -> Tensor:
        dim = 2 * len(plain)
        low, high = (
            dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.fast, self.slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        places = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
        interpolated = ((places - low) / (high - low or 0.001)).clamp(0, 1)
        return plain * (1 - interpolated + interpolated / self.factor)


@register("rope_scaling", "longrope")
class LongRope(RopeScaling):
    """LongRoPE (arXiv 2402.13753): a divisor for each frequency, one set up to the original length and one beyond it.

    Args:
        short_factor, long_factor: divisors, one for each pair of dimensions.
        original_max_seq_len: longest sequence that uses short_factor.
        factor: how many times longer the context becomes.
        attention_factor: of cos and sin; None: sqrt(1 + ln(factor) / ln(original_max_seq_len)).
    """

    rereads = True  # as transformers does for Phi-3

    def __init__(
        self,
        *,
        short_factor: list[float] = [],  # noqa: B006  # the registry reads a literal
        long_factor: list[float] = [],  # noqa: B006
        original_max_seq_len: int = 4096,
        factor: float = 32.0,
        attention_factor: float | None = None,
    ) -> None:
        check(_FACTOR, factor=factor, attention_factor=attention_factor)
        check(Range(least=2), original_max_seq_len=original_max_seq_len)
        for value in (*short_factor, *long_factor):
            check(_FACTOR, factors=value)
        self.short, self.long = tuple(short_factor), tuple(long_factor)
        self.original = original_max_seq_len
        if attention_factor is None:
            attention_factor = math.sqrt(1 + math.log(max(factor, 1)) / math.log(self.original))
        self.attention_factor = attention_factor

    def key(self, length: int) -> int:
        return int(length > self.original)

    def frequencies(self, plain: Tensor, theta: float, key: int | None) -> Tensor:
        return plain / torch.tensor(self.long if key else self.short, dtype=plain.dtype, device=plain.device)

    def check_dim(self, dim: int) -> None:
        """Refuse lists of factors that do not fit a RoPE of width dim."""
        for name, factors in (("short_factor", self.short), ("long_factor", self.long)):
            if len(factors) != dim // 2:
                raise ValueError(f"{name} has {len(factors)} numbers, and RoPE turns {dim // 2} pairs")


def plain_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """RoPE's own frequencies, theta^(-2i / dim), [dim / 2] in fp64."""
    return theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
