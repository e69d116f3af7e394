"""A Grid whose calls survive a moment in which the SuperLink cannot be reached."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedmutual.wire.grids import GridAround

logger = logging.getLogger(__name__)

T = TypeVar("T")

GIVE_UP = 600.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 20.0


class SteadyGrid(GridAround):
    """Repeats a call that failed on the way.

    Flower itself repeats most of them, but not those that fail within TLS (a handshake that takes more than
    30 s on a busy machine, a connection cut by a gateway's restart), nor a push whose session was lost. Every
    call may be repeated: the SuperLink takes a message once, and the error for a report that was already on
    its way makes the exchange send its order again. A certificate that is refused is an error at once.
    For grids that lose nothing (in simulation) it is of no use.
    """

    may_lose = True  # an order or its report may be lost without a word

    def __init__(
        self,
        grid: Grid,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(grid)
        self._clock, self._sleep = clock, sleep

    def get_node_ids(self) -> Iterable[int]:
        return self._repeat("asking for the nodes", lambda: list(self._grid.get_node_ids()))

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self._repeat("asking for the nodes", lambda: list(self._grid.get_nodes()))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        return self._repeat("sending an order", lambda: list(self._grid.push_messages(batch)))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        names = list(message_ids)
        return self._repeat("asking for reports", lambda: list(self._grid.pull_messages(names)))

    def _repeat(self, what: str, call: Callable[[], T]) -> T:
        start, pause = self._clock(), FIRST_PAUSE
        while True:
            try:
                return call()
            except (httpx.TransportError, ObjectPushError) as error:
                if "certificate" in str(error).lower() or self._clock() - start >= GIVE_UP:
                    raise
                logger.warning("%s failed (%s); again in %g s", what, error or type(error).__name__, pause)
            self._sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def steady(grid: Grid) -> Grid:
    """Make a deployment's Grid steady; those of simulations lose nothing."""
    # by its name: to import the class would cost every simulation 0.6 s
    return SteadyGrid(grid) if type(grid).__name__ == "HttpGrid" else grid
