"""A table with 64 columns and 10 classes, split between the clients."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

CLASSES = 10
PUBLIC, TEST = 300, 400  # rows; the other 1097 are private
LEAST = 30  # a client has at least so many rows

Features = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Data:
    """What a client holds: its own rows, and the two parts that every client holds."""

    x: Features
    y: Labels
    public: Features
    test_x: Features
    test_y: Labels


def load_data(partition: int, partitions: int, alpha: float, seed: int) -> Data:
    """A client's data; how often it sees a class is drawn from a Dirichlet distribution."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    public, test, private = np.split(rng.permutation(len(y)), [PUBLIC, PUBLIC + TEST])
    owner = np.zeros_like(private)
    while np.bincount(owner, minlength=partitions).min() < LEAST:
        shares = rng.dirichlet([alpha] * partitions, CLASSES)
        owner = np.array([rng.choice(partitions, p=shares[label]) for label in y[private]])
    own = private[owner == partition]
    return Data(x[own], y[own], x[public], x[test], y[test])
