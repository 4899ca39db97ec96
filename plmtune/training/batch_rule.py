"""The learning rate of a large batch."""

from __future__ import annotations

_BATCH, _RATE = 1_000_000, 1e-4
_LARGE = 4_000_000  # tokens a step, above which the rate grows with the root alone


def batch_rule(tokens_per_step: int) -> tuple[float, float] | None:
    """The lowest and the highest rate for AdamW by PanGu-pi Pro's rule (arXiv 2402.02791, section 3.4):

        lr = (tokens_per_step / 1M)^r 1e-4

    with r = 0.5 above 4M tokens. Up to there both exponents in use, 0.5 and 1, train well; the paper's own models have
    2M and 2e-4, which is r = 1. The rule was found at 1B parameters. None below 1M tokens, where it says nothing:
    smaller models of smaller batches train at higher rates.
    """
    ratio = tokens_per_step / _BATCH
    if ratio < 1:
        return None
    return _RATE * ratio**0.5, _RATE * ratio ** (1.0 if tokens_per_step <= _LARGE else 0.5)


def show_batch_rule(tokens_per_step: int, lr: float) -> str | None:
    """A line that compares a rate with the rule's; None where that says nothing."""
    found = batch_rule(tokens_per_step)
    if found is None:
        return None
    low, high = found
    rates = f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
    return (
        f"optimizer.lr is {lr:.2g}; PanGu-pi Pro's rule for AdamW, (tokens a step / 1M)^r 1e-4 with r = 0.5"
        f"{' to 1' if low != high else ''}, gives {rates} at {tokens_per_step / 1e6:.3g}M"
    )
