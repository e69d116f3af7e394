"""What a site sees of its SuperLink: the way there, TLS, Flower's version, the clock, the node's key.

Nothing is changed at the SuperLink: the key is asked about with a request that it refuses in one way when it
knows the key, and in another when it does not.
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
# Flower refuses a signed request that is more than 5 s from the future or 305 s old (fleet/node_auth.py).
AHEAD, BEHIND = 4.0, 300.0
_UNKNOWN_KEY, _KNOWN_KEY = (
    2004,
    2003,
)  # Flower's FLEET_NODE_ACTIVATION_FAILED, FLEET_INVALID_HEARTBEAT_INTERVAL


@dataclass(frozen=True)
class Link:
    """How a SuperNode would connect; the fields are the options of ``flower-supernode``."""

    superlink: str
    insecure: bool
    root_certificates: Path | None
    private_key: Path | None

    def reach(self) -> str:
        """Open a TCP connection.

        Raises
        ------
        CheckError
            The name is not known, nobody listens, or a firewall is in between.
        """
        host, _, port = self.superlink.rpartition(":")
        if not host or not port.isdigit():
            raise CheckError(
                f"--superlink {self.superlink!r} is no host:port", "write it as server.example:8000"
            )
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT):
                return f"{self.superlink} listens"
        except socket.gaierror as error:
            raise CheckError(f"{host}: {error.strerror}", "check the name, or this machine's DNS") from error
        except TimeoutError as error:
            remedy = f"let this site's firewall and the server's pass TCP port {port}"
            raise CheckError(f"{self.superlink} does not answer within {TIMEOUT:g} s", remedy) from error
        except OSError as error:
            remedy = "start the SuperLink, with --host 0.0.0.0 for other machines, or check the port"
            raise CheckError(f"{self.superlink}: {error.strerror}", remedy) from error

    def check_tls(self) -> str:
        """Ask the SuperLink whether it is well, over the connection that a SuperNode would use."""
        self._get("/health")
        if self.insecure:
            return "no TLS (--insecure): everybody on the way can read and change what is exchanged"
        return f"certificate accepted, by {self.root_certificates or 'the authorities of the system'}"

    def check_version(self) -> str:
        """Compare Flower's version with the SuperLink's."""
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
        """Compare the clock with the SuperLink's, whose answers carry the time to the second."""
        answer = self._get("/health")
        now = datetime.datetime.now(datetime.UTC)
        theirs = parsedate_to_datetime(answer.headers["date"]) + datetime.timedelta(seconds=0.5)
        ahead = (now - theirs).total_seconds()
        said = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the SuperLink's"
        if ahead > AHEAD or ahead < -BEHIND:
            raise CheckError(
                f"this clock is {said}", "set the clock of both machines by NTP (timedatectl set-ntp true)"
            )
        return said

    def check_key(self) -> str:
        """Ask whether the SuperLink knows the node's key.

        Raises
        ------
        CheckError
            The key cannot be read, or is not registered.
        """
        if self.private_key is None:
            return "no key is given: fits a SuperLink without --enable-supernode-auth"
        status, code, said = self._ask_for_key()
        if code == _KNOWN_KEY:
            return f"{self.private_key} is registered"
        if code == _UNKNOWN_KEY:
            remedy = (
                f"register it at the server: flwr supernode register {self.private_key.name}.pub <connection>"
            )
            raise CheckError(f"the SuperLink does not know {self.private_key}", remedy)
        remedy = "check the clock, and that the SuperLink was started with --enable-supernode-auth"
        raise CheckError(f"the SuperLink refused the key's signature (HTTP {status}): {said}", remedy)

    def _ask_for_key(self) -> tuple[int, int | None, str]:
        """Activate the node with an impossible heartbeat: Flower looks the key up, and then refuses."""
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
        return 200, None, "it took a heartbeat of -1 s"

    def _load_key(self) -> Any:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key

        assert self.private_key is not None
        remedy = (
            "make one: ssh-keygen -q -t ecdsa -b 384 -N '' -f <file>, readable by the SuperNode's user only"
        )
        try:
            key = load_ssh_private_key(self.private_key.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CheckError(f"{self.private_key} cannot be read: {error}", remedy) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CheckError(f"{self.private_key} is no elliptic-curve key", remedy)
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
            raise CheckError(text, "is it a Flower SuperLink 1.41 or newer that listens there?") from error
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
            remedy = "copy the server's ca.crt here, and name it with --root-certificates"
            raise CheckError(f"{self.root_certificates}: {error}", remedy) from error


_OTHER_HOST = (
    "the certificate names another host: use that name with --superlink, or make a certificate whose "
    "subjectAltName has this one"
)
_OTHER_AUTHORITY = "another authority has signed it: copy this server's ca.crt here (--root-certificates)"
_NO_TLS = "the SuperLink speaks no TLS: start it with --ssl-certfile, or use --insecure"
_REMEDIES = {
    "expired": "the server's certificate has expired: make a new one, or set this machine's clock",
    "not yet valid": "the server's certificate begins in the future: set this machine's clock",
    "mismatch": _OTHER_HOST,
    "not valid for": _OTHER_HOST,
    "verify failed": _OTHER_AUTHORITY,
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "record layer failure": _NO_TLS,
}


def _tls_remedy(said: str, insecure: bool) -> str:
    """What to do about OpenSSL's words."""
    remedy = next((remedy for words, remedy in _REMEDIES.items() if words in said), "")
    if not remedy and insecure:
        return "the SuperLink may speak TLS: leave --insecure out, and give --root-certificates"
    return remedy or "see the SuperLink's log"
