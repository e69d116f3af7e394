"""What a client's model takes of the images: pictures of its own size, or features of its frozen backbone.

The images of a run have one size (``data.image_size``), and the public set's digest is of these. A pretrained
backbone has its own, so its client decodes the same files once more. Clients with different backbones, and
clients without one, so agree on the public set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.backbones.features import features
from fedmutual.backbones.trunk import Tell, Trunk
from fedmutual.backbones.weights import find_backbone
from fedmutual.data.cache import cached, new_array
from fedmutual.data.decoding import PictureInput, to_rgb
from fedmutual.data.images import DataError, ImageData, ImageSet, Inputs
from fedmutual.data.intake import Intake, Pixels, own_picture
from fedmutual.settings import Settings
from fedmutual.settings.pretrained import PretrainedSettings, pretrained_settings

Find = Callable[[PictureInput], ImageSet]


def intake_of(settings: Settings, tell: Tell | None = None) -> Intake:
    """Return the intake of the settings' model; ``tell`` or the log is told the progress of features."""
    chosen = pretrained_settings(settings.model)
    return Pixels() if chosen is None else BackboneIntake(chosen, tell)


@dataclass(frozen=True)
class BackboneIntake:
    """Pictures of a backbone's size, or its features; nothing is computed before it is needed.

    Parameters
    ----------
    chosen : PretrainedSettings
    tell : callable or None
        Told the progress of features; None: the log is.
    """

    chosen: PretrainedSettings
    tell: Tell | None = None

    def of(self, data: ImageData, settings: Settings, cache_dir: Path) -> ImageData:
        """Return the images with what is made of the same files."""

        @cache
        def decoded(picture: PictureInput) -> ImageData:
            if picture == own_picture(settings):
                return data
            changes: dict[str, Any] = {"image_size": picture.size, "interpolation": picture.interpolation}
            known = {entry.name for entry in fields(settings.data)}
            source = replace(settings.data, **{k: v for k, v in changes.items() if k in known})
            found: ImageData = source.load(cache_dir)
            return found

        def with_inputs(name: str, images: ImageSet) -> ImageSet:
            def find(picture: PictureInput) -> ImageSet:
                found: ImageSet | None = getattr(decoded(picture), name)
                if found is None or found.names != images.names:
                    raise DataError(
                        f"some images of the {name} can be read at {settings.data.image_size} pixels but not "
                        f"at the backbone's {picture.size}, or the reverse: repair or remove damaged ones"
                    )
                return found

            return self._with_inputs(images, find, settings, cache_dir)

        return ImageData(
            classes=data.classes,
            pool=with_inputs("pool", data.pool),
            public=None if data.public is None else with_inputs("public", data.public),
            unseen=None if data.unseen is None else with_inputs("unseen", data.unseen),
        )

    def of_received(self, images: ImageSet, settings: Settings, cache_dir: Path) -> ImageSet:
        """Return received images with what is made of their pixels."""
        return self._with_inputs(
            images, lambda picture: _resized(images, picture, cache_dir), settings, cache_dir
        )

    def _with_inputs(self, images: ImageSet, find: Find, settings: Settings, cache_dir: Path) -> ImageSet:
        chosen = self.chosen

        def compute(views: int) -> NDArray[Any]:
            backbone = find_backbone(chosen)
            pictures = find(replace(backbone.picture, window=own_picture(settings).window))
            if chosen.tune == "all":
                return pictures.images
            trunk = Trunk(backbone, chosen.tune, views)
            return features(pictures, trunk, cache_dir, settings.device, self.tell)

        views = chosen.views if chosen.tune != "all" else 0
        return replace(
            images,
            inputs=Inputs(lambda: compute(0)),
            augmented=Inputs(lambda: compute(views)) if views else None,
        )


def _resized(images: ImageSet, picture: PictureInput, cache_dir: Path) -> ImageSet:
    from PIL import Image

    size = picture.size
    if images.images.shape[1] == size:
        return images

    def build(folder: Path) -> dict[str, NDArray[np.generic]]:
        pixels = new_array(folder, len(images), size)
        for position, image in enumerate(images.images):
            pixels[position] = to_rgb(Image.fromarray(image), size, picture.interpolation)
        return {}

    content = images.pixel_hashes().tobytes()
    entry = cached(cache_dir, f"resized-{_short(content)}-{size}-{picture.interpolation}", build)
    return replace(images, images=entry.images, hashes=entry.hashes, inputs=None, augmented=None)


def _short(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
