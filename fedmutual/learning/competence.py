"""Weights of the clients' predictions, per client or per sample."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmutual.learning.agreement import entropy
from fedmutual.learning.consensus import Competence, FloatArray

LEAST = 1e-3  # lower bound: if all clients are uncertain, all get the same weight
CERTAIN = 0.99  # upper bound of accuracy: a small validation split can easily show no error


def balanced_accuracy(metrics: Mapping[str, Any], split: str = "validation") -> float | None:
    """Return the mean recall of the classes that occur in a split; None if it was not measured."""
    recall = metrics.get(f"{split}-recall")
    return fmean(value for value in recall if value >= 0) if isinstance(recall, list) else None


def validated(metrics: Mapping[str, Any]) -> float | None:
    """Return a client's balanced validation accuracy, else its plain one; None if it reports neither."""
    balanced, plain = balanced_accuracy(metrics), metrics.get("validation-accuracy")
    return balanced if balanced is not None or not isinstance(plain, int | float) else float(plain)


def odds_weights(accuracies: Mapping[str, float | None], num_classes: int) -> dict[str, float]:
    """Return each client's weight, from its balanced accuracy on its own validation images.

    ``w = a / (1 - a)``, the odds that it is right; 0 for a client at chance or below. If exactly one of two
    clients is right and their errors are independent, the odds of client j against client i are ``w_j / w_i``
    (Bayes' rule, in the form of Bradley and Terry, 1952). Weaker peers therefore get little weight, stronger
    peers nearly all.

    Parameters
    ----------
    accuracies : Mapping[str, float or None]
        None for a client without validation images: it gets the mean weight of the others.
    num_classes : int
        C.

    Returns
    -------
    dict[str, float]
        All equal if no client is better than chance.

    >>> {k: round(w, 2) for k, w in odds_weights({"a": 0.9, "b": 0.75, "c": 0.5}, 2).items()}
    {'a': 9.0, 'b': 3.0, 'c': 0.0}
    """
    known = {name: _odds(a, num_classes) for name, a in accuracies.items() if a is not None}
    if not any(known.values()):
        return dict.fromkeys(accuracies, 1.0)
    mean = sum(known.values()) / len(known)
    return {name: known.get(name, mean) for name in accuracies}


def _odds(accuracy: float, num_classes: int) -> float:
    accuracy = min(accuracy, CERTAIN)
    return 0.0 if accuracy * num_classes <= 1 else accuracy / (1 - accuracy)


def certainty(exponent: float) -> Competence:
    """Return the weight ``(1 - H(P) / log C) ** exponent``, as in FedAUX (arXiv:2102.02514)."""

    def weight(p: FloatArray, rows: slice) -> npt.NDArray[np.float64]:
        certain = 1 - entropy(p).astype(np.float64) / np.log(p.shape[1])
        return np.asarray(np.maximum(certain, LEAST) ** exponent)

    return weight
