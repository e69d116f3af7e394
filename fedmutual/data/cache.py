"""Decoded images on disk: written once per machine, memory-mapped by every process.

``<cache>/images/<key>/`` holds ``images.npy`` (uint8 [n, H, W, 3]) and ``index.npz`` (a hash of each image's
pixels, and the source's own arrays). The key is a hash of the content. One process at a time writes an entry,
under a lock that the system releases when its holder dies, into a folder that is renamed when complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from platformdirs import user_cache_path

from fedmutual.data.images import DataError, pixel_hashes

FORMAT = 1  # increase it when the same input is stored as different pixels


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
        The entry is damaged.
    """
    folder = entry_folder(cache_dir, key)
    if not folder.is_dir():
        with FileLock(cache_dir / "locks" / key):
            if not folder.is_dir():
                _make(folder, build)
    return _open(folder)


def entry_folder(cache_dir: Path, key: str) -> Path:
    """Return the folder of the images of ``key``; it exists only when they are complete."""
    return cache_dir / "images" / key


def new_array(folder: Path, num_images: int, image_size: int) -> NDArray[np.uint8]:
    """Create the entry's ``images.npy`` and map it for writing, uint8 [n, size, size, 3]."""
    shape = (num_images, image_size, image_size, 3)
    if num_images == 0:  # an empty file cannot be mapped
        empty = np.empty(shape, dtype=np.uint8)
        np.save(folder / "images.npy", empty)
        return empty
    return np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)


def _make(folder: Path, build: Callable[[Path], Mapping[str, NDArray[np.generic]]]) -> None:
    part = folder.with_name(f"{folder.name}.part")
    if part.exists():  # its writer died: we hold the lock, so no process is writing it
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        index = dict(build(part))
        images = _map(part)
        np.savez(part / "index.npz", hashes=pixel_hashes(images), **index)  # type: ignore[arg-type]
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _open(folder: Path) -> Entry:
    try:
        images = _map(folder)
        with np.load(folder / "index.npz", allow_pickle=False) as file:
            index = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise DataError(f"cached images in {folder} are damaged ({error}): delete that folder") from error
    return Entry(images=images, hashes=index.pop("hashes"), index=index)


def _map(folder: Path) -> NDArray[np.uint8]:
    path = folder / "images.npy"
    header_only = path.stat().st_size <= 128
    array: NDArray[np.uint8] = np.load(path, mmap_mode=None if header_only else "r", allow_pickle=False)
    array.flags.writeable = False
    return array
