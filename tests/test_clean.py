"""``fedmutual clean``: leftovers are found with their size, nothing in use goes, and nothing goes unasked."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedmutual.cli import main
from fedmutual.simulation.leftovers import KINDS, find
from fedmutual.simulation.owner import OWNER, write_owner
from fedmutual.simulation.processes import runs

OLD = time.time() - 40 * 86_400


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with a home and a temporary folder of its own: nobody else's things are found."""
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "FLWR_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def write(path: Path, size: int, when: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    if when is not None:
        for changed in (path, path.parent):
            os.utime(changed, (when, when))
    return path


def kinds(older_than: float = 30.0) -> dict[str, list[int]]:
    found = find(KINDS, Path.cwd() / "outputs", older_than)
    return {kind: [item.size for item in found if item.kind == kind] for kind in KINDS}


def test_sizes_and_ages(home: Path) -> None:
    assert not any(kinds().values())
    write(home / ".cache/fedmutual/images/a/images.npy", 1000)
    write(Path("outputs/2026-01-31/12-00-00-mutual/config.yaml"), 10, OLD)
    write(Path("outputs/2026-02-01/12-00-00-mutual/config.yaml"), 20)  # young
    write(Path("outputs/compare/study/config.yaml"), 30, OLD)  # no run
    write(Path("outputs/2026-01-31/notes/thesis.md"), 40, OLD)  # nor this
    write(home / ".local/share/fedmutual/runs/r/config.yaml", 50, OLD)
    write(home / ".local/share/fedmutual/state/r/client-0", 60, OLD)
    write(home / ".flwr/apps/fedmutual.fedmutual.0.1.0.12345678/a.py", 70)
    write(home / ".flwr/apps/other.app.0.1.0.12345678/a.py", 80)
    assert kinds() == {"cache": [1000], "runs": [10, 50], "states": [60], "superlinks": [], "apps": [70]}
    assert kinds(older_than=0)["runs"] == [10, 20, 50]


def sleeper(flower_home: Path, name: str = "sleeper") -> subprocess.Popen[bytes]:
    """A process whose Flower home is this one; its command line starts a program of that name."""
    code = Path(tempfile.gettempdir()) / name
    code.write_text("import time; print(flush=True); time.sleep(300)")
    environment = {**os.environ, "FLWR_HOME": str(flower_home)}
    process = subprocess.Popen([sys.executable, str(code)], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_killed_run_s_superlink_is_ended_and_a_living_one_s_is_not(
    home: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    ours, left = (Path(tempfile.mkdtemp(prefix="fedmutual-")).resolve() for _ in range(2))
    write_owner(ours)
    (left / OWNER).write_text(json.dumps({"pid": dead_pid(), "created": 1.0}))
    started += [sleeper(ours), sleeper(left)]
    (found,) = find(("superlinks",), Path("outputs"), 30)
    assert str(left) in found.what
    assert "1 processes" in found.what
    assert found.size > 1_000_000  # its memory
    assert main(["clean", "superlinks", "--yes"]) == 0
    assert (runs(psutil.Process(started[0].pid)), started[1].wait(timeout=60) != 0) == (True, True)
    assert (ours.is_dir(), left.exists()) == (True, False)


def test_a_pid_that_was_given_anew_is_no_owner(home: Path) -> None:
    left = Path(tempfile.mkdtemp(prefix="fedmutual-"))
    (left / OWNER).write_text(json.dumps({"pid": os.getpid(), "created": 1.0}))
    assert len(find(("superlinks",), Path("outputs"), 30)) == 1


@pytest.mark.parametrize("busy", [False, True])
def test_flower_s_local_superlink_is_left_alone_while_it_simulates(
    home: Path, busy: bool, started: list[subprocess.Popen[bytes]]
) -> None:
    code = Path(tempfile.gettempdir()) / "flower-superlink"
    child = Path(tempfile.gettempdir()) / ("flwr-simulation" if busy else "flower-superexec")
    child.write_text("import time; print(flush=True); time.sleep(300)")  # it runs now
    code.write_text(
        f"import subprocess, sys\nc = subprocess.Popen([sys.executable, {str(child)!r}])\nc.wait()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "FLWR_HOME"}
    process = subprocess.Popen([sys.executable, str(code)], env=environment, stdout=subprocess.PIPE)
    started.append(process)
    assert process.stdout is not None
    process.stdout.readline()
    children = psutil.Process(process.pid).children()
    found = find(("superlinks",), Path("outputs"), 30)
    assert len(found) == (0 if busy else 1)
    assert main(["clean", "--yes"]) == 0
    assert all(runs(child) == busy for child in children)
    for child_process in children:
        if busy:
            child_process.kill()


class TestAsking:
    @pytest.fixture(autouse=True)
    def _things(self, home: Path) -> None:
        write(home / ".cache/fedmutual/images/a/images.npy", 2_000_000)
        write(Path("outputs/2026-01-31/12-00-00-mutual/config.yaml"), 10, OLD)

    def left(self, home: Path) -> tuple[bool, bool]:
        return (home / ".cache/fedmutual").exists(), Path("outputs/2026-01-31/12-00-00-mutual").exists()

    def test_a_dry_run_only_shows(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["clean", "--dry-run"]) == 0
        assert "2.00 MB" in capsys.readouterr().out
        assert self.left(home) == (True, True)

    def test_with_nobody_to_ask_nothing_is_removed(
        self, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
        assert main(["clean"]) == 2
        assert "--yes" in capsys.readouterr().err
        assert self.left(home) == (True, True)

    @pytest.mark.parametrize(
        ("answer", "left"), [("n", (True, True)), ("", (True, True)), ("y", (False, False))]
    )
    def test_the_answer_counts(
        self, home: Path, answer: str, left: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(builtins, "input", lambda question: asked.append(question) or answer)
        assert main(["clean"]) == 0
        assert [question.split(" (")[0] for question in asked] == ["Remove cache", "Remove runs"]
        assert self.left(home) == left

    def test_only_the_kinds_that_are_named(self, home: Path) -> None:
        assert main(["clean", "runs", "--yes"]) == 0
        assert self.left(home) == (True, False)

    def test_what_is_no_kind_is_refused(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["clean", "everything", "--yes"]) == 2
        assert "'everything' is none of cache, runs" in capsys.readouterr().err
        assert self.left(home) == (True, True)
