"""``fedmutual run`` in a process of its own, and every process below it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from installation import ROOT, outside

SECONDS = 400.0  # a busy machine takes its time
LOOK_SECONDS = 1.0  # between two looks for new processes, which cost a look at all of the machine's


class RunCommand:
    """A started command.

    Parameters
    ----------
    folder : Path
        Where it runs; what it prints goes into a file beside it.
    overrides : str
    program : Sequence[str] or None
        What is started, with an environment that does not lead to this checkout; None: its ``fedmutual``.
    app_dir : Path or None
        The Flower app; None: fedmutual's own.
    """

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        program: Sequence[str] | None = None,
        app_dir: Path | None = None,
    ) -> None:
        if program is not None:
            environment = outside()
        else:
            environment = outside() | {"PYTHONPATH": str(ROOT)}
            program = [sys.executable, "-m", "fedmutual"]
        if app_dir is not None:
            code = "import sys\nfrom pathlib import Path\nfrom fedmutual.cli import main\n"
            code += f"sys.exit(main(sys.argv[1:], app_dir=Path({str(app_dir)!r})))"
            program = [sys.executable, "-c", code]
        self.descendants: set[psutil.Process] = set()
        self._looked = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._text = (folder.parent / f"{folder.name}.txt").open("w+")
        self.process = subprocess.Popen(
            [*program, "run", *overrides],
            cwd=folder,
            env=environment,
            stdout=self._text,
            stderr=subprocess.STDOUT,
        )

    def watch(self) -> bool:
        """Remember who runs below; True when the command has ended."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self.look()
        return self.process.poll() is not None

    def look(self) -> None:
        """Look who runs below now."""
        self._looked = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            self.descendants.update(psutil.Process(self.process.pid).children(recursive=True))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, while the command runs."""
        wait_for(lambda: self.watch() or condition(), SECONDS)
        assert self.process.poll() is None, self.end()[1]

    def clients(self) -> list[psutil.Process]:
        """Ray's processes in which clients learn."""
        self.look()
        found = []
        for process in self.descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith("ray::ClientAppActor"):
                    found.append(process)
        return found

    def end(self) -> tuple[int, str]:
        """Wait for the command's own end; returns its exit code and what it printed."""
        try:
            wait_for(self.watch, SECONDS)
        finally:
            self.process.kill()
            self._text.seek(0)
            printed = self._text.read()
            self._text.close()
        return self.process.wait(), printed

    def left(self) -> list[psutil.Process]:
        """Processes that outlived the command."""
        assert len(self.descendants) > 5, "Ray was never seen"
        return [process for process in self.descendants if alive(process)]


def alive(process: psutil.Process) -> bool:
    """A zombie is over: it is gone as soon as the machine's first process looks, whenever that is."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until a condition holds, and fail if it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
