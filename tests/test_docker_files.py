"""The image's fixed packages; what needs an engine is in tests/docker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
    assert re.findall(r"/opt/install\.sh /opt/(\S+\.txt)", text) == list(LOCKS)
    assert "pip install" not in text
    script = (DOCKER / "install.sh").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install.*", script)
    assert len(installs) == 2  # uv, and with it all else
    assert all("--require-hashes" in install and "--no-deps" in install for install in installs)
    assert "FROM ${PYTHON_IMAGE}" in text  # which can be fixed by its digest
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {f"!docker/{lock}" for lock in LOCKS} <= set(ignored)


def test_the_image_has_the_command(tmp_path: Path) -> None:
    command = DOCKER / "fedmutual"
    assert os.access(command, os.X_OK)
    text = (DOCKER / "Dockerfile").read_text()
    copied = [line.split()[1:] for line in text.splitlines() if line.startswith("COPY docker/")]
    assert ["docker/fedmutual", "/opt/venv/bin/fedmutual"] in copied
    ignored = (ROOT / ".dockerignore").read_text().split()
    for source in (name for line in copied for name in line[:-1]):
        assert f"!{source}" in ignored
    here = tmp_path / "fedmutual"  # as in the image, but with this interpreter and checkout
    script = command.read_text().replace("/opt/venv/bin/python", sys.executable)
    here.write_text(script.replace('"/app"', repr(str(ROOT))))
    here.chmod(0o755)
    done = subprocess.run([here, "provision", "--example"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# One project")
