"""Public sets received from a server: stored by digest, verified before use.

``<cache>/received/<digest>/<i>.npy`` holds the parts received so far. When all parts are there and match the
digest, they become an entry of the image cache (:mod:`fedmutual.data.cache`), and the parts are deleted.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from fedmutual.data.cache import cached, entry_folder, new_array
from fedmutual.data.images import DataError, ImageSet, pixel_hashes
from fedmutual.data.public import PublicSet, digest
from fedmutual.files.atomic import atomic_write


@dataclass(frozen=True)
class Part:
    """One part of a public set in transfer.

    Attributes
    ----------
    digest : str
        Of the whole set.
    number, count : int
        Index of this part, from 0, and the number of parts.
    classes : tuple[str, ...]
    labels : int64 array [N] or None
        Labels of the whole set, if they are used.
    images : uint8 array [n, H, W, 3]
        Of this part.
    """

    digest: str
    number: int
    count: int
    classes: tuple[str, ...]
    labels: NDArray[np.int64] | None
    images: NDArray[np.uint8]


def has_received(cache_dir: Path, wanted: str) -> bool:
    """Return whether the whole public set with this digest has been received."""
    return entry_folder(cache_dir, _key(wanted)).is_dir()


def parts_received(cache_dir: Path, wanted: str) -> list[int]:
    """Return the indices of the parts received so far."""
    return sorted(int(path.stem) for path in _parts(cache_dir, wanted).glob("[0-9]*.npy"))


def receive(cache_dir: Path, part: Part) -> bool:
    """Store a part; return whether the set is now complete.

    Raises
    ------
    DataError
        The complete set does not match its digest; all parts are deleted and must be sent again.
    """
    folder = _parts(cache_dir, part.digest)
    with FileLock(cache_dir / "locks" / _key(part.digest).replace("public", "parts")):
        if has_received(cache_dir, part.digest):
            return True
        content = io.BytesIO()
        np.save(content, part.images)
        atomic_write(folder / f"{part.number}.npy", content.getvalue())
        if parts_received(cache_dir, part.digest) != list(range(part.count)):
            return False
        try:
            cached(cache_dir, _key(part.digest), lambda target: _assemble(folder, part, target))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return True


def load_received(cache_dir: Path, wanted: str) -> PublicSet:
    """Open a received public set.

    Raises
    ------
    DataError
        It has not been received.
    """
    if not has_received(cache_dir, wanted):
        raise DataError(
            f"the server's public set {wanted} is not in {cache_dir}: start the run with "
            "public.distribute=true, and keep this folder (cache_dir) between orders"
        )
    entry = cached(cache_dir, _key(wanted), lambda _: {})
    names = tuple(f"public-{number}" for number in range(len(entry.images)))
    labels = entry.index["labels"].astype(np.int64)
    return PublicSet(ImageSet(entry.images, labels, None, names, entry.hashes), None, None, wanted)


def _assemble(folder: Path, part: Part, target: Path) -> Mapping[str, NDArray[np.generic]]:
    """Join the parts and verify the digest before the cache entry exists."""
    pieces = [np.load(folder / f"{number}.npy", mmap_mode="r") for number in range(part.count)]
    total = sum(len(piece) for piece in pieces)
    images = new_array(target, total, part.images.shape[1])
    np.concatenate(pieces, out=images)
    labels = np.full(total, -1, np.int64) if part.labels is None else part.labels
    names = tuple(map(str, range(total)))
    whole = ImageSet(images, labels, None, names, pixel_hashes(images))
    found = digest(part.classes, whole, part.labels is not None, None)
    if found != part.digest:
        raise DataError(
            f"the public set received from the server has the digest {found}, not {part.digest}: it was "
            "damaged in transfer or changed at the server; it is requested again before the next order"
        )
    return {"labels": labels}


def _key(wanted: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{32}", wanted):
        raise DataError(f"{wanted!r} is not a digest of a public set")
    return f"public-{wanted}"


def _parts(cache_dir: Path, wanted: str) -> Path:
    return cache_dir / "received" / _key(wanted).removeprefix("public-")
