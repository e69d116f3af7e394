"""The speaker that a site makes alone (``privacy.speaker=own``): each class against the public images.

Of an image with features ``phi`` (:class:`fedmutual.learning.speaker.FeatureMap`) and label y, a site adds up
``phi y^T``, [k, C], with the label as a one-hot row y, and ``COUNT y``, [C], which makes the class counts.
Together these have a length of at most ``sqrt(1 + COUNT^2)``: by so much adding or removing an image changes
the sums, which is all that is read of the images. As in :mod:`fedmutual.learning.speaker`, every entry is
rounded to a multiple of ``1 / GRID`` before the images are added up. The noise of all entries is the same, so
that the counts get ``COUNT^2 / (1 + COUNT^2)``, a fifth, of the budget.

The speaker tells each class from the public images: the direction from their mean to the class's, by their
covariance (linear discriminant analysis). So it knows nothing of a site's class shares, and a site that has
one class has something to say of it. A logistic regression between a site's own classes, with as much noise,
was 1 to 4 points worse under label skew, and had nothing to say where there is one class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedmutual.learning.speaker import GRID, Matrix, Whole

COUNT = 0.5  # of an image in its class's count
SILENT = 0.5  # deviations of a count's noise up to which a site says nothing of a class
_CHUNK = 256  # images whose products are formed at a time


def class_sums(phi: Matrix, labels: NDArray[np.integer], num_classes: int) -> Whole:
    """Return what a site's images add up to, in steps of ``1 / GRID``.

    Parameters
    ----------
    phi : float64 [n, k]
        Rows of length at most 1.
    labels : int [n]
    num_classes : int
        C.

    Returns
    -------
    int64 [k C + C]
        The matrix [k, C] row by row, and the counts. An image whose numbers are longer than
        :func:`sensitivity` says, which only a row longer than 1 has, is left out.
    """
    size = phi.shape[1]
    most = sensitivity(size) ** 2
    total = np.zeros((size + 1, num_classes), np.int64)
    for start in range(0, len(phi), _CHUNK):
        some, truth = phi[start : start + _CHUNK], labels[start : start + _CHUNK]
        each = np.rint(np.concatenate((some, np.full((len(some), 1), COUNT)), axis=1) * GRID).astype(np.int64)
        kept = (each**2).sum(axis=1) <= most
        np.add.at(total.T, truth[kept], each[kept])
    return total.reshape(-1)


def sensitivity(size: int) -> int:
    """Return by how much one image changes :func:`class_sums`, in L2 and steps of ``1 / GRID``, at most.

    Parameters
    ----------
    size : int
        k, the length of phi.

    Examples
    --------
    >>> round(sensitivity(33) / GRID, 4), round((1 + 0.25) ** 0.5, 4)
    (1.118, 1.118)
    """
    return math.ceil(math.sqrt(1 + COUNT**2) * GRID + math.sqrt(size + 1) / 2) + 1


def solve_own(
    noisy: NDArray[np.int64], num_classes: int, shown: Matrix, noise: float, share: float
) -> tuple[Matrix, Matrix]:
    """Return a site's own speaker; all of it is made of the noisy sums and of public images.

    Parameters
    ----------
    noisy : int64 [k C + C]
        :func:`class_sums` with noise.
    num_classes : int
        C.
    shown : float64 [N, k]
        phi of the public images.
    noise : float
        Standard deviation of the noise in each entry, in ones; 0: none.
    share : float
        The penalty without noise, as a share of the mean square of an entry of phi.

    Returns
    -------
    weights : float64 [k, C]
        Of scores that tell each class from the public images.
    counts : float64 [C]
        Of the site's images by class, with noise; 0 of those that it says nothing of.

    Notes
    -----
    The length of a column's noise, ``noise sqrt k``, is added to the penalty.
    """
    told = noisy.reshape(-1, num_classes) / GRID
    counts = told[-1] / COUNT
    size, images = len(told) - 1, max(float(counts.sum()), 1.0)
    known = counts > max(SILENT * noise / COUNT, 0.5)
    away = told[:-1] - np.outer(shown.mean(axis=0), counts)
    penalty = share * images / size + noise * math.sqrt(size) + 1e-9
    whole = images * (shown.T @ shown) / len(shown) + penalty * np.eye(size)
    scale = np.divide(images, counts, out=np.zeros(num_classes), where=known)
    return np.linalg.solve(whole, away) * scale, np.where(known, counts, 0.0)


def together(said: Mapping[str, Matrix], counts: Mapping[str, Matrix]) -> Matrix | None:
    """Return the consensus of the sites' speakers, [N, C]; None where fewer than two classes are known.

    Parameters
    ----------
    said : Mapping[str, float [N, C]]
        Scores of the public samples by site.
    counts : Mapping[str, float [C]]
        See :func:`solve_own`.

    Notes
    -----
    Of each class the mean over the sites, weighted by how many of its images they have. A class that nobody
    says anything of gets the lowest score of its sample.
    """
    heard = np.maximum(np.array(list(counts.values())), 0.0)  # [sites, C]
    known = heard.sum(axis=0) > 0
    if known.sum() < 2:
        return None
    shares = np.divide(heard, heard.sum(axis=0), out=np.zeros_like(heard), where=known)
    scores: Matrix = np.einsum("snc,sc->nc", np.array(list(said.values()), np.float64), shares)
    return np.where(known, scores, scores[:, known].min(axis=1, keepdims=True))


def student(phi: Matrix, scores: Matrix) -> Matrix:
    """Return the weights [k, C] of least squares that say the consensus's scores of public samples.

    Each site's scores are linear in phi, so the consensus is, and nothing is lost.
    """
    size = phi.shape[1]
    found: Matrix = np.linalg.solve(phi.T @ phi + 1e-6 * np.eye(size), phi.T @ scores)
    return found
