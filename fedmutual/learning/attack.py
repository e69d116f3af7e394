"""Emulated attacks: what hostile clients report instead of their predictions, for robustness studies."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedmutual.learning.consensus import FloatArray, log_softmax

ATTACKS = ("none", "label_flip", "random", "constant", "one_hot")
SURE = 1e-6  # probability that a one-hot attack leaves to the other classes, before the floor of the wire


def poisoned(attack: str, log_probabilities: FloatArray, known: FloatArray | None, seed: int) -> FloatArray:
    """Return the log-probabilities [N, C] that a hostile client sends.

    Parameters
    ----------
    attack : str
        ``label_flip``: its own prediction, with each class's probability moved to the next class; ``random``:
        a random class with probability 1; ``constant``: always class 0; ``one_hot``: probability 1 for the
        class that it believes least probable (loss maximisation, arXiv:2402.12265).
    log_probabilities : float32 [N, C]
        Its honest predictions.
    known : float32 [N, C] or None
        The previous round's consensus on the same samples, if it received one.
    seed : int
        Seed of this client and round.

    Raises
    ------
    ValueError
        Unknown attack.

    >>> p = np.log(np.array([[0.7, 0.2, 0.1]], np.float32))
    >>> np.exp(poisoned("label_flip", p, None, 0)).round(2)
    array([[0.1, 0.7, 0.2]], dtype=float32)
    >>> np.exp(poisoned("one_hot", p, None, 0)).round(2)
    array([[0., 0., 1.]], dtype=float32)
    """
    samples, classes = log_probabilities.shape
    if attack == "none":
        return log_probabilities
    if attack == "label_flip":
        return np.roll(log_probabilities, 1, axis=1)
    if attack == "random":
        return _one_hot(np.random.default_rng(seed).integers(0, classes, (samples,)), classes)
    if attack == "constant":
        return _one_hot(np.zeros(samples, np.int64), classes)
    if attack == "one_hot":
        best = log_probabilities if known is None else known
        return _one_hot(np.asarray(best.argmin(axis=1)), classes)
    raise ValueError(f"attack: {attack!r} is none of {', '.join(ATTACKS)}")


def _one_hot(labels: npt.NDArray[np.integer[Any]], classes: int) -> FloatArray:
    scores = np.full((len(labels), classes), np.log(SURE), np.float32)
    scores[np.arange(len(labels)), labels] = 0
    return log_softmax(scores)
