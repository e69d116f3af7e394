"""The processes of one run: known by descent and by a mark in their environment, ended without exception.

Flower and Ray start processes that outlive their parents, so that neither a process group nor the tree
at the end shows them all. Each process that is started gets an environment variable with a value of this
run; whoever was seen below one of ours, or carries the mark, is ours. Nothing else is ever signalled.
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
    """Remember the processes of a run while they live, and end them.

    Parameters
    ----------
    mark : tuple[str, str]
        Name and value of an environment variable that only processes of this run carry.
    """

    def __init__(self, mark: tuple[str, str]) -> None:
        self._mark = mark
        self._seen: set[psutil.Process] = set()  # equal by pid and time of creation: a reused pid is no match

    def add(self, pid: int) -> None:
        """Remember a process that was started for this run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen.add(psutil.Process(pid))

    def record(self) -> None:
        """Remember all present descendants of the processes seen so far."""
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
        """Return the remembered processes that still run (a zombie has ended)."""
        return [process for process in self._seen if runs(process)]

    def named(self, program: str) -> list[psutil.Process]:
        """Return the running processes whose command line starts a program of that name."""
        return [process for process in self.alive() if program in _program(process)]

    def end(self, grace: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """End every process of the run: ask, wait up to ``grace`` seconds (less in a hurry), then kill.

        Raises
        ------
        RuntimeError
            When a process survived SIGKILL (it hangs in the kernel).
        """
        self._find_all()
        _signal(self.alive(), signal.SIGTERM)
        self._wait(grace, hurry)
        deadline = time.monotonic() + 10.0
        while True:  # a process may start another while it dies
            self._find_all()
            remaining = self.alive()
            if not remaining:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"could not end {[(p.pid, _program(p)) for p in remaining]}")
            _signal(remaining, signal.SIGKILL)
            self._wait(0.5, lambda: False)

    def reap(self, seconds: float = 2.0) -> None:
        """Take the exit status of those that have ended and were adopted, so that no zombie is left."""
        deadline = time.monotonic() + seconds
        zombies = list(self._seen)
        while zombies and time.monotonic() < deadline:
            for process in zombies:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
            # a process shows as a zombie while its last threads are still on their way out
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

    Elsewhere, and in a kernel that refuses, they go to the system's first process as usual; they are found
    and ended all the same.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def runs(process: psutil.Process) -> bool:
    """Whether a process still does something: a zombie has ended."""
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
