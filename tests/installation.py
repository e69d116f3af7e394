"""The source archive and the wheel, built, and an environment with one of them installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(arguments: list[str], cwd: Path, **environment: str) -> str:
    """Run a program that must succeed; nothing of the checkout is on its path."""
    result = subprocess.run(
        arguments, cwd=cwd, env=outside() | environment, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def outside() -> dict[str, str]:
    """The environment without what leads to the checkout."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def copy_checkout(folder: Path) -> None:
    """A copy of this checkout, with what a working one has lying about."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "outputs", "dist", "build", "site", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copy(ROOT / ".gitignore", folder)
    for name in ("outputs/2026-01-31/run/config.yaml", "photos/train/a/labels.json", "notes.md", "my.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stray: 1\n")


def build(checkout: Path, out: Path) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it (not from the checkout)."""
    command([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)], out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def environment(archive: Path, folder: Path) -> Path:
    """An environment with an archive installed and nothing of the checkout; returns its folder of programs.

    What the archive depends on is large: it comes from this environment, behind the new one's own packages. A
    path in a .pth file is searched, but its own .pth files, such as an editable installation's, are not read.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    own = command([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)[:-1]
    (Path(own) / "dependencies.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
    )
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    command([*pip, "install", *options, str(archive)], folder)
    for entry in metadata.distribution("flwr").entry_points.select(group="console_scripts"):
        program = folder / "bin" / entry.name
        program.write_text(
            f"#!{python}\nimport sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
        )
        program.chmod(0o755)
    return folder / "bin"
