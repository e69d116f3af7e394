"""Who holds which images: partitions of the pool over clients.

The splits are made by flwr-datasets' partitioners over a table of labels, on rows shuffled by the run's seed.
They depend on nothing but labels, natural ids, settings, number of clients and seed, and are cached, so that
only the first process pays for the import.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmutual.data.cache import locked, write_atomically
from fedmutual.data.images import DataError, ImageSet, Rows
from fedmutual.data.stratify import Positions, generator, largest_remainder
from fedmutual.settings import PartitionSettings, setting

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same settings would give another split
DIRICHLET_SEEDS = 50  # each makes 11 draws

Table = ImageSet | Rows  # pixels are not looked at


@dataclass(kw_only=True)
class Iid(PartitionSettings):
    """Equal shares, drawn at random."""


@dataclass(kw_only=True)
class Dirichlet(PartitionSettings):
    """Label skew: every class is spread over the clients by a Dirichlet draw (arXiv:1905.12022)."""

    alpha: float = setting("concentration; the smaller, the fewer classes a client holds", above=0)
    min_size: int = setting(
        "images that every client holds at least; draws are repeated until it does", minimum=1
    )


@dataclass(kw_only=True)
class Pathological(PartitionSettings):
    """Every client holds a fixed number of classes, client i the classes from i on (arXiv:1602.05629)."""

    classes_per_client: int = setting("classes that a client holds", minimum=1)


@dataclass(kw_only=True)
class Size(PartitionSettings):
    """Quantity skew: shares of different size, drawn at random."""

    weights: list[float] = setting("a client's share, one number a client; empty: client i has i + 1")

    def check(self) -> str | None:
        """Weights must be positive."""
        return f"weights: {self.weights} are not all above 0" if any(w <= 0 for w in self.weights) else None


@dataclass(kw_only=True)
class Natural(PartitionSettings):
    """All images of one natural id go to one client; dealt so that clients are about equally large."""


@dataclass(kw_only=True)
class Stream(PartitionSettings):
    """The stream of arXiv:2503.05803: every client trains on a new class-stratified fold every round.

    The public set is part of it, see :mod:`fedmutual.data.stream`.
    """


def split(
    data: Table, settings: PartitionSettings, num_clients: int, seed: int, cache_dir: Path
) -> list[Positions]:
    """Give every image to one client.

    Returns
    -------
    list of int64 arrays
        Sorted positions of each client's images: disjoint, together all of them, none empty.

    Raises
    ------
    DataError
        The settings ask for what these images cannot give; the message says what to change.
    """
    require_shares(len(data), num_clients)
    path = cache_dir / "splits" / f"{_key(data, settings, num_clients, seed)}.npz"
    if not path.is_file():
        with locked(cache_dir / "locks" / path.stem):
            if not path.is_file():
                parts = _checked(_split(data, settings, num_clients, seed), len(data))
                _save(path, parts)
    with np.load(path, allow_pickle=False) as file:
        return np.split(file["positions"], file["ends"][:-1])


def require_shares(num_images: int, num_clients: int) -> None:
    """Refuse more clients than private images.

    Raises
    ------
    DataError
    """
    if num_clients > num_images:
        raise DataError(
            f"num_clients: {num_clients} clients cannot share {num_images} images: start fewer clients"
        )


def _save(path: Path, parts: list[Positions]) -> None:
    ends = np.cumsum([len(part) for part in parts])

    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez(file, positions=np.concatenate(parts), ends=ends)

    write_atomically(path, write)


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
            f"clients {empty} would hold no image: start fewer clients or choose another partition"
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
            raise DataError(f"partition: {type(settings).__name__} does not divide images")
    return parts


def _partition(make: Callable[[Any], Any], data: Table, order: Positions) -> list[Positions]:
    """Run a partitioner of flwr-datasets over a table of shuffled rows; ``make`` gets its module."""
    import datasets
    from flwr_datasets import partitioner as partitioners

    columns: dict[str, Any] = {"index": order, "label": data.labels[order]}
    if data.groups is not None:
        columns["group"] = [data.groups[int(i)] for i in order]
    partitioner = make(partitioners)
    partitioner.dataset = datasets.Dataset.from_dict(columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # repeated draws and unused classes are ours to report
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
            f"than the {len(data)} there are: lower it or start fewer clients"
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
            f"each leave some of the {len(counts)} classes to nobody: raise it or start more clients"
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
            f"partition.weights: {len(weights)} weights for {num_clients} clients: give one a client"
        )
    # one image each comes first, so that nobody is left without
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
            f"partition=natural needs a natural id of every image, and {where}: "
            "put the images into a folder per id below their class, or set data.group_column"
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
    for images in sorted(by_id, key=len, reverse=True):  # the largest first, to whoever has least
        client = int(np.argmin(held))
        parts[client].append(images)
        held[client] += len(images)
    return [np.concatenate(part) for part in parts]
