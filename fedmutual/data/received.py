"""Public sets received from a server: stored by digest, verified before use.

``<cache>/received/<digest>/<i>.npy`` holds the parts received so far. When all parts are there and match the
digest, they become an entry of the image cache (:mod:`fedmutual.data.cache`), and the parts are deleted. What
a part says of itself is checked before anything is written; all sets together are at most as large as the
site allows.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.cache import cached, entry_folder, lock, new_array
from fedmutual.data.images import DataError, ImageSet, pixel_hashes
from fedmutual.data.public import PublicSet, digest
from fedmutual.files.atomic import atomic_write

MAX_BYTES = 2 * 2**30  # pixels of all public sets that a site keeps
MOST_PARTS = 10_000
_HEADER_BYTES = 128  # of an array of pixels in NumPy's format


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


def parts_received(cache_dir: Path, wanted: str, count: int = MOST_PARTS) -> list[int]:
    """Return the indices below ``count`` of the parts received so far."""
    numbers = (int(path.stem) for path in _parts(cache_dir, wanted).glob("[0-9]*.npy"))
    return sorted(number for number in numbers if number < count)


def receive(cache_dir: Path, part: Part, max_bytes: int = MAX_BYTES) -> bool:
    """Store a part; return whether the set is now complete.

    Parameters
    ----------
    cache_dir : Path
    part : Part
    max_bytes : int
        Of the pixels of all public sets in ``cache_dir``, received in whole or in part.

    Raises
    ------
    DataError
        The part is out of range, there is no room for its set, or the complete set does not match its digest;
        then all parts are deleted and must be sent again.
    """
    folder = _parts(cache_dir, part.digest)
    _check(part, max_bytes)
    with lock(cache_dir, _key(part.digest).replace("public", "parts")):
        if has_received(cache_dir, part.digest):
            return True
        _require_room(cache_dir, part, max_bytes)
        content = io.BytesIO()
        np.save(content, part.images)
        atomic_write(folder / f"{part.number}.npy", content.getvalue())
        if len(parts_received(cache_dir, part.digest, part.count)) < part.count:
            return False
        try:
            cached(cache_dir, _key(part.digest), lambda target: _assemble(folder, part, target))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return True


def _check(part: Part, max_bytes: int) -> None:
    """Refuse what no server sends: nothing is stored, and nothing is counted to a number of its choice."""
    if not 1 <= part.count <= MOST_PARTS:
        raise _refused(f"a public set of {part.count:.6g} parts: at most {MOST_PARTS:,} are taken")
    if not 0 <= part.number < part.count:
        raise _refused(f"part {part.number:.6g} of {part.count} does not exist")
    if len(part.images) == 0:
        raise _refused("a part without images")
    full_parts = part.count - 1 if part.number < part.count - 1 else 0  # the last one may be smaller
    if max(full_parts, 1) * part.images.nbytes > max_bytes:
        raise _too_large(max_bytes)
    if part.labels is None:
        return
    if part.labels.nbytes > max_bytes or len(part.labels) < len(part.images):
        raise _refused(f"{len(part.labels)} labels do not fit the images")
    if part.labels.min() < -1 or part.labels.max() >= len(part.classes):
        raise _refused(f"labels outside the {len(part.classes)} classes")


def _require_room(cache_dir: Path, part: Part, max_bytes: int) -> None:
    """Refuse a part that makes all public sets of this cache larger than allowed."""
    replaced = _parts(cache_dir, part.digest) / f"{part.number}.npy"
    kept = [*cache_dir.glob("received/*/*.npy"), *cache_dir.glob("images/public-*/images.npy")]
    used = sum(path.stat().st_size - _HEADER_BYTES for path in kept if path != replaced)
    if used + part.images.nbytes > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> DataError:
    return _refused(
        f"the public sets at this site would have more than {max_bytes:,} bytes: remove old ones "
        "(received/ and images/public-* in its cache folder), or raise max-public-bytes in its node "
        "configuration"
    )


def _refused(text: str) -> DataError:
    return DataError.to_everyone(f"public.distribute: {text}")


def load_received(cache_dir: Path, wanted: str) -> PublicSet:
    """Open a received public set.

    Raises
    ------
    DataError
        It has not been received.
    """
    if not has_received(cache_dir, wanted):
        remedy = (
            "start the run with public.distribute=true, let the site accept it (accept-public=true), and "
            "keep its cache folder between orders"
        )
        raise DataError(
            f"the server's public set {wanted} is not in {cache_dir}: {remedy}",
            f"the server's public set {wanted} is not at this site: {remedy}",
        )
    entry = cached(cache_dir, _key(wanted), lambda _: {})
    names = tuple(f"public-{number}" for number in range(len(entry.images)))
    labels = entry.index["labels"].astype(np.int64)
    return PublicSet(ImageSet(entry.images, labels, None, names, entry.hashes), None, None, wanted)


def _assemble(folder: Path, part: Part, target: Path) -> Mapping[str, NDArray[np.generic]]:
    """Join the parts and verify the digest before the cache entry exists."""
    pieces = [np.load(folder / f"{number}.npy", mmap_mode="r") for number in range(part.count)]
    total = sum(len(piece) for piece in pieces)
    if any(piece.shape[1:] != part.images.shape[1:] for piece in pieces):
        raise _refused("the parts have pictures of different sizes")
    if part.labels is not None and len(part.labels) != total:
        raise _refused(f"{len(part.labels)} labels for {total} images")
    images = new_array(target, total, part.images.shape[1])
    np.concatenate(pieces, out=images)
    labels = np.full(total, -1, np.int64) if part.labels is None else part.labels
    names = tuple(map(str, range(total)))
    whole = ImageSet(images, labels, None, names, pixel_hashes(images))
    found = digest(part.classes, whole, part.labels is not None, None)
    if found != part.digest:
        text = (
            f"the public set received from the server has the digest {found}, not {part.digest}: it was "
            "damaged in transfer or changed at the server; it is requested again before the next order"
        )
        raise DataError.to_everyone(text)
    return {"labels": labels}


def _key(wanted: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{32}", wanted):
        raise _refused(f"{wanted[:40]!r} is not a digest of a public set")
    return f"public-{wanted}"


def _parts(cache_dir: Path, wanted: str) -> Path:
    return cache_dir / "received" / _key(wanted).removeprefix("public-")
