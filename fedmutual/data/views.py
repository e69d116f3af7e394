"""Views of the public images, identical at every client: new ones per round, or ones that fill a set up."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.images import ImageSet
from fedmutual.data.stratify import generator

MIRRORED = 0.5  # share of the views
MIXED = 0.5
ONE = 65_536  # of fixed-point numbers


def mixed_views(images: ImageSet, seed: int, round: int) -> ImageSet:
    """Mirror half of the images, and mix half of them with another image, of weight up to one half.

    Peers predict new points between the images (mixup, arXiv:1710.09412) instead of the same images again, at
    no extra traffic. Teacher and student see the same view (arXiv:2106.05237), so it need not be realistic.

    Parameters
    ----------
    images : ImageSet
        The round's public images.
    seed : int
        Seed of the run. Together with the round it determines every view, in integer arithmetic, so that all
        machines compute the same pixels.
    round : int
        The round in which the views are predicted.

    Returns
    -------
    ImageSet
        As many images, with labels of -1, since a mixed image has neither of the two labels.
    """
    rng = generator(seed, "public views", round)
    count = len(images)
    pixels = np.array(images.seen)
    mirrored = rng.random(count) < MIRRORED
    pixels[mirrored] = pixels[mirrored, :, ::-1]
    # weight of the other image, in units of 1/256
    share = np.where(rng.random(count) < MIXED, rng.integers(0, 129, count), 0).astype(np.uint16)
    share = share[:, None, None, None]
    other = pixels[rng.permutation(count)]
    mixed = ((256 - share) * pixels + share * other + 128) >> 8
    labels = np.full(count, -1)
    return replace(images, images=mixed.astype(np.uint8), labels=labels, hashes=None, inputs=None)


def affine_views(images: ImageSet, count: int, seed: int) -> ImageSet:
    """Turn, scale, shift and shear images: ``count`` pictures, of each image in turn.

    By up to 10 degrees, 12 %, a tenth of the side and a tenth; the pixels of the border are repeated beyond
    it. All is integer arithmetic, so that all machines make the same pixels. No image is mirrored, since a
    mirrored digit is none.

    Parameters
    ----------
    images : ImageSet
        n > 0 images.
    count : int
    seed : int
        Seed of the run, which determines every picture.

    Returns
    -------
    ImageSet
        With the images' labels.
    """
    rng = generator(seed, "affine views")
    source = np.arange(count) % len(images)
    rows = images.rows(source)
    _, height, width, channels = images.images.shape
    pixels = np.empty((count, height, width, channels), np.uint8)
    for number, position in enumerate(source):
        sine, shear = (int(v) for v in rng.integers([-11_380, -6_554], [11_381, 6_555]))  # in 1/65536, as all
        scale = int(rng.integers(57_672, 73_401))
        shift = [int(rng.integers(-side * 6_554, side * 6_554 + 1)) for side in (height, width)]
        pixels[number] = _moved(images.images[position], sine, shear, scale, shift)
    return ImageSet(pixels, rows.labels, rows.groups, rows.names)


def _moved(
    image: NDArray[np.uint8], sine: int, shear: int, scale: int, shift: list[int]
) -> NDArray[np.int64]:
    """Return the image, sampled bilinearly at places turned by ``sine`` and so on, around its middle."""
    height, width, _ = image.shape
    cosine = math.isqrt(ONE * ONE - sine * sine)
    y, x = np.mgrid[:height, :width].astype(np.int64)
    y, x = y * ONE - (height - 1) * ONE // 2 - shift[0], x * ONE - (width - 1) * ONE // 2 - shift[1]
    turned_y = ((sine * x + cosine * y >> 16) * scale >> 16) + (height - 1) * ONE // 2
    turned_x = ((cosine * x - sine * y >> 16) * scale + shear * y >> 16) + (width - 1) * ONE // 2
    at_y, at_x = np.clip(turned_y, 0, (height - 1) * ONE), np.clip(turned_x, 0, (width - 1) * ONE)
    top, left = at_y >> 16, at_x >> 16
    low, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, across = (at_y & ONE - 1)[..., None] >> 8, (at_x & ONE - 1)[..., None] >> 8  # in 1/256
    pixels = image.astype(np.int64)
    above = (256 - across) * pixels[top, left] + across * pixels[top, right]
    below = (256 - across) * pixels[low, left] + across * pixels[low, right]
    mixed: NDArray[np.int64] = ((256 - down) * above + down * below + 32_768) >> 16
    return mixed
