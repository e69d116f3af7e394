"""Where a study's runs go by default: processes of this machine, forked from one that imported everything."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from fedmutual.compare.plan import PlannedRun
from fedmutual.compare.worker import PRELOAD, work
from fedmutual.simulation.progress import HistoryTail
from fedmutual.simulation.superlink import ALLOCATOR

POLL_SECONDS = 0.1
ENDING_SECONDS = 30.0  # for runs that were told to end: a federation of real processes needs a while


class Work(Protocol):
    """A run that was started.

    Attributes
    ----------
    round : int
        The last one of which there is a line of history.
    problem : str
        Why it failed where the run itself cannot know it; else empty.
    code : int or None
        Of its process; None while it goes on.
    where : str
        The machine that it ran on; empty: this one.
    """

    round: int
    problem: str
    code: int | None
    where: str

    def over(self) -> bool:
        """Whether it has ended; brings ``round`` up to date."""
        ...


class Workers(Protocol):
    """What starts runs."""

    def prepare(self, cpus: int) -> None:
        """Get ready for runs that train with up to so many threads."""
        ...

    def start(self, run: PlannedRun, path: Path) -> Work:
        """Start a run, or continue the one interrupted in ``path``."""
        ...

    def wait(self) -> None:
        """Wait a moment."""
        ...

    def end(self, hurry: Callable[[], bool]) -> None:
        """End what still runs; ``hurry``: at once."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class PoolWork:
    """A run in a process on this machine."""

    where = problem = ""

    def __init__(self, path: Path, process: BaseProcess) -> None:
        self.process = process
        self.round = 0
        self.code: int | None = None
        self._history = HistoryTail(path / "history.jsonl")

    def over(self) -> bool:
        """Whether the process has ended."""
        if self.code is None:
            ended = not self.process.is_alive()
            self.round = max([self.round, *(int(row["round"]) for row in self._history.poll())])
            if ended:
                self.process.join()
                self.code = self.process.exitcode
                self.process.close()
        return self.code is not None


class Pool:
    """Processes of this machine.

    Parameters
    ----------
    engine : str
        "inprocess", or "flwr" for the machinery of ``fedmutual run``.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._context = multiprocessing.get_context("forkserver")
        self._started: list[PoolWork] = []

    def prepare(self, cpus: int) -> None:
        """Set what the first process passes on to all that are forked from it."""
        os.environ.update(ALLOCATOR | {"OMP_NUM_THREADS": str(cpus), "MKL_NUM_THREADS": str(cpus)})
        multiprocessing.set_forkserver_preload(PRELOAD)

    def start(self, run: PlannedRun, path: Path) -> PoolWork:
        """Start a run, or continue the one interrupted in ``path``."""
        process = self._context.Process(target=work, args=(path, run.overrides, self._engine))
        process.start()
        started = PoolWork(path, process)
        self._started = [*(one for one in self._started if one.code is None), started]
        return started

    def wait(self) -> None:
        """Wait a moment."""
        time.sleep(POLL_SECONDS)

    def end(self, hurry: Callable[[], bool]) -> None:
        """End what still runs."""
        running = [one for one in self._started if not one.over()]
        for one in running:
            one.process.terminate()
        deadline = time.monotonic() + ENDING_SECONDS
        while running := [one for one in running if not one.over()]:
            if time.monotonic() > deadline or hurry():
                for one in running:
                    one.process.kill()
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Nothing is held: the first process ends with this one."""
