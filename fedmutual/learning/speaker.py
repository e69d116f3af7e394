"""The speaker of ``strategy=speaker``: ridge regression on a public feature map, from sums that take noise.

Of an image with features f and label y, a site uses ``phi``: ``u / |u|`` and a constant, together of length
1, where ``u = axes (f - centre)``. It adds up

* the upper triangle of ``phi phi^T``, its off-diagonal entries times sqrt 2, and
* ``FAVOUR phi (y - 1 / C)^T``, [k, C], with the label as a one-hot row y.

Together these have the squared L2 norm ``|phi|^4 + FAVOUR^2 |phi|^2 (1 - 1 / C)``: adding or removing one
image changes the sums by at most ``sqrt(1 + FAVOUR^2 (1 - 1 / C))``. Every entry is rounded to a multiple of
``1 / GRID`` before the images are added up, which moves each of the ``k (k + 1) / 2 + k C`` entries by at
most half a step. From there on only whole numbers are added: no rounding of a sum depends on the images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating]
Whole = NDArray[np.int64]
GRID = 2**20  # steps of 1
FAVOUR = 3  # the second part has a third of the first one's noise: there is a public stand-in for that one
CONSTANT = 0.2  # beside u / |u|, before both are scaled to length 1
_CHUNK = 256  # images whose products are formed at a time


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """What makes ``phi`` of features; it is made of public images alone.

    Parameters
    ----------
    centre : float32 [F]
    axes : float32 [k - 1, F]
    """

    centre: Matrix
    axes: Matrix

    @classmethod
    def of_public(cls, features: Matrix, axes: int) -> FeatureMap:
        """Take the first principal axes of public images' features, float [N, F].

        There are no more than images or features allow.
        """
        wide = features.astype(np.float64)
        centre = wide.mean(axis=0)
        _, values, right = np.linalg.svd(wide - centre, full_matrices=False)
        kept = min(axes, int((values > 1e-6 * max(float(values[0]), 1e-300)).sum()))
        return cls(centre.astype(np.float32), right[:kept].astype(np.float32))

    def unit(self, features: Matrix) -> Matrix:
        """Return phi, float64 [n, k], of features [n, F]; rows of length at most 1.

        A row is shorter where u is 0, and 0 where a feature is no number.
        """
        with np.errstate(invalid="ignore"):
            projected = (features.astype(np.float64) - self.centre) @ self.axes.T.astype(np.float64)
        length = np.linalg.norm(projected, axis=1, keepdims=True)
        found = np.divide(projected, length, out=np.zeros_like(projected), where=length > 0)
        known = np.isfinite(length)
        whole = np.concatenate((found, np.full((len(found), 1), CONSTANT)), axis=1)
        return np.where(known, whole / math.sqrt(1 + CONSTANT**2), 0.0)

    @property
    def size(self) -> int:
        """k, the length of phi."""
        return len(self.axes) + 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the map's arrays by name."""
        return {"centre": self.centre, "axes": self.axes}

    @property
    def digest(self) -> NDArray[np.uint8]:
        """BLAKE2b digest of the map, uint8 [16]."""
        state = hashlib.blake2b(digest_size=16)
        for array in (self.centre, self.axes):
            state.update(f"{array.shape}".encode() + np.ascontiguousarray(array, "<f4").tobytes())
        return np.frombuffer(state.digest(), np.uint8)


def sums(phi: Matrix, labels: NDArray[np.integer], num_classes: int) -> Whole:
    """Return what a site's images add up to, in steps of ``1 / GRID``.

    Parameters
    ----------
    phi : float64 [n, k]
        Rows of length at most 1.
    labels : int [n]

    Returns
    -------
    int64 [k (k + 1) / 2 + k C]
        The triangle row by row, then the matrix [k, C] row by row. An image whose numbers are longer than
        :func:`sensitivity` says, which only a row longer than 1 has, is left out.
    """
    size = phi.shape[1]
    rows, columns = np.triu_indices(size)
    weight = np.where(rows == columns, 1.0, math.sqrt(2)) * GRID
    coded = (np.eye(num_classes) - 1 / num_classes) * FAVOUR * GRID
    most = sensitivity(size, num_classes) ** 2
    total = np.zeros(len(rows) + size * num_classes, np.int64)
    for start in range(0, len(phi), _CHUNK):
        some, code = phi[start : start + _CHUNK], coded[labels[start : start + _CHUNK]]
        products = some[:, rows] * some[:, columns] * weight
        moments = (some[:, :, None] * code[:, None, :]).reshape(len(some), -1)
        whole = np.rint(np.concatenate((products, moments), axis=1)).astype(np.int64)
        total += whole[(whole**2).sum(axis=1) <= most].sum(axis=0)
    return total


def sensitivity(size: int, num_classes: int) -> int:
    """Return by how much one image changes :func:`sums`, in L2 and steps of ``1 / GRID``, at most.

    Parameters
    ----------
    size : int
        k, the length of phi.
    num_classes : int
        C.

    Examples
    --------
    >>> round(sensitivity(33, 2) / GRID, 4), round((1 + 9 / 2) ** 0.5, 4)
    (2.3452, 2.3452)
    """
    entries = size * (size + 1) // 2 + size * num_classes
    longest = math.sqrt(1 + FAVOUR**2 * (1 - 1 / num_classes))
    return math.ceil(longest * GRID + math.sqrt(entries) / 2) + 1


def divided(values: NDArray[Any], size: int, num_classes: int) -> dict[str, Matrix]:
    """Return :func:`sums` as they travel: ``gram``, float32 [k (k + 1) / 2], and ``moment``, [k, C]."""
    triangle = size * (size + 1) // 2
    told = values / GRID
    moment = told[triangle:].reshape(size, num_classes) / FAVOUR
    return {"gram": told[:triangle].astype(np.float32), "moment": moment.astype(np.float32)}


def solve(total: Mapping[str, Matrix], public: Matrix, noise: float, share: float) -> Matrix:
    """Return the weights [k, C] of the ridge regression on labels that are centred over the classes.

    Parameters
    ----------
    total : Mapping[str, array]
        The sites' ``gram`` and ``moment``, added up.
    public : float64 [k, k]
        Mean of ``phi phi^T`` over public images, which stands in for the Gram matrix as far as that is noise.
    noise : float
        Standard deviation of the noise in each entry of the Gram matrix; 0: none.
    share : float
        The penalty without noise, as a share of the mean square of an entry of phi.

    Notes
    -----
    The noise of the Gram matrix is a symmetric Gaussian matrix, whose eigenvalues reach ``noise sqrt(2 k)``;
    its own have the mean ``trace / k``. With q four times the noise's, in units of ``trace / sqrt k``, the
    share ``q^2 / (1 + q^2)`` of it is replaced, and twice the length of a column's noise, ``noise / FAVOUR
    sqrt k``, is added to the penalty. All this depends on the noise and the released sums alone.
    """
    moment = total["moment"].astype(np.float64)
    size = len(moment)
    gram = np.zeros((size, size))
    gram[np.triu_indices(size)] = total["gram"]
    off = np.triu(gram, 1) / math.sqrt(2)
    whole = np.diag(np.diag(gram)) + off + off.T
    trace = max(float(np.trace(whole)), 1.0)
    doubt = 4 * noise * math.sqrt(2 * size) * math.sqrt(size) / trace
    replaced = doubt**2 / (1 + doubt**2)
    values, vectors = np.linalg.eigh((1 - replaced) * whole + replaced * trace * public)
    penalty = share * trace / size + 2 * noise / FAVOUR * math.sqrt(size) + 1e-9
    centred = moment - moment.mean(axis=1, keepdims=True)
    found: Matrix = vectors @ ((vectors.T @ centred) / (np.maximum(values, 0) + penalty)[:, None])
    return found
