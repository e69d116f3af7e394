"""Gaussian noise for differential privacy, and its account: both are OpenDP's.

The noise is the discrete Gaussian on whole numbers, drawn exactly, so that no property of floating-point
numbers tells the noise from the values (arXiv:2004.00010). What it proves is computed by the same library
from the same object: zero-concentrated differential privacy, composed, and turned into (epsilon, delta).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

REMEDY = "pip install 'fedmutual[privacy]'"


def multiplier_for(epsilon: float, delta: float) -> float:
    """Return the least noise that proves (epsilon, delta) for one release.

    Returns
    -------
    float
        Standard deviation of the noise over the sensitivity, the L2 norm of what one record changes.

    Examples
    --------
    >>> round(multiplier_for(0.5, 1e-3), 2)
    5.26
    """
    return _multiplier_for(float(epsilon), float(delta))


@functools.cache
def _multiplier_for(epsilon: float, delta: float) -> float:
    dp = _library()
    low, high = 0.1, 1.0
    while not _proves(high, epsilon, delta):
        low, high = high, 2 * high
    found: float = dp.binary_search(lambda ratio: _proves(ratio, epsilon, delta), bounds=(low, high))
    return found


def _proves(multiplier: float, epsilon: float, delta: float) -> bool:
    return epsilon_of([multiplier], delta) <= epsilon


def epsilon_of(multipliers: Sequence[float], delta: float) -> float:
    """Return the epsilon that releases on the same records have spent together, at this delta.

    Parameters
    ----------
    multipliers : Sequence[float]
        Of each release, see :func:`multiplier_for`; they may depend on each other's outcome.
    delta : float
    """
    if not multipliers:
        return 0.0
    dp = _library()
    space = dp.vector_domain(dp.atom_domain(T="i64"), size=1), dp.l2_distance(T="f64")
    several = [dp.m.make_gaussian(*space, scale=multiplier) for multiplier in multipliers]
    together = dp.c.make_zCDP_to_approxDP(dp.c.make_composition(several))
    found: float = together.map(1.0).epsilon(delta)
    return found


def noisy(values: NDArray[np.int64], scale: float) -> NDArray[np.int64]:
    """Return whole numbers [n] with discrete Gaussian noise of the standard deviation ``scale``.

    The randomness is the operating system's; there is no seed.
    """
    dp = _library()
    space = dp.vector_domain(dp.atom_domain(T="i64"), size=len(values)), dp.l2_distance(T="f64")
    found = dp.m.make_gaussian(*space, scale=float(scale))([int(value) for value in values])
    return np.array(found, np.int64)


def scale_of(multiplier: float, sensitivity: int, shares: int = 1) -> float:
    """Return the standard deviation of the noise for a sensitivity, rounded up.

    Parameters
    ----------
    multiplier : float
    sensitivity : int
    shares : int
        So many independent noises of this deviation are added up, see :func:`multiplier_of_sum`.
    """
    scale = multiplier * sensitivity / math.sqrt(shares)
    return math.nextafter(scale * (1 + 1e-12), math.inf)


def multiplier_of_sum(scale: float, sensitivity: int, shares: int, entries: int) -> float:
    """Return the noise of one Gaussian that proves no more than a sum of discrete ones.

    Parameters
    ----------
    scale : float
        Standard deviation of each noise.
    sensitivity : int
    shares : int
        m, independent noises that are added up.
    entries : int
        d, numbers that have noise.

    Notes
    -----
    The sum of discrete Gaussians is none. It proves ``epsilon^2 / 2`` of zero-concentrated privacy (Kairouz,
    Liu, Steinke 2021, arXiv:2102.06387, theorem 1) with

        epsilon <= sensitivity / (sqrt(m) scale) + tau sqrt(d),
        tau = 10 sum over k = 1 .. m - 1 of exp(-2 pi^2 scale^2 k / (k + 1)),

    as a Gaussian whose deviation is ``sensitivity / epsilon`` does.

    Examples
    --------
    >>> round(multiplier_of_sum(2.0, 1, 4, 1), 6)  # wide noises: as one of twice the deviation
    4.0
    >>> round(multiplier_of_sum(0.5, 1, 4, 100), 3)  # narrow ones prove less
    0.064
    """
    tau = 10 * sum(math.exp(-2 * math.pi**2 * scale**2 * k / (k + 1)) for k in range(1, shares))
    return 1 / (sensitivity / (math.sqrt(shares) * scale) + tau * math.sqrt(entries))


@functools.cache
def _library() -> Any:
    try:
        import opendp.prelude as dp
    except ImportError as error:
        raise ImportError(f"privacy.epsilon needs OpenDP: {REMEDY}") from error
    dp.enable_features("contrib")
    return dp
