"""Augmented views of pictures: the same ones on every machine and in every process."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

_AREA = (0.5, 1.0)  # of the picture that a view shows
_LIGHT = (0.75, 1.3)  # factor of the brightness, and of the contrast


def augmented(pixels: NDArray[np.uint8], hashes: NDArray[np.uint8], view: int) -> NDArray[np.uint8]:
    """Crop, mirror and relight pictures.

    Parameters
    ----------
    pixels : uint8 array [n, S, S, 3]
    hashes : uint8 array [n, 16]
        Of each picture's pixels: together with ``view`` they seed what is done to it.
    view : int
        From 1.

    Returns
    -------
    uint8 array [n, S, S, 3]
    """
    return np.stack([_view(picture, row, view) for picture, row in zip(pixels, hashes, strict=True)])


def _view(picture: NDArray[np.uint8], row: NDArray[np.uint8], view: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng([view, *row.tolist()])
    size = picture.shape[0]
    side = size * np.sqrt(rng.uniform(*_AREA))
    left, top = rng.uniform(0, size - side, 2)
    image = Image.fromarray(picture).resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(*_LIGHT))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(*_LIGHT))
    return np.asarray(image)
