"""Sending orders to many nodes and collecting what comes back: deadline, errors by name, bytes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedmutual.messages import payload_bytes
from fedmutual.settings import ExchangeSettings

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0  # clients that connect within this time of each other are all waited for

_MEANING = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "its ClientApp cannot be loaded (is fedmutual installed there?)",
    ErrorCode.MESSAGE_UNAVAILABLE: "no report within the round's time (exchange.round_timeout)",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its report expired on the way (exchange.round_timeout)",
    ErrorCode.NODE_UNAVAILABLE: "the node is gone; it may join again when its SuperNode is back",
    ErrorCode.CLIENT_APP_CRASHED: "its ClientApp process died (out of memory? killed?)",
    ErrorCode.UNKNOWN: "its process died (in simulation: a Ray actor; out of memory?)",
}


class ExchangeError(RuntimeError):
    """Too few clients are connected, or answered."""


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

    def send_and_collect(self, messages: list[Message]) -> list[Reply]:
        """Send every message, and wait for all replies or until the round's time is over.

        Returns
        -------
        list[Reply]
            One for each message, in the order of the messages.
        """
        deadline = self._clock() + self.settings.round_timeout
        replies: dict[int, Reply] = {}
        waiting: dict[str, tuple[int, Message, int, float]] = {}
        for position, message in enumerate(messages):
            size, sent_at = payload_bytes(message.content), self._clock()
            # one at a time: a rejected message is an empty id in deployment, but is left out in simulation
            ids = list(self.grid.push_messages([message]))
            if ids and ids[0]:
                waiting[ids[0]] = (position, message, size, sent_at)
            else:
                error = "the node is not connected"
                replies[position] = Reply(message.metadata.dst_node_id, None, error, 0, 0, 0.0)
        while waiting:
            for message in self.grid.pull_messages(list(waiting)):
                entry = waiting.pop(message.metadata.reply_to_message_id, None)
                if entry is not None:
                    position, order, size, sent_at = entry
                    replies[position] = _reply(order, message, size, self._clock() - sent_at)
            if not waiting or self._clock() >= deadline:
                break
            self._sleep(self.settings.poll_interval)
        for position, order, size, sent_at in waiting.values():
            error = _MEANING[ErrorCode.MESSAGE_UNAVAILABLE]
            node = order.metadata.dst_node_id
            replies[position] = Reply(node, None, error, size, 0, self._clock() - sent_at)
        return [replies[position] for position in range(len(messages))]


def messages_to(orders: Mapping[int, RecordDict], message_type: str, timeout: float) -> list[Message]:
    """One message a node, which expires with the round."""
    return [Message(content, node, message_type, ttl=timeout) for node, content in orders.items()]


def _reply(order: Message, message: Message, size: int, seconds: float) -> Reply:
    node = order.metadata.dst_node_id
    if message.has_error():
        return Reply(node, None, explain(message.error), size, 0, seconds)
    return Reply(node, message.content, "", size, payload_bytes(message.content), seconds)


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
    meaning = _MEANING.get(error.code, f"Flower error {error.code}")
    return f"{meaning}: {said}" if said and error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION else meaning
