"""The speaker of ``strategy=speaker``: ridge regression on a public feature map, from sums that take noise.

Of an image with features f and label y, a site uses ``phi``: ``u / |u|`` and a constant, together of length
1, where ``u = axes (f - centre)``. It adds up

* ``phi (y - 1 / C)^T``, [k, C], with the label as a one-hot row y, and
* the number ``COUNT``, which makes the number of images.

Together these have the squared L2 norm ``|phi|^2 (1 - 1 / C) + COUNT^2``: adding or removing one image
changes the sums by at most ``sqrt(1 - 1 / C + COUNT^2)``. Every entry is rounded to a multiple of
``1 / GRID`` before the images are added up, which moves each of the ``k C + 1`` entries by at most half a
step. From there on only whole numbers are added: no rounding of a sum depends on the images.

The regression also needs the sum of ``phi phi^T``. It has k times as many entries, so its noise would be what
the speaker learns from; public images have nearly the same. It is added up in runs without noise only.
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
COUNT = 0.1  # of an image in its own entry; more would cost the other entries noise
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


def sums(phi: Matrix, labels: NDArray[np.integer], num_classes: int, *, gram: bool = False) -> Whole:
    """Return what a site's images add up to, in steps of ``1 / GRID``.

    Parameters
    ----------
    phi : float64 [n, k]
        Rows of length at most 1.
    labels : int [n]
    gram : bool
        Add ``phi phi^T`` as well, which no noise is meant for.

    Returns
    -------
    int64 [k C + 1] or [k C + 1 + k (k + 1) / 2]
        The matrix [k, C] row by row, the count, and the upper triangle of ``phi phi^T`` row by row. An image
        whose numbers are longer than :func:`sensitivity` says, which only a row longer than 1 has, is left
        out.
    """
    size = phi.shape[1]
    coded = (np.eye(num_classes) - 1 / num_classes) * GRID
    most = sensitivity(size, num_classes) ** 2
    rows, columns = np.triu_indices(size)
    total = np.zeros(entries(size, num_classes, gram=gram), np.int64)
    for start in range(0, len(phi), _CHUNK):
        some, code = phi[start : start + _CHUNK], coded[labels[start : start + _CHUNK]]
        moments = (some[:, :, None] * code[:, None, :]).reshape(len(some), -1)
        count = np.full((len(some), 1), COUNT * GRID)
        whole = np.rint(np.concatenate((moments, count), axis=1)).astype(np.int64)
        kept = (whole**2).sum(axis=1) <= most
        parts = [whole[kept].sum(axis=0)]
        if gram:
            parts.append(
                np.rint(some[kept][:, rows] * some[kept][:, columns] * GRID).astype(np.int64).sum(axis=0)
            )
        total += np.concatenate(parts)
    return total


def entries(size: int, num_classes: int, *, gram: bool = False) -> int:
    """Return how many numbers :func:`sums` has.

    >>> entries(17, 2), entries(17, 2, gram=True)
    (35, 188)
    """
    return size * num_classes + 1 + (size * (size + 1) // 2 if gram else 0)


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
    >>> round(sensitivity(33, 2) / GRID, 4), round((1 / 2 + 0.01) ** 0.5, 4)
    (0.7141, 0.7141)
    """
    longest = math.sqrt(1 - 1 / num_classes + COUNT**2)
    return math.ceil(longest * GRID + math.sqrt(entries(size, num_classes)) / 2) + 1


def divided(values: NDArray[Any], size: int, num_classes: int) -> dict[str, Matrix]:
    """Return :func:`sums` by name, in ones: ``moment`` [k, C], ``count`` [1], and ``gram`` if it is there."""
    told = values / GRID
    moments = size * num_classes
    found = {
        "moment": told[:moments].reshape(size, num_classes),
        "count": told[moments : moments + 1] / COUNT,
    }
    if len(told) > moments + 1:
        found["gram"] = told[moments + 1 :]
    return {name: part.astype(np.float32) for name, part in found.items()}


def solve(total: Mapping[str, Matrix], public: Matrix, noise: float, share: float) -> Matrix:
    """Return the weights [k, C] of the ridge regression on labels that are centred over the classes.

    Parameters
    ----------
    total : Mapping[str, array]
        The sites' sums, added up, see :func:`divided`.
    public : float64 [k, k]
        Mean of ``phi phi^T`` over public images, which stands in for ``gram`` where there is none.
    noise : float
        Standard deviation of the noise in each entry of the moments; 0: none.
    share : float
        The penalty without noise, as a share of the mean square of an entry of phi.

    Notes
    -----
    The length of a column's noise, ``noise sqrt k``, is added to the penalty.
    """
    moment = total["moment"].astype(np.float64)
    size, count = len(moment), max(float(total["count"][0]), 1.0)
    whole = count * public
    if "gram" in total:
        whole = np.zeros((size, size))
        whole[np.triu_indices(size)] = total["gram"]
        whole += np.triu(whole, 1).T
    penalty = share * count / size + noise * math.sqrt(size) + 1e-9
    values, vectors = np.linalg.eigh(whole)
    centred = moment - moment.mean(axis=1, keepdims=True)
    found: Matrix = vectors @ ((vectors.T @ centred) / (np.maximum(values, 0) + penalty)[:, None])
    return found
