"""The speaker of ``strategy=speaker``: ridge regression on a public feature map, from sums that take noise.

Of an image with features f and label y, a site uses ``phi``: ``u / |u|`` and a constant, together of length
1, where ``u = axes (f - centre)``. It adds up

* the upper triangle of ``phi phi^T``, its off-diagonal entries times sqrt 2, and
* ``phi`` in the column y of a matrix [k, C].

Together these have the squared L2 norm ``|phi phi^T|_F^2 + |phi|^2 = |phi|^4 + |phi|^2 <= 2``: adding or
removing one image changes the sums by at most sqrt 2. Every entry is rounded to a multiple of ``1 / GRID``
before the images are added up, which moves each of the ``k (k + 1) / 2 + k`` entries that are not 0 by at
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
        known = np.isfinite(found).all(axis=1, keepdims=True)
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
    most = sensitivity(size) ** 2
    gram, moment = np.zeros(len(rows), np.int64), np.zeros((size, num_classes), np.int64)
    for start in range(0, len(phi), _CHUNK):
        some, classes = phi[start : start + _CHUNK], labels[start : start + _CHUNK]
        products = np.rint(some[:, rows] * some[:, columns] * weight).astype(np.int64)
        whole = np.rint(some * GRID).astype(np.int64)
        short = (products**2).sum(axis=1) + (whole**2).sum(axis=1) <= most
        gram += products[short].sum(axis=0)
        np.add.at(moment.T, classes[short], whole[short])
    return np.concatenate((gram, moment.ravel()))


def sensitivity(size: int) -> int:
    """Return by how much one image changes :func:`sums`, in L2 and steps of ``1 / GRID``, at most.

    Parameters
    ----------
    size : int
        k, the length of phi.

    Examples
    --------
    >>> sensitivity(32) / GRID > math.sqrt(2), sensitivity(32) / GRID < math.sqrt(2) + 1e-4
    (True, True)
    """
    entries = size * (size + 1) // 2 + size
    return math.ceil(math.sqrt(2) * GRID + math.sqrt(entries) / 2) + 1


def divided(values: NDArray[Any], size: int, num_classes: int) -> dict[str, Matrix]:
    """Return :func:`sums` as they travel: ``gram``, float32 [k (k + 1) / 2], and ``moment``, [k, C]."""
    triangle = size * (size + 1) // 2
    told = (values / GRID).astype(np.float32)
    return {"gram": told[:triangle], "moment": told[triangle:].reshape(size, num_classes)}


def solve(total: Mapping[str, Matrix], noise: float, share: float) -> Matrix:
    """Return the weights [k, C] of the ridge regression on labels that are centred over the classes.

    Parameters
    ----------
    total : Mapping[str, array]
        The sites' ``gram`` and ``moment``, added up.
    noise : float
        Standard deviation of the noise in each entry of the total; 0: none.
    share : float
        The penalty without noise, as a share of the mean square of an entry of phi.

    Notes
    -----
    The noise of the Gram matrix is a symmetric Gaussian matrix, whose eigenvalues reach ``noise sqrt(2 k)``.
    This is added to the penalty, and what the noise has made negative counts as 0. So the penalty depends on
    the noise, k and the released sums, and on nothing private.
    """
    moment = total["moment"].astype(np.float64)
    size = len(moment)
    gram = np.zeros((size, size))
    gram[np.triu_indices(size)] = total["gram"]
    off = np.triu(gram, 1) / math.sqrt(2)
    values, vectors = np.linalg.eigh(np.diag(np.diag(gram)) + off + off.T)
    values = np.maximum(values, 0)
    penalty = share * values.sum() / size + noise * math.sqrt(2 * size) + 1e-9
    centred = moment - moment.mean(axis=1, keepdims=True)
    found: Matrix = vectors @ ((vectors.T @ centred) / (values + penalty)[:, None])
    return found
