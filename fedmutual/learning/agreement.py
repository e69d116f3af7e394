"""Agreement of clients' predictions on the same samples, and each client's confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Predictions = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]


def confusion(log_probabilities: Predictions, labels: Labels) -> npt.NDArray[np.int64]:
    """Count samples by true class (row) and most probable class (column), int64 [C, C].

    >>> confusion(np.log([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]), np.array([0, 0, 1])).tolist()
    [[1, 1], [0, 1]]
    """
    num_classes = log_probabilities.shape[1]
    cells = labels.astype(np.int64) * num_classes + log_probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def agreement(predictions: Sequence[Predictions]) -> npt.NDArray[np.float64]:
    """Return the share of samples on which two clients predict the same class, [K, K].

    Parameters
    ----------
    predictions : sequence of K arrays [N, C]
        At least one sample.
    """
    num_samples, num_classes = predictions[0].shape
    chosen = np.stack([p.argmax(axis=1) for p in predictions])
    same = np.zeros((len(predictions), len(predictions)))
    for position in range(num_classes):
        votes = (chosen == position).astype(np.float32)
        same += votes @ votes.T
    return np.asarray(np.rint(same) / num_samples, dtype=np.float64)


def disagreement(predictions: Sequence[Predictions]) -> npt.NDArray[np.float64]:
    """Return the Jensen-Shannon divergence of the K clients' distributions per sample, in nats [N].

    The entropy of the mean minus the mean of the entropies (Lin, 1991, doi:10.1109/18.61115): 0 where all
    predict the same distribution, at most log(min(K, C)).

    Parameters
    ----------
    predictions : sequence of K arrays [N, C]
        Log-probabilities.
    """
    mean = np.zeros(predictions[0].shape)
    entropies = np.zeros(len(mean))
    for log_p in predictions:
        p = np.exp(log_p.astype(np.float64))
        mean += p / len(predictions)
        entropies += entropy(p) / len(predictions)
    return np.maximum(entropy(mean) - entropies, 0.0)


def entropy(p: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Return the entropy of each distribution in [n, C], in nats [n], with 0 log 0 = 0."""
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    return np.asarray(-(p * logs).sum(axis=1))
