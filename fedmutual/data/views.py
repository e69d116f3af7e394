"""Views of the public images: a fresh one of each a round, the same at every client."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedmutual.data.images import ImageSet
from fedmutual.data.stratify import generator

MIRRORED = 0.5  # share of the views
MIXED = 0.5


def mixed_views(images: ImageSet, seed: int, round: int) -> ImageSet:
    """Mirror half of the images, and mix half of them with another one, whose part is up to a half.

    Peers are asked about pictures between pictures (mixup, arXiv:1710.09412) instead of the same ones again,
    for the same bytes. Teacher and student see the same view (arXiv:2106.05237), so it need not show a real
    thing.

    Parameters
    ----------
    images : ImageSet
        The round's public images.
    seed : int
        The run's; with the round it says what is done to which image, in whole numbers, so that all machines
        make the same pixels.
    round : int
        The round in which they are predicted.

    Returns
    -------
    ImageSet
        Of as many images. Labels are -1: that of a mixed image is none of the two.
    """
    rng = generator(seed, "public views", round)
    count = len(images)
    pixels = np.array(images.images)
    mirrored = rng.random(count) < MIRRORED
    pixels[mirrored] = pixels[mirrored, :, ::-1]
    # parts of 256: what another image takes
    share = np.where(rng.random(count) < MIXED, rng.integers(0, 129, count), 0).astype(np.uint16)
    share = share[:, None, None, None]
    other = pixels[rng.permutation(count)]
    mixed = ((256 - share) * pixels + share * other + 128) >> 8
    return replace(images, images=mixed.astype(np.uint8), labels=np.full(count, -1), hashes=None)
