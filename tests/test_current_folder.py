"""A ``torch.py`` among the photographs is not run by a command that is started there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmutual.simulation.superlink import environment

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "numpy",
    "PIL",
    "hydra",
    "omegaconf",
    "rich",
    "flwr",
    "argcomplete",
    "argparse",
    "json",
    "random",
)

_STARTS_A_PROCESS = """
import multiprocessing, sys
from fedmutual.cli import main
if __name__ == "__main__":
    sys.argv = ["fedmutual", "config"]
    main()
    process = multiprocessing.get_context("forkserver").Process(target=abs, args=(1,))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def _started(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": str(ROOT)}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"} | path
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def _plant(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder ran')\n")


def test_the_module_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    _plant(tmp_path, PACKAGES)
    faces = ["data.pool_size=20", "data.unseen_size=4", "data.image_size=20"]
    node = f'client-name="x" partition-id=0 num-partitions=2 cache-dir="{tmp_path}" state-dir="{tmp_path}"'
    done = _started(tmp_path, "-m", "fedmutual", "doctor", *faces, "--node-config", node)
    assert "of the current folder ran" not in done.stdout + done.stderr
    assert "ok      data" in done.stdout, done.stdout + done.stderr


def test_a_checkout_still_runs_from_its_own_folder(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv[1:] = ['--version']; runpy.run_module('fedmutual', run_name='__main__')"
    )
    for start in (["-m", "fedmutual", "--version"], ["-c", code]):
        done = _started(ROOT, *start)
        assert (done.returncode, done.stdout.startswith("fedmutual ")) == (0, True), done.stderr


def test_processes_that_a_command_starts_import_nothing_from_the_current_folder(tmp_path: Path) -> None:
    script = tmp_path / "script" / "command.py"  # as bin/fedmutual: in a folder of its own
    script.parent.mkdir()
    script.write_text(_STARTS_A_PROCESS)
    _plant(tmp_path, (*PACKAGES, "multiprocessing", "selectors", "socket", "tempfile", "signal"))
    done = _started(tmp_path, str(script))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("inherited", [{}, {"PYTHONSAFEPATH": ""}])
def test_flower_s_processes_import_nothing_from_the_current_folder(
    inherited: dict[str, str], tmp_path: Path
) -> None:
    assert environment(inherited, tmp_path)["PYTHONSAFEPATH"] == "1"
