"""On loopback: a server and three sites that ``fedmutual provision`` has made, and an operator's commands."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import SHORT_ROUNDS, Loopback, copy_app, free_port, wait_for

from fedmutual.cli import main
from fedmutual.provision.kits import provision
from fedmutual.provision.project import Project, Site

pytestmark = pytest.mark.slow

SITES = ("clinic-a", "clinic-b", "clinic-c")
TIMEOUT = 300.0  # seconds; a busy machine takes its time


class Provisioned(Loopback):
    """A deployment whose keys, certificates and settings are a project's folders."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, poll_seconds=0.3)
        self.kits = self.folder / "kits"
        host, port = self.address.split(":")
        shares = [{"partition-id": number, "num-partitions": len(SITES)} for number in range(len(SITES))]
        sites = tuple(Site(name, settings=share) for name, share in zip(SITES, shares, strict=True))
        run = (*SHORT_ROUNDS, "rounds=4", "exchange.poll_interval=0.2", "exchange.min_clients=2")
        provision(Project((host,), sites, port=int(port), run=run), self.kits)
        for number, name in enumerate(SITES):
            self._use_folders_of_this_test(name, self.folder / f"site-{number}")

    def _use_folders_of_this_test(self, name: str, folder: Path) -> None:
        file = self.kits / name / "site.toml"
        text = file.read_text().replace("/var/lib/fedmutual", str(folder))
        file.write_text(text.replace("/etc/fedmutual", str(self.kits / name)))

    def start(self) -> None:
        """Start everything; register the sites with the command."""
        copy_app(self.app_dir)
        self._write_connection()
        self.start_part("superlink")
        self.start_part("superexec")
        wait_for(self._answers, 60, "the SuperLink does not answer")
        assert main(["site", "add", "--all", *self.options]) == 0
        for number in range(self.sites):
            self.start_part(f"site-{number}")

    @property
    def options(self) -> list[str]:
        """Where SuperLink and registry are."""
        server = self.kits / "server"
        certificates = ["--root-certificates", str(server / "secrets/ca.crt")]
        return ["--superlink", self.address, *certificates, "--sites", str(server / "sites")]

    def _command(self, part: str) -> list[str]:
        host, port = self.address.split(":")
        server = self.kits / "server/secrets"
        if part == "superlink":
            return [
                "flower-superlink", "--host", host, "--port", port, "--isolation", "process",
                "--database", str(self.folder / "superlink.db"), "--disable-runtime-dependency-installation",
                "--ssl-ca-certfile", str(server / "ca.crt"), "--ssl-certfile", str(server / "server.pem"),
                "--ssl-keyfile", str(server / "server.key"), "--enable-supernode-auth",
                "--superexec-auth-secret-file", str(server / "superexec.secret"),
            ]  # fmt: skip
        if part == "superexec":
            return [
                "flower-superexec", "--runtime-api-address", self.address,
                "--root-certificates", str(server / "ca.crt"),
                "--superexec-auth-secret-file", str(server / "superexec.secret"),
            ]  # fmt: skip
        number = int(part.removeprefix("site-"))
        kit = self.kits / SITES[number]
        unit = (kit / "fedmutual-site.service").read_text().replace("\\\n", " ")
        (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
        command = line.partition(" -- ")[2].replace("/etc/fedmutual", str(kit))
        return command.replace("--port 9094", f"--port {self._ports[number]}").split()

    def _write_connection(self) -> None:
        super()._write_connection()
        file = self.folder / "commands" / "flwr" / "config.toml"
        file.write_text(
            file.read_text().replace(f"{self.folder}/ca.crt", f"{self.kits}/server/secrets/ca.crt")
        )


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provisioned]:
    with Provisioned(tmp_path_factory.mktemp("provisioned")) as started:
        yield started


def test_a_provisioned_federation_from_registration_to_removal(
    deployment: Provisioned, capsys: pytest.CaptureFixture[str]
) -> None:
    run = deployment.folder / "out"

    def status(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        code = main(["status", "--json", *deployment.options, *options])
        return json.loads(capsys.readouterr().out) | {"code": code}

    def states() -> list[tuple[str, str]]:
        return [(site["name"], site["state"]) for site in status()["sites"]]

    none = status("--runs", str(deployment.folder / "nowhere"))
    assert (none["run"], [site["name"] for site in none["sites"]]) == (None, list(SITES))
    overrides = tomllib.loads((deployment.kits / "server/run.toml").read_text())["overrides"]
    deployment.submit(overrides=f"{overrides} output_dir={run}")

    def waits() -> bool:
        now = status("--run", str(run)) if (run / "progress.json").exists() else {"sites": []}
        return [site["round"] or 0 for site in now["sites"]] > [0, 0, 0] and bool(now["run"]["waiting"])

    wait_for(waits, TIMEOUT, "no status with a round", 0.2)
    seen = status("--run", str(run))
    assert [site["name"] for site in seen["sites"]] == list(SITES)
    assert seen["run"]["rounds"] == 4
    assert seen["run"]["round"] >= 1
    assert set(seen["run"]["waiting"]) <= set(SITES)

    deployment.kill_part("superexec")  # the rest needs no run
    deployment.stop_part("site-1")
    wait_for(lambda: states()[1] == ("clinic-b", "offline"), TIMEOUT, "clinic-b does not leave", 0.5)
    wait_for(lambda: status("--silent", "1", "--check")["code"] == 1, TIMEOUT, "clinic-b is not silent", 0.5)
    assert [site["silent"] for site in status("--silent", "1")["sites"]] == [False, True, False]

    assert main(["site", "remove", "clinic-b", "--yes", *deployment.options]) == 0
    assert [name for name, _ in states()] == ["clinic-a", "clinic-c"]
    deployment.start_part("site-1")  # it comes back, and is refused
    log = deployment.folder / "site-1.log"
    wait_for(lambda: "Failed to activate SuperNode" in log.read_text(), TIMEOUT, "clinic-b is not refused")
    assert main(["site", "add", "clinic-a", *deployment.options]) == 0
    assert main(["status", "--superlink", f"127.0.0.1:{free_port()}", *deployment.options[2:]]) == 2
    assert "does not answer" in capsys.readouterr().err
