"""The clients of a run with rounds: names of nodes, their reports, and the quorum."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedmutual.engine.history import History
from fedmutual.engine.names import Names, Node, connected
from fedmutual.results.summary import natural_key
from fedmutual.settings import ParticipationSettings
from fedmutual.wire.exchange import Exchange, ExchangeError, Reply, messages_to, quorum
from fedmutual.wire.reports import Report, attempt, claimed_client

logger = logging.getLogger(__name__)

IDENTIFY = "query.identify"
IDENTIFY_SECONDS = 60.0


class Roster:
    """The clients of a run.

    Parameters
    ----------
    min_clients : int or None
        Quorum: good reports needed per round; None: half of the initial clients that participate, at least
        one.
    participation : ParticipationSettings or None
        Selects the participants of a round; None: all clients.
    seed : int
        Seed of the selection.
    names : Names or None
        Who may join, and which node has which name; None: anyone.
    """

    def __init__(
        self,
        min_clients: int | None,
        participation: ParticipationSettings | None = None,
        seed: int = 0,
        names: Names | None = None,
    ) -> None:
        self.expected = 0
        self._min_clients = min_clients
        self._participation = participation
        self._seed = seed
        self._names = names or Names()
        self._online: dict[int, Node] = {}
        self._refused: dict[int, str] = {}  # node -> why it gets no order
        self._history = History()
        self._lines: list[dict[str, Any]] = []
        self.good = 0
        self._begun = False  # the first round is over: clients have names

    def expect(self, clients: int) -> None:
        """Set the number of initial clients."""
        self.expected = clients

    def name(self, node: int) -> str | None:
        """Return the name of a node; None until it has reported."""
        return self._names.of(node)

    def nodes(self, grid: Grid) -> list[int]:
        """Return the connected nodes that participate."""
        strangers = self._look(grid)
        return [node for node in self._online if node not in strangers and node not in self._refused]

    def _look(self, grid: Grid) -> dict[int, str]:
        """Note which nodes are connected; return those that may not join, with the reason."""
        self._online = connected(grid)
        reasons = {node.id: self._names.stranger(node) for node in self._online.values()}
        return {node: reason for node, reason in reasons.items() if reason}

    def taking_part(self, round: int, nodes: list[int]) -> list[int]:
        """Return the participants of a round, selected by client name and not by node id."""
        chosen = self._participation
        if chosen is None or chosen.is_full:
            return nodes
        there = [node for node in nodes if not chosen.misses(self.name(node), round)]
        there.sort(key=lambda node: natural_key(self.name(node) or f"~{node}"))
        count = self._part_of(len(nodes))
        if count >= len(there):
            return there
        order = np.random.default_rng([self._seed, round]).permutation(len(there))
        return [there[position] for position in sorted(order[:count])]

    def _part_of(self, clients: int) -> int:
        fraction = 1.0 if self._participation is None else self._participation.fraction
        return max(1, math.ceil(fraction * clients - 1e-9))

    def identify(self, exchange: Exchange) -> None:
        """Ask unknown nodes for their names: those that joined after the first round or a server restart.

        If clients are selected or admitted by name, nodes are also asked before the first round.

        A restarted SuperNode without a key has a new id but must get its own client's target. A node that
        may not have the name it claims gets no order, and is asked again in the next round: Flower takes up
        to a minute to notice a dead node.
        """
        self._refused = self._look(exchange.grid)
        unknown = [n for n in self._online if n not in self._refused and self.name(n) is None]
        by_name = self._participation is not None and not self._participation.is_full
        if unknown and (self._begun or by_name or self._names.restricted):
            asked = {node: RecordDict({"identify": ConfigRecord()}) for node in unknown}
            questions = messages_to(asked, IDENTIFY, IDENTIFY_SECONDS)
            for reply in exchange.send_and_collect(questions, everyone=True):
                self.meet(reply)
        for node, reason in self._refused.items():
            logger.error("node %d gets no order: %s", node, reason)

    def meet(self, reply: Reply) -> str | None:
        """Give a node the name that its reply claims; return the name if it may have it."""
        name = claimed_client(reply.content) if reply.content is not None else None
        if name is not None:
            reason = self._names.claim(self._online[reply.node_id], name, self._online)
        else:  # a new node without a name yet: its report gives it
            reason = "it did not give its name (clients.allowed)" if self._names.restricted else ""
        if reason:
            self._refused[reply.node_id] = reason
        return None if reason else name

    def receive(
        self, replies: list[Reply], read: Callable[[RecordDict], Report], round: int, closing: bool
    ) -> dict[str, Report]:
        """Check the replies of a round; return the valid reports by client.

        Of two nodes with one name, the second is rejected.
        """
        reports: dict[str, Report] = {}
        self._lines = []
        for reply in replies:
            report, reason = _checked(reply, read)
            name = self.name(reply.node_id) or (report.client if report else _claimed(reply))
            if report is not None:
                reason = self._claim(reply.node_id, report.client)
            if report is not None and not reason:
                reports[report.client] = report
            else:
                report = None
                logger.warning("round %d: %s rejected: %s", round, name or f"node {reply.node_id}", reason)
            self._lines.append(self._history.line(reply, name, report, reason, round, closing))
        self.good = len(reports)
        self._begun = self._begun or bool(reports)
        return reports

    def lines(self) -> list[dict[str, Any]]:
        """Return the history of the last received round, one line per client."""
        return self._lines

    def require_quorum(self, round: int) -> None:
        """Raise if the round has too few reports.

        Raises
        ------
        ExchangeError
            The message names every failed client and the reason.
        """
        needed = quorum(self._min_clients, self._part_of(self.expected))
        if self.good >= needed:
            return
        reasons = [_blame(line) for line in self._lines if "rejected" in line]
        ordered = {line["node_id"] for line in self._lines}
        known = self._names.by_node().items()
        reasons += [f"{name}: not connected" for node, name in known if node not in ordered]
        raise ExchangeError(
            f"round {round}: {self.good} good reports, {needed} are needed (exchange.min_clients). "
            + " | ".join(reasons)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON state for the checkpoint."""
        return {"expected": self.expected, "last": self._history.last, "names": self._names.as_dict()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the clients from a checkpoint."""
        self.expected = saved["expected"]
        self._history = History(saved["last"])
        self._names.restore(saved["names"])
        self._begun = True

    def _claim(self, node: int, name: str) -> str:
        """Return why a node may not report under a name; empty if it may."""
        reason = self._names.claim(self._online.get(node, Node(node)), name, self._online)
        if reason:
            self._refused[node] = reason
        return reason


def _blame(line: Mapping[str, Any]) -> str:
    name, reason = line["client"] or f"node {line['node_id']}", str(line["rejected"])
    return reason if reason.startswith(f"{name}: ") else f"{name}: {reason}"  # a client's error names it


def _checked(reply: Reply, read: Callable[[RecordDict], Report]) -> tuple[Report | None, str]:
    if reply.content is None:
        return None, reply.error
    return attempt(read, reply.content)


def _claimed(reply: Reply) -> str | None:
    return None if reply.content is None else claimed_client(reply.content)
