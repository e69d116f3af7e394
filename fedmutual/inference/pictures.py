"""Find and read pictures given as files, folders or patterns."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.decoding import (
    MAX_MEGAPIXELS,
    PictureInput,
    is_supported,
    is_system,
    read_picture,
    reason,
    scan_images,
    skipped_text,
)
from fedmutual.logs import shown

Pixels = NDArray[np.uint8]

logger = logging.getLogger(__name__)


class PicturesError(ValueError):
    """A name is neither a picture nor a folder with pictures."""


def find_pictures(names: Iterable[str]) -> list[Path]:
    """Return the pictures of the given names, each once, in the order of the names.

    A folder stands for all image files below it, sorted, as for training: hidden and system files are
    ignored, and files of unsupported kinds are counted in a warning. The same holds for what a pattern
    matches; a file named itself is always returned. A pattern may contain ``**``; quote it, or use it in
    shells that do not expand patterns.

    Raises
    ------
    PicturesError
        A name matches nothing, or a folder has no pictures.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        pictures = [path] if path.is_file() else _below(path) if path.is_dir() else _matching(name)
        if not pictures:
            raise PicturesError(f"{shown(name)}: no image file in it")
        found |= dict.fromkeys(pictures)
    return list(found)


def read_pictures(
    paths: Sequence[Path], inputs: Sequence[PictureInput], max_megapixels: float = MAX_MEGAPIXELS
) -> tuple[dict[PictureInput, Pixels], list[Path], dict[Path, str]]:
    """Decode pictures as the data layer does.

    Parameters
    ----------
    inputs : Sequence[PictureInput]
        What the models take; each picture is decoded for every one of them.
    max_megapixels : float
        Larger pictures are not decoded.

    Returns
    -------
    pixels : dict[PictureInput, uint8 array [n, size, size, 3]]
    kept : list[Path]
        The n readable pictures.
    failures : dict[Path, str]
        The unreadable pictures, with the reason.
    """
    failures: dict[Path, str] = {}

    def read(path: Path) -> list[Pixels] | None:
        try:
            return [read_picture(path, i.size, max_megapixels, i.interpolation, i.window) for i in inputs]
        except Exception as error:  # a damaged file can raise anything in a decoder
            failures[path] = reason(error)
            return None

    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(read, paths))
    kept = [path for path, pictures in zip(paths, decoded, strict=True) if pictures is not None]
    good = [pictures for pictures in decoded if pictures is not None]
    pixels = {
        wanted: np.stack([pictures[i] for pictures in good])
        if good
        else np.zeros((0, wanted.size, wanted.size, 3), np.uint8)
        for i, wanted in enumerate(inputs)
    }
    return pixels, kept, {path: failures[path] for path in paths if path in failures}


def _matching(pattern: str) -> list[Path]:
    """Return the pictures that a pattern matches, and those below the folders that it matches."""
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise PicturesError(f"{shown(pattern)}: no such file or folder, and no file matches it")
    found: dict[Path, None] = {}
    skipped: list[str] = []
    for match in (Path(match) for match in matches):
        if any(is_system(part) for part in match.parts if part not in pattern):
            continue
        if match.is_dir():
            found |= dict.fromkeys(Path(file.path) for file in scan_images(match).files)
        elif is_supported(match.name):
            found[match] = None
        else:
            skipped.append(str(match))
    if skipped:
        logger.warning(
            "%s", skipped_text(Path(os.path.commonpath([Path(s).parent for s in skipped])), skipped)
        )
    return list(found)


def _below(folder: Path) -> list[Path]:
    scan = scan_images(folder)
    if scan.skipped:
        logger.warning("%s", skipped_text(folder, scan.skipped))
    return [Path(file.path) for file in scan.files]
