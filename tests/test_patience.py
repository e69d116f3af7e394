"""How long a report is waited for: the arithmetic."""

from __future__ import annotations

import pytest

from fedmutual.wire.patience import FACTOR, FIRST, FLOOR, Patience, resend_after


def test_it_is_generous_until_there_are_reports() -> None:
    patience = Patience(None)
    assert patience.seconds == patience.first == FIRST == 3600


@pytest.mark.parametrize(
    ("reports", "seconds"),
    [([10.0], FLOOR), ([FLOOR / FACTOR], FLOOR), ([121.0], 605.0), ([400.0, 30.0], 2000.0), ([1e4], 5e4)],
)
def test_it_follows_the_longest_report_and_has_a_floor(reports: list[float], seconds: float) -> None:
    patience = Patience(None)
    for report in reports:
        patience.observe(report)
    assert patience.seconds == seconds
    assert patience.first == FIRST


def test_a_number_fixes_it() -> None:
    patience = Patience(30.0)
    assert patience.seconds == patience.first == 30
    patience.observe(1e4)
    assert patience.seconds == patience.first == 30


def test_the_floor_leaves_time_for_a_hung_node_to_come_back() -> None:
    """Its watchdog waits 120 s, Flower takes it back after 60 s, and a lost report is noticed after 180 s."""
    assert resend_after(FLOOR) == 300 > 120 + 60
    assert FLOOR - resend_after(FLOOR) >= 180
