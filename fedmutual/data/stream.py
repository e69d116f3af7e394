"""The stream of arXiv:2503.05803: a new fold of the pool per client and round (METHOD.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmutual.data.images import DataError
from fedmutual.data.stratify import Positions, generator, stratified_folds


@dataclass(frozen=True, eq=False)
class StreamFolds:
    """Folds of the stream: positions in the pool.

    Parameters
    ----------
    warm_start : int64 array
        The labelled fold for training the common start.
    private : tuple of rounds of tuples of int64 arrays
        ``private[r][i]`` is the training fold of client i in round r + 1.
    public : tuple of int64 arrays
        One fold per round.
    """

    warm_start: Positions
    private: tuple[tuple[Positions, ...], ...]
    public: tuple[Positions, ...]


def num_folds(num_images: int, num_clients: int, rounds: int) -> int:
    """Return the number of folds of a stream.

    Raises
    ------
    DataError
        A fold would have fewer than two images (one to train on, one to hold out).
    """
    count = (num_clients + 1) * rounds + 1
    if num_images < 2 * count:
        raise DataError(
            f"partition=stream splits the pool into (clients + 1) * rounds + 1 = {count} folds, "
            f"too many for its {num_images} images: set fewer rounds or clients, or add images"
        )
    return count


def stream_folds(labels: NDArray[np.int64], num_clients: int, rounds: int, seed: int) -> StreamFolds:
    """Split the pool into (K + 1) * R + 1 class-stratified folds: METHOD.md section 3, arXiv:2503.05803.

    Raises
    ------
    DataError
        Too few images, see :func:`num_folds`.
    """
    count = num_folds(len(labels), num_clients, rounds)
    folds = stratified_folds(labels, count, generator(seed, "stream"))
    step = num_clients + 1
    starts = range(1, count, step)
    return StreamFolds(
        warm_start=folds[0],
        private=tuple(tuple(folds[start : start + num_clients]) for start in starts),
        public=tuple(folds[start + num_clients] for start in starts),
    )
