"""One run of a study in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

ENGINES = ("inprocess", "flwr")
# What every run imports, once for all of them: the processes of the runs are forked from one that has it.
PRELOAD = [
    "fedmutual.simulation.inprocess",
    "fedmutual.engine.server",
    "fedmutual.client.answer",
    "fedmutual.models.build",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
]


def work(path: Path, overrides: Sequence[str], engine: str) -> None:
    """Do a run in ``path`` and leave with its exit status; what is printed goes to ``<path>.log``."""
    os.setsid()  # the terminal's Ctrl-C reaches the one that started us, who ends us in order
    threading.Thread(target=_end_with_parent, daemon=True).start()
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_of(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(log, stream)
    from fedmutual.logs import show_logs

    show_logs()
    status = _run_flwr(path, overrides) if engine == "flwr" else _run_inprocess(path, overrides)
    if status == 0:
        _drop_states(path)
    sys.exit(status)


def log_of(path: Path) -> Path:
    """Where a run's output goes: beside its folder, which is emptied when a run starts again."""
    return path.with_name(f"{path.name}.log")


def _run_inprocess(path: Path, overrides: Sequence[str]) -> int:
    from fedmutual.simulation.inprocess import run_inprocess

    return run_inprocess(overrides, path)


def _run_flwr(path: Path, overrides: Sequence[str]) -> int:
    from rich.console import Console

    from fedmutual.appfolder import app_folder
    from fedmutual.simulation.inprocess import request_in
    from fedmutual.simulation.run import LocalRun

    return LocalRun(request_in(overrides, path), app_folder(), Console(file=sys.stdout, width=120)).run()


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _drop_states(path: Path) -> None:
    """Remove what only a resume needs, several models a client; ``model.safetensors`` stays."""
    for file in (path / "clients").glob("*/*/state*.safetensors"):
        file.unlink()
