"""Sites by name: registration, removal, and what ``fedmutual status`` makes of what a SuperLink says."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from fedmutual.cli import main
from fedmutual.provision.keys import make_site_key
from fedmutual.provision.registry import Registry
from fedmutual.results.hold import hold
from fedmutual.results.progress import Present, Progress, read_progress
from fedmutual.sites import status as status_module
from fedmutual.sites import superlink as superlink_module
from fedmutual.sites.manage import SiteError, add, remove
from fedmutual.sites.show import make_server, metrics, run_line
from fedmutual.sites.status import Run, newest_run, status_of
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


def test_a_registry_that_cannot_be_written_is_said(
    registry: Registry, keys: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Registry, name: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Registry, "drop", refuse)
    superlink = FakeSuperLink(node("clinic-a", keys["clinic-a"]))
    said = remove(superlink, registry, "clinic-a", yes)
    assert "still lists it (Read-only file system): take it out of the project" in said
    assert superlink.names == [("clinic-a", REMOVED)]


def test_a_removed_key_cannot_come_back(registry: Registry, keys: dict[str, bytes]) -> None:
    superlink = FakeSuperLink(node("clinic-a", keys["clinic-a"], REMOVED))
    with pytest.raises(SiteError, match=r"was removed, .* takes such a key again.*--new-key clinic-a"):
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


# ---------------------------------------------------------------------------------------------------
# Status


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run in round 3 of 5: clinic-a has answered, clinic-b (node 1) has not."""
    folder = tmp_path / "runs" / "today"
    lock = hold(folder)
    (folder / "config.yaml").write_text("rounds: 5\n")
    lines = [
        {"round": r, "client": c, "node_id": n}
        for r in (1, 2)
        for n, c in enumerate(("clinic-a", "clinic-b"))
    ]
    lines.append({"round": 3, "client": "clinic-a", "node_id": 0})
    lines.append({"round": 3, "client": "clinic-c", "node_id": 2, "rejected": "no"})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Progress(folder, 5, lambda: NOW).note(3, {1: None}, 1)
    yield folder
    lock.release()


def seen_by(keys: dict[str, bytes], **changes: tuple[str, float | None]) -> list[Registered]:
    found = []
    for number, (name, key) in enumerate(keys.items()):
        state, seen = changes.get(name[-1], (ONLINE, NOW - 10))
        found.append(node(name, key, state, seen, number))
    return found


def test_a_status_names_the_sites_and_what_is_waited_for(
    registry: Registry, keys: dict[str, bytes], run: Path
) -> None:
    status = status_of(seen_by(keys), NOW, registry, run, 60.0)
    assert [(s.name, s.state, s.round, s.waited_for, s.silent) for s in status.sites] == [
        ("clinic-a", ONLINE, 3, False, False),
        ("clinic-b", ONLINE, 2, True, False),
        ("clinic-c", ONLINE, None, False, False),
    ]
    assert status.run == Run("today", "running", 3, 5, False, 1, ["clinic-b"], NOW)
    assert "round 3 of 5, 1 answered, waiting" in run_line(status.run)
    assert json.loads(status.as_json())["sites"][1]["fingerprint"] == fingerprint(keys["clinic-b"])


@pytest.mark.parametrize(
    ("state", "seen", "silent"),
    [
        (ONLINE, NOW - 20, False),
        (ONLINE, NOW - 34, False),  # its next heartbeat is due
        (ONLINE, NOW - 40, True),
        (OFFLINE, NOW - 4, False),
        (OFFLINE, NOW - 6, True),
        (REGISTERED, None, True),
    ],
)
def test_who_is_silent(
    state: str, seen: float | None, silent: bool, registry: Registry, keys: dict[str, bytes]
) -> None:
    status = status_of(seen_by(keys, b=(state, seen)), NOW, registry, None, 5.0)
    assert [site.silent for site in status.sites] == [False, silent, False]
    assert status.run is None


def test_a_site_that_is_not_registered_is_missing_and_a_removed_one_is_not(
    registry: Registry, keys: dict[str, bytes]
) -> None:
    nodes = seen_by(keys, a=(REMOVED, NOW - 10))[:2]
    status = status_of(nodes, NOW, registry, None, 60.0)
    assert [(s.name, s.state, s.silent) for s in status.sites] == [
        ("clinic-a", "not registered", True),
        ("clinic-b", ONLINE, False),
        ("clinic-c", "not registered", True),
    ]
    registry.drop("clinic-a")
    assert [s.name for s in status_of(nodes, NOW, registry, None, 60.0).sites] == ["clinic-b", "clinic-c"]


def test_a_run_that_is_over_or_was_killed_waits_for_nobody(
    registry: Registry, keys: dict[str, bytes], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "in_use", lambda folder: False)
    killed = status_of(seen_by(keys), NOW, registry, run, 60.0)
    assert killed.run == Run("today", "stopped", 3, 5)
    assert "stopped in round 3: continue it with resume" in run_line(killed.run)
    assert not any(site.waited_for for site in killed.sites)
    (run / status_module.PROGRESS).unlink()  # killed before it wrote any
    early = status_of(seen_by(keys), NOW, registry, run, 60.0).run
    assert early is not None
    assert early.status == "stopped"
    monkeypatch.setattr(status_module, "read_summary", lambda folder: {"status": "completed"})
    over = status_of(seen_by(keys), NOW, registry, run, 60.0)
    assert run_line(over.run) == "no run active; the last one, today, completed after 3 rounds"
    (run / "history.jsonl").write_text("damaged\n")
    assert status_of(seen_by(keys), NOW, registry, run, 60.0).run is not None


def test_the_newest_run_is_shown(run: Path) -> None:
    older = run.parent / "yesterday"
    older.mkdir()
    (older / "config.yaml").write_text("rounds: 5\n")
    os.utime(older / "config.yaml", (NOW, NOW))
    assert newest_run(run.parent) == run
    assert newest_run(run.parent / "nowhere") is None


def test_progress_is_written_once_a_second_and_when_it_changes(tmp_path: Path) -> None:
    now = [NOW]
    progress = Progress(tmp_path, 5, lambda: now[0])
    progress.note(1, {7: "clinic-a", 8: None}, 0)
    assert read_progress(tmp_path) == Present(1, 5, False, {"7": "clinic-a", "8": ""}, 0, NOW)
    now[0] += 0.5
    progress.note(1, {8: None}, 1)
    assert read_progress(tmp_path).answered == 0  # type: ignore[union-attr]
    now[0] += 0.6
    progress.note(1, {8: None}, 1)
    assert read_progress(tmp_path) == Present(1, 5, False, {"8": ""}, 1, NOW)
    (tmp_path / "progress.json").write_text("{")
    assert read_progress(tmp_path) is None


def test_the_metrics_are_prometheus_text(registry: Registry, keys: dict[str, bytes], run: Path) -> None:
    status = status_of(seen_by(keys, c=(REGISTERED, None)), NOW, registry, run, 60.0)
    with make_server("127.0.0.1", 0, lambda: status) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        answer = httpx.get(f"{address}/metrics", trust_env=False)
        assert httpx.get(f"{address}/", trust_env=False).status_code == 404
        server.shutdown()
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in answer.text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|fedmutual_\w+(\{site="[\w-]+"\})? [\d.e+]+', line), line
    lines = answer.text.splitlines()
    assert 'fedmutual_site_waited_for{site="clinic-b"} 1' in lines
    assert 'fedmutual_site_silent_seconds{site="clinic-a"} 10' in lines
    assert not any(line.startswith('fedmutual_site_silent_seconds{site="clinic-c"}') for line in lines)
    assert "fedmutual_run_round 3" in lines
    assert "fedmutual_superlink_up 1" in lines
    assert "fedmutual_superlink_up 0" in metrics(None)


def test_of_two_keys_of_one_name_the_connected_one_counts(
    registry: Registry, keys: dict[str, bytes], run: Path
) -> None:
    status = status_of(seen_by(keys), NOW, registry, run, 60.0)
    online = next(site for site in status.sites if site.state == "online")
    old = replace(online, state="not registered", silent=True)
    lines = metrics(replace(status, sites=[online, old])).splitlines()
    assert f'fedmutual_site_online{{site="{online.name}"}} 1' in lines
    assert f'fedmutual_site_silent{{site="{online.name}"}} 0' in lines


def test_the_status_command(
    registry: Registry,
    keys: dict[str, bytes],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = [
        "--superlink",
        "127.0.0.1:1",
        "--insecure",
        "--sites",
        str(registry.folder),
        "--runs",
        str(run.parent),
    ]
    assert main(["status", *where]) == 2
    assert "the SuperLink at 127.0.0.1:1 does not answer" in capsys.readouterr().err
    assert main(["status", *where, "--prometheus", "99999"]) == 2
    fake = FakeSuperLink(*seen_by(keys, b=(OFFLINE, NOW - 300)))
    monkeypatch.setattr(superlink_module, "SuperLink", lambda connection: _Context(fake))
    capsys.readouterr()
    assert main(["status", *where]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("run today: round 3 of 5, 1 answered, waiting")
    (line,) = [line for line in shown.splitlines() if line.startswith("clinic-b")]
    assert re.search(r"offline, silent +5 min ago +2 +yes +1 +SHA256:", line)
    assert main(["status", *where, "--check"]) == 1
    assert main(["status", *where, "--check", "--silent", "400"]) == 0
