"""What curious peers reconstruct of another's predictions from their targets and their own predictions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmutual.learning.consensus import MeanConsensus

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reconstructed:
    """How exactly the predictions of the others are known to so many peers who work together.

    Attributes
    ----------
    peers : int
    largest_error, mean_error : float
        In probability, over all public images, classes and others.
    explained : float
        Share of what is particular to a client (its difference from the mean of all) that is recovered.
    """

    peers: int
    largest_error: float
    mean_error: float
    explained: float


def reconstructed(
    predictions: Mapping[str, NDArray[np.floating]], divergence: str, temperature: float, peers: int
) -> Reconstructed:
    """Reconstruct as peers can: the mean of the others less what the peers know of it is the rest's mean.

    Parameters
    ----------
    predictions : mapping of float array [n, C]
        Log-probabilities of the same public images, by client.
    divergence, temperature
        Of the mutual loss, which decide what a target is the mean of.
    peers : int
        Those who work together, fewer than the clients.
    """
    names = list(predictions)
    if not 1 <= peers < len(names):
        raise ValueError(f"{peers} of {len(names)} clients")
    rest = len(names) - peers
    truth = {name: np.exp(np.asarray(values, np.float64)) for name, values in predictions.items()}
    mean = np.mean(list(truth.values()), axis=0)
    consensus = MeanConsensus(predictions, divergence, temperature)
    errors, squares, particular = [], 0.0, 0.0
    for chosen in itertools.islice(itertools.combinations(names, peers), 20):
        target = consensus.target(chosen[0])
        assert target is not None
        sent = target.log_probabilities.astype(np.float16).astype(np.float64)  # as it travels
        known = [_part(predictions[name], divergence, temperature) for name in chosen[1:]]
        total = sent if divergence != "peer_own" else np.exp(sent)
        left = (total * (len(names) - 1) - np.sum(known, axis=0)) / rest if known else total
        guess = _probabilities(left, divergence, temperature)
        for victim in set(names) - set(chosen):
            errors.append(np.abs(guess - truth[victim]))
            squares += float(((guess - truth[victim]) ** 2).sum())
            particular += float(((mean - truth[victim]) ** 2).sum())
    every = np.stack(errors)
    explained = 1 - squares / particular if particular > 0 else 0.0
    return Reconstructed(peers, float(every.max()), float(every.mean()), explained)


def _part(log_p: NDArray[np.floating], divergence: str, temperature: float) -> Floats:
    """What a client's predictions add to a target: probabilities, or log-probabilities."""
    scores = np.asarray(log_p, np.float64) / temperature
    scores -= np.logaddexp.reduce(scores, axis=1)[:, None]
    return np.asarray(np.exp(scores) if divergence == "peer_own" else scores, np.float64)


def _probabilities(part: Floats, divergence: str, temperature: float) -> Floats:
    scores = np.log(np.maximum(part, 1e-12)) if divergence == "peer_own" else part
    scores = scores * temperature
    return np.asarray(np.exp(scores - np.logaddexp.reduce(scores, axis=1)[:, None]), np.float64)
