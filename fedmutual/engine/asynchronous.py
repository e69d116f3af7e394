"""The asynchronous loop: send a message to every idle node, process replies as they arrive; no rounds.

At most one message is in flight per node. A :class:`Source` decides what is sent and what a reply means, a
:class:`fedmutual.engine.timing.Timing` decides when a reply counts. This module handles transport and failing
nodes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from fedmutual.engine.timing import Dispatch, Flight, Timing
from fedmutual.settings import ExchangeSettings
from fedmutual.wire.exchange import NO_REPORT, ExchangeError, Reply, explain, quorum, resent
from fedmutual.wire.patience import ATTEMPTS, Patience, resend_after
from fedmutual.wire.records import payload_bytes

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two queries of the connected nodes: each is a request in deployment
FIRST_PAUSE, LONGEST_PAUSE = (
    1.0,
    60.0,
)  # seconds before a failed node gets another message; doubled each time
FAILURES = 3  # in a row; the node then does not count as participating until it answers


class Source(Protocol):
    """Decides which messages are sent, and processes replies."""

    def dispatch(self, node: int, now: float) -> Dispatch | None:
        """Return the next message for a node; None: nothing to send now."""

    def arrived(self, reply: Reply, now: float) -> bool:
        """Process a reply; return False if it was useless and the node must pause."""

    def over(self, now: float) -> bool:
        """Return whether nothing more is to be sent."""


@dataclass
class _Node:
    """The state of a node that failed or was connected before."""

    failures: int = 0
    not_before: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class _Late:
    """A message that was given up; ``until`` then, its node is taken to be busy with it."""

    node: int
    until: float
    sent_at: float


@dataclass
class AsynchronousLoop:
    """Send messages, wait for replies, pass them to the source, repeat.

    Parameters
    ----------
    grid : Grid
    settings : ExchangeSettings
        ``min_clients`` must participate; fewer are tolerated for ``return_timeout``; a reply may take
        ``round_timeout``, and after half of that its message is sent once more. All times are on the
        machine's clock.
    source : Source
    timing : Timing
    expected : int
        Clients at the start; without ``min_clients``, half of them must participate.
    clock, sleep
        The machine's clock and sleep; injected by tests.
    """

    grid: Grid
    settings: ExchangeSettings
    source: Source
    timing: Timing
    expected: int
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _flights: dict[int, Flight] = field(default_factory=dict)
    patience: Patience = field(init=False)
    _late: dict[str, _Late] = field(default_factory=dict)  # timed out, but their nodes may still work on them
    _known: set[int] = field(default_factory=set)  # nodes that have reported
    _nodes: dict[int, _Node] = field(default_factory=dict)
    _online: set[int] = field(default_factory=set)
    _looked: float | None = None
    _few_since: float | None = None

    def __post_init__(self) -> None:
        self.patience = Patience(self.settings.round_timeout)
        self._may_lose = getattr(self.grid, "may_lose", False)

    def run(self) -> None:
        """Run until the source is over, then wait for the messages in flight.

        Raises
        ------
        ExchangeError
            Too few nodes participate for longer than ``exchange.return_timeout``; names the nodes and
            reasons.
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
        """Update the connected nodes; reset a node that returns after an absence."""
        if self._looked is not None and self.clock() - self._looked < LOOK_SECONDS:
            return
        online, self._looked = set(self.grid.get_node_ids()), self.clock()
        for node in online - self._online:
            self._nodes[node] = _Node()
        now = self.clock()
        self._late = {k: late for k, late in self._late.items() if late.node in online and late.until > now}
        self._online = online

    def _send(self) -> None:
        self.timing.tick()
        busy = self._busy()
        for node in sorted(self._online - busy):
            if self._nodes[node].not_before > self.timing.now:
                continue
            dispatch = self.source.dispatch(node, self.timing.now)
            if dispatch is not None:
                self._push(node, dispatch)

    def _busy(self) -> set[int]:
        return {*self._flights, *(late.node for late in self._late.values())}

    def _push(self, node: int, dispatch: Dispatch) -> None:
        # one at a time: a rejected message has an empty id in deployment, but no id in simulation
        size = payload_bytes(dispatch.message.content)
        sent = self.timing.now if dispatch.sent is None else dispatch.sent
        ids = list(self.grid.push_messages([dispatch.message]))
        if not (ids and ids[0]):
            reply = Reply(node, None, "the node is not connected", 0, 0, 0.0)
            self.source.arrived(reply, self.timing.now)
            self._failed(node, reply.error)
            return
        now = self.clock()
        flight = Flight(node, {ids[0]: now}, dispatch, size, sent, now + self._timeout(node))
        self.timing.send(flight)
        self._flights[node] = flight

    def _timeout(self, node: int) -> float:
        return self.patience.seconds if node in self._known else self.patience.first

    def _push_again(self) -> None:
        """Send messages once more that nothing has been heard of."""
        now = self.clock()
        for node, flight in self._flights.items():
            silence = now - max(flight.names.values())
            if flight.reply is not None or len(flight.names) == ATTEMPTS or node not in self._online:
                continue
            if silence >= resend_after(self._timeout(node)):
                ids = list(self.grid.push_messages([resent(flight.dispatch.message)]))
                if ids and ids[0]:
                    flight.names[ids[0]] = now
                    flight.size += payload_bytes(flight.dispatch.message.content)
                    logger.warning("node %d has not answered: its order was sent again", node)

    def _step(self) -> None:
        """Process the next reply, or let time pass."""
        first = self.timing.next(list(self._flights.values()))
        if first is not None and first.reply is not None:
            self._hand_over(first)
            return
        if self._may_lose:
            self._push_again()
        # with a virtual clock, pull only the first reply: an in-process grid may run one client at a time
        waiting = [f for f in ([first] if first else self._flights.values()) if f.reply is None]
        arrived = self._pull({name: flight for flight in waiting for name in flight.names})
        if not arrived and not (first is None and self._skip_pause()):
            self.sleep(self.settings.poll_interval)

    def _pull(self, waiting: dict[str, Flight]) -> bool:
        names = [*waiting, *self._late]
        messages = list(self.grid.pull_messages(names)) if names else []
        for message in messages:
            name = message.metadata.reply_to_message_id
            if name in self._late:
                late = self._late.pop(name)
                logger.info("node %d: its report arrived too late", late.node)
                self._observe(late.node, late.sent_at, message)
            elif name in waiting and waiting[name].reply is None:
                self._receive(waiting[name], name, message)
        for flight in waiting.values():
            if flight.reply is None and self.clock() >= flight.deadline:
                self._leave_open(flight)
        return bool(messages)

    def _leave_open(self, flight: Flight) -> None:
        """Give a reply up; its node gets nothing else before it answers or is gone.

        Where messages may get lost, it gets another one after as long again.
        """
        until = self.clock() + self._timeout(flight.node) if self._may_lose else math.inf
        self._late |= {name: _Late(flight.node, until, sent) for name, sent in flight.names.items()}
        self._answer(flight, Reply(flight.node, None, NO_REPORT, flight.size, 0, 0))

    def _observe(self, node: int, sent_at: float, message: Message) -> None:
        if not message.has_error() and message.metadata.message_type.startswith("train"):
            self._known.add(node)
            self.patience.observe(self.clock() - sent_at)

    def _receive(self, flight: Flight, name: str, message: Message) -> None:
        self._observe(flight.node, flight.names[name], message)
        if message.has_error() and len(flight.names) > 1:
            del flight.names[name]  # it was sent twice, and the other message is still under way
            return
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
        """Pause a failed node, so that a missing or failing node is not polled in a busy loop."""
        known = self._nodes.setdefault(node, _Node())
        pause = min(FIRST_PAUSE * 2**known.failures, LONGEST_PAUSE)
        self._nodes[node] = _Node(known.failures + 1, self.timing.now + pause, error)
        if known.failures + 1 == FAILURES:
            logger.warning("node %d has failed %d times in a row: %s", node, FAILURES, error)

    def _skip_pause(self) -> bool:
        """Advance a virtual clock to the end of the first pause if all nodes pause."""
        if self._flights or self.source.over(self.timing.now):
            return False
        pauses = [self._nodes[node].not_before for node in self._online - self._busy()]
        later = [moment for moment in pauses if moment > self.timing.now]
        skipped = bool(later) and self.timing.wait_until(min(later))
        # virtual time passes instantly: sleep, so that repeatedly failing nodes do not keep the machine busy
        return skipped and any(self._nodes[node].failures < FAILURES for node in self._online)

    def _require_enough(self) -> None:
        taking_part = [node for node in self._online if self._nodes[node].failures < FAILURES]
        needed = quorum(self.settings.min_clients, self.expected)
        if len(taking_part) >= needed:
            self._few_since = None
            return
        self._few_since = self.clock() if self._few_since is None else self._few_since
        if self.clock() - self._few_since < self.settings.return_timeout:
            return
        reasons = [f"node {node}: {known.error}" for node, known in self._nodes.items() if known.error]
        raise ExchangeError(
            f"{len(taking_part)} clients take part, {needed} are needed (exchange.min_clients), and no "
            f"others joined within exchange.return_timeout={self.settings.return_timeout:g} s. "
            + " | ".join(reasons)
        )
