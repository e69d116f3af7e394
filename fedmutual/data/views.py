"""Views of the public images: a new one of each image per round, identical at every client."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedmutual.data.images import ImageSet
from fedmutual.data.stratify import generator

MIRRORED = 0.5  # share of the views
MIXED = 0.5


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
