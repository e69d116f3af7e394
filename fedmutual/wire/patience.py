"""How long the report to an order is waited for, and when the order is sent once more."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

FIRST = 3600.0  # seconds, while nothing is known of how long the clients take
FACTOR = 5.0  # times the longest wait for a report so far
FLOOR = 600.0  # seconds; a hung SuperNode has been restarted by then, and has answered
ATTEMPTS = 3  # to send an order in all: a client that dies of the order itself must not die for ever


class Patience:
    """The time that a report may take: fixed, or following the reports so far.

    Parameters
    ----------
    fixed : float or None
        ``exchange.round_timeout``, in seconds; None: ``FIRST`` until there are reports, then ``FACTOR`` times
        the longest wait for one, at least ``FLOOR``.
    """

    def __init__(self, fixed: float | None) -> None:
        self._fixed = fixed
        self._longest: float | None = None

    @property
    def seconds(self) -> float:
        """From sending an order to giving up its report."""
        if self._fixed is not None:
            return self._fixed
        return self.first if self._longest is None else max(FACTOR * self._longest, FLOOR)

    @property
    def first(self) -> float:
        """The same for a client of which nothing is known."""
        return FIRST if self._fixed is None else self._fixed

    def observe(self, seconds: float) -> None:
        """Take note of how long a report took, from the last time that its order was sent."""
        before = self.seconds
        self._longest = max(seconds, self._longest or 0.0)
        if self.seconds > max(before, FLOOR):
            logger.info("reports may now take %.0f s: the longest took %.0f s", self.seconds, self._longest)


def resend_after(timeout: float) -> float:
    """Seconds without a sign after which an order is sent once more, in case it or its report got lost.

    A client that still works on it answers the second one from its state.
    """
    return timeout / 2
