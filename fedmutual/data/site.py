"""The data of one client, and the data of the server."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import numpy as np

from fedmutual.data.cache import cache_folder
from fedmutual.data.images import DataError, ImageData, ImageSet
from fedmutual.data.intake import Intake, Pixels
from fedmutual.data.overlap import overlapping
from fedmutual.data.partition import Stream, split
from fedmutual.data.public import PublicSet, digest, public_and_private, with_views
from fedmutual.data.received import load_received
from fedmutual.data.stratify import Positions, generator, hold_out
from fedmutual.data.stream import StreamFolds
from fedmutual.logs import shown
from fedmutual.settings import Settings

PIXELS = Pixels()

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SiteData:
    """The data of one client.

    Parameters
    ----------
    classes : tuple[str, ...]
        Class names, the same at every client.
    private : ImageSet
        The images that only this client sees.
    public : PublicSet
        The public images, identical at every client.
    unseen : ImageSet | None
        Images used for evaluation only.
    train_parts, held_out_parts : tuple of int64 arrays
        Sorted positions in ``private``: one part for all rounds, or one per round (partition=stream).
    left_out : int64 array
        Sorted positions in ``private`` that are not trained on, because they are also public.
    """

    classes: tuple[str, ...]
    private: ImageSet
    public: PublicSet
    unseen: ImageSet | None
    train_parts: tuple[Positions, ...]
    held_out_parts: tuple[Positions, ...]
    left_out: Positions = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def private_digest(self) -> str:
        """The digest of the private images and their labels, 32 hex characters; see :func:`digest`."""
        return digest(self.classes, self.private, labelled=True, warm_start=None)

    def train_indices(self, round: int) -> Positions:
        """Return the sorted positions in ``private`` of a round's training images (rounds from 1)."""
        return self.train_parts[_part(round, len(self.train_parts))]

    def validation_indices(self, round: int) -> Positions:
        """Return the sorted positions in ``private`` held out up to a round (from 1), never trained on."""
        last = _part(round, len(self.held_out_parts))
        return np.sort(np.concatenate(self.held_out_parts[: last + 1]))


def _part(round: int, parts: int) -> int:
    """Return the index of a round's part; the closing message (after the last round) gets the last one."""
    if round < 1:
        raise ValueError(f"rounds are counted from 1, not {round}")
    return min(round, parts) - 1


@dataclass(frozen=True, eq=False)
class SharedData:
    """The server's data: the classes, the public set (whose digest clients must match), the unseen set."""

    classes: tuple[str, ...]
    public: PublicSet
    unseen: ImageSet | None


def load_site(
    settings: Settings,
    partition: tuple[int, int] | None,
    public_digest: str | None = None,
    whole_pool: bool = False,
    intake: Intake = PIXELS,
    images: ImageData | None = None,
) -> SiteData:
    """Load the data of one client.

    Parameters
    ----------
    settings : Settings
    partition : (partition_id, num_partitions) | None
        Its share of a pool that all clients hold; None: it owns the whole pool, and the data must include a
        public set.
    public_digest : str | None
        Digest of the server's public set. With ``public.distribute``, a client without this set uses the one
        received from the server.
    whole_pool : bool
        Take the private images of all clients (strategy=centralised).
    intake : Intake
        Of the client's model.
    images : ImageData or None
        What :func:`load_images` returned for these settings; None: they are loaded.

    Raises
    ------
    DataError
        The message names the folder or setting, and the remedy.
    """
    cache_dir = cache_folder(settings.cache_dir)
    data = load_images(settings, intake) if images is None else images
    if partition is None:
        if whole_pool:
            text = (
                "strategy=centralised reads the images of all clients, but this client has only its own: "
                "give it a partition-id and num-partitions of one pool"
            )
            raise DataError.to_everyone(text)
        return _own_site(data, settings, public_digest, intake)
    partition_id, num_clients = partition
    if not 0 <= partition_id < num_clients:
        raise DataError(f"partition-id: {partition_id} is not below num-partitions {num_clients}")
    public, private = public_and_private(data, settings, num_clients)
    if isinstance(private, StreamFolds):
        folds = [np.concatenate(f) if whole_pool else f[partition_id] for f in private.private]
        return _stream_site(data, settings, public, folds, partition_id)
    public = with_views(public, settings, intake)
    drawn = data.public is None  # from the pool, so that none of it is private
    if whole_pool:
        site = _site(data, settings, public, data.pool.subset(private), partition_id)
        return site if drawn else _apart(site, settings)
    # the split needs no pixels: read only this client's
    rows = data.pool.rows(private)
    positions = split(rows, settings.partition, num_clients, settings.seed, cache_dir)[partition_id]
    site = _site(data, settings, public, data.pool.subset(private[positions]), partition_id)
    return site if drawn else _apart(site, settings)


def load_images(settings: Settings, intake: Intake = PIXELS) -> ImageData:
    """Load the images of the settings' source, with what the model takes of them."""
    cache_dir = cache_folder(settings.cache_dir)
    return intake.of(settings.data.load(cache_dir), settings, cache_dir)


def load_shared(
    settings: Settings,
    num_clients: int | None,
    intake: Intake = PIXELS,
    images: ImageData | None = None,
) -> SharedData:
    """Load the server's data.

    Parameters
    ----------
    settings : Settings
    num_clients : int or None
        Required for partition=stream only.
    intake : Intake
        Of the settings' model.
    images : ImageData or None
        What :func:`load_images` returned for these settings; None: they are loaded.
    """
    data = load_images(settings, intake) if images is None else images
    public, _ = public_and_private(data, settings, num_clients)
    public = with_views(public, settings, intake)
    _warn_of_size(data, settings)
    return SharedData(data.classes, public, data.unseen)


def _warn_of_size(data: ImageData, settings: Settings) -> None:
    """Warn if ``public.size`` has no effect; on the server only, so once per run."""
    size = settings.public.size
    if size is None:
        return
    if isinstance(settings.partition, Stream):
        logger.warning(
            "public.size: %d has no effect with partition=stream, whose public set is one fold per round: "
            "set public.size=null",
            size,
        )
    elif data.public is not None and size > len(data.public):
        logger.warning(
            "public.size: %d is more than the %d images of the data's own public set: all are used; "
            "set public.size=null, or add images",
            size,
            len(data.public),
        )


def own_public_set(settings: Settings) -> PublicSet | None:
    """Return the public set in a client's own data; None if there is none."""
    data = settings.data.load(cache_folder(settings.cache_dir))
    return None if data.public is None else public_and_private(data, settings, None)[0]


def _own_site(data: ImageData, settings: Settings, public_digest: str | None, intake: Intake) -> SiteData:
    if settings.public.distribute and public_digest is not None:
        own = None if data.public is None else public_and_private(data, settings, None)[0]
        if own is None or own.digest != public_digest:
            cache_dir = cache_folder(settings.cache_dir)
            own = load_received(cache_dir, public_digest)
            own = replace(own, images=intake.of_received(own.images, settings, cache_dir))
        own = with_views(own, settings, intake)
        return _apart(_site(data, settings, own, data.pool, 0), settings)
    if data.public is None:
        text = (
            "a client without partition-id keeps all its images private, so its data needs its own public "
            "set: put the images that all clients share into <data.root>/public (data=folder), set "
            "data.public_split (data=huggingface), give the node a partition-id and num-partitions, or let "
            "the server send it (public.distribute=true)"
        )
        raise DataError.to_everyone(text)
    public, _ = public_and_private(data, settings, None)
    public = with_views(public, settings, intake)
    return _apart(_site(data, settings, public, data.pool, 0), settings)


def _site(
    data: ImageData, settings: Settings, public: PublicSet, private: ImageSet, partition_id: int
) -> SiteData:
    if len(private) == 0:
        raise DataError("this client has no private images: put them into <data.root>/train/<class>")
    fraction = settings.train.validation_fraction
    train, held_out = hold_out(private.labels, fraction, generator(settings.seed, "validation", partition_id))
    return SiteData(data.classes, private, public, data.unseen, (train,), (held_out,))


def _apart(site: SiteData, settings: Settings) -> SiteData:
    """Return the site without training images that are also public (privacy.overlap).

    Raises
    ------
    DataError
        There are some and the setting is ``refuse``, or nothing else is left to train on.
    """
    rule = settings.privacy.overlap
    if rule == "allow":
        return site
    (train,) = site.train_parts
    found = overlapping(site.private, site.public.images, cache_folder(settings.cache_dir))
    left_out = np.intersect1d(found, train)
    if len(left_out) == 0:
        return site
    if rule == "refuse" or len(left_out) == len(train):
        name = shown(site.private.names[int(left_out[0])])
        raise DataError(
            f"privacy.overlap={rule}: {len(left_out)} of {len(train)} private training images are also "
            f"public, or nearly, such as {name}: take them out of one of the two"
        )
    return replace(site, train_parts=(np.setdiff1d(train, left_out),), left_out=left_out)


def half(site: SiteData, number: int) -> SiteData:
    """Return the site with a random half of its private images to train on, and the other held out.

    Parameters
    ----------
    number : int
        Which half: the seed, beside the number of images. What is left out stays so.
    """
    usable = np.setdiff1d(np.arange(len(site.private)), site.left_out)
    order = np.random.default_rng([number, len(usable)]).permutation(usable)
    middle = (len(order) + 1) // 2
    return replace(site, train_parts=(np.sort(order[:middle]),), held_out_parts=(np.sort(order[middle:]),))


def overlap_text(site: SiteData) -> str:
    """Say how many private images are not trained on; for this site's own eyes."""
    count, name = len(site.left_out), shown(site.private.names[int(site.left_out[0])])
    return (
        f"{count} private training images are also public, or nearly, such as {name}: they are not trained "
        "on (privacy.overlap=exclude), as the server could tell that a model knows them"
    )


def _stream_site(
    data: ImageData, settings: Settings, public: PublicSet, folds: list[Positions], partition_id: int
) -> SiteData:
    train: list[Positions] = []
    held_out: list[Positions] = []
    start = 0
    for round, fold in enumerate(folds, start=1):
        rng = generator(settings.seed, "validation", partition_id, round)
        parts = hold_out(data.pool.labels[fold], settings.train.validation_fraction, rng)
        train.append(start + parts[0])
        held_out.append(start + parts[1])
        start += len(fold)
    private = data.pool.subset(np.concatenate(folds))
    return SiteData(data.classes, private, public, data.unseen, tuple(train), tuple(held_out))
