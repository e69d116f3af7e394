"""Seeded, class-stratified draws without global random state, identical on every machine."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]


def generator(seed: int, *purpose: object) -> np.random.Generator:
    """Return an independent generator per purpose, from one seed."""
    return np.random.default_rng([seed, zlib.crc32(" ".join(map(str, purpose)).encode())])


def largest_remainder(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Split ``total`` into whole numbers proportional to ``shares`` (Hamilton's method).

    >>> largest_remainder(np.array([1.0, 1.0, 2.0]), 6).tolist()
    [2, 1, 3]
    """
    exact = shares / shares.sum() * total
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    # stable sort: equal remainders go to the first, on every machine
    order = np.argsort(-np.round(exact - counts, 9), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def stratified_folds(labels: NDArray[np.int64], num_folds: int, rng: np.random.Generator) -> list[Positions]:
    """Split positions into folds whose sizes and per-class counts differ by at most one.

    Each class is shuffled and dealt round-robin, continuing where the previous class stopped.

    Parameters
    ----------
    labels : int64 array [n]
    num_folds : int
        At most n, so that no fold is empty.

    Returns
    -------
    list of int64 arrays
        Sorted positions; disjoint, covering all images.
    """
    if not 1 <= num_folds <= len(labels):
        raise ValueError(f"{num_folds} folds of {len(labels)} images")
    dealt = np.concatenate([rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)])
    return [np.sort(dealt[fold::num_folds]) for fold in range(num_folds)]


def stratified_sample(labels: NDArray[np.int64], size: int, rng: np.random.Generator) -> Positions:
    """Draw ``size`` sorted positions without replacement, classes in proportion (largest remainder)."""
    if not 0 <= size <= len(labels):
        raise ValueError(f"{size} of {len(labels)} images")
    classes, counts = np.unique(labels, return_counts=True)
    if size == 0:
        return np.empty(0, dtype=np.int64)
    quotas = largest_remainder(counts.astype(np.float64), size)
    drawn = [
        rng.permutation(np.flatnonzero(labels == c))[:quota] for c, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def hold_out(
    labels: NDArray[np.int64], fraction: float, rng: np.random.Generator
) -> tuple[Positions, Positions]:
    """Split positions into a training and a held-out part, class-stratified.

    With two or more images, both parts have at least one. If ``fraction`` is 0, nothing is held out.

    Returns
    -------
    (train, held_out) : sorted int64 arrays
    """
    everything = np.arange(len(labels), dtype=np.int64)
    if fraction == 0 or len(labels) < 2:
        return everything, np.empty(0, dtype=np.int64)
    size = min(max(round(fraction * len(labels)), 1), len(labels) - 1)
    held_out = stratified_sample(labels, size, rng)
    return np.setdiff1d(everything, held_out), held_out
