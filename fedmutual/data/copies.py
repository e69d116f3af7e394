"""Copies of images across parts of the data: the same pixels, or nearly the same (a thumbnail, another JPEG).

Every image has a signature, the mean colours of 8 x 8 blocks. Near copies are neighbours in six coarse sums
of it, found with a k-d tree and then compared block by block. Images without contrast are compared by their
pixels only.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.images import ImageSet

BLOCKS = 8
NEAR_MEAN = 2.5  # grey levels between near copies, mean over the blocks
NEAR_LARGEST = 16.0  # and in any block
CONTRAST = 8.0  # least standard deviation of the blocks
_CHUNK = 512

_known: dict[bytes, NDArray[np.float32]] = {}  # a study has many runs of the same images


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the data.

    Attributes
    ----------
    title : str
        For people: "training images".
    names : tuple[str, ...]
    hashes : uint8 array [n, 16]
    signatures : float32 array [n, 8, 8, 3]
    """

    title: str
    names: tuple[str, ...]
    hashes: NDArray[np.uint8]
    signatures: NDArray[np.float32]

    @classmethod
    def of(cls, title: str, images: ImageSet, positions: NDArray[np.integer] | None = None) -> Part:
        """Return a part from some images of a set (None: all)."""
        chosen = np.arange(len(images)) if positions is None else positions
        names = tuple(images.names[int(position)] for position in chosen)
        return cls(title, names, images.pixel_hashes()[chosen], signatures(images)[chosen])


@dataclass(frozen=True)
class Copies:
    """The images of one part that have a copy in another one, or the same one.

    Attributes
    ----------
    title, other : str
    same, near : int
        Images of the first part with a copy of the same pixels, and others with a near copy.
    example : tuple[str, str]
        Names of one pair.
    """

    title: str
    other: str
    same: int
    near: int
    example: tuple[str, str]


def signatures(images: ImageSet) -> NDArray[np.float32]:
    """Return the mean colours of 8 x 8 blocks of every image, float32 [n, 8, 8, 3]."""
    key = hashlib.blake2b(images.pixel_hashes().tobytes(), digest_size=16).digest()
    if key not in _known:
        _known[key] = _signatures(images.images)
    return _known[key]


def _signatures(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    size = pixels.shape[1]
    edges = np.linspace(0, size, BLOCKS + 1).astype(int)
    average = np.zeros((BLOCKS, size), np.float32)
    for block, (start, stop) in enumerate(itertools.pairwise(edges)):
        average[block, start:stop] = 1 / (stop - start)
    found = np.empty((len(pixels), BLOCKS, BLOCKS, 3), np.float32)
    for start in range(0, len(pixels), _CHUNK):
        chunk = pixels[start : start + _CHUNK].astype(np.float32)
        rows = average @ chunk.reshape(len(chunk), size, size * 3)
        found[start : start + _CHUNK] = average @ rows.reshape(len(chunk), BLOCKS, size, 3)
    return found


def find_copies(parts: Sequence[Part]) -> list[Copies]:
    """Return the copies between every two parts, and within the first.

    Parameters
    ----------
    parts : sequence of Part
        The first is what is trained on.
    """
    pairs = _pairs(parts)
    ends = np.cumsum([0, *(len(part.names) for part in parts)])
    names = [name for part in parts for name in part.names]
    found = []
    for i, part in enumerate(parts):
        for j in range(i + 1) if i == 0 else range(i):
            between = [
                (a, b, same)
                for a, b, same in pairs
                if ends[j] <= a < ends[j + 1] and ends[i] <= b < ends[i + 1]
            ]
            if between:
                exact = {b for _, b, same in between if same}
                near = {b for _, b, _ in between} - exact
                a, b, _ = between[0]
                found.append(Copies(part.title, parts[j].title, len(exact), len(near), (names[a], names[b])))
    return found


def _pairs(parts: Sequence[Part]) -> list[tuple[int, int, bool]]:
    """Return (position, later position, whether their pixels are equal) of all copies, sorted."""
    hashes = np.concatenate([part.hashes for part in parts])
    signed = np.concatenate([part.signatures for part in parts])
    found: dict[tuple[int, int], bool] = dict.fromkeys(_near_pairs(signed), False)
    first: dict[bytes, int] = {}
    for position, row in enumerate(hashes):
        earlier = first.setdefault(row.tobytes(), position)
        if earlier != position:
            found[earlier, position] = True
    return sorted((a, b, same) for (a, b), same in found.items())


def _near_pairs(signed: NDArray[np.float32]) -> list[tuple[int, int]]:
    from scipy.spatial import cKDTree

    flat = signed.reshape(len(signed), -1)
    candidates = np.flatnonzero(flat.std(axis=1) >= CONTRAST)
    if len(candidates) < 2:
        return []
    half = BLOCKS // 2
    quarters = signed.reshape(len(signed), 2, half, 2, half, 3).mean(axis=(2, 4))  # [n, 2, 2, 3]
    coarse = np.concatenate([quarters.mean(axis=3).reshape(len(signed), 4), _chroma(quarters)], axis=1)
    pairs = cKDTree(coarse[candidates]).query_pairs(2 * NEAR_MEAN, output_type="ndarray")
    a, b = candidates[pairs[:, 0]], candidates[pairs[:, 1]]
    kept = []
    for start in range(0, len(a), 100_000):
        chosen = slice(start, start + 100_000)
        apart = np.abs(flat[a[chosen]] - flat[b[chosen]])
        close = (apart.mean(axis=1) <= NEAR_MEAN) & (apart.max(axis=1) <= NEAR_LARGEST)
        kept += list(zip(a[chosen][close].tolist(), b[chosen][close].tolist(), strict=True))
    return kept


def _chroma(quarters: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean differences of red and of blue from green, [n, 2]."""
    mean = quarters.mean(axis=(1, 2))
    return np.asarray(mean[:, [0, 2]] - mean[:, [1]], dtype=np.float32)
