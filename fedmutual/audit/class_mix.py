"""What the predictions of the first round say of a client's class shares and of its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
SHUFFLES = 2000


@dataclass(frozen=True)
class Explained:
    """How much of the differences between the clients an estimate explains.

    Attributes
    ----------
    at_face_value : float or None
        ``1 - SSE / SST`` of the estimates as they are; below 0: worse than saying the mean of all. None: the
        estimate has no scale.
    calibrated : float
        Squared correlation: of an attacker who knows which way, and how far, estimates are off (such as what
        prior correction does to them).
    chance : float
        The same with the clients exchanged at random: with few clients it is far from 0.
    clients : int
    """

    at_face_value: float | None
    calibrated: float
    chance: float
    clients: int


def class_mix(predictions: Mapping[str, Floats], shares: Mapping[str, Floats]) -> Explained:
    """Estimate class shares by the mean predicted distribution.

    Parameters
    ----------
    predictions : mapping of float array [n, C]
        Log-probabilities of the same public images, by client.
    shares : mapping of float array [C]
        The truth.
    """
    names = [name for name in predictions if name in shares]
    estimates = np.stack([np.exp(np.asarray(predictions[name], np.float64)).mean(axis=0) for name in names])
    truth = np.stack([shares[name] for name in names]).astype(np.float64)
    return _explained(estimates, truth, scaled=True)


def size_mix(predictions: Mapping[str, Floats], sizes: Mapping[str, int]) -> Explained:
    """Estimate the logarithm of the number of training images by the mean certainty of predictions."""
    names = [name for name in predictions if name in sizes]
    certainty = [-_entropy(np.asarray(predictions[name], np.float64)) for name in names]
    truth = np.log([[float(sizes[name])] for name in names])
    return _explained(np.array(certainty)[:, None], truth, scaled=False)


def _entropy(log_p: NDArray[np.float64]) -> float:
    return float(-(np.exp(log_p) * log_p).sum(axis=1).mean())


def _explained(estimates: Floats, truth: Floats, *, scaled: bool) -> Explained:
    """Compare [K, C]; both lose the mean over the clients, except for the face value."""
    spread = ((truth - truth.mean(axis=0)) ** 2).sum()
    face = 1 - ((estimates - truth) ** 2).sum() / spread if scaled and spread > 0 else None
    rng = np.random.default_rng(0)
    shuffled = [_correlation(estimates, rng.permutation(truth)) for _ in range(SHUFFLES)]
    own = _correlation(estimates, truth)
    return Explained(None if face is None else float(face), own, float(np.mean(shuffled)), len(truth))


def _correlation(one: Floats, other: Floats) -> float:
    """Squared correlation of what differs between the clients; 0 where nothing does."""
    first, second = (values - values.mean(axis=0) for values in (one, other))
    norms = float((first**2).sum() * (second**2).sum())
    return 0.0 if norms < 1e-20 else float((first * second).sum() ** 2 / norms)
