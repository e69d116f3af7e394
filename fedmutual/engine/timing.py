"""The clock of a run: when a reply counts, in seconds since the start.

On the wall clock, a reply counts when it arrives; for a client of emulated speed s, it is delayed by (s - 1)
times its training time. On the virtual clock, a message takes its nominal duration, and replies count in the
order of that clock. A run is then the same on every machine, whether clients train in parallel or take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message

from fedmutual.wire.exchange import Reply
from fedmutual.wire.reports import claimed_seconds


@dataclass(frozen=True)
class Dispatch:
    """A message for an idle node.

    Attributes
    ----------
    message : Message
    label : tuple
        Sort key of the client, which orders simultaneous replies (node ids are random).
    speed : float
        Emulated slowness: 8 takes eight times as long; 0 takes no time.
    sent : float or None
        Original send time of a message that a resumed run resends; None: now.
    """

    message: Message
    label: tuple[object, ...]
    speed: float = 1.0
    sent: float | None = None


@dataclass
class Flight:
    """A message in flight, and its reply.

    ``names`` are the ids under which it was sent, with the machine's time of each; two where the first was
    not answered for long.
    """

    node: int
    names: dict[str, float]
    dispatch: Dispatch
    size: int
    sent: float
    deadline: float  # on the machine's clock
    due: float | None = None  # when the reply counts
    reply: Reply | None = None


class Timing(Protocol):
    """A run's clock, in seconds since its start (for a resumed run, its first start)."""

    name: str
    now: float

    def send(self, flight: Flight) -> None:
        """Record that a message was sent."""

    def receive(self, flight: Flight) -> None:
        """Record that the reply has arrived."""

    def tick(self) -> None:
        """Update from the machine's clock."""

    def next(self, flights: list[Flight]) -> Flight | None:
        """Return the flight that counts next, whose reply may still be missing; None: none yet."""

    def wait_until(self, moment: float) -> bool:
        """Skip to a moment before which nothing is in flight; return False if the caller must wait."""


class WallTiming:
    """The machine's clock."""

    name = "wall"

    def __init__(self, clock: Callable[[], float] = time.monotonic, start: float = 0.0) -> None:
        self._clock = clock
        self._origin = clock() - start
        self.now = start

    def send(self, flight: Flight) -> None:
        """No-op: the arrival time is not known yet."""

    def receive(self, flight: Flight) -> None:
        """Delay the reply in proportion to the client's training time; failed replies are not delayed."""
        assert flight.reply is not None
        self.tick()
        content = flight.reply.content
        learned = 0.0 if content is None else min(claimed_seconds(content), self.now - flight.sent)
        flight.due = self.now + max(flight.dispatch.speed - 1, 0.0) * learned

    def tick(self) -> None:
        """Advance the clock; it never goes backwards."""
        self.now = max(self.now, self._clock() - self._origin)

    def next(self, flights: list[Flight]) -> Flight | None:
        """Return the flight whose reply became due first; None if none is due."""
        self.tick()
        there = [flight for flight in flights if flight.due is not None and flight.due <= self.now]
        return min(there, key=_when, default=None)

    def wait_until(self, moment: float) -> bool:
        """Return False: time passes by itself."""
        return False


class VirtualTiming:
    """A virtual clock on which a message takes ``speed * nominal`` seconds."""

    name = "virtual"

    def __init__(self, nominal: float, start: float = 0.0) -> None:
        self._nominal = nominal
        self.now = start

    def send(self, flight: Flight) -> None:
        """Fix the time at which the reply counts."""
        flight.due = flight.sent + flight.dispatch.speed * self._nominal

    def receive(self, flight: Flight) -> None:
        """No-op: arrival times are fixed at send time."""

    def tick(self) -> None:
        """No-op: the machine's clock is ignored."""

    def next(self, flights: list[Flight]) -> Flight | None:
        """Return the flight that is due first, whether its reply has arrived or not."""
        first = min(flights, key=_when, default=None)
        if first is not None and first.reply is not None:
            self.now = max(self.now, first.due or 0.0)
        return first

    def wait_until(self, moment: float) -> bool:
        """Advance the clock to the moment."""
        self.now = max(self.now, moment)
        return True


def _when(flight: Flight) -> tuple[float, tuple[object, ...]]:
    return (flight.due or 0.0, flight.dispatch.label)
