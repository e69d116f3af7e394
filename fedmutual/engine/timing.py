"""When a reply counts: a run's own time, in seconds since its start.

On the wall clock a reply counts when it is there; a client whose emulated speed is s is given another (s - 1)
times the seconds that it learned. On the virtual clock a message takes its given duration whatever the
machine does, and replies count in the order of that clock: a run is then the same on every machine, whether
clients learn side by side or take turns.
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
        Orders replies of one virtual moment: of the client, since node ids are random.
    speed : float
        Emulated slowness: 8 is a client that takes eight times as long; 0 takes no time at all.
    sent : float or None
        When a message was sent that a resumed run sends again; None: now.
    """

    message: Message
    label: tuple[object, ...]
    speed: float = 1.0
    sent: float | None = None


@dataclass
class Flight:
    """A message under way, and what has come of it."""

    node: int
    name: str
    dispatch: Dispatch
    size: int
    sent: float
    deadline: float  # on the machine's clock
    due: float | None = None  # when its reply counts
    reply: Reply | None = None


class Timing(Protocol):
    """A run's time, in seconds since its start (of the first start, where it was resumed)."""

    name: str
    now: float

    def send(self, flight: Flight) -> None:
        """A message was sent."""

    def receive(self, flight: Flight) -> None:
        """Its reply is there."""

    def tick(self) -> None:
        """The machine's clock went on."""

    def next(self, flights: list[Flight]) -> Flight | None:
        """Whose reply comes next: it may have to be waited for; None: nobody's yet."""

    def wait_until(self, moment: float) -> bool:
        """Nothing is under way before this moment; True where it is reached without waiting."""


class WallTiming:
    """Time as it passes."""

    name = "wall"

    def __init__(self, clock: Callable[[], float] = time.monotonic, start: float = 0.0) -> None:
        self._clock = clock
        self._origin = clock() - start
        self.now = start

    def send(self, flight: Flight) -> None:
        """Nothing is known yet of when the reply will come."""

    def receive(self, flight: Flight) -> None:
        """A slow client is given more of the time that it learned; one that failed is not slow."""
        assert flight.reply is not None
        self.tick()
        content = flight.reply.content
        learned = 0.0 if content is None else min(claimed_seconds(content), self.now - flight.sent)
        flight.due = self.now + max(flight.dispatch.speed - 1, 0.0) * learned

    def tick(self) -> None:
        """Never backwards."""
        self.now = max(self.now, self._clock() - self._origin)

    def next(self, flights: list[Flight]) -> Flight | None:
        """The one that has been there longest."""
        self.tick()
        there = [flight for flight in flights if flight.due is not None and flight.due <= self.now]
        return min(there, key=_when, default=None)

    def wait_until(self, moment: float) -> bool:
        """Time passes by itself."""
        return False


class VirtualTiming:
    """Time as it would pass if a message took ``speed * nominal`` seconds."""

    name = "virtual"

    def __init__(self, nominal: float, start: float = 0.0) -> None:
        self._nominal = nominal
        self.now = start

    def send(self, flight: Flight) -> None:
        """When the reply counts is known beforehand."""
        flight.due = flight.sent + flight.dispatch.speed * self._nominal

    def receive(self, flight: Flight) -> None:
        """Too early for the machine is early enough here."""

    def tick(self) -> None:
        """The machine's clock means nothing."""

    def next(self, flights: list[Flight]) -> Flight | None:
        """The one that is due first, there or not."""
        first = min(flights, key=_when, default=None)
        if first is not None and first.reply is not None:
            self.now = max(self.now, first.due or 0.0)
        return first

    def wait_until(self, moment: float) -> bool:
        """Go there at once."""
        self.now = max(self.now, moment)
        return True


def _when(flight: Flight) -> tuple[float, tuple[object, ...]]:
    return (flight.due or 0.0, flight.dispatch.label)
