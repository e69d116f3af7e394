"""The asynchronous loop: a message to every idle node, replies handed over as they arrive; no rounds.

At most one message is under way to a node. What is sent and what a reply means is the business of a
:class:`Source`, and when a reply counts that of a :class:`fedmutual.engine.timing.Timing`; here are only
transport and nodes that fail.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedmutual.engine.timing import Dispatch, Flight, Timing
from fedmutual.settings import ExchangeSettings
from fedmutual.wire.exchange import MEANING, ExchangeError, Reply, explain
from fedmutual.wire.records import payload_bytes

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two questions for the connected nodes: in deployment each is a request
FIRST_PAUSE, LONGEST_PAUSE = (
    1.0,
    60.0,
)  # seconds before a node that failed gets another message; doubled each time
FAILURES = 3  # in a row, after which a node no longer counts as taking part, until it answers


class Source(Protocol):
    """What decides about messages and takes replies."""

    def dispatch(self, node: int, now: float) -> Dispatch | None:
        """The next message of a node; None: there is nothing for it now."""

    def arrived(self, reply: Reply, now: float) -> bool:
        """Take a reply; False: it was of no use, the node waits before it gets another message."""

    def over(self, now: float) -> bool:
        """Whether nothing more is to be sent."""


@dataclass
class _Node:
    """What is known of a node that failed, or was there before."""

    failures: int = 0
    not_before: float = 0.0
    error: str = ""


@dataclass
class AsynchronousLoop:
    """Send, wait, hand over, send again.

    Parameters
    ----------
    grid : Grid
    settings : ExchangeSettings
        ``min_clients`` must take part, ``return_timeout`` is how long fewer may, ``round_timeout`` is how
        long one reply may take; all on the machine's clock.
    source : Source
    timing : Timing
    expected : int
        Clients of the start: half of them must take part where ``min_clients`` is not set.
    clock, sleep
        The machine's; injected by tests.
    """

    grid: Grid
    settings: ExchangeSettings
    source: Source
    timing: Timing
    expected: int
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _flights: dict[int, Flight] = field(default_factory=dict)
    _late: dict[str, int] = field(default_factory=dict)  # given up, but their nodes may still be at it
    _nodes: dict[int, _Node] = field(default_factory=dict)
    _online: set[int] = field(default_factory=set)
    _looked: float | None = None
    _few_since: float | None = None

    def run(self) -> None:
        """Go on until the source says that it is over; then wait for what is under way.

        Raises
        ------
        ExchangeError
            Where too few nodes take part for longer than ``exchange.return_timeout``: who, and why.
        """
        while not self.source.over(self.timing.now):
            self._look()
            self._send()
            self._require_enough()
            self._step()
        while self._flights:
            self._step()

    # -----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Who is connected; a node that comes back after an absence starts afresh."""
        if self._looked is not None and self.clock() - self._looked < LOOK_SECONDS:
            return
        online, self._looked = set(self.grid.get_node_ids()), self.clock()
        for node in online - self._online:
            self._nodes[node] = _Node()
        gone = {node for node in self._late.values() if node not in online}
        self._late = {name: node for name, node in self._late.items() if node not in gone}
        self._online = online

    def _send(self) -> None:
        self.timing.tick()
        busy = {*self._flights, *self._late.values()}
        for node in sorted(self._online - busy):
            if self._nodes[node].not_before > self.timing.now:
                continue
            dispatch = self.source.dispatch(node, self.timing.now)
            if dispatch is not None:
                self._push(node, dispatch)

    def _push(self, node: int, dispatch: Dispatch) -> None:
        # one at a time: a rejected message is an empty id in deployment, but is left out in simulation
        size = payload_bytes(dispatch.message.content)
        sent = self.timing.now if dispatch.sent is None else dispatch.sent
        ids = list(self.grid.push_messages([dispatch.message]))
        if not (ids and ids[0]):
            reply = Reply(node, None, "the node is not connected", 0, 0, 0.0)
            self.source.arrived(reply, self.timing.now)
            self._failed(node, reply.error)
            return
        flight = Flight(node, ids[0], dispatch, size, sent, self.clock() + self.settings.round_timeout)
        self.timing.send(flight)
        self._flights[node] = flight

    def _step(self) -> None:
        """Hand over the next reply, or let time pass."""
        first = self.timing.next(list(self._flights.values()))
        if first is not None and first.reply is not None:
            self._hand_over(first)
            return
        # on the virtual clock only the first is asked for: whoever plays the clients may play them one by one
        names = {f.name: f for f in ([first] if first else self._flights.values()) if f.reply is None}
        arrived = self._pull(names)
        if not arrived and not (first is None and self._skip_pause()):
            self.sleep(self.settings.poll_interval)

    def _pull(self, waiting: dict[str, Flight]) -> bool:
        names = [*waiting, *self._late]
        messages = list(self.grid.pull_messages(names)) if names else []
        for message in messages:
            name = message.metadata.reply_to_message_id
            if name in self._late:
                logger.info("node %d: its report came too late", self._late.pop(name))
            elif name in waiting:
                self._receive(waiting[name], message)
        for flight in waiting.values():
            if flight.reply is None and self.clock() >= flight.deadline:
                self._late[flight.name] = flight.node
                self._answer(
                    flight,
                    Reply(flight.node, None, MEANING[ErrorCode.MESSAGE_UNAVAILABLE], flight.size, 0, 0),
                )
        return bool(messages)

    def _receive(self, flight: Flight, message: Message) -> None:
        if message.has_error():
            reply = Reply(flight.node, None, explain(message.error), flight.size, 0, 0.0)
        else:
            up = payload_bytes(message.content)
            reply = Reply(flight.node, message.content, "", flight.size, up, 0.0)
        self._answer(flight, reply)

    def _answer(self, flight: Flight, reply: Reply) -> None:
        flight.reply = reply
        self.timing.receive(flight)

    def _hand_over(self, flight: Flight) -> None:
        del self._flights[flight.node]
        assert flight.reply is not None
        seconds = self.timing.now - flight.sent
        reply = Reply(**{**vars(flight.reply), "seconds": seconds})
        if self.source.arrived(reply, self.timing.now):
            self._nodes[flight.node] = _Node()
        else:
            self._failed(flight.node, reply.error or "its report was rejected")

    def _failed(self, node: int, error: str) -> None:
        """No more messages for a while: a node that is gone, or fails at once, is not spun on."""
        known = self._nodes.setdefault(node, _Node())
        pause = min(FIRST_PAUSE * 2**known.failures, LONGEST_PAUSE)
        self._nodes[node] = _Node(known.failures + 1, self.timing.now + pause, error)
        if known.failures + 1 == FAILURES:
            logger.warning("node %d has failed %d times in a row: %s", node, FAILURES, error)

    def _skip_pause(self) -> bool:
        """Where all nodes are pausing, a virtual clock goes to the end of the first pause."""
        if self._flights or self.source.over(self.timing.now):
            return False
        pauses = [self._nodes[node].not_before for node in self._online - set(self._late.values())]
        later = [moment for moment in pauses if moment > self.timing.now]
        skipped = bool(later) and self.timing.wait_until(min(later))
        # a virtual second is over at once: nodes that fail again and again must not keep the machine busy
        return skipped and any(self._nodes[node].failures < FAILURES for node in self._online)

    def _require_enough(self) -> None:
        taking_part = [node for node in self._online if self._nodes[node].failures < FAILURES]
        needed = self.settings.min_clients or max(1, (self.expected + 1) // 2)
        if len(taking_part) >= needed:
            self._few_since = None
            return
        self._few_since = self.clock() if self._few_since is None else self._few_since
        if self.clock() - self._few_since < self.settings.return_timeout:
            return
        reasons = [f"node {node}: {known.error}" for node, known in self._nodes.items() if known.error]
        raise ExchangeError(
            f"{len(taking_part)} clients take part, {needed} are needed (exchange.min_clients), and no "
            f"others came within exchange.return_timeout={self.settings.return_timeout:g} s. "
            + " | ".join(reasons)
        )
