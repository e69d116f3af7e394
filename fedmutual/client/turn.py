"""One client process of a node at a time.

Flower starts a second process for a node when it takes the first one for dead, which on a busy machine it may
not be. The second waits here, before it imports torch, and then answers from the state that the first has
left, or does the work. Of several that wait only the newest stays: Flower takes no reply from the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from platformdirs import user_data_path

logger = logging.getLogger(__name__)

PROGRAM = "flwr-clientapp"
WAIT_SECONDS = 0.2
PATIENCE = 180.0  # seconds for a process that Flower has given up; it ends itself within half a minute


class SupersededError(Exception):
    """A newer process of this node waits."""


class Turn:
    """The turn of this process.

    Parameters
    ----------
    folder : Path
        A folder of the site's own.
    node : int
        The node's id: several nodes may share the folder.
    clock, sleep
        Injected by tests.
    """

    def __init__(
        self,
        folder: Path,
        node: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._lock = FileLock(folder / f"{node}.lock", timeout=0)
        self._newest = folder / f"{node}.newest"
        self._holder = folder / f"{node}.holder"
        self._me = f"{os.getpid()} {time.time_ns()}"
        self._clock, self._sleep = clock, sleep

    def take(self) -> None:
        """Wait until no other process of the node works, and keep the turn until this process ends.

        A process that still works ``PATIENCE`` seconds later is ended: nobody takes its reply any more.

        Raises
        ------
        SupersededError
            A newer process waits: this one must end.
        """
        folder = self._newest.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._write(self._newest)
        deadline = self._clock() + PATIENCE
        while not self._taken():
            if self._clock() >= deadline:
                end_client(self._read(self._holder))
                deadline = self._clock() + PATIENCE
            self._sleep(WAIT_SECONDS)
        self._write(self._holder)

    def _taken(self) -> bool:
        if self._read(self._newest) != self._me:
            raise SupersededError
        try:
            self._lock.acquire()
        except Timeout:
            return False
        return True

    def _write(self, path: Path) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        part.write_text(self._me)
        os.replace(part, path)

    @staticmethod
    def _read(path: Path) -> str:
        try:
            return path.read_text()
        except FileNotFoundError:
            return ""


def take_turn(node: int, node_config: Mapping[str, Any]) -> Turn | None:
    """Take the turn of a client process of a deployment; elsewhere (simulation, tests) there is none to take.

    The process ends here where a newer one waits. A folder that cannot be written is no reason to fail: the
    state's own lock still keeps two processes apart.
    """
    if os.path.basename(sys.argv[0]) != PROGRAM:
        return None
    state = node_config.get("state-dir")
    folder = (Path(str(state)) if state else user_data_path("fedmutual", appauthor=False)) / ".turns"
    turn = Turn(folder, node)
    try:
        turn.take()
    except SupersededError:
        logger.warning("node %d: Flower has started another client process since; this one ends", node)
        os._exit(0)
    except OSError as error:
        logger.warning("%s: %s: client processes of one node are not kept apart", folder, error.strerror)
        return None
    return turn


def end_client(said: str) -> None:
    """Kill the client process of a ``holder`` file, if it is still that process."""
    pid, _, since = said.partition(" ")
    with contextlib.suppress(psutil.Error, ValueError):
        process = psutil.Process(int(pid))
        words = [os.path.basename(word) for word in process.cmdline()[:2]]
        if PROGRAM in words and process.create_time() <= int(since) / 1e9:
            logger.warning("client process %s has not ended in %g s: it is killed", pid, PATIENCE)
            process.kill()
