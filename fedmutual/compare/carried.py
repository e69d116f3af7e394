"""A run's folder as bytes, from a machine to another one that shares no disk with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedmutual.files.disk import make_private

_LEFT = (".lock", ".tmp")  # holds of a live process, and files that are half written


@dataclass(frozen=True)
class Changes:
    """A folder at one moment.

    Attributes
    ----------
    names : frozenset[str]
        All files, relative to the folder, with ``/``.
    files : Mapping[str, bytes]
        The content of those that are new or changed since the moment before.
    """

    names: frozenset[str] = frozenset()
    files: Mapping[str, bytes] = field(default_factory=dict)


class Outgoing:
    """A folder whose changes are sent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sent: dict[str, tuple[int, int, int]] = {}

    def changes(self) -> Changes:
        """What is there now, with the content of what changed since the last call.

        The folder must not change meanwhile.
        """
        found = {name: _version(self._folder / name) for name in _names(self._folder)}
        new = [name for name, version in found.items() if self._sent.get(name) != version]
        self._sent = found
        return Changes(frozenset(found), {name: (self._folder / name).read_bytes() for name in new})


def whole(folder: Path) -> Changes:
    """All of a folder."""
    return Outgoing(folder).changes()


def replace_folder(folder: Path, changes: Changes) -> None:
    """Make a folder what ``changes`` says: the folder before, or this one, whenever the process is killed.

    What did not change is linked, not copied. A kill between the two renames leaves the folder before under
    another name, from which :func:`recover` takes it back.
    """
    new, old = _beside(folder, "new"), _beside(folder, "old")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    for name in sorted(changes.names):
        target = new / name
        make_private(target.parent)
        if name in changes.files:
            _write(target, changes.files[name])
        else:
            _link(folder / name, target)
    make_private(new)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Take back a folder whose replacement was cut off."""
    old = _beside(folder, "old")
    if old.is_dir() and not folder.exists():
        os.rename(old, folder)


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path.relative_to(folder).as_posix() for path in files if path.suffix not in _LEFT]


def _version(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _beside(folder: Path, word: str) -> Path:
    return folder.with_name(f".{folder.name}.{word}")


def _write(target: Path, data: bytes) -> None:
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
