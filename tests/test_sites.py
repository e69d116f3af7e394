"""Sites by name: registration, removal, and what ``fedmutual status`` makes of what a SuperLink says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedmutual.cli import main
from fedmutual.provision.keys import make_site_key
from fedmutual.provision.registry import Registry
from fedmutual.sites import superlink as superlink_module
from fedmutual.sites.manage import SiteError, add, remove
from fedmutual.sites.superlink import (
    OFFLINE,
    ONLINE,
    REGISTERED,
    REMOVED,
    Registered,
    SuperLink,
    SuperLinkError,
    connection_of,
)
from fedmutual.wire.signatures import fingerprint

NOW = 1_000_000.0


class FakeSuperLink(SuperLink):
    """Nodes in a list; keys that were removed are refused, as Flower refuses them."""

    def __init__(self, *nodes: Registered) -> None:
        self.list = list(nodes)

    def nodes(self) -> tuple[list[Registered], float]:
        return list(self.list), NOW

    def register(self, name: str, public_key: bytes) -> int:
        assert fingerprint(public_key) not in {node.fingerprint for node in self.list}
        self.list.append(node(name, public_key, REGISTERED, None, number=900 + len(self.list)))
        return self.list[-1].id

    def unregister(self, node: int) -> None:
        self.list = [Registered(**{**vars(n), "state": REMOVED}) if n.id == node else n for n in self.list]

    @property
    def names(self) -> list[tuple[str, str]]:
        return [(node.name, node.state) for node in self.list]


def node(
    name: str, key: bytes, state: str = ONLINE, seen: float | None = NOW - 10, number: int = 1
) -> Registered:
    return Registered(number, name, fingerprint(key), state, seen, 30.0)


@pytest.fixture
def keys() -> dict[str, bytes]:
    return {name: make_site_key(name)[1] for name in ("clinic-a", "clinic-b", "clinic-c")}


@pytest.fixture
def registry(tmp_path: Path, keys: dict[str, bytes]) -> Registry:
    registry = Registry(tmp_path / "sites")
    for name, line in keys.items():
        registry.put(name, line)
    return registry


def yes(nodes: Sequence[Registered]) -> bool:
    return True


def test_a_site_is_registered_once(registry: Registry) -> None:
    superlink = FakeSuperLink()
    assert "clinic-a registered as node 900" in add(superlink, registry, "clinic-a", None, False)
    assert "clinic-a is registered: node 900" in add(superlink, registry, "clinic-a", None, False)
    assert superlink.names == [("clinic-a", REGISTERED)]


def test_a_new_site_comes_with_its_key(registry: Registry, tmp_path: Path) -> None:
    superlink, line = FakeSuperLink(), make_site_key("somebody")[1]
    with pytest.raises(SiteError, match=r"has no clinic-d\.pub; it has clinic-a, clinic-b, clinic-c"):
        add(superlink, registry, "clinic-d", None, False)
    (tmp_path / "d.pub").write_bytes(line)
    add(superlink, registry, "clinic-d", tmp_path / "d.pub", False)
    assert registry.read()["clinic-d"] == line.replace(b"somebody", b"clinic-d")
    (tmp_path / "d.pub").write_text("ssh-rsa AAAA")
    with pytest.raises(SiteError, match="is no public key of a site"):
        add(superlink, registry, "clinic-e", tmp_path / "d.pub", False)
    with pytest.raises(SiteError, match="is no name"):
        add(superlink, registry, "../e", tmp_path / "d.pub", False)


def test_another_key_of_a_name_is_replaced_only_when_that_is_meant(registry: Registry) -> None:
    superlink = FakeSuperLink(node("clinic-a", make_site_key("clinic-a")[1], OFFLINE, number=5))
    with pytest.raises(SiteError, match=r"registered with another key.*--replace"):
        add(superlink, registry, "clinic-a", None, False)
    assert "node 5 with the key" in add(superlink, registry, "clinic-a", None, True)
    assert superlink.names == [("clinic-a", REMOVED), ("clinic-a", REGISTERED)]


def test_one_key_is_one_site(registry: Registry, keys: dict[str, bytes]) -> None:
    superlink = FakeSuperLink(node("clinic-b", keys["clinic-a"]))
    with pytest.raises(SiteError, match="is registered as clinic-b: one key is one site"):
        add(superlink, registry, "clinic-a", None, True)
    with pytest.raises(SiteError, match="is registered as clinic-b: correct"):
        remove(superlink, registry, "clinic-a", yes)
    assert superlink.names == [("clinic-b", ONLINE)]


def test_the_named_site_is_removed_and_no_other(registry: Registry, keys: dict[str, bytes]) -> None:
    superlink = FakeSuperLink(*(node(name, key, number=n) for n, (name, key) in enumerate(keys.items())))
    assert remove(superlink, registry, "clinic-b", lambda nodes: False) == ""
    assert [state for _, state in superlink.names] == [ONLINE] * 3
    shown: list[Registered] = []
    said = remove(superlink, registry, "clinic-b", lambda nodes: bool(shown.extend(nodes)) or True)
    assert said == f"clinic-b removed: node 1 with the key {fingerprint(keys['clinic-b'])}"
    assert [node.id for node in shown] == [1]
    assert superlink.names == [("clinic-a", ONLINE), ("clinic-b", REMOVED), ("clinic-c", ONLINE)]
    assert list(registry.read()) == ["clinic-a", "clinic-c"]
    with pytest.raises(SiteError, match="there is no such site; there are clinic-a, clinic-c"):
        remove(superlink, registry, "clinic-b", yes)


def test_a_removed_key_cannot_come_back(registry: Registry, keys: dict[str, bytes]) -> None:
    superlink = FakeSuperLink(node("clinic-a", keys["clinic-a"], REMOVED))
    with pytest.raises(SiteError, match=r"was removed, and Flower never takes such a key again.*provision"):
        add(superlink, registry, "clinic-a", None, False)


def test_the_command_line(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeSuperLink()
    monkeypatch.setattr(superlink_module, "SuperLink", lambda connection: _Context(fake))
    where = ["--superlink", "127.0.0.1:1", "--insecure", "--sites", str(registry.folder)]
    assert main(["site", "add", *where]) == 2
    assert main(["site", "add", "--all", "x", *where]) == 2
    assert main(["site", "add", "--all", *where]) == 0
    assert main(["site", "remove", "clinic-b", *where]) == 1  # no terminal to ask on
    assert "add --yes" in capsys.readouterr().err
    assert main(["site", "remove", "--yes", *where, "clinic-b"]) == 0
    capsys.readouterr()
    assert main(["site", "list", *where]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["clinic-a", "registered"],
        ["clinic-c", "registered"],
    ]


class _Context:
    def __init__(self, value: FakeSuperLink) -> None:
        self.value = value

    def __enter__(self) -> FakeSuperLink:
        return self.value

    def __exit__(self, *_: object) -> None:
        pass


def test_a_superlink_is_named_or_in_flower_s_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(SuperLinkError, match="so no SuperLink is known; name it"):
        connection_of(None, None, False)
    config = tmp_path / "config.toml"
    config.write_text('[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n')
    with pytest.raises(SuperLinkError, match="no address of a SuperLink as its default"):
        connection_of(None, None, False)
    config.write_text(
        '[superlink]\ndefault = "x"\n[superlink.x]\naddress = "a:8000"\nroot-certificates = "ca.crt"\n'
    )
    found = connection_of(None, None, False)
    assert (found.address, found.root_certificates) == ("a:8000", tmp_path / "ca.crt")
    assert connection_of("b:1", None, True).root_certificates is None
    for wrong in ((None, False), (Path("ca.crt"), True)):
        with pytest.raises(SuperLinkError, match="needs --root-certificates"):
            connection_of("b:1", *wrong)


def test_a_superlink_that_is_down_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = ["--superlink", "127.0.0.1:1", "--insecure", "--sites", str(tmp_path)]
    assert main(["site", "list", *where]) == 2
    assert "the SuperLink at 127.0.0.1:1 does not answer" in capsys.readouterr().err
