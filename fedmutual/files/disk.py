"""What a disk may refuse, said with the file's name and the remedy; and files that only their owner reads."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_BLOCK = 1 << 20


class WriteError(OSError):
    """A file cannot be written; the message names it and the remedy. ``errno`` is the system's.

    Parameters
    ----------
    path : Path
        The file.
    cause : OSError
    size : int
        Bytes that it needs.
    """

    def __init__(self, path: Path, cause: OSError, size: int = 0) -> None:
        super().__init__(cause.errno, cause.strerror or str(cause))
        self.path, self.size = path, size

    def __str__(self) -> str:
        """Return the file, the system's reason and the remedy, in one line."""
        folder, remedy = self.path.parent, "see whether this disk is in order"
        if self.errno in _FULL:
            remedy = f"make room for {max(self.size, 1000) / 1e6:.3g} MB in {folder}"
        elif self.errno in _FORBIDDEN:
            remedy = f"make {folder} writable, or name another folder"
        return f"{self.path} cannot be written ({self.strerror}): {remedy}"


@contextlib.contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """Raise a :class:`WriteError` that names ``path`` for what the system refuses inside."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error, size) from error


def make_private(folder: Path) -> None:
    """Make a folder and those above it, open to their owner only; one that exists keeps its permissions."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(mode=0o700, exist_ok=True)


def create(path: Path, private: bool = True) -> BinaryIO:
    """Open a new file for writing, for its owner only if ``private``.

    Raises
    ------
    FileExistsError
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o600 if private else 0o666), "w+b")


def allocate(file: BinaryIO, size: int) -> None:
    """Reserve ``size`` zero bytes after the file's position, which stays.

    A mapped file whose blocks are not reserved ends the process (SIGBUS) when the disk is full.
    """
    start = file.tell()
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), start, size)
    except (AttributeError, OSError) as error:  # not on macOS and Windows, and not on every file system
        if isinstance(error, OSError) and error.errno not in _NO_PREALLOCATION:
            raise
        for offset in range(0, size, _BLOCK):
            file.write(bytes(min(_BLOCK, size - offset)))
        file.flush()
        file.seek(start)


def sync(path: Path) -> None:
    """Put a file, what was written through mappings included, or a folder's entries on the disk."""
    if path.is_dir() and os.name != "posix":  # a folder cannot be opened for this on Windows
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
