"""How much the word of a peer counts."""

from __future__ import annotations

import math
from collections.abc import Mapping

CERTAIN = 0.99  # nobody is believed to be better: a small validation split is soon without an error


def log_odds_weights(accuracies: Mapping[str, float | None], num_classes: int) -> dict[str, float]:
    """Weight of each client from the balanced accuracy on its own validation images.

    ``w = log((C - 1) a / (1 - a))``, which is best for independent voters of accuracy a (Nitzan and Paroush,
    1982, for C = 2): 0 for a client at chance or below, 2.2 at 90 % of two classes, 4.6 from 99 % on.

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

    >>> {k: round(w, 2) for k, w in log_odds_weights({"a": 0.9, "b": 0.5, "c": 0.3}, 2).items()}
    {'a': 2.2, 'b': 0.0, 'c': 0.0}
    """
    known = {name: _log_odds(a, num_classes) for name, a in accuracies.items() if a is not None}
    if not any(known.values()):
        return dict.fromkeys(accuracies, 1.0)
    mean = sum(known.values()) / len(known)
    return {name: known.get(name, mean) for name in accuracies}


def _log_odds(accuracy: float, num_classes: int) -> float:
    accuracy = min(accuracy, CERTAIN)
    if accuracy * num_classes <= 1:
        return 0.0
    return math.log((num_classes - 1) * accuracy / (1 - accuracy))
