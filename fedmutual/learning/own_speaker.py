"""The speaker that a site makes alone (``privacy.speaker=own``): logistic regression by noisy steps.

Of an image with features ``phi`` (:class:`fedmutual.learning.speaker.FeatureMap`, length at most 1) and label
y, each step adds up ``phi (p - y)^T``, the gradient of the cross-entropy, where p is what the weights so far
say of this image, with the site's class shares as a prior. ``p - y`` is first scaled to a length of at most
``longest(C)``, which is its length at weights of zero and equal shares: so no image counts for more than it
did at the start, and adding or removing one changes the sum by at most that. As in
:mod:`fedmutual.learning.speaker`, every entry is rounded to a multiple of ``1 / GRID`` before the images are
added up.

The class shares come from noisy class counts, of which adding or removing an image changes one by 1. They get
``COUNTS`` of the budget, the steps the rest. Everything that is made of these sums and of public images is
post-processing: the weights, the predictions, and of which classes the site says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmutual.learning.consensus import log_softmax
from fedmutual.learning.gaussian import multiplier_of_several, scale_of
from fedmutual.learning.speaker import GRID, Matrix, Whole

STEPS = 10
COUNTS = 0.2  # share of the budget, in rho of zero-concentrated privacy
SILENT = 0.5  # deviations of a count's noise up to which a site says nothing of a class
_CHUNK = 256  # images whose gradients are formed at a time

Noise = Callable[[Whole, float], Whole]


@dataclass(frozen=True)
class Noises:
    """Standard deviations of the noise, in whole numbers; 0: none.

    Attributes
    ----------
    count : float
        Of each class count.
    step : float
        Of each entry of a step's gradient, in steps of ``1 / GRID``.
    """

    count: float
    step: float

    @classmethod
    def of(cls, multiplier: float, size: int, num_classes: int) -> Noises:
        """Split what one release with this multiplier would spend between the counts and the steps.

        Parameters
        ----------
        multiplier : float
            See :func:`fedmutual.learning.gaussian.multiplier_for`.
        size : int
            k, the length of phi.
        num_classes : int
            C.
        """
        if multiplier == 0:
            return cls(0.0, 0.0)
        count = scale_of(multiplier / math.sqrt(COUNTS), 1)
        step = multiplier * math.sqrt(STEPS / (1 - COUNTS))
        return cls(count, scale_of(step, sensitivity(size, num_classes)))

    def multipliers(self, size: int, num_classes: int) -> list[float]:
        """Return the noise over the sensitivity of everything that is released: the counts, and each step."""
        return [self.count, *[self.step / sensitivity(size, num_classes)] * STEPS]

    def together(self, size: int, num_classes: int) -> float:
        """Return the multiplier of one release that spends as much."""
        return multiplier_of_several(self.multipliers(size, num_classes))


def longest(num_classes: int) -> float:
    """Return the length to which ``p - y`` is scaled where it is longer.

    >>> round(longest(2), 4), round(longest(10), 4)
    (0.7071, 0.9487)
    """
    return math.sqrt(1 - 1 / num_classes)


def sensitivity(size: int, num_classes: int) -> int:
    """Return by how much one image changes :func:`gradient`, in L2 and steps of ``1 / GRID``, at most."""
    return math.ceil(longest(num_classes) * GRID + math.sqrt(size * num_classes) / 2) + 1


def gradient(phi: Matrix, labels: NDArray[np.integer], weights: Matrix, log_prior: Matrix) -> Whole:
    """Return the sum over a site's images of ``phi (p - y)^T``, in steps of ``1 / GRID``.

    Parameters
    ----------
    phi : float64 [n, k]
        Rows of length at most 1.
    labels : int [n]
    weights : float64 [k, C]
    log_prior : float64 [C]
        Log class shares that the predictions of private images begin with.

    Returns
    -------
    int64 [k C]
        Row by row. An image whose numbers are longer than :func:`sensitivity` says, which only a row longer
        than 1 has, is left out.
    """
    size, classes = weights.shape
    most = sensitivity(size, classes) ** 2
    total = np.zeros(size * classes, np.int64)
    for start in range(0, len(phi), _CHUNK):
        some, truth = phi[start : start + _CHUNK], labels[start : start + _CHUNK]
        # no matrix product: in its last bits, a row would depend on the other rows
        scores = (some[:, :, None] * weights[None]).sum(axis=1) + log_prior
        error = _softmax(scores) - np.eye(classes)[truth]
        length = np.sqrt((error**2).sum(axis=1, keepdims=True))
        error *= np.minimum(1, longest(classes) / np.maximum(length, 1e-12))
        each = np.rint((some[:, :, None] * error[:, None, :]).reshape(len(some), -1) * GRID).astype(np.int64)
        total += each[(each**2).sum(axis=1) <= most].sum(axis=0)
    return total


def fit(
    phi: Matrix,
    labels: NDArray[np.integer],
    public: Matrix,
    noises: Noises,
    noisy: Noise,
    *,
    num_classes: int,
    share: float,
) -> tuple[Matrix, Matrix]:
    """Return a site's own speaker.

    Parameters
    ----------
    phi : float64 [n, k]
        Of the site's images.
    labels : int [n]
    public : float64 [k, k]
        Mean of ``phi phi^T`` over public images, which stands in for the curvature.
    noises : Noises
    noisy : callable
        Adds noise of a standard deviation to whole numbers, see :func:`fedmutual.learning.gaussian.noisy`.
    num_classes : int
        C.
    share : float
        The penalty without noise, as a share of the mean square of an entry of phi.

    Returns
    -------
    weights : float64 [k, C]
        The mean of the later half of the steps, without the prior.
    counts : float64 [C]
        Noisy counts of the site's images by class; 0 of those that it says nothing of.

    Notes
    -----
    A step is Newton's with the public images' curvature, ``n public / 2``, which is at least the logistic
    loss's. The length of a column's noise is added to the penalty, so that it is smaller where there is more.
    """
    size = phi.shape[1]
    told = _with(np.bincount(labels, minlength=num_classes).astype(np.int64), noises.count, noisy)
    least = max(1.0, noises.count)
    floored = np.maximum(told.astype(np.float64), least)
    log_prior = np.log(floored / floored.sum())
    images = max(float(told.sum()), 1.0)
    penalty = share * images / size + noises.step / GRID * math.sqrt(size / STEPS) + 1e-9
    values, vectors = np.linalg.eigh(public)
    curvature = images * np.maximum(values, 0)[:, None] / 2 + penalty
    weights, later = np.zeros((size, num_classes)), np.zeros((size, num_classes))
    for step in range(STEPS):
        summed = _with(gradient(phi, labels, weights, log_prior), noises.step, noisy)
        slope = summed.reshape(size, num_classes) / GRID
        slope = slope - slope.mean(axis=1, keepdims=True) + penalty * weights
        weights = weights - vectors @ ((vectors.T @ slope) / curvature)
        if step >= STEPS // 2:
            later += weights / (STEPS - STEPS // 2)
    return later, np.where(told > SILENT * noises.count, told, 0).astype(np.float64)


def together(said: Mapping[str, Matrix], counts: Mapping[str, Matrix]) -> Matrix | None:
    """Return the consensus of the sites' speakers, scores [N, C]; None where nobody says anything.

    Parameters
    ----------
    said : Mapping[str, float [N, C]]
        Log-probabilities of the public samples by site.
    counts : Mapping[str, float [C]]
        See :func:`fit`. A site with fewer than two classes is not heard.

    Notes
    -----
    For each class the mean of the log-probabilities, less their mean over the classes that a site says
    something of. A site's weight is the harmonic mean of its counts: it knows as much as its rarest class
    lets it. A class that nobody says anything of gets the lowest score of its sample.
    """
    shape = next(iter(said.values())).shape if said else (0, 0)
    total, heard = np.zeros(shape), np.zeros(shape[1])
    for name, values in said.items():
        known = counts[name] > 0
        if known.sum() < 2:
            continue
        weight = 1 / float((1 / counts[name][known]).mean())
        centred = values - values[:, known].mean(axis=1, keepdims=True)
        total += weight * np.where(known, centred, 0.0)
        heard += weight * known
    if not heard.any():
        return None
    mean = total / np.where(heard > 0, heard, 1.0)
    return np.where(heard > 0, mean, mean.min(axis=1, keepdims=True))


def student(phi: Matrix, scores: Matrix) -> Matrix:
    """Return the weights [k, C] of least squares that say the consensus's scores of public samples.

    Each site's scores are linear in phi, so the consensus is, and nothing is lost.
    """
    size = phi.shape[1]
    found: Matrix = np.linalg.solve(phi.T @ phi + 1e-6 * np.eye(size), phi.T @ scores)
    return found


def _with(values: Whole, scale: float, noisy: Noise) -> Whole:
    return values if scale == 0 else noisy(values, scale)


def _softmax(scores: NDArray[Any]) -> Matrix:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    found: Matrix = raised / raised.sum(axis=1, keepdims=True)
    return found


def log_said(phi: Matrix, weights: Matrix) -> Matrix:
    """Return the log-probabilities float32 [n, C] that a site's speaker gives samples of features phi."""
    return log_softmax(phi @ weights)
