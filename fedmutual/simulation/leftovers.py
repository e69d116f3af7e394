"""What runs leave on a machine that may be removed: found here, and removed only when asked.

Nothing that is in use is ever named: not the processes of a run whose command still lives, not Flower's local
SuperLink while it simulates, not a run that is younger than asked.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedmutual.data.cache import cache_folder
from fedmutual.results.directory import CONFIG, user_runs_dir
from fedmutual.simulation.owner import OWNER, owner_lives
from fedmutual.simulation.processes import ProcessTree, runs

KINDS = ("cache", "runs", "states", "superlinks", "apps")
_DAY = 86_400.0
_APP_SETTLE = (
    3600.0  # seconds before the app folder of a killed run counts as left: no process may be in it yet
)


@dataclass(frozen=True)
class Leftover:
    """One thing that may go.

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
    """Return what may be removed.

    Parameters
    ----------
    kinds : tuple[str, ...]
        Of :data:`KINDS`.
    outputs : Path
        Folder of runs, ``<date>/<time>-<strategy>`` below it.
    older_than : float
        Days since the last write, for runs and states.
    """
    finders: dict[str, Callable[[], Iterator[Leftover]]] = {
        "cache": _cache,
        "runs": lambda: _runs(outputs, older_than),
        "states": lambda: _states(older_than),
        "superlinks": _superlinks,
        "apps": _apps,
    }
    return [leftover for kind in KINDS if kind in kinds for leftover in finders[kind]()]


def _cache() -> Iterator[Leftover]:
    folder = cache_folder(None)
    if folder.is_dir():
        yield _folder("cache", f"decoded images in {folder} (made again when needed)", folder)


def _runs(outputs: Path, older_than: float) -> Iterator[Leftover]:
    dated = (d for d in outputs.glob("*") if re.fullmatch(r"\d{4}-\d\d-\d\d", d.name))
    candidates = [run for date in sorted(dated) for run in sorted(date.iterdir())]
    candidates += sorted(user_runs_dir().glob("*"))
    for run in candidates:
        if (run / CONFIG).is_file():
            yield from _old(_folder("runs", str(run), run), older_than)


def _states(older_than: float) -> Iterator[Leftover]:
    for folder in sorted((user_runs_dir().parent / "state").glob("*")):
        if folder.is_dir():
            yield from _old(_folder("states", f"{folder} (clients' states and models)", folder), older_than)


def _old(leftover: Leftover, days: float) -> Iterator[Leftover]:
    if time.time() - leftover.used >= days * _DAY:
        yield leftover


def _superlinks() -> Iterator[Leftover]:
    """SuperLinks of runs that were killed, and Flower's own local one where it is idle."""
    for home in sorted(_temporary().glob("fedmutual-*")):
        if (home / OWNER).is_file() and not owner_lives(home):
            processes = _processes(str(home))
            what = f"{home}: the SuperLink of a run that was killed, {len(processes)} processes"
            size, used = _measure(home)
            tree = ProcessTree(("FLWR_HOME", str(home)))
            yield Leftover("superlinks", what, size + _memory(processes), used, _ending(tree, home))
    local = flower_home()
    for process in _processes(str(local)):
        children = _children(process)
        if not _starts(process, "flower-superlink") or any(_starts(c, "flwr-simulation") for c in children):
            continue
        tree = ProcessTree(("FEDMUTUAL_CLEAN", "matches nothing: only what is added and its descendants"))
        tree.add(process.pid)
        what = f"Flower's local SuperLink, process {process.pid}, idle (the next `flwr run` starts another)"
        yield Leftover(
            "superlinks", what, _memory([process, *children]), process.create_time(), _ending(tree, None)
        )


def _apps() -> Iterator[Leftover]:
    """Apps that `flwr run` has unpacked, one for each change of the code; and those of killed runs."""
    busy = [_cwd(process) for process in psutil.process_iter()]
    for folder in sorted(_temporary().glob("fedmutual-app-*")):
        used = any(cwd.startswith(str(folder)) for cwd in busy)
        if not used and time.time() - _measure(folder)[1] > _APP_SETTLE:
            yield _folder("apps", str(folder), folder)
    if not any(_starts(p, "flwr-simulation") for p in _processes(str(flower_home()))):
        for folder in sorted((flower_home() / "apps").glob("fedmutual.fedmutual.*")):
            yield _folder("apps", f"{folder} (unpacked again when needed)", folder)


def flower_home() -> Path:
    """Flower's own folder."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")


def _processes(home: str) -> list[psutil.Process]:
    """Processes of this user whose Flower home is this one."""
    found = []
    for process in psutil.process_iter():
        environment = _environment(process)
        own = environment.get("FLWR_HOME") or f"{environment.get('HOME', '')}/.flwr"
        if environment and own == home and runs(process):
            found.append(process)
    return found


def _starts(process: psutil.Process, program: str) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return any(Path(part).name == program for part in process.cmdline()[:2])
    return False


def _environment(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error, OSError):  # it has ended, or is somebody else's
        return dict(process.environ())
    return {}


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error, OSError):
        return list(process.children(recursive=True))
    return []


def _cwd(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        return str(process.cwd())
    return ""


def _memory(processes: list[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            total += int(process.memory_info().rss)
    return total


def _temporary() -> Path:
    return Path(tempfile.gettempdir()).resolve()


def _folder(kind: str, what: str, folder: Path) -> Leftover:
    size, used = _measure(folder)
    return Leftover(kind, what, size, used, lambda: shutil.rmtree(folder))


def _ending(tree: ProcessTree, home: Path | None) -> Callable[[], None]:
    def remove() -> None:
        tree.end(grace=5.0)
        if home is not None:
            shutil.rmtree(home)

    return remove


def _measure(folder: Path) -> tuple[int, float]:
    """Bytes below a folder, links not followed, and the time of the last write."""
    size, used = 0, folder.lstat().st_mtime
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = (Path(parent) / name).lstat()
                size, used = size + status.st_size, max(used, status.st_mtime)
    return size, used
