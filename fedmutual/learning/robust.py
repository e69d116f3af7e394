"""Consensus that is robust to a hostile minority: order statistics over clients, and outlier scores.

A client's own prediction is included: with 2 hostile clients of 5, the four peers of an honest client would
be a tie. A robust consensus has one distribution per sample, the same for all clients. Numpy only.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import numpy as np

from fedmutual.learning.agreement import entropy
from fedmutual.learning.consensus import FloatArray, Target, as_target, chunks, log_softmax, read_only

TINY = np.finfo(np.float32).tiny
SAYS_NOTHING = 1e-6  # nats; an honest model's predictions vary between samples


class TrimmedConsensus:
    """Coordinate-wise trimmed mean of all clients (arXiv:1803.01498), renormalised; at most the median.

    For each class of each sample, the ``trim`` lowest and highest probabilities are dropped and the others
    averaged. If at most ``trim`` clients are hostile, every value lies between honest values.

    Parameters
    ----------
    predictions : Mapping[str, float array [N, C]]
        Normalised log-probabilities of each client on the same samples.
    divergence : str
        Direction of the loss for which the target is made.
    trim : int or None
        Values dropped at each end; None: as many as possible, which gives the median. If too few clients have
        reported, the median is used.
    temperature : float
        Every distribution is softened to ``softmax(log P / temperature)`` first.

    Examples
    --------
    >>> p = {k: np.log(np.array([[v, 1 - v]], np.float32)) for k, v in zip("abc", (0.9, 0.8, 0.0001))}
    >>> np.exp(TrimmedConsensus(p, "peer_own", trim=1).target("a").log_probabilities).round(3)
    array([[0.8, 0.2]], dtype=float32)
    """

    def __init__(
        self,
        predictions: Mapping[str, FloatArray],
        divergence: str,
        trim: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        self._target: Target | None = None
        if predictions:
            log_q = trimmed_mean(list(predictions.values()), trim, temperature)
            self._target = read_only(as_target(log_q, divergence))

    def target(self, client: str | None) -> Target | None:
        """Return the consensus, the same for every client."""
        return self._target


def trimmed_mean(predictions: list[FloatArray], trim: int | None, temperature: float = 1.0) -> FloatArray:
    """Return log-probabilities [N, C] of the coordinate-wise trimmed mean of K predictions [N, C].

    Sorts a few samples at a time: O(K N C log K) work, O(N C) memory besides the predictions.
    """
    clients, (samples, classes) = len(predictions), predictions[0].shape
    cut = (clients - 1) // 2 if trim is None else min(trim, (clients - 1) // 2)
    mean = np.empty((samples, classes), np.float32)
    for rows in chunks(samples, clients * classes):
        stack = np.stack([p[rows] for p in predictions]).astype(np.float32)
        if temperature != 1:
            stack = np.stack([log_softmax(p / np.float32(temperature)) for p in stack])
        values = np.sort(np.exp(stack), axis=0)
        mean[rows] = values[cut : clients - cut].mean(axis=0)
    return log_softmax(np.log(np.maximum(mean, TINY)))


def information(log_probabilities: FloatArray) -> float:
    """Return the mutual information of sample and class, in nats: H(mean_n P_n) - mean_n H(P_n).

    It is 0 if the predictions [N, C] are the same for every sample.

    >>> information(np.log(np.array([[0.9, 0.1], [0.9, 0.1]], np.float32)))
    0.0
    """
    p = np.exp(log_probabilities.astype(np.float64))
    return max(0.0, float(entropy(p.mean(axis=0, keepdims=True))[0] - entropy(p).mean()))


def informative(predictions: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Return the predictions of clients whose predictions vary between samples.

    Constant predictions carry no information, so they are excluded from the median too: otherwise two
    constant attackers and two honest clients that lack the same class would form the majority.
    """
    return {n: p for n, p in predictions.items() if len(p) == 1 or information(p) > SAYS_NOTHING}


def outlier_scores(
    predictions: Mapping[str, FloatArray], taught: Container[str], tolerance: float, margin: float
) -> dict[str, float]:
    """Return each client's excess distance from the coordinate-wise median of all; 0 for most clients.

    ``max(0, d_j - tolerance * median_k d_k - margin_j)``, where d_j is the mean total variation distance in
    [0, 1] of client j's distributions from the median. Honest clients that lack classes are far from the
    median before their first mutual step, and close to it afterwards; a client that stays far away does not
    learn. The margin of a client that had no target yet is therefore ``1 - 1 / C``, the distance between the
    truth and a client that knows a single class.

    Parameters
    ----------
    predictions : Mapping[str, float array [N, C]]
    taught : Container[str]
        Clients that had a target before these predictions.
    tolerance : float
        Multiple of the median distance that is tolerated.
    margin : float
        Further total variation distance that is tolerated for a client that had a target.
    """
    if len(predictions) < 3:  # with two clients, either could be the outlier
        return dict.fromkeys(predictions, 0.0)
    middle = np.exp(trimmed_mean(list(predictions.values()), None))
    distance = {
        name: float(np.abs(np.exp(p.astype(np.float32, copy=False)) - middle).sum(axis=1).mean() / 2)
        for name, p in predictions.items()
    }
    usual = tolerance * float(np.median(list(distance.values())))
    untaught = 1 - 1 / middle.shape[1]
    return {
        name: max(0.0, d - usual - (margin if name in taught else untaught)) for name, d in distance.items()
    }


def suspicion(before: Mapping[str, float], scores: Mapping[str, float], memory: float) -> dict[str, float]:
    """Return the decayed sum of outlier scores per client: ``memory * before + score``.

    Clients without a report this round keep their suspicion.

    >>> suspicion({"a": 1.0, "b": 0.5}, {"a": 0.0}, memory=0.8)
    {'a': 0.8, 'b': 0.5}
    """
    return dict(before) | {name: memory * before.get(name, 0.0) + score for name, score in scores.items()}


def trust(suspicions: Mapping[str, float], names: Iterable[str], severity: float) -> dict[str, float]:
    """Return each client's weight, ``exp(-severity * suspicion)``: multiplicative weights over the rounds.

    As in ExpGuard (arXiv:2402.12265), with the distance to the median as the score.
    """
    return {name: float(np.exp(-severity * suspicions.get(name, 0.0))) for name in names}
