"""Predictions as whole numbers modulo 2^24, so that masked ones can be added exactly.

What the clients add up is what the strategy averages: probabilities, or log-odds against the first class.
Either is C - 1 numbers a sample in a known range, which each client divides into ``(2^24 - 1) // K`` steps:
the sum of K clients cannot wrap, and whatever a hostile client adds, the result is a mean in that range.
Numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from fedmutual.learning.consensus import FloatArray, log_softmax

RingArray = npt.NDArray[np.uint32]  # numbers modulo 2^24
WideArray = npt.NDArray[np.uint64]  # numbers modulo 2^24 or 2^64

MODULUS = 1 << 24
MOST_CLIENTS = 128  # the mean is then exact to 1e-4 (log-odds, a floor of 1e-4)
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Summed:
    """What the clients of a run add up.

    Attributes
    ----------
    log_odds : bool
        Log-odds ``log P_c - log P_0``, as their mean is a mean of scores; False: probabilities.
    floor : float
        Least shared probability: log-odds lie within ``log(floor)`` of 0.
    temperature : float
        Softens probabilities before they are added up: their mean cannot be softened afterwards.
    without_own : bool
        Each client takes its own part out of the mean.
    """

    log_odds: bool
    floor: float
    temperature: float = 1.0
    without_own: bool = False

    def encode(self, log_probabilities: FloatArray, clients: int) -> RingArray:
        """Return a client's part [N * (C - 1)], each number below ``2^24 / clients``.

        Raises
        ------
        ValueError
            For more clients than the ring can add up.
        """
        low, high = self._range
        share = (self._values(log_probabilities) - low) / (high - low)
        return cast(RingArray, np.rint(np.clip(share, 0, 1) * steps(clients)).astype(np.uint32).reshape(-1))

    def decode(self, total: RingArray | WideArray, clients: int, num_classes: int) -> FloatArray:
        """Return the mean of ``clients`` clients, from the sum of their parts, as log-probabilities [N, C].

        They are what a single client would have to say for the strategy to form the same consensus from it.
        """
        low, high = self._range
        mean = low + (high - low) * total.reshape(-1, num_classes - 1) / (clients * steps(clients))
        if self.log_odds:
            return log_softmax(_with_first(mean, 0.0))
        p = _with_first(mean, 1 - mean.sum(axis=1, keepdims=True))
        return log_softmax(self.temperature * np.log(np.maximum(p, _TINY)))

    def take_out(self, log_targets: FloatArray, own: FloatArray, share: float, softened: float) -> FloatArray:
        """Return the mean of a client's peers [N, C], as log-probabilities.

        Parameters
        ----------
        log_targets : float32 [N, C]
            The mean of all clients, softened.
        own : float32 [N, C]
            The client's own log-probabilities, not softened.
        share : float
            1 / K.
        softened : float
            Temperature of ``log_targets``.
        """
        if self.log_odds:
            limit = self._range[1] / softened
            odds = log_targets[:, 1:] - log_targets[:, :1]
            mean = (odds - share * self._values(own) / softened) / (1 - share)
            return log_softmax(_with_first(np.clip(mean, -limit, limit), 0.0))
        own_p = np.exp(log_softmax(own / softened))
        p = (np.exp(log_targets.astype(np.float64)) - share * own_p) / (1 - share)
        return log_softmax(np.log(np.maximum(p, self.floor)))

    @property
    def _range(self) -> tuple[float, float]:
        limit = -float(np.log(self.floor))
        return (-limit, limit) if self.log_odds else (0.0, 1.0)

    def _values(self, log_probabilities: FloatArray) -> npt.NDArray[np.float64]:
        if self.log_odds:
            return (log_probabilities[:, 1:] - log_probabilities[:, :1]).astype(np.float64)
        return np.exp(log_softmax(log_probabilities / self.temperature))[:, 1:].astype(np.float64)


def ensemble_of(floor: float) -> Summed:
    """Return what adds up closing predictions: log-odds, whose mean is the mean-logit ensemble's."""
    return Summed(True, floor)


def steps(clients: int) -> int:
    """Return into how many steps each of ``clients`` clients divides the range, so that their sum fits.

    Raises
    ------
    ValueError
        For more clients than the ring can add up precisely enough.
    """
    if not 1 <= clients <= MOST_CLIENTS:
        raise ValueError(f"privacy.secagg adds up at most {MOST_CLIENTS} clients, not {clients}")
    return (MODULUS - 1) // clients


def _with_first(
    rest: npt.NDArray[np.float64], first: float | npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    return np.concatenate([np.broadcast_to(first, (len(rest), 1)), rest], axis=1)
