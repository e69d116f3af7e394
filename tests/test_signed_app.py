"""On loopback: sites that execute only an app that their owner has signed, and a run that wants more.

Flower attaches signatures to apps of its hub only (``flwr run @publisher/app``). A few lines of HTTP stand
for the hub here; the signature, its check and the refusal are Flower's own.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.cli.app_cmd.review import _sign_fab
from flwr.cli.build import build_fab_from_disk
from loopback import SHORT_ROUNDS, Loopback, copy_app, wait_for

import fedmutual

pytestmark = pytest.mark.slow

# without the version, a SuperLink takes what it fetched for an earlier run
APP = Path(f"@fedmutual/fedmutual=={fedmutual.__version__}")
SETTINGS = (*SHORT_ROUNDS, "num_clients=2", "rounds=1", "exchange.poll_interval=0.2")


class Hub(ThreadingHTTPServer):
    """Flower's hub, as far as a SuperLink asks it: where an app is, and who has signed it."""

    app = b""
    signatures: tuple[dict[str, Any], ...] = ()

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def publish(self, app: bytes, key: ed25519.Ed25519PrivateKey, name: str) -> None:
        signature, signed_at = _sign_fab(app, key)
        encoded = base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
        self.app = app
        self.signatures = ({"public_key_id": name, "signature": encoded, "signed_at": signed_at},)


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        content = {"fab_url": f"{self.server.address}/app", "verifications": self.server.signatures}
        self._send(json.dumps(content).encode())

    def do_GET(self) -> None:
        self._send(self.server.app)

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class SignedLoopback(Loopback):
    """A deployment whose sites trust one signer, and take their images' folder from their owner."""

    def __init__(self, folder: Path, hub: Hub, key: ed25519.Ed25519PrivateKey) -> None:
        super().__init__(folder, sites=2, secure=False, poll_seconds=0.3)
        self.hub = hub
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        (self.folder / "trusted.yaml").write_text(json.dumps({"fpk_owner": public.decode()}))

    def _command(self, part: str) -> list[str]:
        more = ["--trusted-entities", str(self.folder / "trusted.yaml")] if part.startswith("site-") else []
        return [*super()._command(part), *more]

    def _environment(self, part: str) -> dict[str, str]:
        return super()._environment(part) | {"FLWR_SUPERGRID_API_URL": self.hub.address}


@pytest.fixture(scope="module")
def owner() -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, owner: ed25519.Ed25519PrivateKey
) -> Iterator[SignedLoopback]:
    with Hub() as hub, SignedLoopback(tmp_path_factory.mktemp("signed"), hub, owner) as started:
        yield started
        hub.shutdown()


def outcome(deployment: SignedLoopback, app: Path | None, *overrides: str) -> dict[str, Any]:
    """The summary of a run that is over."""
    output = deployment.folder / f"out-{time.monotonic_ns()}"
    deployment.submit(*SETTINGS, f"output_dir={output}", *overrides, app_dir=app)
    wait_for((output / "summary.json").exists, 300.0, "the run does not end")
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def test_an_app_that_the_owner_signed_runs_and_no_other(
    deployment: SignedLoopback, owner: ed25519.Ed25519PrivateKey, tmp_path: Path
) -> None:
    hub, signed = deployment.hub, build_fab_from_disk(deployment.app_dir)
    hub.publish(signed, owner, "fpk_owner")
    assert outcome(deployment, APP)["status"] == "completed"

    unsigned = outcome(deployment, None)
    assert unsigned["status"] == "failed"
    assert "takes signed apps only (--trusted-entities)" in unsigned["reason"]
    log = deployment.folder / "site-0.log"
    assert "could not verify the FAB" not in log.read_text()

    copy_app(tmp_path / "fedmutual")
    with (tmp_path / "fedmutual" / "client_app.py").open("a") as file:
        file.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    hub.app = build_fab_from_disk(tmp_path / "fedmutual")  # with the other one's signature
    assert "takes signed apps only" in outcome(deployment, APP)["reason"]
    assert "could not verify the FAB" in log.read_text()
    assert not (tmp_path / "ran").exists()


def test_with_a_signed_app_a_run_gets_no_more_than_the_owner_allows(
    deployment: SignedLoopback, owner: ed25519.Ed25519PrivateKey, tmp_path: Path
) -> None:
    deployment.hub.publish(build_fab_from_disk(deployment.app_dir), owner, "fpk_owner")
    (tmp_path / "hubconf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    hub = (f"+model.repo_or_dir={tmp_path}", "+model.model=net", "+model.source=local")
    summary = outcome(deployment, APP, "model=custom", "model._target_=torch.hub.load", *hub)
    assert summary["status"] == "failed"
    assert "client-0: SettingsError: model._target_: torch.hub.load is not allowed" in summary["reason"]
    assert str(tmp_path) not in summary["reason"]
    assert not (tmp_path / "ran").exists()
