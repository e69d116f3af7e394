"""CPU seconds of a command and everything that it starts, by process."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

INTERVAL = 0.2  # seconds between two looks: what a process used after its last one is lost
# A word of the command line, and what the process is; the first that fits.
KINDS = (
    ("flwr-simulation", "server and engine"),
    ("flower-superlink", "SuperLink"),
    ("flower-superexec", "SuperExec"),
    ("ray::", "clients"),
    ("default_worker.py", "clients"),
    ("raylet", "Ray's monitors"),
    ("gcs_server", "Ray's monitors"),
    ("/ray/", "Ray's monitors"),
    ("fedmutual run", "fedmutual run"),
)


@dataclass(frozen=True)
class Spent:
    """What a command took.

    Attributes
    ----------
    wall : float
        Seconds.
    began : float
        Unix time.
    cpu : Mapping[str, float]
        CPU seconds by kind of process.
    at_mark : Mapping[str, float]
        The same at the first moment at which ``mark`` was true.
    """

    wall: float
    began: float
    cpu: Mapping[str, float]
    at_mark: Mapping[str, float]

    @property
    def total(self) -> float:
        """CPU seconds of all processes."""
        return sum(self.cpu.values())


def watch(command: Sequence[str], environment: Mapping[str, str], mark: Callable[[], bool]) -> Spent:
    """Run a command to its end, and look at its processes on the way.

    Raises
    ------
    SystemExit
        The command failed; the message has its output.
    """
    began, start = time.time(), time.perf_counter()
    used: dict[psutil.Process, tuple[str, float]] = {}
    at_mark: dict[str, float] = {}
    with subprocess.Popen(
        command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        root = psutil.Process(child.pid)
        while True:
            try:
                printed, _ = child.communicate(timeout=INTERVAL)
                break
            except subprocess.TimeoutExpired:
                _look(root, used)
            if not at_mark and mark():
                at_mark = _sums(used)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{printed[-4000:]}")
    return Spent(time.perf_counter() - start, began, _sums(used), at_mark)


def kind_of(command_line: Sequence[str]) -> str:
    """Return what a process is, by its command line."""
    line = " ".join(command_line)
    return next((kind for word, kind in KINDS if word in line), "other")


def _look(root: psutil.Process, used: dict[psutil.Process, tuple[str, float]]) -> None:
    try:
        running = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in running:
        try:
            with process.oneshot():
                times, line = process.cpu_times(), process.cmdline()
                known = used[process][0] if process in used else "other"  # a zombie has no command line
                used[process] = (kind_of(line) if line else known, times.user + times.system)
        except psutil.Error:  # it has just ended
            continue


def _sums(used: Mapping[psutil.Process, tuple[str, float]]) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for kind, seconds in used.values():
        sums[kind] += seconds
    return dict(sums)
