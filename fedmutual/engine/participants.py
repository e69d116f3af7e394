"""The clients of a run without rounds: node, name, update count and emulated speed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedmutual.engine.names import Names, Node
from fedmutual.results.summary import natural_key
from fedmutual.wire.exchange import Reply
from fedmutual.wire.reports import claimed_client

logger = logging.getLogger(__name__)


@dataclass
class Participant:
    """A client of the run.

    Attributes
    ----------
    speed : float
        Emulated slowness: factor on the duration of an update.
    update : int
        Number of its current or next order, from 1.
    delivered : int
        Number of accepted reports.
    under_way : bool
        The order is open: it is resent unchanged until it is answered.
    sent : float
        When the order was first sent, in seconds of the run's clock.
    """

    name: str
    speed: float
    update: int = 1
    delivered: int = 0
    under_way: bool = False
    sent: float = 0.0


class Participants:
    """The clients by node.

    Parameters
    ----------
    speeds : Sequence[float]
        Assigned to the initial clients in order of their names, then to others as they join.
    names : Names or None
        Who may join, and which node has which name; None: anyone.
    """

    def __init__(self, speeds: Sequence[float], names: Names | None = None) -> None:
        self.by_name: dict[str, Participant] = {}
        self._speeds = speeds
        self._names = names or Names()
        self._unnamed: set[int] = set()

    def expect(self, nodes: Iterable[int]) -> None:
        """Set the initial nodes; the run starts when each has named itself or failed to."""
        self._unnamed = set(nodes)

    @property
    def complete(self) -> bool:
        """Whether all initial nodes have been asked."""
        return not self._unnamed

    def at(self, node: int) -> Participant | None:
        """Return the client at a node; None until the node has named itself."""
        return self.by_name.get(self._names.of(node) or "")

    def named(self, node: int) -> bool:
        """Return whether a node has named itself; it is a client only once the start is complete."""
        return self._names.of(node) is not None

    def reachable(self) -> set[str]:
        """Return the names claimed by nodes since the server started."""
        return set(self._names.by_node().values())

    def reachable_nodes(self) -> dict[int, Participant]:
        """Return the clients that have named themselves since the server started, by node."""
        return self.nodes(self._names.by_node())

    def nodes(self, online: Iterable[int]) -> dict[int, Participant]:
        """Return the clients at these nodes."""
        return {node: client for node in online if (client := self.at(node)) is not None}

    def identified(self, reply: Reply, online: Mapping[int, Node]) -> bool:
        """Process a node's answer about its name; return False if it cannot participate (now).

        A restarted SuperNode without a key has a new id but keeps its client. While its old node is still
        connected, it must wait: Flower takes up to a minute to notice a dead node.
        """
        node, name = reply.node_id, None if reply.content is None else claimed_client(reply.content)
        at_start = node in self._unnamed
        if name is None:
            logger.warning("node %d did not give its name: %s", node, reply.error or "no client-name")
        else:
            self._meet(online.get(node, Node(node)), name, at_start, online)
        self._unnamed.discard(node)
        if at_start and self.complete:  # in name order, since node ids are random
            for known in sorted(self.reachable(), key=natural_key):
                self._admit(known)
        return self.named(node)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON state for the checkpoint."""
        return {
            "clients": [asdict(client) for client in self.by_name.values()],
            "names": self._names.as_dict(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the clients from a checkpoint."""
        self.by_name = {entry["name"]: Participant(**entry) for entry in saved["clients"]}
        self._names.restore(saved["names"])

    def _meet(self, node: Node, name: str, at_start: bool, online: Mapping[int, Node]) -> None:
        reason = self._names.claim(node, name, online)
        if reason:
            logger.error("node %d gets no order: %s", node.id, reason)
        elif not at_start:
            self._admit(name)

    def _admit(self, name: str) -> None:
        if name not in self.by_name:
            speed = self._speeds[len(self.by_name) % len(self._speeds)]
            self.by_name[name] = Participant(name, float(speed))
