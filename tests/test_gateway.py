"""The limits of the gateway that ``fedmutual provision`` writes, with nginx itself where it is installed."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedmutual.provision.kits import provision
from fedmutual.provision.project import Project, Site

SECRETS = "/etc/fedmutual/secrets/"


def _kit(folder: Path) -> Path:
    provision(Project(("localhost",), (Site("clinic-a"),)), folder)
    return folder / "server"


with tempfile.TemporaryDirectory() as _folder:
    CONF = (_kit(Path(_folder)) / "gateway.conf").read_text()
MIB = 2**20
needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx (apt install nginx-light)")


def _setting(name: str) -> list[str]:
    return re.findall(rf"^\s*{name} ([^;]+);", CONF, re.MULTILINE)


def _bytes(text: str) -> int:
    return int(text.rstrip("km")) * {"k": 2**10, "m": 2**20}.get(text[-1], 1)


def test_every_limit_is_set() -> None:
    common, *small, internal = map(_bytes, _setting("client_max_body_size"))
    assert 8 * MIB <= common <= 32 * MIB
    assert small == [1024, 1024]
    assert internal == 0  # between containers of the server
    for name in ("client_header_timeout", "client_body_timeout"):
        (seconds,) = _setting(name)
        assert 5 <= int(seconds.removesuffix("s")) <= 30
    (per_address, total) = _setting("limit_conn")
    assert per_address.split() == ["address", "64"]
    assert total.split() == ["all", "512"]
    (workers,) = re.findall(r"worker_connections (\d+);", CONF)
    assert int(workers) >= 2 * 512 + 512  # so that connections without a request keep nobody out
    assert _setting("limit_conn_status") == ["503"]  # Flower tries again after 502, 503 and 504


def test_a_part_of_flower_s_fits_with_room_for_predictions() -> None:
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

    limit = _bytes(_setting("client_max_body_size")[0])
    assert limit >= 2 * FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


# with nginx


@dataclass
class _Gateway:
    """nginx with that configuration, before a server that counts what reaches it."""

    port: int
    folder: Path
    context: ssl.SSLContext
    received: list[tuple[str, int]] = field(default_factory=list)

    def connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("localhost", self.port, context=self.context, timeout=20)

    def ask(self, path: str, body: object = b"", method: str = "POST", **headers: str) -> int:
        """Send a request; return the status."""
        connection = self.connect()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError, ssl.SSLError
        ):  # refused while it is sent
            connection.request(method, path, body, headers=sent)  # type: ignore[arg-type]
        status = connection.getresponse().status
        connection.close()
        return status


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Gateway]:
    folder = _kit(tmp_path_factory.mktemp("gateway")) / "secrets"
    running = _Gateway(_free_port(), folder, ssl.create_default_context(cafile=str(folder / "ca.crt")))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            self.rfile.read(length)
            running.received.append((self.path, length))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *arguments: object) -> None:
            pass

    superlink = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "server.pem", folder / "server.key")
    superlink.socket = tls.wrap_socket(superlink.socket, server_side=True)
    threading.Thread(target=superlink.serve_forever, daemon=True).start()

    (folder / "tmp").mkdir()
    text = CONF.replace("/tmp/", f"{folder}/tmp/").replace(SECRETS, f"{folder}/")
    text = text.replace("superlink:8000", f"127.0.0.1:{superlink.server_address[1]}")
    text = text.replace("listen 8443", f"listen 127.0.0.1:{running.port}")
    text = text.replace("listen 8000", f"listen 127.0.0.1:{_free_port()}")
    (folder / "gateway.conf").write_text("user root;\n" + text)
    command = ["nginx", "-e", str(folder / "error.log"), "-c", str(folder / "gateway.conf")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    nginx = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                assert running.ask("/health", method="GET") == 200
                break
            except ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield running
    finally:
        nginx.terminate()
        nginx.wait()
        superlink.shutdown()


@pytest.fixture(scope="module")
def signed() -> dict[str, str]:
    """The headers of Flower's own client."""
    import httpx
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.protobuf.client import ProtobufRequestContext
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    key = ec.generate_private_key(ec.SECP384R1())
    seen: dict[str, str] = {}

    def call(context: ProtobufRequestContext) -> httpx.Response:
        seen.update(
            {k.replace("-", "_"): v for k, v in context.request.headers.items() if k.startswith("flwr-")}
        )
        return httpx.Response(200)

    context = ProtobufRequestContext("x", Node(), httpx.Request("POST", "https://localhost/v1/fleet/x"))
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, call)
    return seen


@needs_nginx
@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/runtime/x", "/", "/v1/fleet/../control/x", "/docs"]
)
def test_only_the_fleet_passes(path: str, gateway: _Gateway, signed: dict[str, str]) -> None:
    before = len(gateway.received)
    assert gateway.ask(path, **signed) == 404
    assert len(gateway.received) == before


@needs_nginx
def test_a_full_part_of_flower_s_passes(gateway: _Gateway, signed: dict[str, str]) -> None:
    import numpy as np
    from flwr.app import Array
    from flwr.proto.message_pb2 import PushObjectRequest
    from flwr.proto.node_pb2 import Node

    array = Array(np.zeros(8 * MIB, np.uint8))
    parts = [part.deflate() for _, part in array.slice_array()]
    assert len(parts) == 2
    for part in parts:
        node = Node(node_id=2**63)
        request = PushObjectRequest(node=node, run_id=2**63, object_id="a" * 64, object_content=part)
        body = request.SerializeToString()
        assert gateway.ask("/v1/fleet/push-object", body, **signed) == 200
        assert gateway.received[-1] == ("/v1/fleet/push-object", len(body))


@needs_nginx
@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_request_is_refused_and_leaves_nothing(
    chunked: bool, gateway: _Gateway, signed: dict[str, str]
) -> None:
    before = len(gateway.received)
    body = iter([bytes(MIB)] * 40) if chunked else bytes(40 * MIB)
    assert gateway.ask("/v1/fleet/push-object", body, **signed) == 413
    assert gateway.ask("/health", bytes(2000)) == 413
    assert len(gateway.received) == before
    assert not [
        path for path in (gateway.folder / "tmp").rglob("*") if path.is_file() and path.stat().st_size > MIB
    ]


@needs_nginx
def test_a_request_without_a_signature_is_answered_before_its_body(
    gateway: _Gateway, signed: dict[str, str]
) -> None:
    before = len(gateway.received)
    for missing in ({}, {**signed, "flwr_signature": "x"}, {**signed, "flwr_timestamp": "now; drop"}):
        assert gateway.ask("/v1/fleet/push-object", b"x", **missing) == 401
    connection = gateway.connect()
    connection.putrequest("POST", "/v1/fleet/push-object")
    connection.putheader("content-length", str(15 * MIB))
    connection.endheaders()  # nothing of the body
    assert connection.getresponse().status == 401
    connection.close()
    assert len(gateway.received) == before


@needs_nginx
def test_the_requests_of_one_address_are_limited(gateway: _Gateway, signed: dict[str, str]) -> None:
    held = []
    try:
        for _ in range(64):
            connection = gateway.connect()
            connection.putrequest("POST", "/v1/fleet/push-object")
            for name, value in signed.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.putheader("content-length", "1000")
            connection.endheaders(b"x")  # the rest never comes
            held.append(connection)
        deadline = time.monotonic() + 10
        while (status := gateway.ask("/v1/fleet/push-object", b"x", **signed)) != 503:
            assert time.monotonic() < deadline, status
    finally:
        for connection in held:
            connection.close()
    deadline = time.monotonic() + 10
    while gateway.ask("/v1/fleet/push-object", b"x", **signed) != 200:
        assert time.monotonic() < deadline
