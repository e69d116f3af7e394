"""Consensus functions that average the predictions of all clients, a client's own included.

Each maps log-probabilities [K, N, C] of K clients to log-probabilities [N, C], float32. Numpy only.
"""

from __future__ import annotations

import numpy as np

from fedmutual.learning.consensus import FloatArray, log_softmax

TINY = np.finfo(np.float32).tiny


def mean_of_scores(predictions: FloatArray) -> FloatArray:
    """Return the softmax of the mean score, as in FedMD (arXiv:1910.03581) and FedDF (arXiv:2006.07242).

    >>> p = np.log(np.array([[[0.9, 0.1]], [[0.5, 0.5]]], np.float32))
    >>> np.exp(mean_of_scores(p)).round(3)  # odds 9 and 1: their geometric mean is 3
    array([[0.75, 0.25]], dtype=float32)
    """
    return log_softmax(predictions.mean(axis=0))


def mean_of_probabilities(predictions: FloatArray) -> FloatArray:
    """Return the plain mean of the distributions."""
    mean = np.exp(predictions.astype(np.float64)).mean(axis=0)
    return log_softmax(np.log(np.maximum(mean, TINY)))


def entropy_reduction(predictions: FloatArray, temperature: float) -> FloatArray:
    """Return the softmax of the mean distribution over a temperature: DS-FL's ERA (arXiv:2008.06180, eq. 13).

    >>> p = np.log(np.array([[[0.6, 0.4]], [[0.8, 0.2]]], np.float32))
    >>> np.exp(entropy_reduction(p, 0.1)).round(3)  # 1 / (1 + exp(-(0.7 - 0.3) / 0.1))
    array([[0.982, 0.018]], dtype=float32)
    """
    return log_softmax(np.exp(predictions.astype(np.float64)).mean(axis=0) / temperature)
