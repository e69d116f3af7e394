"""How well scores tell members from others: AUC and TPR at a low FPR, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FPR = 0.01
DRAWS = 1000

Scores = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Leak:
    """What an attack achieves.

    Attributes
    ----------
    auc : float
        Probability that a member has a higher score than another image; ties count half. 0.5: nothing.
    tpr : float
        Share of the members that are found where at most :data:`FPR` of the others are taken for members.
    auc_interval, tpr_interval : tuple[float, float]
        95 % bootstrap intervals (seeded; whole images are drawn).
    members, others : int
        Numbers of scores.
    """

    auc: float
    tpr: float
    auc_interval: Interval
    tpr_interval: Interval
    members: int
    others: int


def measured(
    scores: Scores, member: NDArray[np.bool_], images: NDArray[np.int64] | None = None, seed: int = 0
) -> Leak:
    """Measure an attack.

    Parameters
    ----------
    scores : float array [n]
        Higher: rather a member.
    member : bool array [n]
    images : int array [n] or None
        Which image a score is of, where there are several of one: these are not independent. None: each is
        of an image of its own.

    Raises
    ------
    ValueError
        There are no members, or nothing but members.
    """
    if member.all() or not member.any():
        raise ValueError("there are no members, or nothing but members")
    levels, place = np.unique(-scores, return_inverse=True)  # from the highest score down
    areas, rates = [], []
    for weights in _drawn(member, np.arange(len(scores)) if images is None else images, seed):
        inside = np.bincount(place, weights * member, len(levels)).astype(np.float64)
        outside = np.bincount(place, weights * ~member, len(levels)).astype(np.float64)
        areas.append(_area(inside, outside))
        rates.append(_rate(inside, outside))
    auc, tpr = (tuple(np.percentile(values[1:], [2.5, 97.5]).tolist()) for values in (areas, rates))
    return Leak(areas[0], rates[0], auc, tpr, int(member.sum()), int((~member).sum()))


def centred(scores: Scores, groups: NDArray[np.int64]) -> Scores:
    """Return scores less the median of their group: how easy a client's or a class' images are is no leak."""
    result = scores.copy()
    for group in np.unique(groups):
        chosen = groups == group
        result[chosen] -= np.median(scores[chosen])
    return result


def _drawn(member: NDArray[np.bool_], images: NDArray[np.int64], seed: int) -> Iterator[NDArray[np.int64]]:
    """Return how often each score counts, [n]: as they are, and then in each bootstrap sample."""
    rng = np.random.default_rng(seed)
    kinds = [(kind, *np.unique(images[kind], return_inverse=True)) for kind in (member, ~member)]
    weights = np.ones(len(member), np.int64)
    yield weights
    for _ in range(DRAWS):
        for kind, own, place in kinds:
            weights[kind] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)))[place]
        yield weights


def _area(inside: Scores, outside: Scores) -> float:
    below = outside.sum() - np.cumsum(outside)
    return float((inside * (below + outside / 2)).sum() / (inside.sum() * outside.sum()))


def _rate(inside: Scores, outside: Scores) -> float:
    allowed = np.cumsum(outside) <= FPR * outside.sum()
    return float(inside[: int(allowed.argmin()) if not allowed.all() else None].sum() / inside.sum())
