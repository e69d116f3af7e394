"""Each client's target from all clients' predictions, in O(K N C) work and O(N C) memory.

Numpy only, so that the server starts without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
# weights float64 [n] of a client's predictions on the samples `rows`, from its probabilities [n, C] there
Competence = Callable[[FloatArray, slice], npt.NDArray[np.float64]]

CHUNK_VALUES = 65_536  # 256 KiB of float32, a few of which fit the L2 cache
FEW_VALUES = 4_096  # below, NumPy's own conversion of float16 is as fast as any
COLD = 0.1  # temperature below which the sum of exponentials can underflow


@dataclass(frozen=True)
class Target:
    """The target of one client's mutual loss.

    Attributes
    ----------
    log_probabilities : float32 [N, C]
        ``mean_j log P_j`` (own || peer; not normalised) or ``log mean_j P_j`` (peer || own).
    entropies : float32 [N] or None
        ``mean_j H(P_j)`` in nats, which turns the peer || own loss into the mean KL; None for own || peer.
    """

    log_probabilities: FloatArray
    entropies: FloatArray | None = None


def log_softmax(values: npt.NDArray[np.floating]) -> FloatArray:
    """Return scores [N, C] normalised to log-probabilities, float32."""
    # numpy reduces a short last axis one row at a time; in Fortran order it reduces whole columns
    scores = values.astype(np.float32, order="F")
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return np.ascontiguousarray(scores)


def as_float32(values: npt.NDArray[np.floating]) -> FloatArray:
    """Return finite values as float32; float16 in half of NumPy's time, exactly.

    The exponent and fraction of a float16 are moved to those of a float32, whose exponent counts from 2^-112.
    """
    if values.dtype != np.float16 or values.size < FEW_VALUES:
        return values.astype(np.float32, copy=False)
    bits = values.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= ~0x70000000  # copies of the sign
    numbers = bits.view(np.float32)
    numbers *= np.float32(2.0**112)
    return numbers


def softened(log_probabilities: FloatArray, temperature: np.float32) -> FloatArray:
    """Return log-probabilities [N, C] of ``softmax(log P / temperature)``; the same array at 1."""
    if temperature == 1:
        return log_probabilities
    scores = log_probabilities / temperature
    if temperature < COLD:
        return log_softmax(scores)
    scores -= np.log(np.einsum("nc->n", np.exp(scores)))[:, None]
    return scores


def prediction_shares(log_probabilities: npt.NDArray[np.floating]) -> list[float]:
    """Return the share of the samples [N, C] for which each class is the most probable, [C]."""
    counts = np.bincount(log_probabilities.argmax(axis=1), minlength=log_probabilities.shape[1])
    return [float(count) / len(log_probabilities) for count in counts]


@dataclass(frozen=True)
class Gathered:
    """The inputs of a consensus.

    Attributes
    ----------
    predictions : Mapping[str, float array [N, C]]
        Normalised log-probabilities by client, of the same samples in the same order.
    divergence, temperature
        Of the mutual loss.
    validated : Mapping[str, float or None]
        Balanced accuracy in [0, 1] of each client on its own validation images; None if it has none.
    suspicion : Mapping[str, float]
        Suspicion against clients from earlier rounds; 0 for those not named.
    """

    predictions: Mapping[str, npt.NDArray[np.floating]]
    divergence: str
    temperature: float = 1.0
    validated: Mapping[str, float | None] = field(default_factory=dict)
    suspicion: Mapping[str, float] = field(default_factory=dict)


class Consensus(Protocol):
    """A rule that turns a round's predictions into targets."""

    def target(self, client: str | None) -> Target | None:
        """Return the target of ``client`` (None: a client that sent nothing); None if there is no target."""


class MeanConsensus:
    """Mean of the peers (arXiv:2503.05803 for own || peer, arXiv:1706.00384 for peer || own).

    The sum over all clients is computed once; client i's target is ``(sum - own) / (K - 1)``. A client's
    contribution is recomputed when it is subtracted, because storing all of them would double the memory of
    the predictions.

    Parameters
    ----------
    predictions : Mapping[str, float array [N, C]]
        Normalised log-probabilities of each client on the same N public samples, in the same order. Kept
        by reference, in the precision received.
    divergence : str
        ``own_peer`` (also for ``published_code``) averages log-probabilities, ``peer_own`` probabilities.
    temperature : float
        Every distribution is softened to ``softmax(log P / temperature)`` first.
    weights : Mapping[str, float] or None
        Weight w_j >= 0 of each client, see :mod:`fedmutual.learning.competence`; None: all equal. The target
        is ``(sum_j w_j x_j - own) / (sum_j w_j - w_own)``, and the loss against it is exactly the weighted
        mean of the KL divergences, since each of them is linear in the peer's part.
    competence : Competence or None
        Per-sample factor of w_j, computed from the client's probabilities as sent; see
        :mod:`fedmutual.learning.competence`. None: all samples have equal weight.
    include_own : bool
        Include the client's own prediction in the mean.
    """

    def __init__(
        self,
        predictions: Mapping[str, npt.NDArray[np.floating]],
        divergence: str,
        temperature: float = 1.0,
        weights: Mapping[str, float] | None = None,
        competence: Competence | None = None,
        include_own: bool = False,
    ) -> None:
        self._predictions = predictions
        self._weights = {name: 1.0 if weights is None else weights[name] for name in predictions}
        self._heard = sum(weight != 0 for weight in self._weights.values())
        self._weight = sum(self._weights.values())
        self._of_all: Target | None = None
        self._averages_probabilities = divergence == "peer_own"
        self._temperature = np.float32(temperature)
        self._competence = competence
        self._include_own = include_own
        self._shape = next(iter(predictions.values())).shape if predictions else (0, 1)
        # float64: in float32, the subtraction below would lose precision
        self._sum = np.zeros(self._shape, np.float64)
        self._entropy_sum = np.zeros(self._shape[0], np.float64)
        self._weight_sum = np.zeros(self._shape[0] if competence else 0, np.float64)
        for name, values in predictions.items():
            for rows in self._chunks():
                part = self._contribution(values[rows], self._weights[name], rows)
                self._sum[rows] += part.values
                if competence:
                    self._weight_sum[rows] += part.weight
                if part.entropies is not None:
                    self._entropy_sum[rows] += part.entropies
        # the sum as two float32 arrays: what is left after the subtraction keeps the precision of float64
        self._high = self._sum.astype(np.float32)
        self._sum -= self._high
        self._low = self._sum.astype(np.float32)
        del self._sum

    def target(self, client: str | None) -> Target | None:
        """Return the mean of the client's peers, or of all clients if it sent nothing.

        None if no peer has a positive weight. Clients that get the mean of all get the same read-only arrays.
        """
        own_weight = self._weights.get(client, 0.0) if client is not None else 0.0
        if self._heard == (own_weight != 0):
            return None
        own = None if client is None or self._include_own else self._predictions.get(client)
        if own is not None:
            return self._mean(str(client), own, self._weight - own_weight)
        if self._of_all is None:
            self._of_all = read_only(self._mean("", None, self._weight))
        return self._of_all

    def _mean(self, client: str, own: npt.NDArray[np.floating] | None, counted: float) -> Target:
        """Return the mean of all but ``client``, whose predictions are ``own``; of all if it has none."""
        mean = np.empty(self._shape, np.float32)
        mean_entropies = np.empty(self._shape[0], np.float32) if self._averages_probabilities else None
        for rows in self._chunks():
            entropies = self._entropy_sum[rows]
            weight = self._weight_sum[rows] if self._competence else np.full(1, counted)
            if own is None:
                mean[rows] = self._high[rows]
            else:
                part = self._contribution(own[rows], self._weights[client], rows)
                np.subtract(self._high[rows], part.values, out=mean[rows], casting="same_kind")
                entropies = entropies if part.entropies is None else entropies - part.entropies
                weight = np.asarray(weight - part.weight) if self._competence else weight
            mean[rows] += self._low[rows]
            mean[rows] /= np.expand_dims(weight, -1).astype(np.float32)
            if mean_entropies is not None:
                np.log(np.maximum(mean[rows], np.finfo(np.float32).tiny), out=mean[rows])
                mean_entropies[rows] = np.maximum(entropies / weight, 0)
        return Target(mean, mean_entropies)

    def _chunks(self) -> Iterator[slice]:
        return chunks(*self._shape)

    def _contribution(self, values: npt.NDArray[np.floating], weight: float, rows: slice) -> _Part:
        """Return a client's contribution to the sums."""
        alike = self._competence is None and weight == 1
        counts: float | npt.NDArray[np.float64] = weight
        if self._competence:
            counts = weight * self._competence(np.exp(as_float32(values)), rows)
        factor = np.expand_dims(counts, -1)
        log_p = softened(as_float32(values), self._temperature)
        if not self._averages_probabilities:
            return _Part(log_p if alike else log_p.astype(np.float64) * factor, None, counts)
        p = np.exp(log_p)
        entropies = -np.einsum("nc,nc->n", p, log_p)
        return _Part(p, entropies, counts) if alike else _Part(p * factor, entropies * counts, counts)


@dataclass(frozen=True)
class _Part:
    """A client's contribution to the sums: values [n, C], entropies [n] in nats, weight [n] or scalar."""

    values: npt.NDArray[np.floating]
    entropies: npt.NDArray[np.floating] | None
    weight: float | npt.NDArray[np.float64]


def chunks(samples: int, values_each: int) -> Iterator[slice]:
    """Yield slices of samples small enough for intermediate arrays to stay in the CPU cache."""
    size = max(CHUNK_VALUES // values_each, 1)
    return (slice(start, start + size) for start in range(0, samples, size))


def read_only(target: Target) -> Target:
    """Return a target that several clients get, and protect its arrays."""
    for array in (target.log_probabilities, target.entropies):
        if array is not None:
            array.flags.writeable = False
    return target


def as_target(log_probabilities: FloatArray, divergence: str = "peer_own") -> Target:
    """Return the target of a consensus with one distribution per sample: the loss is the KL to it."""
    if divergence != "peer_own":
        return Target(log_probabilities)
    entropies = -(np.exp(log_probabilities) * log_probabilities).sum(axis=1)
    return Target(log_probabilities, entropies.astype(np.float32))
