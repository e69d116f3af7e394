"""Sending orders to many nodes and collecting what comes back: deadline, errors by name, bytes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedmutual.settings import ExchangeSettings
from fedmutual.wire.patience import ATTEMPTS, Patience, resend_after
from fedmutual.wire.records import payload_bytes

FIRST_WORD, NEXT_WORD = 15.0, 60.0  # seconds after which the log says for whom a round waits, and again

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0  # clients that connect within this time of each other are all waited for
LONGEST_PAUSE = 2.0  # seconds between two looks for replies, where a look itself takes as long
BATCH, BATCH_BYTES = 64, 4 * 2**20  # orders of one request to a SuperLink, and their content at most
CLOCK_SKEW = 300.0  # seconds; Flower itself refuses a node with a key whose clock is further behind

MEANING = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "its ClientApp cannot be loaded (is fedmutual installed there?)",
    ErrorCode.MESSAGE_UNAVAILABLE: "its report got lost on the way, or came after exchange.round_timeout",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its report expired on the way (exchange.round_timeout)",
    ErrorCode.NODE_UNAVAILABLE: "the node is gone; it may join again when its SuperNode is back",
    ErrorCode.CLIENT_APP_CRASHED: "its ClientApp process died (out of memory? killed?)",
    ErrorCode.UNKNOWN: "its process died (in simulation: a Ray actor; out of memory?)",
    ErrorCode.MOD_FAILED_PRECONDITION: "a Flower mod of its ClientApp refused the order",
    ErrorCode.INVALID_FAB: "its SuperNode takes signed apps only (--trusted-entities) and refused this one",
}
NO_REPORT = "no report within the round's time (exchange.round_timeout)"
_MAY_COME_BACK = (
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
)


class ExchangeError(RuntimeError):
    """Too few clients are connected, or answered."""


def quorum(min_clients: int | None, clients: int) -> int:
    """Return how many clients must be good: ``exchange.min_clients``, or half of them, at least one."""
    return min_clients or max(1, (clients + 1) // 2)


@dataclass(frozen=True)
class Reply:
    """What came of one order.

    Attributes
    ----------
    node_id : int
    content : RecordDict or None
        None where the reply is an error or never came.
    error : str
        What went wrong, in words; empty where nothing did.
    downlink_bytes, uplink_bytes : int
        Content as serialised: the order, and the report.
    seconds : float
        From sending to receiving.
    """

    node_id: int
    content: RecordDict | None
    error: str
    downlink_bytes: int
    uplink_bytes: int
    seconds: float


class Exchange:
    """Orders out, replies in, over a Flower Grid.

    Flower's own ``send_and_receive`` looks for replies every 3 s in deployment; a round of ours may be
    shorter than that, so messages are pushed and pulled here.
    """

    def __init__(
        self,
        grid: Grid,
        settings: ExchangeSettings,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.grid = grid
        self.settings = settings
        self._clock = clock
        self._sleep = sleep
        self.patience = Patience(settings.round_timeout)
        self._may_lose = getattr(grid, "may_lose", False)
        self._late: dict[str, _Late] = {}  # orders that are no longer waited for
        self.name_of: Callable[[int], str | None] = lambda node: None  # for the log
        self.label: Callable[[list[Reply]], str] = lambda good: ""  # for the log, of good replies
        self.watch: Callable[[list[int], int], None] = lambda open, answered: None  # called at every look
        self._nodes: set[int] = set()
        self._asked = -math.inf

    def wait_for_clients(self, count: int | None) -> list[int]:
        """Wait until ``count`` nodes are connected; without a count, until no more arrive.

        Raises
        ------
        ExchangeError
            If too few are there after ``exchange.join_timeout`` seconds.
        """
        start = self._clock()
        seen: list[int] = []
        last_change = start
        while True:
            now = self._clock()
            nodes = sorted(self.grid.get_node_ids())
            if nodes != seen:
                seen, last_change = nodes, now
            if count is not None and len(nodes) >= count:
                return nodes
            if count is None and nodes and now - last_change >= SETTLE_SECONDS:
                return nodes
            if now - start > self.settings.join_timeout:
                raise ExchangeError(
                    f"{len(nodes)} of {count or 'any'} clients connected within "
                    f"{self.settings.join_timeout:g} s: start the other SuperNodes, set num_clients to the "
                    "number there are, or raise exchange.join_timeout"
                )
            self._sleep(self.settings.poll_interval)

    def send_and_collect(
        self, messages: list[Message], everyone: bool = False, rounds: int = 1
    ) -> list[Reply]:
        """Send every message, and wait for the replies or until the round's time is over.

        A node that still works on the order of an earlier round gets its order when it has answered that one.
        An order whose process or node died, or whose report got lost, is sent again once the node is there,
        within ``exchange.return_timeout``; one that nothing is heard of is sent again after half of the
        round's time. A client answers what it has done before from its state.

        Parameters
        ----------
        messages : list[Message]
            At most one a node.
        everyone : bool
            Wait for all also where ``exchange.enough_clients`` would do.
        rounds : int
            How many rounds' time they may take.

        Returns
        -------
        list[Reply]
            One for each message, in the order of the messages.
        """
        now, enough = self._clock(), None if everyone else self.settings.enough_clients
        orders = [_Order(message, payload_bytes(message.content), now) for message in messages]
        timeout = rounds * self.patience.seconds
        deadline, silence, tell = now + timeout, resend_after(timeout), now + FIRST_WORD
        while True:
            waiting = [order for order in orders if order.reply is None]
            self._push([order for order in waiting if not order.names])
            if self._may_lose:
                self._push_again([order for order in waiting if order.silent(self._clock(), silence)])
            look = self._clock()
            came = self._pull(
                {name: order for order in orders if order.reply is None for name in order.names}
            )
            took = 0.0 if came or not self._may_lose else min(self._clock() - look, LONGEST_PAUSE)
            replies = [order.reply for order in orders if order.reply is not None]
            good = [reply for reply in replies if reply.content is not None]
            answered = len(good)
            open_orders = [order for order in orders if order.reply is None]
            self.watch([order.node for order in open_orders], answered)
            if not open_orders or self._clock() >= deadline or (enough is not None and answered >= enough):
                break
            if self._clock() >= tell:
                tell = self._clock() + NEXT_WORD
                names = [self.name_of(order.node) or f"node {order.node}" for order in open_orders]
                said = f"{self.label(good)}{answered} of {len(orders)} answered"
                logger.info("%s, waiting for %s", said, listed(names))
            # a SuperLink that is slow to say that there is nothing is not asked more than half of the time
            self._sleep(max(self.settings.poll_interval, took))
        for order in open_orders:
            self._leave_open(order, deadline)
        return [order.reply for order in orders if order.reply is not None]

    def _push(self, orders: list[_Order]) -> None:
        now = self._clock()
        self._late = {name: late for name, late in self._late.items() if late.until > now}
        busy = {late.node for late in self._late.values() if late.busy}
        lost = [order for order in orders if order.lost_at is not None]
        online = self._online() if lost else set()
        ready = [o for o in orders if o.node not in busy and (o.lost_at is None or o.node in online)]
        for order, sent in self._send_all(ready):
            if sent:
                if order.lost_at is not None:
                    logger.info("node %d is there: its order was sent again", order.node)
            elif order.lost_at is None:
                order.reply = Reply(order.node, None, "the node is not connected", 0, 0, 0.0)
        for order in lost:
            if not order.names and self._clock() - cast(float, order.lost_at) > self.settings.return_timeout:
                self._close(order, f"{order.error} (it was not back within exchange.return_timeout)")

    def _push_again(self, orders: list[_Order]) -> None:
        """Send orders once more that nothing has been heard of; their first messages are still waited for."""
        online = self._online() if orders else set()
        for order in orders:
            if order.node in online and self._send(order):
                logger.warning("node %d has not answered: its order was sent again", order.node)

    def _send_all(self, orders: list[_Order]) -> Iterator[tuple[_Order, bool]]:
        """Send orders, and say of each whether it was taken.

        A deployment's Grid keeps the place of a rejected message, so that orders go in batches. It refuses a
        request that is too large as a whole: those orders then go one at a time, as in simulation, where a
        rejected message is left out of the answer. Nodes that must be served first (public.distribute) come
        last, one at a time, since all after them wait.
        """
        is_new = getattr(self.grid, "is_new", lambda message: False)
        known: list[_Order] = []
        new: list[_Order] = []
        for order in orders:
            (new if is_new(order.original) else known).append(order)
        together = batches(known) if self._may_lose else ([order] for order in known)
        for batch in chain(together, ([order] for order in new)):
            ids = list(self.grid.push_messages([order.message() for order in batch]))
            if not ids and len(batch) > 1:
                yield from ((order, self._send(order)) for order in batch)
            else:
                named = [*ids, *[""] * (len(batch) - len(ids))]
                yield from ((o, self._note(o, name)) for o, name in zip(batch, named, strict=True))

    def _send(self, order: _Order) -> bool:
        ids = list(self.grid.push_messages([order.message()]))
        return self._note(order, ids[0] if ids else "")

    def _note(self, order: _Order, name: str | None) -> bool:
        """Note the id under which an order is under way; False where it was rejected."""
        if not name:
            return False
        now = self._clock()
        order.names[name], order.attempts = now, order.attempts + 1
        order.sent_at = now if order.attempts == 1 else order.sent_at
        return True

    def _pull(self, waiting: dict[str, _Order]) -> int:
        """Take what has come of orders and of late ones, and say how many messages it was."""
        names, came = [*waiting, *self._late], 0
        for message in self.grid.pull_messages(names) if names else []:
            came += 1
            name = message.metadata.reply_to_message_id
            if name in self._late:
                late = self._late.pop(name)
                if late.sent_at is not None and not message.has_error():
                    logger.info("node %d: its report of an earlier round came too late", late.node)
                    self.patience.observe(self._clock() - late.sent_at)
            elif name in waiting and waiting[name].reply is None:
                self._receive(waiting[name], name, message)
        return came

    def _receive(self, order: _Order, name: str, message: Message) -> None:
        sent_at = order.names.pop(name)
        if not message.has_error():
            if order.trains:
                self.patience.observe(self._clock() - sent_at)
            self._close(order, "", message.content, payload_bytes(message.content))
            return
        order.error = explain(message.error)
        if order.names:
            return  # it was sent twice, and the other message is still under way
        may_come_back = message.error.code in _MAY_COME_BACK
        order.lost_at = self._clock() if order.lost_at is None else order.lost_at
        again = may_come_back and order.attempts < ATTEMPTS
        if again and self._clock() - order.lost_at < self.settings.return_timeout:
            logger.warning("node %d: %s; its order is sent again when it is there", order.node, order.error)
        else:
            self._close(order, order.error)

    def _leave_open(self, order: _Order, deadline: float) -> None:
        """The round goes on without this reply: its time is over, or enough others are in."""
        over = self._clock() >= deadline
        for name, sent_at in order.names.items():
            until = self._clock() + CLOCK_SKEW if over else deadline
            self._late[name] = _Late(order.node, until, not over, sent_at if order.trains else None)
        order.names = {}
        self._close(
            order,
            order.error or (NO_REPORT if over else "enough others had reported (exchange.enough_clients)"),
        )

    def _close(
        self, order: _Order, error: str, content: RecordDict | None = None, uplink_bytes: int = 0
    ) -> None:
        for name in order.names:  # it was sent twice; the other answer is only taken off the SuperLink
            self._late[name] = _Late(order.node, self._clock() + CLOCK_SKEW, False, None)
        seconds, downlink_bytes = self._clock() - order.sent_at, order.size * order.attempts
        order.reply = Reply(order.node, content, error, downlink_bytes, uplink_bytes, seconds)

    def _online(self) -> set[int]:
        """Connected nodes, asked for once a second at most: in deployment each question is a request."""
        if self._clock() - self._asked >= 1.0:
            self._asked, self._nodes = self._clock(), set(self.grid.get_node_ids())
        return self._nodes


@dataclass(frozen=True)
class _Late:
    """A message whose answer is no longer waited for.

    Attributes
    ----------
    until : float
        When it is forgotten.
    busy : bool
        The node gets no other order before it has answered.
    sent_at : float or None
        None where the answer says nothing about how long a round takes.
    """

    node: int
    until: float
    busy: bool
    sent_at: float | None


@dataclass
class _Order:
    """An order of the present round, and what has come of it."""

    original: Message
    size: int
    sent_at: float
    names: dict[str, float] = field(default_factory=dict)  # ids under which it is under way -> when sent
    attempts: int = 0
    lost_at: float | None = None
    error: str = ""
    reply: Reply | None = None

    @property
    def node(self) -> int:
        return self.original.metadata.dst_node_id

    @property
    def trains(self) -> bool:
        """Whether it is a round's order, and not a question."""
        return self.original.metadata.message_type.startswith("train")

    def silent(self, now: float, seconds: float) -> bool:
        """Whether nothing has been heard of it for so long that it is to be sent once more."""
        return bool(self.names) and self.attempts < ATTEMPTS and now - max(self.names.values()) >= seconds

    def message(self) -> Message:
        """The message itself, and later a copy of it: one that was pushed has its id for good."""
        return self.original if self.attempts == 0 else resent(self.original)


def batches(orders: Sequence[_Order]) -> Iterator[list[_Order]]:
    """Yield orders in batches of at most ``BATCH``; of ``BATCH_BYTES``, unless one alone has more."""
    batch: list[_Order] = []
    for order in orders:
        if batch and (len(batch) == BATCH or sum(o.size for o in batch) + order.size > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(order)
    if batch:
        yield batch


def messages_to(orders: Mapping[int, RecordDict], message_type: str, timeout: float) -> list[Message]:
    """One message a node, which expires after the round.

    A node drops a message that has expired by its own clock, so a clock may differ by ``CLOCK_SKEW``.
    """
    ttl = timeout + CLOCK_SKEW
    return [Message(content, node, message_type, ttl=ttl) for node, content in orders.items()]


def resent(message: Message) -> Message:
    """A message with the same content, which gets an id of its own."""
    metadata = message.metadata
    return Message(message.content, metadata.dst_node_id, metadata.message_type, ttl=metadata.ttl)


def as_reply(message: Message) -> Reply:
    """A message that somebody else has pulled; what it answers is not known."""
    if message.has_error():
        return Reply(message.metadata.src_node_id, None, explain(message.error), 0, 0, 0.0)
    size = payload_bytes(message.content)
    return Reply(message.metadata.src_node_id, message.content, "", 0, size, 0.0)


def explain(error: Error) -> str:
    """A Flower error in words: what it means here, and the last line of what the client said."""
    lines = [line.strip() for line in (error.reason or "").splitlines() if line.strip()]
    said = lines[-1] if lines else ""
    if error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
        return said or "its ClientApp raised an exception"
    meaning = MEANING.get(error.code, f"Flower error {error.code}")
    telling = (ErrorCode.LOAD_CLIENT_APP_EXCEPTION, ErrorCode.MOD_FAILED_PRECONDITION, ErrorCode.INVALID_FAB)
    return f"{meaning}: {said}" if said and error.code in telling else meaning


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more
