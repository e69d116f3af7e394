"""How much the word of a client counts: as a whole, or image by image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from fedmutual.learning.agreement import entropy
from fedmutual.learning.consensus import Competence, FloatArray

LEAST = 1e-3  # where all abstain, all count alike
CERTAIN = 0.99  # nobody is believed to be better: a small validation split is soon without an error


def odds_weights(accuracies: Mapping[str, float | None], num_classes: int) -> dict[str, float]:
    """Weight of each client from the balanced accuracy on its own validation images.

    ``w = a / (1 - a)``, the odds that it is right; 0 for a client at chance or below. Where just one of two
    clients is right and their errors are independent, it is client j rather than client i with odds
    ``w_j / w_i`` (Bayes' rule; the form is that of Bradley and Terry, 1952). So who is clearly weaker than
    oneself says little, and who is clearly stronger nearly all.

    Parameters
    ----------
    accuracies : Mapping[str, float or None]
        None for a client without validation images: it gets the mean weight of the others.
    num_classes : int
        C.

    Returns
    -------
    dict[str, float]
        All equal where nobody is better than chance.

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
    """``(1 - H(P) / log C) ** exponent``, as FedAUX weighs by certainty (arXiv:2102.02514)."""

    def weight(p: FloatArray, rows: slice) -> npt.NDArray[np.float64]:
        certain = 1 - entropy(p).astype(np.float64) / np.log(p.shape[1])
        return np.asarray(np.maximum(certain, LEAST) ** exponent)

    return weight


def selection(threshold: float) -> Competence:
    """1 where the largest probability is at least ``threshold``, else next to nothing: it abstains.

    A small largest probability marks images unlike those learnt from (arXiv:1610.02136). That clients should
    not teach about these is from Selective-FD (arXiv:2304.01731), of whose density estimate at the clients
    nothing is needed here: only predictions travel.
    """

    def weight(p: FloatArray, rows: slice) -> npt.NDArray[np.float64]:
        return np.where(p.max(axis=1) >= threshold, 1.0, LEAST)

    return weight


class Agreement:
    """``(1 - TV(P_j, mean of all others)) ** exponent``, with TV the total variation distance in [0, 1].

    KT-pFL weighs peers by how far their soft predictions agree (arXiv:2111.02862); here sample by sample, and
    without learnt coefficients. Who contradicts the others about an image counts less there.

    Parameters
    ----------
    predictions : Iterable[float array [N, C]]
        Normalised log-probabilities of all clients, at least one.
    exponent : float
    """

    def __init__(self, predictions: Iterable[npt.NDArray[np.floating]], exponent: float) -> None:
        self._exponent = exponent
        self._clients = 0
        self._sum: npt.NDArray[np.float64] | float = 0.0
        for log_p in predictions:
            self._clients += 1
            self._sum = self._sum + np.exp(log_p.astype(np.float32, copy=False))

    def __call__(self, p: FloatArray, rows: slice) -> npt.NDArray[np.float64]:
        """Weights [n] of one of the clients, whose probabilities [n, C] are ``p``."""
        assert isinstance(self._sum, np.ndarray)
        others = (self._sum[rows] - p) / max(self._clients - 1, 1)
        agreed = 1 - np.abs(p - others).sum(axis=1) / 2
        return np.asarray(np.maximum(agreed, LEAST) ** self._exponent)
