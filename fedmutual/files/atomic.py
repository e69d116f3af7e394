"""Files that are either the old one or the new one, whenever the power goes or the disk is full."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from fedmutual.files.disk import create, make_private, sync, writing


def atomic_write(path: Path, data: bytes, keep: Path | None = None, private: bool = True) -> None:
    """Replace ``path`` by ``data`` in one step: temporary file beside it, fsync, rename, fsync of the folder.

    A process that is killed at any moment leaves the old content or the new, never a part of either. Missing
    parent folders are made, for their owner only.

    Parameters
    ----------
    path : Path
    data : bytes
    keep : Path or None
        What was at ``path`` is kept under this name, in the same folder; a kill between the two renames
        leaves it there, and nothing at ``path``.
    private : bool
        Only the owner may read the file; False: as the process's umask says.

    Raises
    ------
    WriteError
        The folder cannot be written or the disk is full; the old file and ``keep`` are untouched.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with writing(path, len(data)):
        make_private(path.parent)
        try:
            with create(temporary, private) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def append(path: Path, data: bytes) -> None:
    """Add ``data`` to the end of a file, on the disk on return; a new file is for its owner only.

    Raises
    ------
    WriteError
        Nothing was added: what was written before the disk was full is taken back.
    """
    with writing(path, len(data)):
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(descriptor, "ab", buffering=0) as file:
            before = os.fstat(descriptor).st_size
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise
        if new:
            sync(path.parent)
