"""Who takes part in a run without rounds: nodes by name, each client's own count, and its emulated speed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
        How many times as long as others it takes, emulated.
    update : int
        Number of its present or next order, from 1.
    delivered : int
        Reports that were taken.
    under_way : bool
        The order stands: it is repeated as it is until there is an answer.
    sent : float
        When it was sent first, in seconds of the run's clock.
    """

    name: str
    speed: float
    update: int = 1
    delivered: int = 0
    under_way: bool = False
    sent: float = 0.0


class Participants:
    """The clients, found by node.

    Parameters
    ----------
    speeds : Sequence[float]
        Dealt out in order of the names to the clients of the start, then to others as they come.
    """

    def __init__(self, speeds: Sequence[float]) -> None:
        self.by_name: dict[str, Participant] = {}
        self._speeds = speeds
        self._names: dict[int, str] = {}
        self._unnamed: set[int] = set()

    def expect(self, nodes: Iterable[int]) -> None:
        """The nodes of the start: the run begins when all of them have said who they are, or failed to."""
        self._unnamed = set(nodes)

    @property
    def complete(self) -> bool:
        """Whether all nodes of the start have been asked."""
        return not self._unnamed

    def at(self, node: int) -> Participant | None:
        """The client at a node, once that has said who it is."""
        return self.by_name.get(self._names.get(node, ""))

    def named(self, node: int) -> bool:
        """Whether a node has said who it is; until the start is complete it is no client yet."""
        return node in self._names

    def reachable(self) -> set[str]:
        """Names that a node has claimed since the server started."""
        return set(self._names.values())

    def nodes(self, online: Iterable[int]) -> dict[int, Participant]:
        """The clients at these nodes."""
        return {node: client for node in online if (client := self.at(node)) is not None}

    def identified(self, reply: Reply, online: set[int]) -> bool:
        """A node has answered the question who it is; False where it cannot take part (now).

        A restarted SuperNode has a new id, but is its client again; while its old node is still connected
        it has to wait: Flower takes up to a minute to see that one is dead.
        """
        node, name = reply.node_id, None if reply.content is None else claimed_client(reply.content)
        at_start = node in self._unnamed
        if name is None:
            logger.warning("node %d does not say who it is: %s", node, reply.error or "no client-name")
        else:
            self._meet(node, name, at_start, online)
        self._unnamed.discard(node)
        if at_start and self.complete:  # in order of the names: node ids are random
            for known in sorted(self.reachable(), key=natural_key):
                self._admit(known)
        return node in self._names

    def as_list(self) -> list[dict[str, Any]]:
        """For the checkpoint, as JSON. Node ids are not kept: after a restart they mean nothing."""
        return [asdict(client) for client in self.by_name.values()]

    def restore(self, saved: Sequence[dict[str, Any]]) -> None:
        """Take up a checkpoint's clients."""
        self.by_name = {entry["name"]: Participant(**entry) for entry in saved}

    def _meet(self, node: int, name: str, at_start: bool, online: set[int]) -> None:
        holders = [other for other, known in self._names.items() if known == name and other != node]
        if any(holder in online for holder in holders):
            problem = (
                f"nodes {holders[0]} and {node} are both named {name}: give every node its own client-name "
                "(or partition-id) in its --node-config"
            )
            logger.error("%s; node %d waits until the other one is gone", problem, node)
            return
        for holder in holders:
            del self._names[holder]
        self._names[node] = name
        if not at_start:
            self._admit(name)

    def _admit(self, name: str) -> None:
        if name not in self.by_name:
            speed = self._speeds[len(self.by_name) % len(self._speeds)]
            self.by_name[name] = Participant(name, float(speed))
