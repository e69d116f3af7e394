"""Mixing of weights that arrive one at a time: FedAsync (arXiv:1903.03934), FedBuff (arXiv:2106.06639).

Numpy only, so that the server starts without torch. Weights are float arrays by name. Integer arrays
(batch-norm counters) are not mixed: the newest values are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]

STALENESS = ("constant", "polynomial", "hinge")


@dataclass(frozen=True)
class Staleness:
    """Staleness weight s(t - tau) of a model that started from version tau, at version t (section 5.2).

    Parameters
    ----------
    function : str
        ``constant``: 1; ``polynomial``: ``(t - tau + 1) ** -a``; ``hinge``: 1 up to ``t - tau = b``, then
        ``1 / (a (t - tau - b) + 1)``.
    a, b : float

    >>> Staleness("polynomial", a=0.5, b=0)(3)
    0.5
    >>> [Staleness("hinge", a=10, b=4)(age) for age in (0, 4, 5)]
    [1.0, 1.0, 0.09090909090909091]
    """

    function: str
    a: float
    b: float

    def __call__(self, age: int) -> float:
        """Return s(age), in (0, 1].

        Raises
        ------
        ValueError
            Negative age, or unknown function.
        """
        if age < 0:
            raise ValueError(f"a staleness of {age}: the model started from a future version")
        if self.function == "constant":
            return 1.0
        if self.function == "polynomial":
            return float((age + 1) ** -self.a)
        if self.function == "hinge":
            return 1.0 if age <= self.b else float(1 / (self.a * (age - self.b) + 1))
        raise ValueError(f"{self.function!r} is none of {', '.join(STALENESS)}")


def mix(present: Weights, arrived: Weights, alpha: float) -> dict[str, Array]:
    """Return ``x_t = (1 - alpha_t) x_{t-1} + alpha_t x_new``, in float64, rounded once.

    >>> float(mix({"w": np.float32([1.0])}, {"w": np.float32([2.0])}, 0.25)["w"][0])
    1.25
    """
    return {name: _sum(present[name], 1 - alpha, new, alpha) for name, new in arrived.items()}


def add_delta(total: Weights | None, trained: Weights, start: Weights, share: float) -> dict[str, Array]:
    """Add ``share * (trained - start)`` to the buffer, in float64; integer arrays take the newest value."""
    added = {}
    for name, new in trained.items():
        if not _mixes(new):
            added[name] = new
            continue
        delta = share * (new.astype(np.float64) - start[name].astype(np.float64))
        added[name] = delta if total is None else total[name] + delta
    return added


def apply_deltas(present: Weights, total: Weights, rate: float, count: int) -> dict[str, Array]:
    """Return ``x_{t+1} = x_t + rate / count * sum of the deltas`` (FedBuff, algorithm 1)."""
    return {name: _sum(old, 1.0, total[name], rate / count) for name, old in present.items()}


def _sum(old: Array, keep: float, new: Array, take: float) -> Array:
    if not _mixes(old):
        return new
    mixed: Array = (keep * old.astype(np.float64) + take * new.astype(np.float64)).astype(old.dtype)
    return mixed


def _mixes(values: Array) -> bool:
    return bool(np.issubdtype(values.dtype, np.floating))
