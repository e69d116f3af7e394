"""Owner file that distinguishes a live run's FLWR_HOME from an abandoned one."""

from __future__ import annotations

import json
from pathlib import Path

import psutil

from fedmutual.simulation.processes import runs

OWNER = "owner.json"


def write_owner(home: Path) -> None:
    """Record in ``home`` that it belongs to this process."""
    me = psutil.Process()
    (home / OWNER).write_text(json.dumps({"pid": me.pid, "created": me.create_time()}))


def owner_lives(home: Path) -> bool:
    """Whether the process that owns ``home`` is alive; a later process with the same pid is not it."""
    said = json.loads((home / OWNER).read_text())
    try:
        process = psutil.Process(said["pid"])
        return runs(process) and abs(process.create_time() - said["created"]) < 1.0
    except psutil.NoSuchProcess:
        return False
