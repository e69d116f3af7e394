"""Features of an image that nothing was trained for: histograms of oriented gradients, and colours.

For sites without a common backbone (``strategy.features=hog``). Gradients as Dalal and Triggs (CVPR 2005):
the channel with the largest one counts, votes are shared by the two nearest of nine orientations, four
neighbouring cells are scaled together, and clipped. Beside them stands the mean colour of each cell. Numpy
only; each image's features depend on this image alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CELLS = 6  # a side
BINS = 9
CLIP = 0.3
_CHUNK = 256  # images at a time

Values = NDArray[np.floating]


def hog(pixels: NDArray[np.uint8]) -> Values:
    """Return the features of images.

    Parameters
    ----------
    pixels : uint8 [n, H, W, 3]
        At least 12 a side.

    Returns
    -------
    float32 [n, 5 * 5 * 36 + 6 * 6 * 3]

    Raises
    ------
    ValueError
        The images are smaller.

    Examples
    --------
    >>> hog(np.zeros((2, 32, 32, 3), np.uint8)).shape
    (2, 1008)
    """
    if min(pixels.shape[1:3]) < 2 * CELLS:
        raise ValueError(f"images of {pixels.shape[1:3]} pixels: at least {2 * CELLS} a side are needed")
    parts = [_features(pixels[at : at + _CHUNK]) for at in range(0, len(pixels), _CHUNK)]
    return np.concatenate(parts) if parts else _features(pixels)


def mirrored_hog(pixels: NDArray[np.uint8]) -> Values:
    """Return the mean of :func:`hog` of images [n, H, W, 3] and of their mirror images.

    For tasks in which a mirrored image has the same class: half of the features' directions are left, and so
    as many axes tell more.
    """
    return (hog(pixels) + hog(pixels[:, :, ::-1])) / 2


def _features(pixels: NDArray[np.uint8]) -> Values:
    image = pixels.astype(np.float32) / 255
    down, across = np.zeros_like(image), np.zeros_like(image)
    down[:, 1:-1] = image[:, 2:] - image[:, :-2]
    across[:, :, 1:-1] = image[:, :, 2:] - image[:, :, :-2]
    size = np.hypot(down, across)
    channel = size.argmax(axis=-1)[..., None]
    size, down, across = (np.take_along_axis(a, channel, -1)[..., 0] for a in (size, down, across))
    votes = _cells(_votes(size, np.arctan2(down, across) % np.pi))
    corners = (votes[:, :-1, :-1], votes[:, 1:, :-1], votes[:, :-1, 1:], votes[:, 1:, 1:])
    blocks = np.concatenate(corners, axis=-1)
    blocks = np.minimum(blocks / np.sqrt((blocks**2).sum(axis=-1, keepdims=True) + 0.01), CLIP)
    colours = _cells(image) / _cells(np.ones_like(image)) - 0.5
    count = len(pixels)
    flat = [part.reshape(count, int(np.prod(part.shape[1:]))) for part in (blocks, colours)]
    return np.concatenate(flat, axis=1).astype(np.float32)


def _votes(size: Values, angle: Values) -> Values:
    """Return the gradients [n, H, W] by orientation, [n, H, W, BINS]."""
    place = angle / np.pi * BINS
    lower = np.floor(place).astype(np.int64)
    upper_share = place - lower
    shares = np.zeros((*size.shape, BINS), np.float32)
    for orientation in range(BINS):
        at_lower, at_upper = lower % BINS == orientation, (lower + 1) % BINS == orientation
        shares[..., orientation] = at_lower * (1 - upper_share) + at_upper * upper_share
    return shares * size[..., None]


def _cells(values: Values) -> Values:
    """Return sums [n, CELLS, CELLS, b] of [n, H, W, b]."""
    for axis in (1, 2):
        starts = np.linspace(0, values.shape[axis], CELLS + 1).astype(np.int64)[:-1]
        values = np.add.reduceat(values, starts, axis=axis)
    return values
