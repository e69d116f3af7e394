"""Checks of the connection to the SuperLink: network, TLS, Flower's version, clock, the node's key.

The checks change nothing at the SuperLink. To check the key, they send an invalid request: the SuperLink
refuses it with one error if it knows the key, and with another if it does not.
"""

from __future__ import annotations

import datetime
import socket
import ssl
import sys
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

from fedmutual.doctor.finding import CheckError

TIMEOUT = 10.0
# Flower refuses signed requests dated over 5 s in the future or 305 s in the past (fleet/node_auth.py).
AHEAD, BEHIND = 4.0, 300.0
_UNKNOWN_KEY, _KNOWN_KEY = (
    2004,
    2003,
)  # Flower's FLEET_NODE_ACTIVATION_FAILED, FLEET_INVALID_HEARTBEAT_INTERVAL


@dataclass(frozen=True)
class Link:
    """A SuperNode's connection; the fields are the options of ``flower-supernode``."""

    superlink: str
    insecure: bool
    root_certificates: Path | None
    private_key: Path | None

    def reach(self) -> str:
        """Open a TCP connection.

        Raises
        ------
        CheckError
            Unknown host name, no server at the port, or a firewall in between.
        """
        host, _, port = self.superlink.rpartition(":")
        if not host or not port.isdigit():
            raise CheckError(
                f"--superlink {self.superlink!r} is not host:port", "write it as server.example:8000"
            )
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT):
                return f"{self.superlink} listens"
        except socket.gaierror as error:
            raise CheckError(f"{host}: {error.strerror}", "check the name, or this machine's DNS") from error
        except TimeoutError as error:
            remedy = f"allow TCP port {port} in the firewalls of this site and of the server"
            raise CheckError(f"{self.superlink} does not answer within {TIMEOUT:g} s", remedy) from error
        except OSError as error:
            remedy = "start the SuperLink, with --host 0.0.0.0 for other machines, or check the port"
            raise CheckError(f"{self.superlink}: {error.strerror}", remedy) from error

    def check_tls(self) -> str:
        """Request the SuperLink's health over the connection that a SuperNode would use."""
        self._get("/health")
        if self.insecure:
            return "no TLS (--insecure): anyone on the network path can read and change the messages"
        return f"certificate accepted by {self.root_certificates or 'the system certificates'}"

    def check_version(self) -> str:
        """Compare the Flower versions of this site and of the SuperLink."""
        own = metadata.version("flwr")
        theirs = str(self._get("/openapi.json").json().get("info", {}).get("version", "unknown"))
        if theirs.split(".")[:2] != own.split(".")[:2]:
            raise CheckError(
                f"flwr {own} here, {theirs} at the SuperLink",
                f"pip install 'flwr[simulation]=={theirs}' here",
            )
        torch, python = metadata.version("torch"), ".".join(map(str, sys.version_info[:3]))
        return f"flwr {own} here, {theirs} at the SuperLink; torch {torch}, Python {python}"

    def check_clock(self) -> str:
        """Compare the clock with the SuperLink's, from the time in its answers (to the second)."""
        answer = self._get("/health")
        now = datetime.datetime.now(datetime.UTC)
        theirs = parsedate_to_datetime(answer.headers["date"]) + datetime.timedelta(seconds=0.5)
        ahead = (now - theirs).total_seconds()
        said = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the SuperLink's"
        if ahead > AHEAD or ahead < -BEHIND:
            raise CheckError(
                f"this clock is {said}", "synchronise both clocks with NTP (timedatectl set-ntp true)"
            )
        return said

    def check_key(self) -> str:
        """Check that the SuperLink knows the node's key.

        Raises
        ------
        CheckError
            The key is unreadable or not registered.
        """
        if self.private_key is None:
            return "no key given, which works only with a SuperLink without --enable-supernode-auth"
        status, code, said = self._ask_for_key()
        if code == _KNOWN_KEY:
            return f"{self.private_key} is registered"
        if code == _UNKNOWN_KEY:
            names = (f"{self.private_key.name}.pub", self.private_key.with_suffix(".pub").name)
            public = next((n for n in names if self.private_key.with_name(n).exists()), names[0])
            remedy = (
                f"register it at the server: fedmutual site add NAME --key {public}, or "
                f"flwr supernode register {public} <connection>"
            )
            raise CheckError(f"the SuperLink does not know {self.private_key}", remedy)
        remedy = "check the clock, and that the SuperLink was started with --enable-supernode-auth"
        raise CheckError(f"the SuperLink refused the key's signature (HTTP {status}): {said}", remedy)

    def _ask_for_key(self) -> tuple[int, int | None, str]:
        """Try to activate the node with an invalid heartbeat: Flower looks up the key, then refuses."""
        from flwr.proto.fleet_pb2 import ActivateNodeRequest
        from flwr.supercore.error import FlowerError
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        private = self._load_key()
        public = private.public_key()
        interceptors: list[Any] = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private, public),
        ]
        certificates = None if self.root_certificates is None else str(self.root_certificates)
        request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=-1.0)
        with FleetHttpClient.from_server_address(
            self.superlink, self.insecure, certificates, interceptors=interceptors
        ) as client:
            try:
                client.ActivateNode(request)
            except httpx.HTTPStatusError as error:
                told = FlowerError.from_json(error.response.text)
                code = None if told is None else int(told.code)
                return error.response.status_code, code, error.response.text[:200]
        return 200, None, "it accepted a heartbeat of -1 s"

    def _load_key(self) -> Any:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key

        assert self.private_key is not None
        remedy = (
            "create one: ssh-keygen -q -t ecdsa -b 384 -N '' -f <file>, readable by the SuperNode's user only"
        )
        try:
            key = load_ssh_private_key(self.private_key.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CheckError(f"{self.private_key} cannot be read: {error}", remedy) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CheckError(f"{self.private_key} is not an elliptic-curve key", remedy)
        return key

    def _get(self, path: str) -> httpx.Response:
        try:
            with httpx.Client(verify=self._verify(), timeout=TIMEOUT, trust_env=False) as client:
                scheme = "http" if self.insecure else "https"
                answer = client.get(f"{scheme}://{self.superlink}{path}")
                answer.raise_for_status()
                return answer
        except httpx.HTTPStatusError as error:
            text = f"{path}: HTTP {error.response.status_code}"
            raise CheckError(text, "check that a Flower SuperLink 1.41 or newer listens there") from error
        except httpx.TransportError as error:
            raise CheckError(f"{error}", _tls_remedy(str(error), self.insecure)) from error

    def _verify(self) -> ssl.SSLContext | bool:
        if self.insecure:
            return False
        if self.root_certificates is None:
            return True
        try:
            return ssl.create_default_context(cafile=str(self.root_certificates))
        except (OSError, ssl.SSLError) as error:
            remedy = "copy the server's ca.crt here, and pass it with --root-certificates"
            raise CheckError(f"{self.root_certificates}: {error}", remedy) from error


_OTHER_HOST = (
    "the certificate is for another host: use that name with --superlink, or create a certificate with this "
    "name in its subjectAltName"
)
_OTHER_AUTHORITY = "it is signed by another authority: copy this server's ca.crt here (--root-certificates)"
_NO_TLS = "the SuperLink does not use TLS: start it with --ssl-certfile, or use --insecure"
_REMEDIES = {
    "expired": "the server's certificate has expired: create a new one, or correct this machine's clock",
    "not yet valid": "the server's certificate is not valid yet: correct this machine's clock",
    "mismatch": _OTHER_HOST,
    "not valid for": _OTHER_HOST,
    "verify failed": _OTHER_AUTHORITY,
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "record layer failure": _NO_TLS,
}


def _tls_remedy(said: str, insecure: bool) -> str:
    """Return the remedy for an OpenSSL error message."""
    remedy = next((remedy for words, remedy in _REMEDIES.items() if words in said), "")
    if not remedy and insecure:
        return "the SuperLink may use TLS: remove --insecure and pass --root-certificates"
    return remedy or "see the SuperLink's log"
