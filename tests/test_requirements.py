"""The versions that ``make`` installs fit pyproject.toml, and there is a way without uv."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCKED = re.compile(r"([A-Za-z0-9_.-]+)==(\S+)")
FAKE = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in {failing}) exit 1;; esac
"""


def locked(name: str) -> dict[str, list[str]]:
    """Versions by package; several where they depend on Python's."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        if match := LOCKED.match(line):
            found.setdefault(match[1].lower(), []).append(match[2])
    return found


def wanted(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    options = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras for line in options[extra])]
    return [Requirement(line) for line in lines if not line.startswith("fedmutual")]


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("run.txt", ("export", "pretrained")),
        ("dev.txt", ("dev", "dicom", "docs", "export", "notebook", "pretrained", "privacy", "search")),
    ],
)
def test_the_locked_versions_fit_the_project(name: str, extras: tuple[str, ...]) -> None:
    versions = locked(name)
    for requirement in wanted(*extras):
        found = versions.get(requirement.name.lower())
        assert found, f"{requirement.name}: run requirements/lock.sh"
        assert all(requirement.specifier.contains(version) for version in found), requirement


def test_what_runs_is_what_is_tested() -> None:
    tested = locked("dev.txt")
    assert {name: v for name, v in locked("run.txt").items() if tested.get(name) != v} == {}


@pytest.mark.parametrize("name", ["run.txt", "dev.txt"])
def test_every_file_is_known_by_its_hash_and_no_index_is_named(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text
    for entry in re.split(r"\n(?=[A-Za-z])", text.partition("\n\n")[2] or text):
        if LOCKED.match(entry):
            assert "--hash=sha256:" in entry, entry.splitlines()[0]


@pytest.mark.parametrize(
    ("failing", "last", "status"),
    [
        ("never", "uv --quiet pip install", 0),
        ("*uv*", "--quiet install --no-deps --editable", 0),
        ("*uv*|*--require-hashes*", "--quiet install --editable", 0),
        ("*install*", "--quiet install --editable", 1),
    ],
    ids=["uv", "no uv", "no such versions", "no network"],
)
def test_there_is_a_way_without_uv_and_without_a_version(
    failing: str, last: str, status: int, tmp_path: Path
) -> None:
    log, python = tmp_path / "log", tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE.format(log=log, failing=failing))
    python.chmod(0o755)
    done = subprocess.run(
        [ROOT / "requirements" / "install.sh", tmp_path / "venv", "run"], capture_output=True, check=False
    )
    assert bool(done.returncode) == bool(status), done.stderr
    assert last in log.read_text().splitlines()[-1]
