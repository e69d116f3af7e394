"""Private images that are also public: whoever sees the public ones could tell that a model knows them.

Same pixels are found by their hashes. A near copy (another JPEG, another size, darker, mirrored, grey) is
found by correlation: first of the grey levels of 8 x 8 blocks, a perceptual hash that is not rounded, then of
all pixels. On 3,833 and 5,988 photographs of two sources, 46 million pairs with the mirrored ones, none was
taken for a copy; docs/privacy.md has the rest.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.copies import CONTRAST, signatures
from fedmutual.data.images import ImageSet
from fedmutual.data.stratify import Positions
from fedmutual.files.atomic import atomic_write

NEAR_BLOCKS = 0.95  # least correlation of the 8 x 8 blocks of two copies
NEAR_PIXELS = 0.9  # and of their pixels
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_RULE = "1"  # of these numbers; a cached result is of one rule
_CHUNK = 1024

Floats = NDArray[np.float32]


def overlapping(private: ImageSet, public: ImageSet, cache_dir: Path) -> Positions:
    """Return the sorted positions of the private images that are also public, or nearly.

    Parameters
    ----------
    private, public : ImageSet
    cache_dir : Path
        Keeps the result: in a deployment every order has its own process.
    """
    found = hashlib.blake2b(_RULE.encode(), digest_size=16)
    for images in (private, public):
        found.update(images.pixel_hashes().tobytes())
        found.update(len(images).to_bytes(8, "little"))
    path = cache_dir / "overlap" / f"{found.hexdigest()}.npy"
    if path.exists():
        return np.asarray(np.load(path), np.int64)
    positions = np.union1d(_same(private, public), _near(private, public)).astype(np.int64)
    data = io.BytesIO()
    np.save(data, positions)
    atomic_write(path, data.getvalue())
    return positions


def _same(private: ImageSet, public: ImageSet) -> Positions:
    known = {row.tobytes() for row in public.pixel_hashes()}
    return np.array([i for i, row in enumerate(private.pixel_hashes()) if row.tobytes() in known], np.int64)


def _near(private: ImageSet, public: ImageSet) -> Positions:
    own, others = _grey(signatures(private)), _grey(signatures(public))
    first, second = _with_contrast(own), _with_contrast(others)
    found: set[int] = set()
    for mirrored in (False, True):
        theirs = _centred(others[second][:, :, ::-1] if mirrored else others[second])
        for start in range(0, len(first), _CHUNK):
            chosen = first[start : start + _CHUNK]
            rows, columns = np.nonzero(_centred(own[chosen]) @ theirs.T >= NEAR_BLOCKS)
            pairs = zip(chosen[rows].tolist(), second[columns].tolist(), strict=True)
            found |= {i for i, j in pairs if _alike(private.images[i], public.images[j], mirrored)}
    return np.array(sorted(found), np.int64)


def _alike(one: NDArray[np.uint8], other: NDArray[np.uint8], mirrored: bool) -> bool:
    pixels = np.stack([_grey(one), _grey(other[:, ::-1] if mirrored else other)])
    first, second = _centred(pixels)
    return float(first @ second) >= NEAR_PIXELS


def _grey(colours: NDArray[np.generic]) -> Floats:
    return np.asarray(colours.astype(np.float32) @ LUMINANCE, np.float32)


def _with_contrast(grey: Floats) -> Positions:
    """Positions of the images that are not one colour: without contrast, a correlation says nothing."""
    return np.flatnonzero(grey.std(axis=(1, 2)) >= CONTRAST)


def _centred(grey: Floats) -> Floats:
    """Return rows whose products are correlations, [n, pixels]."""
    rows = grey.reshape(len(grey), grey.shape[1] * grey.shape[2])
    rows = rows - rows.mean(axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6), np.float32)
