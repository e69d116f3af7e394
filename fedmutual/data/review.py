"""What is worth knowing about data before a run: what does not fit the network, copies across its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.copies import Copies, Part, find_copies, signatures
from fedmutual.data.decoding import PictureSettings
from fedmutual.data.images import ImageData, ImageSet
from fedmutual.data.public import public_and_private
from fedmutual.data.site import SiteData, load_images
from fedmutual.data.stream import StreamFolds
from fedmutual.logs import shown
from fedmutual.settings import Settings
from fedmutual.settings.pretrained import pretrained_settings

FEW_IMAGES = 10
FAR_LARGER, FAR_SMALLER = 8.0, 0.5  # sides of the files and of what the network takes
LITTLE_RANGE = 64  # of 256 grey levels
_SAMPLE = 256  # images of which pixels are looked at
_GREY = 2.0  # most difference between the channels of a grey image


def review_run(
    settings: Settings, num_clients: int | None, size: int, images: ImageData | None = None
) -> list[str]:
    """Return remarks about all images of a run, as far as the server or a simulation has them.

    Empty for sources that draw their images.

    Parameters
    ----------
    settings : Settings
    num_clients : int or None
    size : int
        Side length in pixels of what the network takes.
    images : ImageData or None
        The settings' images, if they are loaded already.
    """
    if not _has_files(settings):
        return []
    data = load_images(settings) if images is None else images
    public, private = public_and_private(data, settings, num_clients)
    if isinstance(private, StreamFolds):
        private = np.unique(np.concatenate([np.concatenate(folds) for folds in private.private]))
    parts = [Part.of("private images", data.pool, private), Part.of("public images", public.images)]
    if data.unseen is not None:
        parts.append(Part.of("test images", data.unseen))
    remarks = review_images(data.pool, data.classes, settings, size) if len(data.pool) else []
    return remarks + [copies_text(found) for found in find_copies(parts)]


def review_site(site: SiteData, settings: Settings, size: int) -> list[str]:
    """Return remarks about the images of a site of its own."""
    if not _has_files(settings):
        return []
    train, held_out = site.train_indices(1), site.validation_indices(1)
    parts = [
        Part.of("training images", site.private, train),
        Part.of("validation images", site.private, held_out),
        Part.of("public images", site.public.images),
    ]
    if site.unseen is not None:
        parts.append(Part.of("test images", site.unseen))
    found = [copies for copies in find_copies(parts) if copies.title != copies.other]
    return review_images(site.private, site.classes, settings, size) + [
        copies_text(copies) for copies in found
    ]


def _has_files(settings: Settings) -> bool:
    return isinstance(settings.data, PictureSettings)


def copies_text(copies: Copies) -> str:
    """Describe copies in one sentence, with the remedy."""
    count = copies.same + copies.near
    how = f"{copies.same} with the same pixels, {copies.near} nearly"
    first, second = map(shown, copies.example)
    if copies.title == copies.other:
        return (
            f"{count} of the {copies.title} are copies of others ({how}), such as {second} of {first}: "
            "training and validation may share them; keep one of each"
        )
    told = "figures on them are too good" if copies.title != "public images" else "they are no secret"
    return (
        f"{count} of the {copies.title} are copies of {copies.other} ({how}), such as {second} of {first}: "
        f"{told}; keep one of each"
    )


def review_images(images: ImageSet, classes: Sequence[str], settings: Settings, size: int) -> list[str]:
    """Return remarks about labelled images and the network that is to learn them."""
    remarks = [
        _few(images, classes),
        _size(images, size),
        _range(images),
        _colour(images, classes, settings),
    ]
    return [remark for remark in remarks if remark]


def _few(images: ImageSet, classes: Sequence[str]) -> str:
    counts = np.bincount(images.labels[images.labels >= 0], minlength=len(classes))
    few = [f"{shown(name)} ({n})" for name, n in zip(classes, counts, strict=True) if 0 < n < FEW_IMAGES]
    if not few:
        return ""
    return (
        f"fewer than {FEW_IMAGES} images of {', '.join(few)}: figures on so few say little; add some, or "
        "leave the class out"
    )


def _size(images: ImageSet, size: int) -> str:
    if images.facts is None:
        return ""
    side = float(np.nanmedian(np.sqrt(images.facts[:, 0] * images.facts[:, 1])))
    if FAR_SMALLER <= side / size <= FAR_LARGER:
        return ""
    fitting = 2 ** math.ceil(math.log2(max(side, 8)))
    if side < size:
        return (
            f"the images have about {side:.0f} x {side:.0f} pixels and are enlarged to {size} x {size}: "
            f"data.image_size={fitting} costs less"
        )
    return (
        f"the images have about {side:.0f} x {side:.0f} pixels and are reduced to {size} x {size}: small "
        "details are lost; try a larger data.image_size, model=pretrained, or crop them to what matters"
    )


def _range(images: ImageSet) -> str:
    low, high = value_percentiles(images)
    if high - low >= LITTLE_RANGE:
        return ""
    text = f"the images use {high - low + 1:.0f} of 256 levels ({low:.0f} to {high:.0f})"
    deep = images.facts is not None and np.isfinite(images.facts[:, 2:]).all(axis=1)
    if images.facts is not None and np.any(deep):
        least, most = float(images.facts[deep, 2].min()), float(images.facts[deep, 3].max())
        window = f"[{least:g},{most:g}]" if least < 0 else f"[0,{_bits(most)}]"
        return f"{text}: the files have values from {least:g} to {most:g}; set data.window={window}"
    return f"{text}: the network sees little contrast; were they saved with the wrong depth?"


def _bits(most: float) -> int:
    """Return the largest value of as many bits as a value needs."""
    return int(2 ** math.ceil(math.log2(most + 1)) - 1)


def value_percentiles(images: ImageSet) -> tuple[float, float]:
    """Return the 0.1 and 99.9 % percentiles of the pixels that the network sees, 0 to 255."""
    low, high = np.percentile(sample(images), (0.1, 99.9))
    return float(low), float(high)


def sample(images: ImageSet) -> NDArray[np.uint8]:
    """Return the pixels of evenly spread images, uint8 [up to 256, H, W, 3]."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), _SAMPLE)).astype(int))
    return np.asarray(images.images[chosen])


def _colour(images: ImageSet, classes: Sequence[str], settings: Settings) -> str:
    signed = signatures(images)
    grey = (signed.max(axis=3) - signed.min(axis=3)).max(axis=(1, 2)) <= _GREY
    shares = {
        name: float(grey[images.labels == label].mean())
        for label, name in enumerate(classes)
        if (images.labels == label).any()
    }
    if grey.all():
        if pretrained_settings(settings.model) is None:
            return ""
        return (
            "all images are grey, and the backbone knows colour photographs: it may help less than usual; "
            "compare with model.tune=last and model=visionnet"
        )
    most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    if shares[most] - shares[least] < 0.5:
        return ""
    grey_of = f"{shares[most]:.0%} of the images of {shown(most)} are grey, and {shares[least]:.0%} of"
    return f"{grey_of} {shown(least)}: a network may learn the colour and not the class; save all as grey"
