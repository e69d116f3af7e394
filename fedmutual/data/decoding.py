"""Decode image files to pixels, once per machine, on all its cores."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.cache import FORMAT, Entry, cached, lock, new_array
from fedmutual.data.depth import Window, as_window, eight_bits, extremes, is_deep, value_range
from fedmutual.data.dicom import SUFFIXES as DICOM_SUFFIXES
from fedmutual.data.dicom import is_dicom, open_dicom
from fedmutual.data.images import DataError
from fedmutual.files.atomic import atomic_write
from fedmutual.logs import shown
from fedmutual.settings import DataSettings, setting

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

SUFFIXES = (
    frozenset(
        (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
    )
    | DICOM_SUFFIXES
)
# Pillow tries no other decoder: by default it looks at the content only, and starts Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
SYSTEM_NAMES = frozenset(  # of archives, indexes and recycle bins; hidden names (".x") need no entry
    (
        "__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information",
        "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "__pycache__",
    )
)  # fmt: skip
Facts = tuple[float, float, float, float]  # of a file: width, height; least and largest deep value, or NaN
INTERPOLATIONS = ("bilinear", "bicubic")
MAX_MEGAPIXELS = 64  # of predict and export; conf/data/ has the same for training
UNREADABLE_SHARE = 0.01  # a larger share stops the run
UNREADABLE = bytes(64)  # replaces the digest of a file that cannot be read; same length
_LARGE_PIXELS = 16_000_000  # a few pictures above this are decoded at a time, for memory
_few_large = threading.BoundedSemaphore(2)
_BAND = 256  # rows converted at a time


@dataclass(kw_only=True)
class PictureSettings(DataSettings):
    """Settings of data sources that decode pictures."""

    max_megapixels: float = setting(
        "larger pictures are not decoded but count as unreadable; compared with the size in the file's "
        "header, since a small file can claim gigabytes of pixels",
        above=0,
        maximum=178,  # Pillow refuses more
    )
    interpolation: str = setting("how pictures are resized, always with antialiasing", choices=INTERPOLATIONS)
    window: list[float] | None = setting(
        "[LOW,HIGH]: the values that become black and white in grey pictures of more than 8 bits (DICOM: in "
        "Hounsfield units or the like); null: the range that the file states"
    )

    @property
    def picture(self) -> PictureInput:
        """The pictures that are made of the files."""
        return PictureInput(self.image_size, self.interpolation, as_window(self.window))


@dataclass(frozen=True)
class PictureInput:
    """The pictures that a model takes: side length in pixels, how they are resized to it, and the window."""

    size: int
    interpolation: str = "bilinear"
    window: Window | None = None


@dataclass(frozen=True)
class ImageFile:
    """A file, with what shows later processes that it is unchanged.

    Attributes
    ----------
    name : str
        Relative to the scanned folder, '/' between parts.
    path : str
    stamp : tuple of int
        See :func:`stamp_of`; (-1,): missing.
    """

    name: str
    path: str
    stamp: tuple[int, ...]


@dataclass(frozen=True)
class Scan:
    """The contents of a folder and the folders below it.

    Attributes
    ----------
    files : list[ImageFile]
        The image files (by suffix), sorted by their relative names ('/' between parts).
    skipped : tuple[str, ...]
        Sorted paths of the other files, except for hidden and system files.
    """

    files: list[ImageFile]
    skipped: tuple[str, ...]


def list_images(folder: Path) -> list[ImageFile]:
    """Return the image files below a folder, sorted; see :func:`scan_images`."""
    return scan_images(folder).files


def scan_images(folder: Path) -> Scan:
    """Find the image files below a folder.

    Hidden and system folders and files are ignored (:func:`is_system`). Symbolic links to folders are
    followed, unless they point to a parent folder.
    """
    found: list[ImageFile] = []
    skipped: list[str] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not (is_system(name) or _leads_back(parent, name))]
        for name in names:
            if is_system(name):
                continue
            path = os.path.join(parent, name)
            if not is_supported(name):
                skipped.append(path)
                continue
            try:
                stamp = stamp_of(path)
            except OSError:  # a dangling link: reported and skipped at decoding
                stamp = (-1,)
            found.append(ImageFile(Path(path).relative_to(folder).as_posix(), path, stamp))
    return Scan(sorted(found, key=lambda file: file.name), tuple(sorted(skipped)))


def stamp_of(path: str | Path) -> tuple[int, ...]:
    """Return a file's size, times of modification and of change (ns), device and inode.

    Copying tools and ``touch`` restore the time of modification; the time of change is the system's own.
    """
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino


def is_system(name: str) -> bool:
    """Return whether a file or folder is hidden or a system's own (``__MACOSX``, ``Thumbs.db``)."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def is_supported(name: str) -> bool:
    """Return whether a file's suffix is one of :data:`SUFFIXES`."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def skipped_text(folder: Path, skipped: Sequence[str]) -> str:
    """Describe files of unsupported kinds: how many of which suffix, and the first one's name."""
    kinds = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in skipped)
    listed = ", ".join(f"{count} {shown(kind)}" for kind, count in kinds.most_common(5))
    more = f" and {len(kinds) - 5} more kinds" if len(kinds) > 5 else ""
    return (
        f"skipped {len(skipped)} {'file' if len(skipped) == 1 else 'files'} below {shown(folder)} of "
        f"unsupported kinds ({listed}{more}), first {shown(Path(skipped[0]).relative_to(folder))}: convert "
        f"pictures to one of {', '.join(sorted(SUFFIXES))}"
    )


def _leads_back(parent: str, name: str) -> bool:
    """Return whether a folder is a link to one of its own parents (an endless walk)."""
    path = Path(parent, name)
    return path.is_symlink() and any(path.samefile(above) for above in path.parents)


def decode_files(
    files: Sequence[ImageFile],
    image_size: int,
    cache_dir: Path,
    max_megapixels: float = MAX_MEGAPIXELS,
    notice: str = "",
    interpolation: str = "bilinear",
    window: Window | None = None,
) -> tuple[Entry, NDArray[np.int64]]:
    """Decode files into one cached array, or open the array if it is cached already.

    The cache key is the files' content. A small index from paths and stamps (:func:`stamp_of`) to that
    key saves later processes from reading the files again.

    Parameters
    ----------
    notice : str
        A warning to log when this machine sees these files for the first time; empty: none.

    Returns
    -------
    (entry, kept)
        ``entry.images`` uint8 [n, size, size, 3], and the positions in ``files`` of the n readable ones.

    Raises
    ------
    DataError
        More than 1 % of the files cannot be read; the message names them.
    """
    options = _Options(image_size, max_megapixels, interpolation, window)
    key = _known_key(files, options, cache_dir, notice)
    entry = cached(cache_dir, key, lambda folder: _decode_all([file.path for file in files], options, folder))
    return entry, entry.index["kept"].astype(np.int64)


@dataclass(frozen=True)
class _Options:
    """What the pixels and the set of readable files depend on, besides the files."""

    image_size: int
    max_megapixels: float
    interpolation: str
    window: Window | None


def read_picture(
    source: str | Path | IO[bytes],
    image_size: int,
    max_megapixels: float,
    interpolation: str = "bilinear",
    window: Window | None = None,
) -> NDArray[np.uint8]:
    """Decode one picture to uint8 [size, size, 3]; training, prediction and export all use this.

    Raises
    ------
    Exception
        Any: decoders raise many types on damaged files. :func:`reason` describes it.
    """
    return read_with_facts(source, image_size, max_megapixels, interpolation, window)[0]


def read_with_facts(
    source: str | Path | IO[bytes],
    image_size: int,
    max_megapixels: float,
    interpolation: str = "bilinear",
    window: Window | None = None,
) -> tuple[NDArray[np.uint8], Facts]:
    """Decode one picture as :func:`read_picture` does; return also what the file had."""
    with open_picture(source, max_megapixels) as picture:
        size = picture.width, picture.height
        pixels = to_rgb(picture, image_size, interpolation, window)
        values = extremes(picture) if is_deep(picture) else (math.nan, math.nan)
        return pixels, (*size, *values)


@contextmanager
def open_picture(source: str | Path | IO[bytes], max_megapixels: float) -> Iterator[Image.Image]:
    """Open a picture of a supported format, without decoding its pixels (DICOM: with them).

    Raises
    ------
    ValueError
        Its header claims more than ``max_megapixels``.
    OSError
        It is in none of the supported formats.
    """
    from PIL import Image, UnidentifiedImageError

    if is_dicom(source):
        yield open_dicom(source, max_megapixels)
        return
    try:
        opened = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"damaged, or none of {', '.join(FORMATS)}, DICOM") from error
    with opened as picture:
        megapixels = picture.width * picture.height / 1e6
        if megapixels > max_megapixels:
            raise ValueError(
                f"{picture.width} x {picture.height} pixels are {megapixels:.4g} megapixels, more than "
                f"max_megapixels={max_megapixels:g}"
            )
        yield picture


def reason(error: Exception) -> str:
    """Describe a decoder's exception in one line."""
    text = shown(error).strip()
    expected = isinstance(error, OSError | ValueError | SyntaxError | EOFError)
    return text if text and expected else f"{type(error).__name__}: {text}".removesuffix(": ")


def to_rgb(
    picture: Image.Image, image_size: int, interpolation: str = "bilinear", window: Window | None = None
) -> NDArray[np.uint8]:
    """Convert a picture to the models' input format, uint8 [size, size, 3].

    Apply its EXIF orientation, put transparency on white, reduce grey values of more than 8 bits to 8
    (:func:`fedmutual.data.depth.value_range`), and resize with antialiasing to a square, whatever its aspect
    ratio (as arXiv:2503.05803 does).

    Raises
    ------
    ValueError
        The range of a deep picture is unknown.
    """
    if is_deep(picture):
        window = value_range(picture, window)
    picture.draft("RGB", (2 * image_size, 2 * image_size))  # JPEG: decode at reduced size
    if picture.width * picture.height > _LARGE_PIXELS:
        with _few_large:
            return _converted(picture, image_size, interpolation, window)
    return _converted(picture, image_size, interpolation, window)


def _converted(
    picture: Image.Image, image_size: int, interpolation: str, window: Window | None
) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if is_deep(picture) and window is not None:
        scale = functools.partial(eight_bits, window=window)
        picture = _in_bands(picture, "L", scale)
    if picture.has_transparency_data:
        picture = _in_bands(picture, "RGB", _on_white)
    how = Image.Resampling[interpolation.upper()]
    small = picture.convert("RGB").resize((image_size, image_size), how)
    return np.asarray(small, dtype=np.uint8)


def _in_bands(picture: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert a picture a band of rows at a time, so that copies of all pixels do not add up."""
    from PIL import Image

    result = Image.new(mode, picture.size)
    for top in range(0, picture.height, _BAND):
        band = picture.crop((0, top, picture.width, min(top + _BAND, picture.height)))
        result.paste(convert(band), (0, top))
    return result


def _on_white(band: Image.Image) -> Image.Image:
    from PIL import Image

    band = band.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB")


def _known_key(files: Sequence[ImageFile], options: _Options, cache_dir: Path, notice: str) -> str:
    """Return the key of the files' content from the index; without an entry, read the files."""
    stamps = json.dumps([FORMAT, astuple(options), notice, [(f.path, *f.stamp) for f in files]])
    signature = hashlib.blake2b(stamps.encode(), digest_size=16).hexdigest()
    pointer = cache_dir / "files" / signature
    known = _pointed_to(pointer)
    if known is None:
        with lock(cache_dir, signature):
            known = _pointed_to(pointer)
            if known is None:
                if notice:
                    logger.warning("%s", notice)
                known, complete = _content_key([file.path for file in files], options)
                if complete:  # fixing a permission changes no stamp: check again next time
                    atomic_write(pointer, known.encode())
    return known


def _pointed_to(pointer: Path) -> str | None:
    """The key in an entry of the index; None where there is none, or a damaged one."""
    try:
        key = pointer.read_bytes()
    except FileNotFoundError:
        return None
    return key.decode() if re.fullmatch(rb"[0-9a-f]{32}", key) else None


def _content_key(paths: Sequence[str], options: _Options) -> tuple[str, bool]:
    """Return the key of the files' content, and whether all files could be read."""

    def hash_file(path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "blake2b").digest()
        except OSError:
            return UNREADABLE

    complete = True
    state = hashlib.blake2b(f"{FORMAT} {astuple(options)} {len(paths)}".encode(), digest_size=16)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for digest in pool.map(hash_file, paths):
            state.update(digest)
            complete = complete and digest != UNREADABLE
    return state.hexdigest(), complete


def _decode_all(paths: Sequence[str], options: _Options, folder: Path) -> Mapping[str, NDArray[np.generic]]:
    readers = [lambda p=path: read_with_facts(p, *astuple(options)) for path in paths]
    return decode_into(folder, readers, paths, options.image_size)


def decode_into(
    folder: Path,
    readers: Sequence[Callable[[], tuple[NDArray[np.uint8], Facts]]],
    names: Sequence[str],
    image_size: int,
) -> dict[str, NDArray[np.generic]]:
    """Fill a cache entry's array from the readers.

    Returns
    -------
    dict
        ``kept``: int64 [n], the positions of the readers that succeeded; ``facts``: float64 [n, 4], see
        :data:`Facts`.
    """
    pixels = new_array(folder, len(readers), image_size)
    facts = np.full((len(readers), 4), np.nan)
    failures: dict[int, str] = {}

    def decode(position: int) -> None:
        try:
            pixels[position], facts[position] = readers[position]()
        except Exception as error:  # a damaged file can raise anything in a decoder
            failures[position] = f"{shown(names[position])}: {reason(error)}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, range(len(readers))):
            pass
    kept = np.setdiff1d(np.arange(len(readers), dtype=np.int64), np.asarray(sorted(failures), dtype=np.int64))
    if failures:
        _report([failures[position] for position in sorted(failures)], len(readers))
        kept_pixels = pixels[kept]
        new_array(folder, len(kept), image_size)[:] = kept_pixels
    return {"kept": kept, "facts": facts[kept]}


def _report(failures: list[str], total: int) -> None:
    if len(failures) > UNREADABLE_SHARE * total:
        more = [f"and {len(failures) - 20} more"] if len(failures) > 20 else []
        listed = "\n  ".join(failures[:20] + more)
        raise DataError(
            f"{len(failures)} of {total} images cannot be read, more than {UNREADABLE_SHARE:.0%}; "
            f"repair or remove them:\n  {listed}"
        )
    for failure in failures:
        logger.warning("skipped an unreadable image: %s", failure)
