"""A results folder belongs to one run at a time.

The ServerApp holds ``.run.lock`` in it, a command that starts one (`fedmutual run`) ``.command.lock``. The
system releases both when their holder dies, whatever it dies of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedmutual.files.disk import make_private, writing
from fedmutual.results.errors import ResultsError

RUN, COMMAND = ".run.lock", ".command.lock"


def hold(folder: Path, lock: str = RUN) -> FileLock:
    """Hold a results folder, which is made if it is missing, until the lock is released.

    Raises
    ------
    ResultsError
        Another run holds it.
    WriteError
        The folder cannot be written.
    """
    path = folder / lock
    with writing(path):
        make_private(folder)
        # not bound to this thread: Flower may end the app in another one
        held = FileLock(path, timeout=0, mode=0o600, thread_local=False)
        try:
            held.acquire()
        except Timeout as error:
            raise ResultsError(
                f"{folder} is in use by a run that is still going on: wait until it has ended, or stop it; "
                "a new run needs an output_dir of its own"
            ) from error
    return held


@contextmanager
def held_by_command(folder: Path) -> Iterator[None]:
    """Hold a results folder for a command that starts a run in it.

    Raises
    ------
    ResultsError
        Another command or a run holds it.
    WriteError
        The folder cannot be written.
    """
    held = hold(folder, COMMAND)
    try:
        hold(folder, RUN).release()  # of a ServerApp that no command of this machine has started
        yield
    finally:
        held.release()


def in_use(folder: Path) -> bool:
    """Whether a run or a command holds a results folder; nothing is made in it."""
    try:
        for lock in (COMMAND, RUN):
            if (folder / lock).exists():
                hold(folder, lock).release()
    except ResultsError:
        return True
    except OSError:  # of another user
        return False
    return False
