"""Ridge regression from sums that clients can add up (Fed3R, arXiv:2406.01116)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating]


def statistics(features: Matrix, labels: NDArray[np.integer], num_classes: int) -> tuple[Matrix, Matrix]:
    """Return what a client adds to the sums, of its features and labels.

    Parameters
    ----------
    features : float [n, F]
    labels : int [n]

    Returns
    -------
    gram : float32 [(F + 1)(F + 2) / 2]
        Upper triangle of ``Z^T Z``, row by row, where ``Z`` is the features and a column of ones.
    moment : float32 [F + 1, C]
        ``Z^T Y`` with the labels as one-hot rows ``Y``.
    """
    ones = np.ones((len(features), 1))
    z = np.concatenate([features.astype(np.float64), ones], axis=1)
    y = np.eye(num_classes)[labels]
    gram = z.T @ z
    return gram[np.triu_indices(len(gram))].astype(np.float32), (z.T @ y).astype(np.float32)


def solve(gram: Matrix, moment: Matrix, ridge: float) -> tuple[Matrix, Matrix]:
    """Return the weights of the ridge regression on one-hot labels, and their constants.

    Parameters
    ----------
    gram, moment
        Sums of the clients' :func:`statistics`.
    ridge : float
        lambda, as a share of the features' mean square; the constants are not penalised.

    Returns
    -------
    weights : float64 [C, F]
    constants : float64 [C]

    Examples
    --------
    >>> gram, moment = statistics(np.array([[-1.0], [1.0]]), np.array([0, 1]), 2)
    >>> weights, constants = solve(gram, moment, ridge=0.0)
    >>> weights.round(6).tolist(), constants.round(6).tolist()
    ([[-0.5], [0.5]], [0.5, 0.5])
    """
    size = len(moment)
    whole = np.zeros((size, size))
    whole[np.triu_indices(size)] = gram
    whole += np.triu(whole, 1).T
    penalty = np.full(size, ridge * np.trace(whole[:-1, :-1]) / max(size - 1, 1))
    penalty[-1] = 0.0
    solution = np.linalg.lstsq(whole + np.diag(penalty), moment.astype(np.float64), rcond=None)[0]
    return solution[:-1].T, solution[-1]
