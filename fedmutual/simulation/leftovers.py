"""Leftovers of runs on this machine: found here, and removed only when asked.

Nothing in use is listed: not the processes of a run whose command is alive, not Flower's local SuperLink
while it simulates, not a run that is younger than asked.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedmutual.data.cache import cache_folder
from fedmutual.results.directory import CONFIG, states_dir, user_runs_dir
from fedmutual.results.hold import COMMAND, RUN, in_use
from fedmutual.simulation.owner import OWNER, owner_lives
from fedmutual.simulation.processes import ProcessTree, runs

_DATED = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]/*"
_APP_SETTLE = 3600.0  # seconds after which a run's app folder without a process counts as left


@dataclass(frozen=True)
class Leftover:
    """One thing that can be removed.

    Attributes
    ----------
    kind : str
        One of :data:`KINDS`.
    what : str
        For the person.
    size : int
        Bytes on the disk, and of memory where processes run.
    used : float
        When it was last written to, seconds since the epoch.
    remove : callable
        Removes it.
    """

    kind: str
    what: str
    size: int
    used: float
    remove: Callable[[], None]


def find(kinds: tuple[str, ...], outputs: Path, older_than: float) -> list[Leftover]:
    """Return what can be removed.

    Parameters
    ----------
    kinds : tuple[str, ...]
        Of :data:`KINDS`.
    outputs : Path
        Folder of runs, ``<date>/<time>-<strategy>`` below it.
    older_than : float
        Days since the last write, for runs and states.
    """
    latest = time.time() - older_than * 86_400
    found = [leftover for kind in KINDS if kind in kinds for leftover in _FINDERS[kind](outputs)]
    return [
        leftover for leftover in found if leftover.kind not in ("runs", "states") or leftover.used <= latest
    ]


def _cache(_: Path) -> Iterator[Leftover]:
    folder = cache_folder(None)
    if folder.is_dir():
        yield _folder("cache", folder, f"decoded images in {folder} (made again when needed)")


def _runs(outputs: Path) -> Iterator[Leftover]:
    for run in [*sorted(outputs.glob(_DATED)), *sorted(user_runs_dir().glob("*"))]:
        if (run / CONFIG).is_file() and not in_use(run):
            yield _folder("runs", run, str(run))


def _states(_: Path) -> Iterator[Leftover]:
    for folder in sorted(states_dir().glob("[!.]*/")):  # .sent stays
        yield _folder("states", folder, f"{folder} (clients' states and models)")


def _superlinks(_: Path) -> Iterator[Leftover]:
    """SuperLinks of runs that were killed, and Flower's own local one where it is idle."""
    for home in sorted(_temporary().glob("fedmutual-*")):
        if (home / OWNER).is_file() and not owner_lives(home):
            processes = _processes(home)
            what = f"{home}: the SuperLink of a run that was killed, {len(processes)} processes"
            yield _folder("superlinks", home, what, processes, ProcessTree(("FLWR_HOME", str(home))))
    for process in _processes(_flower_home()):
        below = _told(functools.partial(process.children, recursive=True), [])
        if _starts(process, "flower-superlink") and not any(_starts(p, "flwr-simulation") for p in below):
            tree = ProcessTree(("FEDMUTUAL_CLEAN", "matches nothing: only what is added and its descendants"))
            tree.add(process.pid)
            what = (
                f"Flower's local SuperLink, process {process.pid}, idle (the next `flwr run` starts another)"
            )
            size = _memory([process, *below])
            yield Leftover("superlinks", what, size, process.create_time(), functools.partial(tree.end, 5.0))


def _apps(_: Path) -> Iterator[Leftover]:
    """Apps that `flwr run` has unpacked, one for each change of the code; and those of killed runs."""
    busy = [str(_told(process.cwd, "")) for process in psutil.process_iter()]
    for folder in sorted(_temporary().glob("fedmutual-app-*")):
        leftover = _folder("apps", folder, str(folder))
        if time.time() - leftover.used > _APP_SETTLE and not any(cwd.startswith(str(folder)) for cwd in busy):
            yield leftover
    if not any(_starts(process, "flwr-simulation") for process in _processes(_flower_home())):
        for folder in sorted((_flower_home() / "apps").glob("fedmutual.fedmutual.*")):
            yield _folder("apps", folder, f"{folder} (unpacked again when needed)")


_FINDERS = {"cache": _cache, "runs": _runs, "states": _states, "superlinks": _superlinks, "apps": _apps}
KINDS = tuple(_FINDERS)


def _flower_home() -> Path:
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


def _temporary() -> Path:
    return Path(tempfile.gettempdir()).resolve()


def _told(ask: Callable[[], Any], otherwise: Any) -> Any:
    """What a process says of itself, or ``otherwise``: it has ended, or belongs to another user."""
    with contextlib.suppress(psutil.Error, OSError):
        return ask()
    return otherwise


def _processes(home: Path) -> list[psutil.Process]:
    """Running processes of this user whose Flower home is this one."""
    found = []
    for process in psutil.process_iter():
        environment = _told(process.environ, {})
        own = environment.get("FLWR_HOME") or f"{environment.get('HOME', '')}/.flwr"
        if environment and own == str(home) and runs(process):
            found.append(process)
    return found


def _starts(process: psutil.Process, program: str) -> bool:
    return any(Path(part).name == program for part in _told(process.cmdline, [])[:2])


def _memory(processes: Sequence[psutil.Process]) -> int:
    known = [_told(process.memory_info, None) for process in processes]
    return sum(memory.rss for memory in known if memory is not None)


def _folder(
    kind: str,
    folder: Path,
    what: str,
    processes: Sequence[psutil.Process] = (),
    tree: ProcessTree | None = None,
) -> Leftover:
    """A folder, and the processes that use it; links in it are not followed."""

    def remove() -> None:
        if tree is not None:
            tree.end(grace=5.0)
        shutil.rmtree(folder)

    size, used = _memory(processes), folder.lstat().st_mtime
    for parent, _, names in os.walk(folder):
        for name in set(names) - {RUN, COMMAND}:  # opening a lock changes its time
            with contextlib.suppress(FileNotFoundError):
                status = (Path(parent) / name).lstat()
                size, used = size + status.st_size, max(used, status.st_mtime)
    return Leftover(kind, what, size, used, remove)
