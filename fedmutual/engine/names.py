"""Which node is which client: a name belongs to one node for the length of a run.

A client's targets go to the node that has its name, so a second node must not get it. A node that an
operator registered with a name (``flwr supernode register KEY.pub SERVER --name NAME``) keeps its key when it
restarts: its client belongs to that key, also while the node is away. A node without such a key gets a new
key and a new id whenever it restarts. Its name is free again once Flower knows that the old node is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flwr.serverapp import Grid

from fedmutual.settings import ClientsSettings
from fedmutual.wire.signatures import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """A connected node, as Flower describes it.

    Attributes
    ----------
    fingerprint : str
        SHA256 of its public key, as ``ssh-keygen -lf`` prints it; empty where the grid knows no keys.
    registered : bool
        An operator registered its key, so it has the same one after a restart.
    """

    id: int
    fingerprint: str = ""
    registered: bool = False


def connected(grid: Grid) -> dict[int, Node]:
    """Return the connected nodes by id, in the order of their ids."""
    nodes = sorted(grid.get_nodes(), key=lambda info: info.node_id)
    return {info.node_id: Node(info.node_id, fingerprint(info.public_key), bool(info.name)) for info in nodes}


@dataclass(frozen=True)
class _Holder:
    """The node that has a name, or had it last."""

    node: int
    fingerprint: str
    bound: bool  # to the key: nobody else gets the name


class Names:
    """The names of the nodes.

    Parameters
    ----------
    settings : ClientsSettings or None
        Who may join, and what a name is bound to; None: anyone, and ``auto``.
    """

    def __init__(self, settings: ClientsSettings | None = None) -> None:
        self._allowed = {} if settings is None else settings.keys_of_allowed()
        self._bind = "auto" if settings is None else settings.bind
        self._by_node: dict[int, str] = {}
        self._holders: dict[str, _Holder] = {}

    @property
    def restricted(self) -> bool:
        """Whether a node must give a name of ``clients.allowed`` before it gets an order."""
        return bool(self._allowed)

    def of(self, node: int) -> str | None:
        """Return the name of a node; None until it has one."""
        return self._by_node.get(node)

    def by_node(self) -> dict[int, str]:
        """Return node -> name of the nodes that have named themselves since the server started."""
        return dict(self._by_node)

    def stranger(self, node: Node) -> str:
        """Return why a node may have no name at all; empty if it may."""
        keys = set(self._allowed.values())
        if self._allowed and "" not in keys and node.fingerprint not in keys:
            return f"its key {node.fingerprint or '(none)'} is not in clients.allowed"
        return ""

    def claim(self, node: Node, name: str, online: Mapping[int, Node]) -> str:
        """Give a node a name; return why it may not have it, empty if it has it now.

        Parameters
        ----------
        online : Mapping[int, Node]
            The connected nodes.
        """
        reason = self._refusal(node, name, online)
        if reason:
            return reason
        holder = self._holders.get(name)
        if holder is not None and holder.node != node.id:
            self._by_node.pop(holder.node, None)
            if not self._same_key(holder, node):
                logger.warning(
                    "client %s: node %d replaces node %d, which is gone", name, node.id, holder.node
                )
        self._by_node[node.id] = name
        bound = bool(node.fingerprint) and (self._bind == "key" or (self._bind == "auto" and node.registered))
        self._holders[name] = _Holder(node.id, node.fingerprint, bound)
        return ""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON state for the checkpoint: who has which name."""
        return {name: asdict(holder) for name, holder in self._holders.items()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore who has which name; each node must name itself again."""
        self._holders = {name: _Holder(**holder) for name, holder in saved.items()}

    def _refusal(self, node: Node, name: str, online: Mapping[int, Node]) -> str:
        known = self._by_node.get(node.id)
        if known is not None and known != name:
            return f"client: the report is {name}'s, but this node is {known}"
        if self._allowed:
            if name not in self._allowed:
                return f"client {name} is not in clients.allowed"
            if self._allowed[name] not in ("", node.fingerprint):
                return f"client {name} has another key in clients.allowed than node {node.id} has"
        holder = self._holders.get(name)
        if holder is None or holder.node == node.id or self._same_key(holder, node):
            return ""
        if holder.node in online and self._by_node.get(holder.node, name) == name:
            return (
                f"nodes {holder.node} and {node.id} are both named {name}: give every node its own "
                "client-name (or partition-id) in its --node-config"
            )
        if holder.bound:
            return (
                f"client {name} belongs to the key {holder.fingerprint} for this run, and node {node.id} has "
                "another one: start that site with its own key, or give this one its own client-name"
            )
        return ""

    @staticmethod
    def _same_key(holder: _Holder, node: Node) -> bool:
        return bool(node.fingerprint) and holder.fingerprint == node.fingerprint
