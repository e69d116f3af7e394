"""Files that are either the old one or the new one, whenever the power goes."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def atomic_write(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Replace ``path`` by ``data`` in one step: temporary file beside it, fsync, rename, fsync of the folder.

    A process that is killed at any moment leaves the old content or the new, never a part of either. Missing
    parent folders are made.

    Parameters
    ----------
    path : Path
    data : bytes
    keep : Path or None
        What was at ``path`` is kept under this name, in the same folder; a kill between the two renames
        leaves it there, and nothing at ``path``.

    Raises
    ------
    OSError
        The folder cannot be written or the disk is full; the old file and ``keep`` are untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in ``folder`` durable; a folder cannot be opened for this on Windows."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
