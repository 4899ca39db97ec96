"""The learning rate of a large batch, by PanGu-pi Pro's rule."""

import pytest

from plmtune.training.batch_rule import batch_rule, show_batch_rule


class TestBatchRule:
    @pytest.mark.parametrize(
        ("tokens", "low", "high"),
        [
            (1_000_000, 1e-4, 1e-4),
            (2_000_000, 1.4142e-4, 2e-4),  # the paper's own models have 2e-4
            (4_000_000, 2e-4, 4e-4),
            (16_000_000, 4e-4, 4e-4),
        ],
    )
    def test_equals_the_formula_written_naively(self, tokens: int, low: float, high: float) -> None:
        assert batch_rule(tokens) == pytest.approx((low, high), rel=1e-4)

    def test_says_nothing_of_a_smaller_batch(self) -> None:
        assert batch_rule(999_999) is None and show_batch_rule(65_536, 3e-4) is None

    def test_a_line_names_the_rate_and_the_rules(self) -> None:
        assert show_batch_rule(2_000_000, 3e-4) == (
            "optimizer.lr is 0.0003; PanGu-pi Pro's rule for AdamW, (tokens a step / 1M)^r 1e-4 with r = 0.5 to 1, "
            "gives 0.00014 to 0.0002 at 2M"
        )
        assert "with r = 0.5, gives 0.0004 at 16M" in str(show_batch_rule(16_000_000, 3e-4))
