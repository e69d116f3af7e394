"""Find and end all processes of one run, by descent and by a mark in their environment.

Flower and Ray start processes that outlive their parents, so neither a process group nor the final process
tree contains them all. Every process of a run inherits an environment variable with a value unique to the
run. Processes that were seen as descendants or carry this mark belong to the run; no other process gets a
signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable

import psutil

POLL_SECONDS = 0.05
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class ProcessTree:
    """Record the processes of a run, and end them.

    Parameters
    ----------
    mark : tuple[str, str]
        Name and value of an environment variable that only processes of this run carry.
    """

    def __init__(self, mark: tuple[str, str]) -> None:
        self._mark = mark
        self._seen: set[psutil.Process] = set()  # equal by pid and creation time: a reused pid differs

    def add(self, pid: int) -> None:
        """Record a process that was started for this run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen.add(psutil.Process(pid))

    def record(self) -> None:
        """Record all current descendants of the recorded processes."""
        children: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess):
                children.setdefault(process.ppid(), []).append(process)
        parents = self.alive()
        while parents:
            found = children.pop(parents.pop().pid, [])
            self._seen.update(found)
            parents.extend(found)

    def alive(self) -> list[psutil.Process]:
        """Return the recorded processes that still run (zombies excluded)."""
        return [process for process in self._seen if runs(process)]

    def named(self, program: str) -> list[psutil.Process]:
        """Return the running processes of the program with that name."""
        return [process for process in self.alive() if program in _program(process)]

    def end(self, grace: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """End every process of the run: terminate, wait up to ``grace`` seconds (less in a hurry), kill.

        Raises
        ------
        RuntimeError
            A process survived SIGKILL (it hangs in the kernel).
        """
        self._find_all()
        _signal(self.alive(), signal.SIGTERM)
        self._wait(grace, hurry)
        deadline = time.monotonic() + 10.0
        while True:  # a dying process may start another
            self._find_all()
            remaining = self.alive()
            if not remaining:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"could not end {[(p.pid, _program(p)) for p in remaining]}")
            _signal(remaining, signal.SIGKILL)
            self._wait(0.5, lambda: False)

    def reap(self, seconds: float = 2.0) -> None:
        """Collect the exit status of adopted processes that have ended, so that no zombie remains."""
        deadline = time.monotonic() + seconds
        zombies = list(self._seen)
        while zombies and time.monotonic() < deadline:
            for process in zombies:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
            # a process is a zombie while its last threads are still ending
            zombies = [process for process in zombies if process.is_running()]
            if zombies:
                time.sleep(POLL_SECONDS)

    def _find_all(self) -> None:
        self.record()
        for process in psutil.process_iter():
            with contextlib.suppress(
                psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError
            ):
                if process.environ().get(self._mark[0]) == self._mark[1]:
                    self._seen.add(process)

    def _wait(self, seconds: float, hurry: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline and not hurry():
            time.sleep(POLL_SECONDS)


def adopt_orphans(adopt: bool) -> None:
    """Become the parent of descendants whose own parent ends, so that no zombie outlives the run (Linux).

    On other systems, or if the kernel refuses, init adopts them as usual; they are still found and ended.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def runs(process: psutil.Process) -> bool:
    """Return whether a process still runs (a zombie does not)."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _program(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:2])
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
