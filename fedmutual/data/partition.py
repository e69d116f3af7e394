"""Partitions of the pool over the clients.

The partitioners of flwr-datasets split a table of labels whose rows are shuffled by the run's seed. A split
depends only on labels, natural ids, settings, number of clients and seed. Splits are cached, so only the
first process imports flwr-datasets.
"""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmutual.data.cache import lock
from fedmutual.data.images import DataError, ImageSet, Rows
from fedmutual.data.stratify import Positions, generator, largest_remainder
from fedmutual.files.atomic import atomic_write
from fedmutual.settings import PartitionSettings, setting

logger = logging.getLogger(__name__)

FORMAT = 1  # increase it when the same settings give another split
DIRICHLET_SEEDS = 50  # 11 draws each

Table = ImageSet | Rows  # only metadata is used, never pixels


@dataclass(kw_only=True)
class Iid(PartitionSettings):
    """IID: equal shares, drawn at random."""


@dataclass(kw_only=True)
class Dirichlet(PartitionSettings):
    """Label skew: a Dirichlet draw per class gives each client's share of it (arXiv:1905.12022)."""

    alpha: float = setting("concentration; smaller means more label skew", above=0)
    min_size: int = setting("minimum images per client; the draw is repeated until it holds", minimum=1)


@dataclass(kw_only=True)
class Pathological(PartitionSettings):
    """Label skew: client i holds a fixed number of classes, starting at class i (arXiv:1602.05629)."""

    classes_per_client: int = setting("number of classes per client", minimum=1)


@dataclass(kw_only=True)
class Size(PartitionSettings):
    """Quantity skew: random shares of different sizes."""

    weights: list[float] = setting("relative share of each client; empty: i + 1 for client i")

    def check(self) -> str | None:
        """Reject weights that are not positive."""
        return f"weights: {self.weights} are not all above 0" if any(w <= 0 for w in self.weights) else None


@dataclass(kw_only=True)
class Natural(PartitionSettings):
    """Assign all images of a natural id to one client; balance the clients' sizes."""


@dataclass(kw_only=True)
class Stream(PartitionSettings):
    """The stream of arXiv:2503.05803: a new class-stratified training fold per client and round.

    The stream also defines the public set, see :mod:`fedmutual.data.stream`.
    """


def split(
    data: Table, settings: PartitionSettings, num_clients: int, seed: int, cache_dir: Path
) -> list[Positions]:
    """Assign every image to one client.

    Returns
    -------
    list of int64 arrays
        Sorted positions of each client's images; disjoint, covering all images, none empty.

    Raises
    ------
    DataError
        The settings are impossible with these images; the message says what to change.
    """
    require_shares(len(data), num_clients)
    path = cache_dir / "splits" / f"{_key(data, settings, num_clients, seed)}.npz"
    saved = _load(path)
    if saved is None:
        with lock(cache_dir, path.stem):
            saved = _load(path)
            if saved is None:
                saved = _checked(_split(data, settings, num_clients, seed), len(data))
                _save(path, saved)
    return saved


def require_shares(num_images: int, num_clients: int) -> None:
    """Reject more clients than private images.

    Raises
    ------
    DataError
    """
    if num_clients > num_images:
        raise DataError(
            f"num_clients: {num_clients} clients cannot share {num_images} images: start fewer clients"
        )


def _save(path: Path, parts: list[Positions]) -> None:
    content = io.BytesIO()
    np.savez(content, positions=np.concatenate(parts), ends=np.cumsum([len(part) for part in parts]))
    atomic_write(path, content.getvalue())


def _load(path: Path) -> list[Positions] | None:
    """Read a saved split; None if there is none, or it is damaged and has to be made again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return np.split(file["positions"], file["ends"][:-1])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged (%s) and made again", path, error)
        return None


def _key(data: Table, settings: PartitionSettings, num_clients: int, seed: int) -> str:
    head = (
        FORMAT,
        type(settings).__qualname__,
        sorted(asdict(settings).items()),
        num_clients,
        seed,
        data.groups,
    )
    return hashlib.blake2b(repr(head).encode() + data.labels.tobytes(), digest_size=16).hexdigest()


def _checked(parts: list[Positions], num_images: int) -> list[Positions]:
    if any(len(part) == 0 for part in parts):
        empty = [i for i, part in enumerate(parts) if len(part) == 0]
        raise DataError(
            f"clients {empty} would get no images: start fewer clients or choose another partition"
        )
    parts = [np.sort(part) for part in parts]
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(num_images)):
        raise DataError("the partitioner lost or repeated images: choose another partition")
    return parts


def _split(data: Table, settings: PartitionSettings, num_clients: int, seed: int) -> list[Positions]:
    rng = generator(seed, "partition", type(settings).__name__)
    order = rng.permutation(len(data))
    draw = int(rng.integers(2**31))
    match settings:
        case Iid():
            parts = _partition(_iid(num_clients), data, order)
        case Dirichlet():
            parts = _dirichlet(data, order, settings, num_clients, draw)
        case Pathological():
            parts = _pathological(data, order, settings, num_clients, draw)
        case Size():
            parts = _sizes(data, order, settings, num_clients)
        case Natural():
            parts = _natural(data, num_clients)
        case _:
            raise DataError(f"partition: {type(settings).__name__} does not split images")
    return parts


def _partition(make: Callable[[Any], Any], data: Table, order: Positions) -> list[Positions]:
    """Run a flwr-datasets partitioner on a table of shuffled rows; ``make`` gets the partitioner module."""
    import datasets
    from flwr_datasets import partitioner as partitioners

    columns: dict[str, Any] = {"index": order, "label": data.labels[order]}
    if data.groups is not None:
        columns["group"] = [data.groups[int(i)] for i in order]
    partitioner = make(partitioners)
    partitioner.dataset = datasets.Dataset.from_dict(columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # we report repeated draws and unused classes ourselves
        count = partitioner.num_partitions
        return [np.asarray(partitioner.load_partition(i)["index"], dtype=np.int64) for i in range(count)]


def _iid(num_clients: int) -> Callable[[Any], Any]:
    return lambda partitioners: partitioners.IidPartitioner(num_partitions=num_clients)


def _dirichlet(
    data: Table, order: Positions, settings: Dirichlet, num_clients: int, draw: int
) -> list[Positions]:
    if settings.min_size * num_clients > len(data):
        raise DataError(
            f"partition.min_size: {num_clients} clients of at least {settings.min_size} images need more "
            f"than the {len(data)} available: lower it or start fewer clients"
        )
    for attempt in range(DIRICHLET_SEEDS):
        seed = draw + attempt
        try:
            return _partition(
                lambda partitioners: partitioners.DirichletPartitioner(
                    num_partitions=num_clients,
                    partition_by="label",
                    alpha=settings.alpha,
                    min_partition_size=settings.min_size,
                    self_balancing=False,
                    seed=seed,  # noqa: B023 (called at once)
                ),
                data,
                order,
            )
        except ValueError:
            logger.debug("Dirichlet seed %d leaves a client below %d images", seed, settings.min_size)
    raise DataError(
        f"no Dirichlet(partition.alpha={settings.alpha}) draw of {DIRICHLET_SEEDS * 11} gave all "
        f"{num_clients} clients partition.min_size={settings.min_size} images: raise alpha, lower min_size "
        "or start fewer clients"
    )


def _pathological(
    data: Table, order: Positions, settings: Pathological, num_clients: int, draw: int
) -> list[Positions]:
    counts = np.unique(data.labels, return_counts=True)[1]
    if settings.classes_per_client > len(counts):
        raise DataError(
            f"partition.classes_per_client: {settings.classes_per_client} is more than the "
            f"{len(counts)} classes of the pool"
        )
    if settings.classes_per_client + num_clients - 1 < len(counts):
        raise DataError(
            f"partition.classes_per_client: {num_clients} clients with {settings.classes_per_client} classes "
            f"each leave some of the {len(counts)} classes unassigned: raise it or start more clients"
        )
    try:
        return _partition(
            lambda partitioners: partitioners.PathologicalPartitioner(
                num_partitions=num_clients,
                partition_by="label",
                num_classes_per_partition=settings.classes_per_client,
                class_assignment_mode="deterministic",
                seed=draw,
            ),
            data,
            order,
        )
    except ValueError as error:
        raise DataError(
            f"{num_clients} clients are too many for the smallest class of {counts.min()} images: {error}"
        ) from error


def _sizes(data: Table, order: Positions, settings: Size, num_clients: int) -> list[Positions]:
    weights = settings.weights or [float(i + 1) for i in range(num_clients)]
    if len(weights) != num_clients:
        raise DataError(
            f"partition.weights: {len(weights)} weights for {num_clients} clients: give one per client"
        )
    # one image each first, so that no client is empty
    sizes = 1 + largest_remainder(np.asarray(weights, dtype=np.float64), len(data) - num_clients)
    return _partition(
        lambda partitioners: partitioners.SizePartitioner(partition_sizes=[int(s) for s in sizes]),
        data,
        order,
    )


def _natural(data: Table, num_clients: int) -> list[Positions]:
    if data.groups is None or "" in data.groups:
        where = "no image has one" if data.groups is None else f"{data.names[data.groups.index('')]} has none"
        raise DataError(
            f"partition=natural needs a natural id for every image, but {where}: "
            "put the images into one folder per id below their class, or set data.group_column"
        )
    by_id = _partition(
        lambda partitioners: partitioners.NaturalIdPartitioner(partition_by="group"),
        data,
        np.arange(len(data), dtype=np.int64),
    )
    if len(by_id) < num_clients:
        raise DataError(f"{num_clients} clients cannot share {len(by_id)} natural ids: start fewer clients")
    if len(by_id) == num_clients:  # client i is the i-th id in sorted order
        return by_id
    parts: list[list[Positions]] = [[] for _ in range(num_clients)]
    held = np.zeros(num_clients, dtype=np.int64)
    for images in sorted(by_id, key=len, reverse=True):  # largest id first, to the smallest client
        client = int(np.argmin(held))
        parts[client].append(images)
        held[client] += len(images)
    return [np.concatenate(part) for part in parts]
