"""Who a client is: the same name in simulation and deployment, and after every restart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it names folders too


class IdentityError(ValueError):
    """The node's configuration gives it no usable name or share."""


def client_name(node_config: Mapping[str, Any]) -> str:
    """Name of a client: ``client-name`` of its node configuration, else ``client-<partition-id>``.

    Never the node id, which changes when a SuperNode restarts.

    Raises
    ------
    IdentityError
        If there is neither, or the name cannot be a folder's.
    """
    name = str(node_config.get("client-name", ""))
    if not name and "partition-id" in node_config:
        name = f"client-{node_config['partition-id']}"
    if not name:
        raise IdentityError("this node has no name: start it with --node-config 'client-name=\"...\"'")
    if not CLIENT_NAME.fullmatch(name):
        raise IdentityError(
            f"client-name {name!r}: use up to 64 letters, digits, dots, hyphens and underscores"
        )
    return name


def partition_of(node_config: Mapping[str, Any]) -> tuple[int, int] | None:
    """``(partition-id, num-partitions)`` of a node that shares a pool; None for one with data of its own."""
    if "num-partitions" not in node_config:
        return None
    if "partition-id" not in node_config:
        raise IdentityError("node-config has num-partitions but no partition-id")
    return int(node_config["partition-id"]), int(node_config["num-partitions"])
