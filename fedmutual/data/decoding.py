"""Decode image files to pixels, once per machine, on all its cores."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from fedmutual.data.cache import FORMAT, Entry, cached, new_array
from fedmutual.data.images import DataError
from fedmutual.files.atomic import atomic_write

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))
UNREADABLE_SHARE = 0.01  # a larger share stops the run
UNREADABLE = bytes(64)  # replaces the digest of a file that cannot be read; same length


@dataclass(frozen=True)
class ImageFile:
    """A file, with the size and time that show later processes that it is unchanged (size -1: missing)."""

    name: str
    path: str
    size: int
    mtime_ns: int


def list_images(folder: Path) -> list[ImageFile]:
    """Return the image files below a folder (by suffix), sorted by their relative names ('/' between parts).

    Symbolic links to folders are followed, unless they point to a parent folder.
    """
    found: list[ImageFile] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not (name.startswith(".") or _leads_back(parent, name))]
        for name in names:
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SUFFIXES:
                continue
            path = os.path.join(parent, name)
            try:
                stat = os.stat(path)
                stamp = stat.st_size, stat.st_mtime_ns
            except OSError:  # a dangling link: reported and skipped at decoding
                stamp = -1, 0
            found.append(ImageFile(Path(path).relative_to(folder).as_posix(), path, *stamp))
    return sorted(found, key=lambda file: file.name)


def _leads_back(parent: str, name: str) -> bool:
    """Return whether a folder is a link to one of its own parents (an endless walk)."""
    path = Path(parent, name)
    return path.is_symlink() and any(path.samefile(above) for above in path.parents)


def decode_files(
    files: Sequence[ImageFile], image_size: int, cache_dir: Path
) -> tuple[Entry, NDArray[np.int64]]:
    """Decode files into one cached array, or open the array if it is cached already.

    The cache key is the files' content. A small index from path, size and modification time to that key saves
    later processes from reading the files again.

    Returns
    -------
    (entry, kept)
        ``entry.images`` uint8 [n, size, size, 3], and the positions in ``files`` of the n readable ones.

    Raises
    ------
    DataError
        More than 1 % of the files cannot be read; the message names them.
    """
    key = _known_key(files, image_size, cache_dir)
    entry = cached(
        cache_dir, key, lambda folder: _decode_all([file.path for file in files], image_size, folder)
    )
    return entry, entry.index["kept"].astype(np.int64)


def to_rgb(picture: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """Convert a picture to the models' input format, uint8 [size, size, 3].

    Apply its EXIF orientation, put transparency on white, reduce 16-bit greyscale to 8 bits, and resize with
    antialiasing to a square, whatever its aspect ratio (as arXiv:2503.05803 does).
    """
    from PIL import Image, ImageOps

    if picture.mode == "F":  # `convert` would clip to 0..255
        raise ValueError("floating-point pixels of unknown range: save it with 8 or 16 bits")
    picture.draft("RGB", (2 * image_size, 2 * image_size))  # JPEG: decode at reduced size
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits; `convert` would clip at 255
        deep = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray(np.clip(deep / 257, 0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    small = picture.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.uint8)


def _known_key(files: Sequence[ImageFile], image_size: int, cache_dir: Path) -> str:
    """Return the key of the files' content from the index; without an entry, read the files."""
    stamps = json.dumps([FORMAT, image_size, [(f.path, f.size, f.mtime_ns) for f in files]])
    signature = hashlib.blake2b(stamps.encode(), digest_size=16).hexdigest()
    pointer = cache_dir / "files" / signature
    if not pointer.is_file():
        with FileLock(cache_dir / "locks" / signature):
            if not pointer.is_file():
                key, complete = _content_key([file.path for file in files], image_size)
                if not complete:  # fixing a permission changes no stamp: check again next time
                    return key
                atomic_write(pointer, key.encode())
    return pointer.read_text(encoding="ascii")


def _content_key(paths: Sequence[str], image_size: int) -> tuple[str, bool]:
    """Return the key of the files' content, and whether all files could be read."""

    def hash_file(path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "blake2b").digest()
        except OSError:
            return UNREADABLE

    complete = True
    state = hashlib.blake2b(f"{FORMAT} {image_size} {len(paths)}".encode(), digest_size=16)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for digest in pool.map(hash_file, paths):
            state.update(digest)
            complete = complete and digest != UNREADABLE
    return state.hexdigest(), complete


def _decode_all(paths: Sequence[str], image_size: int, folder: Path) -> Mapping[str, NDArray[np.generic]]:
    from PIL import Image

    def read(path: str) -> NDArray[np.uint8]:
        with Image.open(path) as picture:
            return to_rgb(picture, image_size)

    readable = decode_into(folder, [lambda p=path: read(p) for path in paths], paths, image_size)  # type: ignore[misc]
    return {"kept": readable}


def decode_into(
    folder: Path,
    readers: Sequence[Callable[[], NDArray[np.uint8]]],
    names: Sequence[str],
    image_size: int,
) -> NDArray[np.int64]:
    """Fill a cache entry's array from the readers; return the positions of those that succeeded."""
    from PIL import Image

    pixels = new_array(folder, len(readers), image_size)
    failures: dict[int, str] = {}

    def decode(position: int) -> None:
        try:
            pixels[position] = readers[position]()
        except (
            OSError,
            ValueError,
            SyntaxError,
            EOFError,
            struct.error,
            Image.DecompressionBombError,
        ) as error:
            failures[position] = f"{names[position]}: {error}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(len(readers))):
            pass
    kept = np.setdiff1d(np.arange(len(readers), dtype=np.int64), np.asarray(sorted(failures), dtype=np.int64))
    if failures:
        _report([failures[position] for position in sorted(failures)], len(readers))
        kept_pixels = pixels[kept]
        new_array(folder, len(kept), image_size)[:] = kept_pixels
    return kept


def _report(failures: list[str], total: int) -> None:
    if len(failures) > UNREADABLE_SHARE * total:
        shown = "\n  ".join(
            failures[:20] + ([f"and {len(failures) - 20} more"] if len(failures) > 20 else [])
        )
        raise DataError(
            f"{len(failures)} of {total} images cannot be read, more than {UNREADABLE_SHARE:.0%}; "
            f"repair or remove them:\n  {shown}"
        )
    for failure in failures:
        logger.warning("skipped an unreadable image: %s", failure)
