"""What a client's model takes of the images: their pixels, or what is made of them for it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from fedmutual.data.decoding import PictureInput, PictureSettings
from fedmutual.data.images import ImageData, ImageSet
from fedmutual.settings import Settings


class Intake(Protocol):
    """Adds to images what a model takes of them (:attr:`fedmutual.data.images.ImageSet.inputs`)."""

    def of(self, data: ImageData, settings: Settings, cache_dir: Path) -> ImageData:
        """Return a data source's images with it."""

    def of_received(self, images: ImageSet, settings: Settings, cache_dir: Path) -> ImageSet:
        """Return images of which there are no files here with it."""


class Pixels:
    """The intake of models that take the pixels of the run as they are."""

    def of(self, data: ImageData, settings: Settings, cache_dir: Path) -> ImageData:
        """Return the images themselves."""
        return data

    def of_received(self, images: ImageSet, settings: Settings, cache_dir: Path) -> ImageSet:
        """Return the images themselves."""
        return images


def own_picture(settings: Settings) -> PictureInput:
    """Return the pictures of the run, which models without a backbone take."""
    chosen = settings.data
    return chosen.picture if isinstance(chosen, PictureSettings) else PictureInput(chosen.image_size)
