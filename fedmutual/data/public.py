"""The public set: the images that every client predicts, their digest, and each round's selection."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.cache import cache_folder
from fedmutual.data.images import DataError, ImageData, ImageSet, joined
from fedmutual.data.intake import Intake
from fedmutual.data.partition import Stream
from fedmutual.data.stratify import Positions, generator, stratified_folds, stratified_sample
from fedmutual.data.stream import StreamFolds, stream_folds
from fedmutual.data.views import affine_views
from fedmutual.settings import PublicSettings, Settings
from fedmutual.settings.pretrained import tunes_head

DEFAULT_SHARE = 0.15  # of the pool
DIGEST_FORMAT = 1


@dataclass(frozen=True, eq=False)
class PublicSet:
    """The public images, identical at every client and at the server.

    Parameters
    ----------
    images : ImageSet
        With the source's labels, which are used for training only if ``public.labelled`` is set.
    warm_start : ImageSet | None
        The labelled fold for training the common start (partition=stream only).
    folds : tuple of int32 arrays | None
        One fold per round, where the partition defines them (partition=stream only).
    digest : str
        Hex digest of the content without ``views``, see :func:`digest`.
    views : int
        How many views of the images the last round adds (``public.fill``).
    make_filled : callable | None
        Returns the images and views of them; None: the images alone.
    """

    images: ImageSet
    warm_start: ImageSet | None
    folds: tuple[NDArray[np.int32], ...] | None
    digest: str
    views: int = 0
    make_filled: Callable[[], ImageSet] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def filled(self) -> ImageSet:
        """The images and behind them their views, made when they are first needed."""
        return self.images if self.make_filled is None else self.make_filled()

    def indices(self, settings: PublicSettings, seed: int, round: int, rounds: int) -> NDArray[np.int32]:
        """Return the sorted positions of the public images of a round.

        static: all, the views in the last round only. kfold: one class-stratified fold per round (the
        stream's folds with partition=stream); with more rounds than folds, the folds repeat. sample: a seeded
        random subset.

        Parameters
        ----------
        round : int
            Counted from 1.
        rounds : int
            Rounds of the run: the number of folds.
        """
        if round < 1:
            raise ValueError(f"rounds are counted from 1, not {round}")
        if settings.schedule == "static":
            count = len(self) + (self.views if round >= rounds else 0)
            return np.arange(count, dtype=np.int32)
        if settings.schedule == "sample":
            size = settings.per_round or max(len(self) // 4, 1)
            rng = generator(seed, "public sample", round)
            return np.sort(rng.choice(len(self), size=size, replace=False)).astype(np.int32)
        if self.folds is not None:
            return self.folds[(round - 1) % len(self.folds)]
        folds = stratified_folds(self.images.labels, min(rounds, len(self)), generator(seed, "public folds"))
        return folds[(round - 1) % len(folds)].astype(np.int32)


def public_and_private(
    data: ImageData, settings: Settings, num_clients: int | None
) -> tuple[PublicSet, Positions | StreamFolds]:
    """Return the public set and the private images of the pool.

    Parameters
    ----------
    num_clients : int | None
        Clients of the run (only partition=stream needs it).

    Returns
    -------
    (public, private)
        ``private``: sorted positions of the pool images outside the public set, or the folds of the stream.

    Raises
    ------
    DataError
        The public set would be empty or larger than the pool, or lacks labels that the settings need.
    """
    private: Positions | StreamFolds
    if isinstance(settings.partition, Stream):
        public, private = _from_stream(data, settings, num_clients)
    else:
        images, private = _own(data, settings) if data.public is not None else _drawn(data, settings)
        public = _public_set(data.classes, images, settings.public.labelled)
    _check(public, settings.public)
    return public, private


def with_views(public: PublicSet, settings: Settings, intake: Intake) -> PublicSet:
    """Let the last round add views of the images up to ``public.fill``; the same at every client.

    A client makes them only for an order that names them: whether one does is the server's to say, which
    knows the model of the run.
    """
    missing = settings.public.fill - len(public)
    if missing <= 0 or len(public) == 0:
        return public
    make = partial(_filled, public, missing, settings, intake)
    return replace(public, views=missing if _adds_views(settings) else 0, make_filled=make)


def _adds_views(settings: Settings) -> bool:
    """Return whether all clients predict the last round's images: those of a part would teach too little."""
    all_answer = settings.participation.is_full and settings.exchange.enough_clients is None
    from_pixels = not isinstance(settings.partition, Stream) and not tunes_head(settings.model)
    return settings.strategy.fills_public and all_answer and from_pixels


def _filled(public: PublicSet, missing: int, settings: Settings, intake: Intake) -> ImageSet:
    key = (public.digest, missing, settings.seed)
    if public.images.inputs is None and key in _FILLED:
        return _FILLED[key]
    views = affine_views(public.images, missing, settings.seed)
    images = joined(public.images, intake.of_received(views, settings, cache_folder(settings.cache_dir)))
    if images.inputs is None:
        _FILLED.clear()
        _FILLED[key] = images
    return images


_FILLED: dict[tuple[str, int, int], ImageSet] = {}  # the last one, which the clients of a process share


def _from_stream(
    data: ImageData, settings: Settings, num_clients: int | None
) -> tuple[PublicSet, StreamFolds]:
    if num_clients is None:
        raise DataError(
            "partition=stream splits one pool over the clients: it needs num_clients and partition-id"
        )
    if data.public is not None:
        raise DataError(
            "partition=stream draws its public folds from the pool: remove the data's public folder"
        )
    folds = stream_folds(data.pool.labels, num_clients, settings.rounds, settings.seed)
    ends = np.cumsum([len(fold) for fold in folds.public])
    rounds = np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1])
    images = data.pool.subset(np.concatenate(folds.public))
    warm_start = data.pool.subset(folds.warm_start)
    return _public_set(data.classes, images, settings.public.labelled, warm_start, tuple(rounds)), folds


def _own(data: ImageData, settings: Settings) -> tuple[ImageSet, Positions]:
    assert data.public is not None
    size, images = settings.public.size, data.public
    if size is not None and size < len(images):
        images = images.subset(stratified_sample(images.labels, size, generator(settings.seed, "public")))
    return images, np.arange(len(data.pool), dtype=np.int64)


def _drawn(data: ImageData, settings: Settings) -> tuple[ImageSet, Positions]:
    total = len(data.pool)
    size = drawn_size(total, settings.public)
    chosen = stratified_sample(data.pool.labels, size, generator(settings.seed, "public"))
    return data.pool.subset(chosen), np.setdiff1d(np.arange(total, dtype=np.int64), chosen)


def drawn_size(total: int, settings: PublicSettings) -> int:
    """Return how many images of a pool become public.

    Raises
    ------
    DataError
        No image would stay private.
    """
    size = settings.size if settings.size is not None else max(round(DEFAULT_SHARE * total), 1)
    if size >= total:
        raise DataError(f"public.size: {size} of the pool's {total} images leaves no private image: lower it")
    return size


def _check(public: PublicSet, settings: PublicSettings) -> None:
    if len(public) == 0:
        raise DataError(
            "the public set is empty: put images into the data's public folder, or remove the folder"
        )
    if settings.labelled and bool((public.images.labels < 0).any()):
        raise DataError(
            "public.labelled: the public images have no labels: set public.labelled=false, "
            "or put them into a folder per class"
        )
    if settings.schedule == "sample" and settings.per_round is not None and settings.per_round > len(public):
        raise DataError(
            f"public.per_round: {settings.per_round} is more than the {len(public)} public images"
        )


def _public_set(
    classes: tuple[str, ...],
    images: ImageSet,
    labelled: bool,
    warm_start: ImageSet | None = None,
    folds: tuple[NDArray[np.int32], ...] | None = None,
) -> PublicSet:
    return PublicSet(images, warm_start, folds, digest(classes, images, labelled, warm_start))


def digest(classes: tuple[str, ...], images: ImageSet, labelled: bool, warm_start: ImageSet | None) -> str:
    """Return the digest of a public set's content, 32 hex characters.

    It covers the class names, the image size, every image's decoded pixels in order, the labels if they are
    used, and the labelled warm-start fold. It is computed from the cached hash of each image, without reading
    pixels.
    """
    head = {
        "format": DIGEST_FORMAT,
        "classes": classes,
        "size": images.images.shape[1:],
        "images": len(images),
        "labelled": labelled,
        "warm_start": None if warm_start is None else len(warm_start),
    }
    state = hashlib.blake2b(json.dumps(head).encode(), digest_size=16)
    state.update(images.pixel_hashes().tobytes())
    if labelled:
        state.update(images.labels.astype("<i8").tobytes())
    if warm_start is not None:
        state.update(warm_start.pixel_hashes().tobytes())
        state.update(warm_start.labels.astype("<i8").tobytes())
    return state.hexdigest()
