"""A client's name belongs to one node for the length of a run, and only who is allowed may join."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Message
from local_grid import FIRST_NODE, LocalGrid, play, trains

from fedmutual.engine.names import Names, Node, fingerprint
from fedmutual.settings import ClientsSettings, SettingsError
from fedmutual.settings.compose import compose
from fedmutual.wire.records import REPORT

SECOND = FIRST_NODE + 1
A, B = "SHA256:" + "a" * 43, "SHA256:" + "b" * 43


def names(*allowed: str, bind: str = "auto") -> Names:
    return Names(ClientsSettings(allowed=list(allowed), bind=bind))


def online(*nodes: Node) -> dict[int, Node]:
    return {node.id: node for node in nodes}


OWNER, RESTARTED = Node(1, A, registered=True), Node(2, A, registered=True)
OTHER, KEYLESS = Node(3, B, registered=True), Node(4, "SHA256:" + "c" * 43)


def test_a_key_keeps_its_name_while_its_node_is_away() -> None:
    known = names()
    assert known.claim(OWNER, "a", online(OWNER)) == ""
    for thief in (OTHER, KEYLESS):
        assert "client a belongs to the key SHA256:aaa" in known.claim(thief, "a", online(thief))
        assert known.of(thief.id) is None
    assert known.claim(RESTARTED, "a", online(RESTARTED)) == ""
    assert known.by_node() == {2: "a"}


def test_a_key_comes_back_even_while_its_old_node_is_listed() -> None:
    known = names()
    known.claim(OWNER, "a", online(OWNER))
    assert known.claim(RESTARTED, "a", online(OWNER, RESTARTED)) == ""


def test_a_name_without_a_key_waits_until_its_node_is_gone() -> None:
    known = names()
    first, second = Node(1, A), Node(2, B)  # their keys do not outlive a restart
    known.claim(first, "a", online(first))
    assert "nodes 1 and 2 are both named a" in known.claim(second, "a", online(first, second))
    assert known.claim(second, "a", online(second)) == ""
    assert "nodes 2 and 1 are both named a" in known.claim(first, "a", online(first, second))


def test_what_a_name_belongs_to_can_be_set() -> None:
    strict, open_ = names(bind="key"), names(bind="node")
    for known in (strict, open_):
        known.claim(Node(1, A, registered=known is open_), "a", {})
    assert "belongs to the key" in strict.claim(Node(2, B), "a", {})
    assert open_.claim(Node(2, B), "a", {}) == ""


def test_a_node_has_one_name() -> None:
    known = names()
    known.claim(OWNER, "a", {})
    assert known.claim(OWNER, "b", {}) == "client: the report is b's, but this node is a"


def test_only_who_is_listed_may_join() -> None:
    known = names(f"a:{A}", "b")
    assert known.restricted
    assert known.claim(OWNER, "a", {}) == ""
    assert "another key in clients.allowed" in names(f"a:{A}").claim(OTHER, "a", {})
    assert known.claim(OTHER, "c", {}) == "client c is not in clients.allowed"
    assert known.claim(OTHER, "b", {}) == ""
    assert known.stranger(KEYLESS) == ""  # its name may be b
    assert "is not in clients.allowed" in names(f"a:{A}").stranger(OTHER)


def test_names_outlive_the_server() -> None:
    before = names()
    before.claim(OWNER, "a", {})
    before.claim(Node(5, ""), "b", {})
    after = names()
    after.restore(json.loads(json.dumps(before.as_dict())))
    assert "belongs to the key" in after.claim(OTHER, "a", online(OTHER))
    assert "both named b" in after.claim(OTHER, "b", online(OTHER, Node(5)))
    assert after.claim(RESTARTED, "a", online(RESTARTED)) == ""


def test_a_fingerprint_is_the_one_that_ssh_prints(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    ssh = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    assert fingerprint(pem) == fingerprint(ssh)
    (tmp_path / "key.pub").write_bytes(ssh)
    try:
        said = subprocess.check_output(["ssh-keygen", "-lf", tmp_path / "key.pub"], text=True)
    except FileNotFoundError:
        pytest.skip("ssh-keygen is not here")
    assert fingerprint(pem) == said.split()[1]


@pytest.mark.parametrize("value", ["[../a]", "[a:SHA256:short]", "[a,a]"])
def test_a_malformed_list_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="clients"):
        compose([f"clients.allowed={value}"])


KEY, THIEF = (
    ec.generate_private_key(ec.SECP256R1())
    .public_key()
    .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for _ in range(2)
)


@pytest.mark.parametrize("strategy", ["mutual", "mutual_async"])
def test_the_name_of_an_absent_client_cannot_be_taken(strategy: str, tmp_path: Path) -> None:
    grids: list[LocalGrid] = []

    def prepare(grid: LocalGrid) -> None:
        grids.append(grid)
        grid.keys = {FIRST_NODE + i: f"{i}".encode() for i in range(3)} | {SECOND: KEY}

    def tamper(node: int, reply: Message) -> Message:
        if trains(reply) and node == FIRST_NODE + 2 and reply.content[REPORT]["round"] == 1:
            grids[0].offline = {SECOND}
            grids[0].keys[7] = THIEF
            grids[0].add_node(7, {"partition-id": 1, "num-partitions": 3})
        return reply

    small = ("exchange.return_timeout=0", "exchange.round_timeout=2", "exchange.min_clients=2")
    run = play(tmp_path / "run", f"strategy={strategy}", *small, prepare=prepare, tamper=tamper)
    assert run.summary["status"] == "completed"
    assert not [order for order in run.grid.orders if order.metadata.dst_node_id == 7 and trains(order)]


def test_a_stranger_gets_nothing(tmp_path: Path) -> None:
    run = play(tmp_path / "run", "clients.allowed=[client-0,client-2]", "num_clients=null")
    assert run.summary["status"] == "completed"
    assert sorted(run.summary["clients"]) == ["client-0", "client-2"]
    assert not [order for order in run.grid.orders if order.metadata.dst_node_id == SECOND and trains(order)]
