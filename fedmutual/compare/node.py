"""What a machine of a cluster does with one run of a study: carry it out, and send its folder back.

The run itself is a process of its own, forked as on one machine (:mod:`fedmutual.compare.worker`). Beside it
the task sends how far it is, what it prints and, now and then, its folder. For that moment the process is
stopped: what is sent is a folder as a kill would leave it, from which a run continues.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from fedmutual.compare.carried import Changes, Outgoing, replace_folder
from fedmutual.compare.worker import PRELOAD, log_of, work
from fedmutual.simulation.progress import HistoryTail

BEAT_SECONDS = 1.0
FOLDER_SECONDS = 30.0  # between two copies of a run's folder: what a lost machine loses of a run
STOPPING_SECONDS = 5.0
_PREFIX = "fedmutual-run-"
PACKAGES = ("torch", "torchvision", "numpy", "flwr")


@dataclass(frozen=True)
class Order:
    """A run for a machine.

    Attributes
    ----------
    folder : str
        Of the run, below the study's: its last part is the run's name.
    overrides : tuple[str, ...]
        Complete, without the folders.
    needs : Mapping[str, str]
        Setting -> file or folder that the run reads.
    versions : Mapping[str, str]
        Of what computes, on the machine of the command.
    begun : Changes or None
        The folder so far of a run that continues.
    """

    folder: str
    overrides: tuple[str, ...]
    needs: Mapping[str, str]
    versions: Mapping[str, str]
    begun: Changes | None


@dataclass(frozen=True)
class Beat:
    """How far a run is.

    Attributes
    ----------
    node : str
        The machine's name and address.
    round : int
    log : bytes
        What the run has printed since the beat before.
    changes : Changes or None
        Its folder; not with every beat.
    code : int or None
        With the last beat: of the run's process.
    problem : str
        Why this machine cannot do it; nothing was started.
    """

    node: str
    round: int = 0
    log: bytes = b""
    changes: Changes | None = None
    code: int | None = None
    problem: str = ""


def versions() -> dict[str, str]:
    """Versions of what computes; empty for what is missing."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def carry_out(order: Order) -> Iterator[Beat]:
    """Do a run on this machine."""
    node = f"{socket.gethostname()} ({_address()})"
    problem = _missing(order, node) or _other_version(order, node)
    if problem:
        yield Beat(node, problem=problem)
        return
    yield Beat(node)
    _remove_left()
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as temporary:
        path = Path(temporary) / order.folder
        if order.begun is not None:
            path.parent.mkdir(parents=True)
            replace_folder(path, order.begun)
        with _running(path, order.overrides) as process:
            yield from _beats(node, path, process)


def _beats(node: str, path: Path, process: BaseProcess) -> Iterator[Beat]:
    history, outgoing = HistoryTail(path / "history.jsonl"), Outgoing(path)
    printed, round_, due = 0, 0, time.monotonic() + FOLDER_SECONDS
    while True:
        process.join(BEAT_SECONDS)
        over = not process.is_alive()
        changes = None
        if over or time.monotonic() > due:
            with _stopped(process):
                changes = outgoing.changes()
            due = time.monotonic() + FOLDER_SECONDS
        round_ = max([round_, *(int(row["round"]) for row in history.poll())])
        log = _read_from(log_of(path), printed)
        printed += len(log)
        yield Beat(node, round_, log, changes, process.exitcode if over else None)
        if over:
            return


@contextmanager
def _running(path: Path, overrides: Sequence[str]) -> Iterator[BaseProcess]:
    multiprocessing.set_forkserver_preload(["ray", *PRELOAD])  # Ray's worker is the main module here
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=work, args=(path, tuple(overrides), "inprocess"))
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join(STOPPING_SECONDS)
        process.kill()
        process.join()


@contextmanager
def _stopped(process: BaseProcess) -> Iterator[None]:
    """Hold a process while the block runs, as SIGSTOP does."""
    try:
        child = psutil.Process(process.pid)
        child.suspend()
        deadline = time.monotonic() + STOPPING_SECONDS
        while child.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.001)
    except psutil.NoSuchProcess:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # it was killed meanwhile
            child.resume()


def _remove_left() -> None:
    """Remove the folders of tasks that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _missing(order: Order, node: str) -> str:
    """Say what this machine lacks of the run's data."""
    key = next((key for key, place in order.needs.items() if not os.path.exists(place)), None)
    if key is None:
        return ""
    return (
        f"{key}: {order.needs[key]} is not there on {node}: copy it to the same path there, or use a folder "
        "that all machines of the cluster share"
    )


def _other_version(order: Order, node: str) -> str:
    own = versions()
    name = next((name for name, wanted in order.versions.items() if own.get(name) != wanted), None)
    if name is None:
        return ""
    there = own.get(name) or "none"
    return f"{name} is {order.versions[name]} here and {there} on {node}: install the same version there"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _address() -> str:
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())  # type: ignore[no-untyped-call]


def _read_from(path: Path, start: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(start)
        return file.read()
