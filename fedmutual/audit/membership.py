"""Membership inference from log-odds, with the other clients as reference.

A model is surer of images that it was trained on. How sure others are of the same image says how easy it is;
what one client is surer than the others points to its own training images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmutual.results.received import Heard

LAST = 3

Floats = NDArray[np.floating]
Scores = NDArray[np.float64]


def log_odds(log_probabilities: Floats, labels: NDArray[np.int64]) -> Scores:
    """Return ``log p(label) - log(1 - p(label))`` of predictions [n, C], [n].

    >>> log_odds(np.log([[0.8, 0.2]]), np.array([1])).round(3)
    array([-1.386])
    """
    values = np.asarray(log_probabilities, np.float64)
    rows = np.arange(len(values))
    own = values[rows, labels]
    others = values.copy()
    others[rows, labels] = -np.inf
    return np.asarray(own - np.logaddexp.reduce(others, axis=1), np.float64)


def against_others(odds: Mapping[str, Scores]) -> dict[str, Scores]:
    """Return each client's log-odds less the mean of the others'; alone, its own."""
    if len(odds) == 1:
        return dict(odds)
    total = np.sum(list(odds.values()), axis=0)
    return {name: own - (total - own) / (len(odds) - 1) for name, own in odds.items()}


def on_public(rounds: Sequence[Heard], labels: NDArray[np.int64]) -> dict[str, Scores]:
    """Return each client's score of each public image: the mean of its last :data:`LAST` rounds.

    NaN: there is none. What a model remembers grows from round to round.

    Parameters
    ----------
    labels : int64 array [N]
        Of all public images; predictions of their views are left out.
    """
    total: dict[str, Scores] = {}
    seen: dict[str, Scores] = {}
    for heard in reversed(rounds):
        images = heard.indices < len(labels)  # not the views of the last round
        indices = heard.indices[images]
        odds = {name: log_odds(values[images], labels[indices]) for name, values in heard.predictions.items()}
        for name, scores in against_others(odds).items():
            own, count = (table.setdefault(name, np.zeros(len(labels))) for table in (total, seen))
            new = count[indices] < LAST
            own[indices] += scores * new
            count[indices] += new
    return {name: np.where(seen[name] > 0, total[name] / np.maximum(seen[name], 1), np.nan) for name in total}


def likelihood_ratios(odds: Scores, shadows: NDArray[np.float64], inside: NDArray[np.bool_]) -> Scores:
    """Return LiRA's scores (arXiv:2112.03570): how much likelier log-odds are of a model that knew the image.

    Parameters
    ----------
    odds : float array [n]
        Of the attacked model.
    shadows : float array [S, n]
        Of models trained by the same recipe.
    inside : bool array [S, n]
        Whether the image was trained on.

    Notes
    -----
    Normal distributions with one variance for all images, as the paper does with few shadow models; where an
    image has none inside (or outside), the mean difference of all images stands in for its own.
    """
    known_in, known_out = inside.sum(axis=0), (~inside).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_in = (shadows * inside).sum(axis=0) / known_in
        mean_out = (shadows * ~inside).sum(axis=0) / known_out
    both = (known_in > 0) & (known_out > 0)
    shift = float((mean_in - mean_out)[both].mean()) if both.any() else 1.0
    mean_in = np.where(known_in > 0, mean_in, mean_out + shift)
    mean_out = np.where(known_out > 0, mean_out, mean_in - shift)
    spread = np.where(inside, shadows - mean_in, shadows - mean_out)
    freedom = max(spread.size - int((known_in > 0).sum() + (known_out > 0).sum()), 1)
    variance = max(float((spread**2).sum()) / freedom, 1e-6)
    return np.asarray(((odds - mean_out) ** 2 - (odds - mean_in) ** 2) / (2 * variance), np.float64)
