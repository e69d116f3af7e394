"""Labelled images in memory-mapped arrays: what every data source returns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.logs import shown
from fedmutual.told import Told

HASH_BYTES = 16


class DataError(Told, ValueError):
    """The data do not fit the settings; the message names the folder or setting and the remedy."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The metadata of an image set without its pixels; same fields as :class:`ImageSet`."""

    labels: NDArray[np.int64]
    groups: tuple[str, ...] | None
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


class Inputs:
    """An array computed when it is first needed: what a model takes instead of the pixels of a run.

    Parameters
    ----------
    compute : callable
        Returns the array, one row an image.
    """

    def __init__(self, compute: Callable[[], NDArray[Any]]) -> None:
        self._compute = compute

    @cached_property
    def array(self) -> NDArray[Any]:
        """The array: uint8 [n, S, S, 3] pixels, float [n, F] features, or float [n, h, w, K] maps."""
        return self._compute()

    def subset(self, positions: NDArray[np.integer]) -> Inputs:
        """Return the rows at these positions, computed when they are needed."""
        return Inputs(lambda: self.array[positions])


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with their labels, in a fixed order.

    Parameters
    ----------
    images : uint8 array [n, H, W, 3]
        RGB pixels, read-only, usually memory-mapped.
    labels : int64 array [n]
        Position in the class names; -1 if unlabelled.
    groups : tuple[str, ...] | None
        Natural id of every image (a person, a site); None if the source has none.
    names : tuple[str, ...]
        File name or id of every image.
    hashes : uint8 array [n, 16] | None
        Cached BLAKE2b hash of each image's pixels; None: computed on request.
    facts : float64 array [n, 4] | None
        Of every image's file: width, height, and the least and largest value of a grey picture of more than 8
        bits, else NaN; None: unknown.
    inputs : Inputs | None
        What this client's model takes; None: ``images``.
    augmented : Inputs | None
        The same of augmented views, [n, views, ...]; None: there are none.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    groups: tuple[str, ...] | None
    names: tuple[str, ...]
    hashes: NDArray[np.uint8] | None = None
    facts: NDArray[np.float64] | None = None
    inputs: Inputs | None = None
    augmented: Inputs | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.labels), len(self.names)} | (
            {len(self.groups)} if self.groups is not None else set()
        )
        if lengths != {len(self.images)} or self.images.ndim != 4:
            raise ValueError(f"{self.images.shape} images, but labels, names and groups of {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, positions: NDArray[np.integer]) -> ImageSet:
        """Return the images at these positions, in this order; no copy for all positions in order."""
        if len(positions) == len(self) and np.array_equal(positions, np.arange(len(self))):
            return self
        rows = self.rows(positions)
        return ImageSet(
            images=self.images[positions],
            labels=rows.labels,
            groups=rows.groups,
            names=rows.names,
            hashes=None if self.hashes is None else self.hashes[positions],
            facts=None if self.facts is None else self.facts[positions],
            inputs=None if self.inputs is None else self.inputs.subset(positions),
            augmented=None if self.augmented is None else self.augmented.subset(positions),
        )

    @property
    def seen(self) -> NDArray[Any]:
        """What this client's model takes of each image, see :attr:`Inputs.array`."""
        return self.images if self.inputs is None else self.inputs.array

    def rows(self, positions: NDArray[np.integer]) -> Rows:
        """Return the metadata of the images at these positions, without reading pixels."""
        chosen = [int(p) for p in positions]
        return Rows(
            labels=self.labels[positions],
            groups=None if self.groups is None else tuple(self.groups[p] for p in chosen),
            names=tuple(self.names[p] for p in chosen),
        )

    def pixel_hashes(self) -> NDArray[np.uint8]:
        """Return the BLAKE2b hash of each image's pixels, uint8 [n, 16]."""
        return pixel_hashes(self.images) if self.hashes is None else self.hashes


def joined(first: ImageSet, second: ImageSet) -> ImageSet:
    """Return the images of both, without groups, facts and augmented views."""
    inputs = None
    if first.inputs is not None and second.inputs is not None:
        parts = first.inputs, second.inputs
        inputs = Inputs(lambda: np.concatenate([part.array for part in parts]))
    return ImageSet(
        images=np.concatenate([first.images, second.images]),
        labels=np.concatenate([first.labels, second.labels]),
        groups=None,
        names=first.names + second.names,
        inputs=inputs,
    )


@dataclass(frozen=True, eq=False)
class ImageData:
    """The image sets of a data source.

    Parameters
    ----------
    classes : tuple[str, ...]
        Class names, without control characters; a label is a position in it.
    pool : ImageSet
        The images from which the clients' data are drawn (and the public set, if the source has none).
    public : ImageSet | None
        The source's own public images.
    unseen : ImageSet | None
        Images used for evaluation only.
    """

    classes: tuple[str, ...]
    pool: ImageSet
    public: ImageSet | None
    unseen: ImageSet | None

    def __post_init__(self) -> None:
        require_plain(self.classes)


def require_plain(classes: Iterable[str]) -> None:
    """Refuse class names that terminals and files would not show as they are.

    Raises
    ------
    DataError
        A name has control characters, or is no UTF-8.
    """
    for name in classes:
        if shown(name) != name:
            wrong = (
                "is no UTF-8" if any("\ud800" <= c <= "\udfff" for c in name) else "has control characters"
            )
            raise DataError(f"the class name '{shown(name)}' {wrong}: rename the class (its folder or label)")


def pixel_hashes(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the BLAKE2b hash of each image's pixels, uint8 [n, 16]."""
    hashes = np.empty((len(images), HASH_BYTES), dtype=np.uint8)
    for row, image in zip(hashes, images, strict=True):
        pixels = np.ascontiguousarray(image)
        row[:] = np.frombuffer(hashlib.blake2b(pixels.data, digest_size=HASH_BYTES).digest(), dtype=np.uint8)
    return hashes


def empty_set(image_size: int) -> ImageSet:
    """Return an empty image set."""
    pixels = np.empty((0, image_size, image_size, 3), dtype=np.uint8)
    return ImageSet(images=pixels, labels=np.empty(0, dtype=np.int64), groups=None, names=())
