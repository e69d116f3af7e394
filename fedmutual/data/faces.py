"""Generated faces with and without masks: a data set that needs no download.

There are two sources, as in the photographs: a pool, and an unseen set with another camera, place and light.
Each picture has its own random generator, so its bytes do not depend on process, order or machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.cache import FORMAT, cached, new_array
from fedmutual.data.images import ImageData, ImageSet
from fedmutual.data.portrait import Domain, Portrait
from fedmutual.data.worn import occlude, wear_mask
from fedmutual.settings import DataSettings, setting

CLASSES = ("mask", "no_mask")
PICTURES = 1  # increase it when the same seed draws another picture

POOL = Domain(
    scale=(0.54, 0.82),
    turn=(-0.45, 0.45),
    shift=(-0.24, 0.24),
    yaw=(-0.28, 0.28),
    light=(0.6, 1.25),
    contrast=(-0.3, 0.5),
    warmth=(-0.18, 0.20),
    side_light=(-0.4, 0.4),
    blur=(0.0, 0.018),
    noise=(1.0, 7.0),
    busy=(0, 7),
    plain=0.25,
    masks=(0.40, 0.28, 0.17, 0.15),
)
UNSEEN = Domain(
    scale=(0.62, 0.88),
    turn=(-0.40, 0.40),
    shift=(-0.22, 0.22),
    yaw=(-0.34, 0.34),
    light=(0.65, 1.35),
    contrast=(-0.5, 0.3),
    warmth=(-0.25, 0.12),
    side_light=(-0.55, 0.55),
    blur=(0.008, 0.024),
    noise=(3.0, 9.0),
    busy=(0, 4),
    plain=0.5,
    masks=(0.30, 0.25, 0.20, 0.25),
)


@dataclass(kw_only=True)
class FacesSettings(DataSettings):
    """Generated faces in two balanced classes, ``mask`` and ``no_mask``."""

    pool_size: int = setting("images for the clients and the public set", minimum=4)
    unseen_size: int = setting("images of the second source, for evaluation only", minimum=2)
    seed: int = setting("seed of the pictures", minimum=0)

    def count(self) -> tuple[int, int | None]:
        """Return the pool's size, which is a setting."""
        return self.pool_size, None

    def load(self, cache_dir: Path) -> ImageData:
        """Return the pictures, drawn once per machine."""
        pool = _source(self, "pool", POOL, self.pool_size, cache_dir)
        unseen = _source(self, "unseen", UNSEEN, self.unseen_size, cache_dir)
        return ImageData(classes=CLASSES, pool=pool, public=None, unseen=unseen)


def draw(seed: int, source: str, domain: Domain, index: int, image_size: int) -> NDArray[np.uint8]:
    """Draw one picture; faces with an even index wear a mask (label 0).

    Returns
    -------
    uint8 array [image_size, image_size, 3]
    """
    from PIL import Image, ImageFilter

    rng = np.random.default_rng([seed, len(source), index])
    portrait = Portrait(rng, domain, max(min(2 * image_size, 64), image_size))
    _compose(portrait, masked=index % 2 == 0)
    pixels = _camera(portrait)
    picture = Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.LANCZOS)
    picture = picture.filter(ImageFilter.GaussianBlur(portrait.span(domain.blur) * image_size))
    grain = rng.standard_normal((image_size, image_size, 3)) * portrait.span(domain.noise)
    return np.clip(np.asarray(picture, dtype=np.int16) + np.round(grain), 0, 255).astype(np.uint8)


def _compose(portrait: Portrait, masked: bool) -> None:
    portrait.background()
    portrait.body()
    portrait.skin()
    portrait.eyes()
    portrait.beard()
    portrait.mouth()
    if masked:
        wear_mask(portrait)
    portrait.glasses()
    portrait.hair()
    if not masked:
        occlude(portrait)


def _camera(portrait: Portrait) -> NDArray[np.uint8]:
    """Render the canvas as a camera would: exposure, contrast, white balance, vignetting."""
    domain, canvas = portrait.domain, portrait.canvas
    warmth = portrait.span(domain.warmth)
    gain = np.asarray([1 + warmth, 1, 1 - warmth], dtype=np.float32) * np.float32(portrait.span(domain.light))
    corners = canvas.x * canvas.x + canvas.y * canvas.y
    rgb = canvas.rgb * gain * (1 - np.float32(portrait.within(0, 0.15)) * corners)[..., None]
    rgb = np.clip(rgb, 0, 1)
    bend = np.float32(portrait.span(domain.contrast))
    rgb = rgb + bend * rgb * (1 - rgb) * (2 * rgb - 1)
    pixels: NDArray[np.uint8] = np.floor(np.clip(rgb, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
    return pixels


def _source(settings: FacesSettings, name: str, domain: Domain, size: int, cache_dir: Path) -> ImageSet:
    def build(folder: Path) -> Mapping[str, NDArray[np.generic]]:
        pixels = new_array(folder, size, settings.image_size)
        for index in range(size):
            pixels[index] = draw(settings.seed, name, domain, index, settings.image_size)
        return {}

    parameters = (FORMAT, PICTURES, settings.image_size, settings.seed, name, size)
    key = "faces-" + hashlib.blake2b(repr(parameters).encode(), digest_size=12).hexdigest()
    entry = cached(cache_dir, key, build)
    return ImageSet(
        images=entry.images,
        labels=np.arange(size, dtype=np.int64) % 2,
        groups=None,
        names=tuple(f"{name}-{index}" for index in range(size)),
        hashes=entry.hashes,
    )
