"""Means, spreads and paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Spread:
    """A mean over seeds; ``deviation`` is the sample's standard deviation, None for a single seed."""

    count: int
    mean: float
    deviation: float | None
    lowest: float
    highest: float


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with its 95 % interval, None for a single pair."""

    pairs: int
    mean: float
    interval: tuple[float, float] | None


def spread(values: Iterable[float]) -> Spread | None:
    """Summarise what the seeds gave; None of nothing."""
    numbers = list(values)
    if not numbers:
        return None
    deviation = stdev(numbers) if len(numbers) > 1 else None
    return Spread(len(numbers), fmean(numbers), deviation, min(numbers), max(numbers))


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Mean difference between two variants over the seeds that both have.

    The interval is Student's, for a mean of n differences: d ± t(0.975, n - 1) s / sqrt(n). It supposes that
    the differences are about normal, and speaks of seeds only: of other data it says nothing.

    Parameters
    ----------
    values, reference : Mapping[int, float]
        Seed -> accuracy.

    Returns
    -------
    Difference or None
        None where no seed is common to both.
    """
    return _interval([values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())])


def paired_over_conditions(
    values: Sequence[Mapping[int, float]], references: Sequence[Mapping[int, float]]
) -> Difference | None:
    """As :func:`paired`, of each seed's mean difference over all conditions.

    Runs of one seed share initial weights and data, so the seeds are the sample, not the runs; a seed that
    lacks one of the conditions is left out.
    """
    every = [set(v.keys() & r.keys()) for v, r in zip(values, references, strict=True)]
    seeds = sorted(set.intersection(*every)) if every else []
    return _interval(
        [fmean(v[seed] - r[seed] for v, r in zip(values, references, strict=True)) for seed in seeds]
    )


def _interval(differences: list[float]) -> Difference | None:
    count = len(differences)
    if count == 0:
        return None
    centre = fmean(differences)
    if count == 1:
        return Difference(1, centre, None)
    from scipy.stats import t

    half = float(t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
    return Difference(count, centre, (centre - half, centre + half))
