"""A server and three sites in containers, with TLS and keys: faults change nothing, and no weight travels.

make test-docker        (needs a Docker engine and compose; some 10 minutes on 2 cores)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from federation import (
    HOME,
    SITES,
    Federation,
    build_image,
    call,
    missing_engine,
    wait_for,
)

pytestmark = pytest.mark.docker

ROUNDS = 3
RUN = (
    f"rounds={ROUNDS}", f"num_clients={len(SITES)}", "exchange.min_clients=3", "exchange.return_timeout=600",
    "data.image_size=64", "data.pool_size=160", "data.unseen_size=60",
    "train.local_epochs=1", "strategy.public_epochs=1", "strategy.min_steps=1", "public.fill=0",
)  # fmt: skip
SECRETS = "/etc/fedmutual/secrets"
PATIENCE = 3000.0  # seconds; a busy machine is slow, not wrong


@dataclass
class Outcome:
    """What a run left: its summary, its history, each site's files and the capture of its traffic."""

    summary: dict[str, Any]
    history: list[dict[str, Any]]
    models: dict[str, str]
    model_bytes: int
    state: dict[str, int]
    traffic: dict[str, Any]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Image, keys, server and sites."""
    if problem := missing_engine():
        pytest.fail(f"make test-docker needs a Docker engine; {problem}", pytrace=False)
    build_image()
    federation = Federation(tmp_path_factory.mktemp("federation"))
    try:
        federation.start()
        yield federation
    finally:
        federation.stop()


def completed(federation: Federation, output: str, run_id: str) -> Outcome:
    """Wait for a run's end and gather what it left."""
    wait_for(lambda: bool(federation.result(output, "summary.json")), PATIENCE, f"the run {output}")
    wait_for(lambda: federation.status(run_id).startswith("finished"), 300, f"the end of {output}")
    assert federation.status(run_id) == "finished:completed", federation.flwr(
        "log", run_id, "server", "--show"
    )
    models, sizes, state = {}, set(), {}
    for site in SITES:
        folder = f"{HOME}/state/{output}-*/{site}"
        models[site] = federation.at_site(site, f"cat {folder}/model.safetensors | sha256sum").split()[0]
        sizes.add(int(federation.at_site(site, f"cat {folder}/model.safetensors | wc -c")))
        state[site] = int(json.loads(federation.at_site(site, f"cat {folder}/model.json"))["rounds"])
    summary = json.loads(federation.result(output, "summary.json"))
    return Outcome(summary, federation.history(output), models, min(sizes), state, {})


@pytest.fixture(scope="module")
def undisturbed(federation: Federation) -> Outcome:
    """A run to which nothing happens."""
    with federation.captured() as traffic:
        outcome = completed(federation, "undisturbed", federation.run("undisturbed", *RUN))
    outcome.traffic = traffic
    return outcome


@pytest.fixture(scope="module")
def disturbed(federation: Federation) -> Outcome:
    """The same run; in mid-round a site is killed, the SuperLink, and at last SuperLink and ServerApp."""
    with federation.captured() as traffic:
        run_id = federation.run("disturbed", *RUN)
        working = f"ls {HOME}/state | grep -q disturbed && echo yes || true"
        wait_for(lambda: "yes" in federation.at_site(SITES[1], working), PATIENCE, "the first order")
        before = restarts(federation)
        # every process of the site but the container's first, which ends with them: Docker restarts it
        federation.compose(SITES[1], "exec", "-T", "supernode", "sh", "-c", "kill -9 -1", check=False)
        wait_for(lambda: restarts(federation) > before, 120, "the restart of the killed site")

        wait_for(lambda: rounds_done(federation) >= 1, PATIENCE, "round 1")
        federation.compose("server", "kill", "-s", "SIGKILL", "superlink")
        federation.compose("server", "start", "superlink")

        wait_for(lambda: rounds_done(federation) >= 2, PATIENCE, "round 2")
        federation.compose("server", "kill", "-s", "SIGKILL", "superlink", "superexec")
        federation.compose("server", "up", "-d")
        run_id = federation.resume("disturbed", *RUN)
        outcome = completed(federation, "disturbed", run_id)
    outcome.traffic = traffic
    return outcome


def restarts(federation: Federation) -> int:
    """How often Docker has restarted the second site."""
    container = federation.container(SITES[1], "supernode")
    return int(call("docker", "inspect", "-f", "{{.RestartCount}}", container))


def rounds_done(federation: Federation) -> int:
    """The last round of the disturbed run that is in its history."""
    return max((int(line["round"]) for line in federation.history("disturbed")), default=0)


def doctor(federation: Federation, site: str) -> str:
    """What `fedmutual doctor` says in a container of the site; RuntimeError where it finds a failure."""
    return federation.compose(site, "run", "--rm", "-T", "doctor")


def test_the_doctor_finds_a_site_ready(federation: Federation) -> None:
    said = doctor(federation, "site-a")
    assert f"certificate accepted by {SECRETS}/ca.crt" in said
    assert f"{SECRETS}/site-a.key is registered" in said


def test_a_node_without_a_registered_key_is_refused(federation: Federation) -> None:
    federation.use("stranger", federation.provision(*SITES, "stranger") / "stranger")
    with pytest.raises(RuntimeError, match=rf"the SuperLink does not know {SECRETS}/stranger\.key"):
        doctor(federation, "stranger")
    said = federation.compose("stranger", "run", "--rm", "-T", "supernode", check=False)
    assert "Exit Code: 305" in said
    assert "Failed to activate SuperNode" in said


def test_a_node_with_a_foreign_ca_refuses_the_server(federation: Federation) -> None:
    foreign = federation.provision("site-a", output="foreign") / "site-a"
    key = "secrets/site-a.key"  # a key that the server knows
    (foreign / key).write_bytes((federation.folder / "kits" / "site-a" / key).read_bytes())
    federation.use("foreign", foreign)
    said = federation.compose("foreign", "run", "--rm", "-T", "supernode", check=False)
    assert "CERTIFICATE_VERIFY_FAILED" in said


def test_the_server_names_its_sites(federation: Federation) -> None:
    said = federation.compose("server", "run", "--rm", "-T", "fedmutual", "status", "--json")
    seen = json.loads(said[said.index("{") :])
    states = {site["name"]: site["state"] for site in seen["sites"]}
    assert states.pop("stranger", "not registered") == "not registered"  # whose key was made, no more
    assert states == dict.fromkeys(SITES, "online")


def test_runs_cannot_be_started_from_outside(federation: Federation) -> None:
    config = f'[superlink.out]\naddress = "{federation.address}:{federation.port}"\n'
    config += f'root-certificates = "{SECRETS}/ca.crt"\n'
    script = f"printf '{config}' > $FLWR_HOME/config.toml; flwr run /app out"
    said = federation.compose("site-a", "run", "--rm", "-T", "supernode", "sh", "-c", script, check=False)
    assert "404 Not Found" in said
    assert "control/start-run" in said


_FLOOD = """
import socket, ssl, sys
host, port, megabytes, signed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "signed"
context = ssl.create_default_context(cafile="/etc/fedmutual/secrets/ca.crt")
stream = context.wrap_socket(socket.create_connection((host, port)), server_hostname=host)
headers = {"host": host, "content-length": str(megabytes << 20)}
if signed:  # as a stranger forges it
    headers |= {"flwr-public-key": "A" * 300, "flwr-signature": "A" * 140}
    headers |= {"flwr-timestamp": "2026-01-01T00:00:00"}
lines = ["POST /v1/fleet/push-object HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
stream.sendall(("\\r\\n".join(lines) + "\\r\\n\\r\\n").encode())
sent = 0
try:
    while sent < megabytes << 20:
        stream.sendall(bytes(1 << 20))
        sent += 1 << 20
except OSError:
    pass
try:
    print(sent >> 20, stream.recv(100).split()[1].decode())
except OSError:
    print(sent >> 20, "closed")
"""


def test_a_flood_without_a_key_fills_neither_disk_nor_memory(federation: Federation) -> None:
    gateway, superlink = (federation.container("server", name) for name in ("gateway", "superlink"))

    def memory() -> int:
        """MB that all processes of the SuperLink's container have had at most."""
        script = (
            "cat /proc/[0-9]*/status 2>/dev/null | awk '/^VmHWM/ { kb += $2 } END { print int(kb / 1024) }'"
        )
        return int(call("docker", "exec", superlink, "sh", "-c", script))

    before = memory()
    for megabytes, signed, status in (
        (10, "unsigned", "401"),
        (300, "unsigned", "413"),
        (200, "signed", "413"),
    ):
        command = ["python", "-c", _FLOOD, federation.address, str(federation.port), str(megabytes), signed]
        said = federation.compose("site-a", "run", "--rm", "-T", "supernode", *command).split()
        assert said[-1] in (status, "closed"), said  # nginx reads on for 5 s, and keeps nothing
    assert call("docker", "exec", gateway, "find", "/tmp", "-type", "f", "-size", "+100k") == ""
    assert memory() - before < 50


def test_no_container_of_the_server_sees_the_authority_s_key(federation: Federation) -> None:
    seen = {
        name: set(call("docker", "exec", federation.container("server", name), "ls", SECRETS).split())
        for name in ("superlink", "superexec", "gateway")
    }
    assert seen["superlink"] == {"ca.crt", "server.pem", "server.key", "superexec.secret"}
    assert seen["superexec"] == {"superexec.secret"}
    assert seen["gateway"] == {"ca.crt", "server.pem", "server.key"}
    shown = federation.compose("server", "run", "--rm", "-T", "--entrypoint", "ls", "flwr", SECRETS)
    assert set(shown.split()) == {"ca.crt"}


def test_faults_change_nothing(undisturbed: Outcome, disturbed: Outcome) -> None:
    assert disturbed.models == undisturbed.models  # byte for byte
    assert len(set(disturbed.models.values())) == len(SITES)  # and they are three models
    assert disturbed.summary["unseen"] == undisturbed.summary["unseen"]


def test_no_round_and_no_state_is_lost(undisturbed: Outcome, disturbed: Outcome) -> None:
    for outcome in (undisturbed, disturbed):
        reported = sorted(
            (line["round"], line["client"]) for line in outcome.history if "num_examples" in line
        )
        assert reported == [(r, site) for r in range(1, ROUNDS + 2) for site in SITES]
        assert outcome.state == dict.fromkeys(SITES, ROUNDS)


@pytest.mark.parametrize("name", ["undisturbed", "disturbed"])
def test_no_weight_travels(name: str, request: pytest.FixtureRequest) -> None:
    outcome = request.getfixturevalue(name)
    up, down = outcome.traffic["up"], outcome.traffic["down"]
    assert outcome.traffic["dropped"] == 0  # the capture is complete
    # the app's code is the one thing of size: each site fetches it once a run, and for the resumed one again
    code = [size for size in down if size > outcome.model_bytes / 10]
    assert max(up) < outcome.model_bytes / 100
    assert max(down) < outcome.model_bytes
    assert len(code) <= (2 * len(SITES) + 1 if name == "disturbed" else len(SITES))  # +1: the killed site
    assert max(code) - min(code) < 100
    assert sum(up) < outcome.model_bytes * len(
        SITES
    )  # all of it, polls and heartbeats too, for the whole run

    ledger = outcome.summary["traffic"]
    over_up = (sum(up) - ledger["uplink_bytes"]) / len(up)
    over_down = (sum(down) - sum(code) - ledger["downlink_bytes"]) / len(down)
    print(
        f"\n{name}: model {outcome.model_bytes} B; largest payload up {max(up)} B, down {max(down)} B;"
        f" captured up {sum(up)} B, down {sum(down)} B in {len(up)} requests on"
        f" {outcome.traffic['connections']} connections; ledger up {ledger['uplink_bytes']} B, down"
        f" {ledger['downlink_bytes']} B; overhead a request: up {over_up:.0f} B, down {over_down:.0f} B"
    )
    # HTTP headers, the node's signature, TLS records and handshakes; nothing else is in the difference
    assert 300 < over_up < 1500
    assert 100 < over_down < 1500
