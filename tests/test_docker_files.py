"""The image's fixed versions follow pyproject.toml; what needs an engine is in tests/docker."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def fixed() -> dict[str, str]:
    """Versions of docker/requirements.txt, and PyTorch's of the Dockerfile."""
    lines = (ROOT / "docker/requirements.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in lines if not line.startswith("#"))
    for line in (ROOT / "docker/Dockerfile").read_text().splitlines():
        name, _, version = line.removeprefix("ARG ").partition("=")
        if name in ("TORCH", "TORCHVISION"):
            versions[name.lower()] = version
    return versions


def test_the_image_has_a_fitting_version_of_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = fixed()
    for text in project["dependencies"]:
        needed = Requirement(text)
        assert needed.name in versions, f"docker/requirements.txt lacks {needed.name}"
        assert needed.specifier.contains(versions[needed.name]), (
            f"{text}: {versions[needed.name]} does not fit"
        )
