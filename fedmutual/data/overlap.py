"""Private images that are also public: whoever sees the public ones could tell that a model knows them.

Same pixels are found by their hashes. A near copy (another JPEG, another size, darker, mirrored, grey) is
found by correlation: first of the grey levels of 8 x 8 blocks, a perceptual hash that is not rounded, then of
all pixels. What counts as near depends on the images: digits or radiographs are all alike, so a copy must be
far nearer than the few most alike public images are. docs/privacy.md has what was measured.
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
FAR_NEARER = 0.12  # most distance (1 - correlation) of copies, as a share of that to an image merely alike
ALIKE, ALIKE_SHARE = 5, 0.02  # rank of the latter among the public images, or its share of them
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_RULE = "2"  # of these numbers; a cached result is of one rule
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
    near = near_pairs(private, public)[:, 0]
    positions = np.union1d(_same(private, public), near).astype(np.int64)
    data = io.BytesIO()
    np.save(data, positions)
    atomic_write(path, data.getvalue())
    return positions


def _same(private: ImageSet, public: ImageSet) -> Positions:
    known = {row.tobytes() for row in public.pixel_hashes()}
    return np.array([i for i, row in enumerate(private.pixel_hashes()) if row.tobytes() in known], np.int64)


def near_pairs(private: ImageSet, public: ImageSet) -> NDArray[np.int64]:
    """Return the pairs of a private and a public image that are copies, the same pixels too.

    Returns
    -------
    int64 array [p, 2]
        Positions of the private and the public image.
    """
    own, others = _grey(signatures(private)), _grey(signatures(public))
    first, second = _with_contrast(own), _with_contrast(others)
    plain, mirrored = _centred(others[second]), _centred(others[second][:, :, ::-1])
    found: set[tuple[int, int]] = set()
    for start in range(0, len(first), _CHUNK):
        chosen = first[start : start + _CHUNK]
        blocks = _centred(own[chosen])
        correlations = blocks @ plain.T
        least = np.maximum(NEAR_PIXELS, 1 - FAR_NEARER * _distance(correlations))
        for flip, near in ((False, correlations), (True, blocks @ mirrored.T)):
            for row, column in np.argwhere(near >= NEAR_BLOCKS):
                i, j = int(chosen[row]), int(second[column])
                if _correlation(private.images[i], public.images[j], flip) >= least[row]:
                    found.add((i, j))
    return np.array(sorted(found), np.int64).reshape(-1, 2)


def _distance(correlations: Floats) -> Floats:
    """Return how far each image [n, m] is from one that is merely alike, [n]; 1 where there are too few."""
    count = correlations.shape[1]
    rank = max(ALIKE, round(ALIKE_SHARE * count))
    if count <= rank:
        return np.ones(len(correlations), np.float32)
    return np.asarray(1 - np.partition(correlations, -rank, axis=1)[:, -rank], np.float32)


def _correlation(one: NDArray[np.uint8], other: NDArray[np.uint8], mirrored: bool) -> float:
    first, second = _centred(np.stack([_grey(one), _grey(other[:, ::-1] if mirrored else other)]))
    return float(first @ second)


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
