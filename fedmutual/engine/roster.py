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
from fedmutual.results.summary import natural_key
from fedmutual.settings import ParticipationSettings
from fedmutual.wire.exchange import Exchange, ExchangeError, Reply, messages_to
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
    """

    def __init__(
        self, min_clients: int | None, participation: ParticipationSettings | None = None, seed: int = 0
    ) -> None:
        self.expected = 0
        self._min_clients = min_clients
        self._participation = participation
        self._seed = seed
        self._names: dict[int, str] = {}
        self._refused: set[int] = set()
        self._history = History()
        self._lines: list[dict[str, Any]] = []
        self.good = 0
        self._begun = False  # the first round is over: clients have names

    def expect(self, clients: int) -> None:
        """Set the number of initial clients."""
        self.expected = clients

    def name(self, node: int) -> str | None:
        """Return the name of a node; None until it has reported."""
        return self._names.get(node)

    def nodes(self, grid: Grid) -> list[int]:
        """Return the connected nodes that participate."""
        return [node for node in sorted(grid.get_node_ids()) if node not in self._refused]

    def taking_part(self, round: int, nodes: list[int]) -> list[int]:
        """Return the participants of a round, selected by client name and not by node id."""
        chosen = self._participation
        if chosen is None or chosen.is_full:
            return nodes
        there = [node for node in nodes if not chosen.misses(self._names.get(node), round)]
        there.sort(key=lambda node: natural_key(self._names.get(node, f"~{node}")))
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

        If clients are selected by name, nodes are also asked before the first round.

        A restarted SuperNode has a new id but must get its own client's target. A second node with the name
        of a connected node is rejected for this round and asked again in the next: Flower takes up to a
        minute to notice a dead node.
        """
        self._refused.clear()
        online = self.nodes(exchange.grid)
        strangers = [node for node in online if node not in self._names]
        by_name = self._participation is not None and not self._participation.is_full
        if not strangers or not (self._begun or by_name):
            return
        asked = {node: RecordDict({"identify": ConfigRecord()}) for node in strangers}
        questions = messages_to(asked, IDENTIFY, IDENTIFY_SECONDS)
        for reply in exchange.send_and_collect(questions, everyone=True):
            name = claimed_client(reply.content) if reply.content is not None else None
            if name is None:
                continue  # treat it as a new node: its report gives its name
            holders = [node for node, known in self._names.items() if known == name]
            if any(node in online for node in holders):
                self._refused.add(reply.node_id)
                logger.error(
                    "node %d waits: client %s is still connected as node %d; if that node is alive, give "
                    "every node its own client-name", reply.node_id, name, holders[0],
                )  # fmt: skip
                continue
            for node in holders:
                del self._names[node]
            self._names[reply.node_id] = name

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
            name = self._names.get(reply.node_id) or (report.client if report else _claimed(reply))
            if report is not None:
                reason = self._conflict(report, reply.node_id, [r.node_id for r in replies])
            if report is not None and not reason:
                self._names[reply.node_id] = report.client
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
        needed = self._min_clients or max(1, (self._part_of(self.expected) + 1) // 2)
        if self.good >= needed:
            return
        reasons = [_blame(line) for line in self._lines if "rejected" in line]
        ordered = {line["node_id"] for line in self._lines}
        reasons += [f"{name}: not connected" for node, name in self._names.items() if node not in ordered]
        raise ExchangeError(
            f"round {round}: {self.good} good reports, {needed} are needed (exchange.min_clients). "
            + " | ".join(reasons)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON state for the checkpoint, without node ids, which a restart invalidates."""
        return {"expected": self.expected, "last": self._history.last}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the clients from a checkpoint."""
        self.expected = saved["expected"]
        self._history = History(saved["last"])
        self._begun = True

    def _conflict(self, report: Report, node: int, asked: list[int]) -> str:
        """Return why a node may not report under a name; empty if it may."""
        known = self._names.get(node)
        if known is not None and known != report.client:
            return f"client: the report is {report.client}'s, but this node is {known}"
        other = next((n for n in asked if n != node and self._names.get(n) == report.client), None)
        if other is None:
            return ""
        self._refused.add(node)
        return _twins(other, node, report.client)


def _twins(first: int, second: int, name: str) -> str:
    return (
        f"nodes {first} and {second} are both named {name}: give every node its own client-name (or "
        "partition-id) in its --node-config"
    )


def _blame(line: Mapping[str, Any]) -> str:
    name, reason = line["client"] or f"node {line['node_id']}", str(line["rejected"])
    return reason if reason.startswith(f"{name}: ") else f"{name}: {reason}"  # a client's error names it


def _checked(reply: Reply, read: Callable[[RecordDict], Report]) -> tuple[Report | None, str]:
    if reply.content is None:
        return None, reply.error
    return attempt(read, reply.content)


def _claimed(reply: Reply) -> str | None:
    return None if reply.content is None else claimed_client(reply.content)
