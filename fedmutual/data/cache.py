"""Decoded images on disk: written once per machine, memory-mapped by every process.

``<cache>/images/<key>/`` holds ``images.npy`` (uint8 [n, H, W, 3]) and ``index.npz`` (a hash of each image's
pixels, and the source's own arrays). The key is a hash of the content. One process at a time writes an entry,
under a lock that the system releases when its holder dies, into a folder that is renamed when complete and on
the disk. Each process compares the pixels with their hashes when it first opens an entry. Only the owner can
read what is cached.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from platformdirs import user_cache_path

from fedmutual.data.images import DataError, pixel_hashes
from fedmutual.files.atomic import atomic_write
from fedmutual.files.disk import allocate, create, make_private, sync, writing

FORMAT = 1  # increase it when the same input is stored as different pixels
IMAGES, INDEX = "images.npy", "index.npz"
_verified: set[tuple[str, int, int]] = set()  # files whose pixels this process has compared with their hashes


@dataclass(frozen=True, eq=False)
class Entry:
    """A cached array of images: uint8 [n, H, W, 3], hashes uint8 [n, 16], and the source's own arrays."""

    images: NDArray[np.uint8]
    hashes: NDArray[np.uint8]
    index: Mapping[str, NDArray[np.generic]]


def cache_folder(cache_dir: str | None) -> Path:
    """Return ``cache_dir``, or the user's cache folder where it is None."""
    return user_cache_path("fedmutual", appauthor=False) if cache_dir is None else Path(cache_dir)


def cached(cache_dir: Path, key: str, build: Callable[[Path], Mapping[str, NDArray[np.generic]]]) -> Entry:
    """Open the cached images of ``key``; build them first if they are missing.

    Parameters
    ----------
    cache_dir : Path
    key : str
        Identifies the content; must be a valid file name.
    build : callable
        Called with an empty folder; writes ``images.npy`` into it (see :func:`new_array`) and returns further
        arrays to keep. Called once per key, however many processes ask at the same time.

    Raises
    ------
    DataError
        The entry is damaged: a file cannot be read, or pixels are not those that were stored.
    WriteError
        The disk is full, or the cache cannot be written; nothing of the entry is left.
    """
    folder = entry_folder(cache_dir, key)
    if not folder.is_dir():
        with lock(cache_dir, key):
            if not folder.is_dir():
                _make(folder, build)
    return _open(folder)


def entry_folder(cache_dir: Path, key: str) -> Path:
    """Return the folder of the images of ``key``; it exists only when they are complete."""
    return cache_dir / "images" / key


def lock(cache_dir: Path, name: str) -> FileLock:
    """Return the lock of this name in the cache.

    Raises
    ------
    WriteError
        The cache cannot be written.
    """
    path = cache_dir / "locks" / name
    with writing(path):
        make_private(path.parent)
    return FileLock(path, mode=0o600)


def new_array(folder: Path, num_images: int, image_size: int) -> NDArray[np.uint8]:
    """Create the entry's ``images.npy`` and map it for writing, uint8 [n, size, size, 3].

    Raises
    ------
    WriteError
        The disk has no room for it.
    """
    return allocated(folder, (num_images, image_size, image_size, 3), np.dtype(np.uint8))


def allocated(folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Create the entry's ``images.npy`` of any shape and type, and map it for writing.

    Its space on the disk is reserved: a write to a mapping for which there is none kills the process.

    Raises
    ------
    WriteError
        The disk has no room for it.
    """
    path, size = folder / IMAGES, math.prod(shape) * dtype.itemsize
    path.unlink(missing_ok=True)  # not emptied: an earlier array may still be mapped
    with writing(path, size), create(path) as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        allocate(file, size)
    if size == 0:  # an empty file cannot be mapped
        return np.empty(shape, dtype=dtype)
    return np.lib.format.open_memmap(path, mode="r+")


def _make(folder: Path, build: Callable[[Path], Mapping[str, NDArray[np.generic]]]) -> None:
    part = folder.with_name(f"{folder.name}.part")
    if part.exists():  # its writer died: we hold the lock, so no process is writing it
        shutil.rmtree(part)
    try:
        with writing(part):
            make_private(part)
        index = dict(build(part))
        images = _map(part)
        content = io.BytesIO()
        np.savez(content, hashes=pixel_hashes(images), **index)  # type: ignore[arg-type]
        with writing(part / IMAGES, images.nbytes):
            sync(part / IMAGES)
        atomic_write(part / INDEX, content.getvalue())
        with writing(folder):
            os.replace(part, folder)
            sync(folder.parent)
        _verified.add(_identity(folder))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _open(folder: Path) -> Entry:
    try:
        images = _map(folder)
        with np.load(folder / INDEX, allow_pickle=False) as file:
            index = {name: file[name] for name in file.files}
        hashes = index.pop("hashes")
        _verify(folder, images, hashes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"cached images in {folder} are damaged ({error}): delete that folder, it is made again"
        ) from error
    return Entry(images=images, hashes=hashes, index=index)


def _verify(folder: Path, images: NDArray[np.uint8], hashes: NDArray[np.uint8]) -> None:
    """Compare the pixels with their hashes, once a process: 600 MB take some 0.7 s."""
    identity = _identity(folder)
    if identity in _verified:
        return
    if len(images) != len(hashes):
        raise ValueError(f"{len(images)} images and {len(hashes)} hashes")
    wrong = np.flatnonzero((pixel_hashes(images) != hashes).any(axis=1))
    if len(wrong):
        raise ValueError(f"{len(wrong)} of {len(images)} images are not those that were stored")
    _verified.add(identity)


def _identity(folder: Path) -> tuple[str, int, int]:
    status = (folder / IMAGES).stat()
    return str(folder), status.st_ino, status.st_mtime_ns


def _map(folder: Path) -> NDArray[np.uint8]:
    path = folder / IMAGES
    header_only = path.stat().st_size <= 128
    array: NDArray[np.uint8] = np.load(path, mmap_mode=None if header_only else "r", allow_pickle=False)
    array.flags.writeable = False
    return array
