"""Find and read pictures given as files, folders or patterns."""

from __future__ import annotations

import glob
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.decoding import list_images, to_rgb

Pixels = NDArray[np.uint8]


class PicturesError(ValueError):
    """A name is neither a picture nor a folder with pictures."""


def find_pictures(names: Iterable[str]) -> list[Path]:
    """Return the pictures of the given names, each once, in the order of the names.

    A folder stands for all image files below it, sorted. A pattern may contain ``**``; quote it, or use it in
    shells that do not expand patterns.

    Raises
    ------
    PicturesError
        A name matches nothing, or a folder has no pictures.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        matches = (
            [path] if path.exists() else [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        )
        pictures = [file for match in matches for file in _below(match)]
        if not matches:
            raise PicturesError(f"{name}: no such file or folder, and no file matches it")
        if not pictures:
            raise PicturesError(f"{name}: no image file in it")
        found |= dict.fromkeys(pictures)
    return list(found)


def read_pictures(
    paths: Sequence[Path], sizes: Sequence[int]
) -> tuple[dict[int, Pixels], list[Path], dict[Path, str]]:
    """Decode pictures as the data layer does.

    Parameters
    ----------
    sizes : Sequence[int]
        Side lengths in pixels; each picture is decoded to every size.

    Returns
    -------
    pixels : dict[int, uint8 array [n, size, size, 3]]
    kept : list[Path]
        The n readable pictures.
    failures : dict[Path, str]
        The unreadable pictures, with the reason.
    """
    failures: dict[Path, str] = {}

    def read(path: Path) -> list[Pixels] | None:
        try:
            return [_decode(path, size) for size in sizes]
        except _unreadable() as error:
            failures[path] = str(error) or type(error).__name__
            return None

    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(read, paths))
    kept = [path for path, pictures in zip(paths, decoded, strict=True) if pictures is not None]
    good = [pictures for pictures in decoded if pictures is not None]
    pixels = {
        size: np.stack([pictures[i] for pictures in good]) if good else np.zeros((0, size, size, 3), np.uint8)
        for i, size in enumerate(sizes)
    }
    return pixels, kept, {path: failures[path] for path in paths if path in failures}


def _below(path: Path) -> list[Path]:
    return [Path(file.path) for file in list_images(path)] if path.is_dir() else [path]


def _decode(path: Path, size: int) -> Pixels:
    from PIL import Image

    with Image.open(path) as picture:
        return to_rgb(picture, size)


def _unreadable() -> tuple[type[Exception], ...]:
    from PIL import Image

    return OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError
