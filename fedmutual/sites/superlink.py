"""What a SuperLink says of its nodes and runs, and the registration of keys: Flower's Control API.

The Control API has no authentication, so a SuperLink is asked from its own machine only.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from fedmutual.logs import brief
from fedmutual.wire.signatures import fingerprint

ONLINE, OFFLINE, REGISTERED, REMOVED = "online", "offline", "registered", "unregistered"  # Flower's words
_PATIENCE = 2  # heartbeats: flwr.common.constant.HEARTBEAT_PATIENCE


class SuperLinkError(RuntimeError):
    """The SuperLink cannot be reached, or refuses; the message says what to do."""


@dataclass(frozen=True)
class Connection:
    """Where a SuperLink is.

    Attributes
    ----------
    root_certificates : Path or None
        The authority's certificate; None: without TLS.
    """

    address: str
    root_certificates: Path | None


@dataclass(frozen=True)
class Registered:
    """A node whose key is registered, or was.

    Attributes
    ----------
    name : str
        The name that it was registered with; empty: none.
    state : str
        ``online``, ``offline``, ``registered`` (it has never connected) or ``unregistered``.
    seen : float or None
        Unix time of its last heartbeat; of a node that is away, when it was given up at the latest.
    interval : float
        Seconds between two heartbeats.
    """

    id: int
    name: str
    fingerprint: str
    state: str
    seen: float | None
    interval: float


def connection_of(address: str | None, root_certificates: Path | None, insecure: bool) -> Connection:
    """Return the SuperLink of the options, else the default one of Flower's configuration.

    Raises
    ------
    SuperLinkError
        There is none, or what the options say does not fit together.
    """
    if address is not None:
        if insecure == (root_certificates is not None):
            raise SuperLinkError("--superlink needs --root-certificates CA.CRT, or else --insecure")
        return Connection(address, root_certificates)
    file = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"
    remedy = "name it: --superlink HOST:PORT --root-certificates CA.CRT, on the SuperLink's machine"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("superlink", {})
        found = table.get(table.get("default"), {})
    except FileNotFoundError:
        raise SuperLinkError(f"there is no {file}, so no SuperLink is known; {remedy}") from None
    except (OSError, ValueError) as error:
        raise SuperLinkError(f"{file} cannot be read: {error}") from error
    if ":" not in str(found.get("address", "")) or found["address"].startswith(":"):
        raise SuperLinkError(f"{file} has no address of a SuperLink as its default; {remedy}")
    certificates = found.get("root-certificates")
    return Connection(found["address"], None if certificates is None else file.parent / str(certificates))


class SuperLink:
    """A connection to a SuperLink; a context manager.

    Parameters
    ----------
    connection : Connection
    timeout : float
        Seconds for one answer.
    """

    def __init__(self, connection: Connection, timeout: float = 10.0) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

        self.connection = connection
        certificates = connection.root_certificates
        try:
            content = None if certificates is None else certificates.read_bytes()
            self._client = ControlHttpClient.from_server_address(
                connection.address,
                certificates is None,
                content,
                [RuntimeVersionHttpInterceptor(component_name="fedmutual")],
            )
        except OSError as error:
            raise SuperLinkError(f"{certificates}: {error}") from error
        self._client._client.timeout = httpx.Timeout(timeout)

    def __enter__(self) -> SuperLink:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def nodes(self) -> tuple[list[Registered], float]:
        """Return all nodes, those that were removed included, and the SuperLink's time (Unix).

        Raises
        ------
        SuperLinkError
        """
        from flwr.proto.control_pb2 import ListNodesRequest

        answer = self._ask("ListNodes", ListNodesRequest())
        found = [
            Registered(
                node.node_id,
                node.name,
                fingerprint(node.public_key),
                node.status,
                _seen(node),
                node.heartbeat_interval,
            )
            for node in answer.nodes_info
        ]
        return found, datetime.fromisoformat(answer.now).timestamp()

    def register(self, name: str, public_key: bytes) -> int:
        """Register a key (OpenSSH) under a name; returns the node's id."""
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key
        from flwr.proto.control_pb2 import RegisterNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        key = load_ssh_public_key(public_key)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        request = RegisterNodeRequest(public_key=public_key_to_bytes(key), name=name)
        return int(self._ask("RegisterNode", request).node_id)

    def unregister(self, node: int) -> None:
        """Remove a node: its key is refused from now on, and for good."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._ask("UnregisterNode", UnregisterNodeRequest(node_id=node))

    def _ask(self, method: str, request: Any) -> Any:
        where = self.connection.address
        try:
            return getattr(self._client, method)(request)
        except httpx.HTTPStatusError as error:
            said = brief(error.response.text)
            if error.response.status_code == 404:
                said = "this is its gateway for sites: ask the SuperLink itself, on its own machine"
            raise SuperLinkError(f"the SuperLink at {where} refuses {method}: {said}") from error
        except httpx.HTTPError as error:
            raise SuperLinkError(
                f"the SuperLink at {where} does not answer ({error}): is it running, and is the address "
                "right?"
            ) from error


def of_name(nodes: Sequence[Registered], name: str, key: str = "") -> list[Registered]:
    """Return the nodes that are registered under a name, or with its key."""
    present = [node for node in nodes if node.state != REMOVED]
    return [node for node in present if node.name == name or (key and node.fingerprint == key)]


def _seen(node: Any) -> float | None:
    if not node.HasField("online_until"):
        return None
    away = _PATIENCE * node.heartbeat_interval if node.status == ONLINE else 0.0
    return float(node.online_until) - away
