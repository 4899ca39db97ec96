"""Numbers as people read them."""

import pytest

from plmtune.cli.plan_report import _hours
from plmtune.units import runs_of, show_count, show_duration, show_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1954.3, "1,950"),
        (580.4, "580"),
        (99.96, "100"),
        (12.34, "12.3"),
        (0.03419, "0.0342"),
        (4800, "4,800"),
        (0, "0"),
        (float("inf"), "inf"),
    ],
)
def test_a_number_has_three_digits_and_no_power_of_ten(value: float, text: str) -> None:
    assert show_number(value) == text


def test_counts_beyond_the_last_letter_stay_plain() -> None:
    assert show_count(1.954e15) == "1.95P"
    assert show_count(1.954e22) == "19,500E"
    assert show_count(999_999) == "1M"
    assert show_count(1234) == "1.23K"


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.00057 / 60, "0.0342 device-seconds"), (0.5, "30 device-minutes"), (1954.0, "1,950 device-hours")],
)
def test_time_on_a_device_is_in_the_unit_that_suits(hours: float, text: str) -> None:
    assert _hours(hours) == text


def test_a_duration_reads_as_a_clock() -> None:
    assert [show_duration(seconds) for seconds in (0, 65, 3599.6, 3725)] == ["0:00", "1:05", "1:00:00", "1:02:05"]


def test_runs_of_numbers_are_their_first_and_last() -> None:
    assert runs_of([0, 1, 2, 5, 7, 8, 3]) == [(0, 2), (5, 5), (7, 8), (3, 3)]
    assert runs_of([]) == []
