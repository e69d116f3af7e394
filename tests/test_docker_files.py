"""The image's fixed packages, and who gets which key; what needs an engine is in tests/docker."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from fedmutual.watch.supervisor import LOOK_SECONDS

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
LOCKS = ("torch.txt", "requirements.txt")


def fixed(lock: str) -> dict[str, tuple[str, int]]:
    """Name -> version and number of hashes, of a lock file."""
    text = re.sub(r"#.*\n", "", (DOCKER / lock).read_text())
    found = {}
    for entry in re.split(r"\n(?! )", text.strip()):
        name, version = re.match(r"([a-z0-9-]+)(?:\[[a-z,]+\])?==([^ ]+) ", entry).groups()  # type: ignore[union-attr]
        found[name] = version, len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry))
    return found


@pytest.mark.parametrize("unit", sorted((DOCKER / "systemd").glob("*.service")), ids=lambda path: path.stem)
def test_a_unit_is_restarted_and_watched(unit: Path) -> None:
    service = [line.strip() for line in unit.read_text().split("[Service]")[1].splitlines()]
    assert {"Type=notify", "NotifyAccess=main", "Restart=always", "KillMode=control-group"} <= set(service)
    (command,) = [line for line in service if line.startswith("ExecStart=")]
    assert "fedmutual watch --once -- flower-super" in command
    (seconds,) = [
        int(line.removeprefix("WatchdogSec=")) for line in service if line.startswith("WatchdogSec=")
    ]
    assert seconds > 10 * LOOK_SECONDS


@pytest.mark.parametrize("file", ["client/compose.yaml", "trial.compose.yaml"])
def test_every_site_is_watched(file: str) -> None:
    for name, service in yaml.safe_load((DOCKER / file).read_text())["services"].items():
        command = [*service.get("entrypoint", []), *service.get("command", [])]
        if name != "gateway":
            assert command[:7] == ["python", "-m", "fedmutual", "watch", "--once", "--", "flower-supernode"]
            assert service["restart"] == "unless-stopped"


def needed() -> list[Requirement]:
    """pyproject.toml's dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["dependencies"]]


def test_the_image_has_a_fitting_version_of_every_dependency() -> None:
    versions = {name: version for lock in LOCKS for name, (version, _) in fixed(lock).items()}
    asked = {
        requirement.name: requirement
        for line in (DOCKER / "requirements.in").read_text().splitlines()
        if not line.startswith("#")
        for requirement in [Requirement(line)]
    }
    for requirement in needed():
        assert requirement.name in asked, f"docker/requirements.in lacks {requirement.name}"
        assert requirement.name in versions, f"run docker/lock.sh: {requirement.name} is missing"
        version = versions[requirement.name]
        assert requirement.specifier.contains(version), f"{requirement}: {version} does not fit"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_is_fixed_by_hashes(lock: str) -> None:
    packages = fixed(lock)
    assert len(packages) >= 30
    assert not [name for name, (_, hashes) in packages.items() if hashes == 0]


def test_the_locks_agree_and_only_one_has_pytorch() -> None:
    torch, rest = (fixed(lock) for lock in LOCKS)
    assert {name: torch[name] for name in torch.keys() & rest.keys()}.items() <= rest.items()
    special = re.compile("torch|torchvision|triton|(nvidia|cuda)-.*")
    assert {"torch", "torchvision"} <= torch.keys()
    assert not [name for name in rest if special.fullmatch(name)]


def test_the_image_installs_only_what_has_a_known_hash() -> None:
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install[^&\n]*", text)
    assert [re.findall(r"/opt/(\S+\.txt)", install) for install in installs] == [[lock] for lock in LOCKS]
    assert all("--require-hashes" in install and "--no-deps" in install for install in installs)
    assert "FROM ${PYTHON_IMAGE}" in text  # which can be fixed by its digest
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {f"!docker/{lock}" for lock in LOCKS} <= set(ignored)


def _secrets(file: str) -> dict[str, set[str]]:
    """Service -> what it gets of the folder of secrets."""
    services = yaml.safe_load((DOCKER / file).read_text())["services"]
    return {
        name: {_secret(volume) for volume in service.get("volumes", [])} - {""}
        for name, service in services.items()
    }


def _secret(volume: Any) -> str:
    source = volume["source"] if isinstance(volume, dict) else volume.rpartition(":/")[0]
    found = re.fullmatch(r"\$\{SECRETS:-\./secrets\}(?:/(.*))?", source)
    return "" if found is None else found[1] or "everything"


def test_no_container_of_the_server_has_the_key_of_the_authority() -> None:
    assert _secrets("server/compose.yaml") == {
        "superlink": {"ca.crt", "server.pem", "server.key", "superexec.secret"},
        "superexec": {"superexec.secret"},
        "gateway": {"ca.crt", "server.pem", "server.key"},
        "flwr": {"ca.crt", "sites"},
    }
    trial = _secrets("trial.compose.yaml")
    assert trial == {"gateway": set(), **{f"site-{x}": {"ca.crt", f"site-{x}.key"} for x in "abc"}}


def test_keys_are_made_where_compose_looks_for_them(tmp_path: Path) -> None:
    for command in (["ca", str(tmp_path)], ["server", str(tmp_path), "server.example", "10.0.0.1"]):
        subprocess.run(["sh", str(DOCKER / "keys.sh"), *command], check=True)
    wanted = set().union(*_secrets("server/compose.yaml").values())
    assert wanted <= {path.name for path in tmp_path.iterdir()}
    usage = subprocess.run(["sh", str(DOCKER / "keys.sh")], capture_output=True, text=True)
    assert usage.returncode == 2
    assert [line.split()[1] for line in usage.stderr.splitlines() if "keys.sh" in line] == [
        "ca",
        "server",
        "site",
    ]
