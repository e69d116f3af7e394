"""What the strategies that exchange predictions share: the public samples and how predictions travel."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fedmutual.strategies.base import RoundStrategy, Schedule, at_least, one_of
from fedmutual.wire.codec import WIRE_DTYPES, FloatArray
from fedmutual.wire.records import FLOOR, NO_SAMPLES, IndexArray

SCHEDULES = ("static", "sample", "kfold")


class PredictionStrategy(RoundStrategy):
    """A strategy whose clients exchange predictions of public samples.

    Parameters
    ----------
    num_samples : int
        Public samples that every client holds, in the same order.
    num_classes : int
    schedule : str or callable
        ``static``: all samples in every round; ``sample``: a fresh random subset a round; ``kfold``: a fresh
        fold a round, all samples in turn; or a function from the round (from 1) to int32 positions.
    per_round : int or None
        Samples a round of ``sample`` and ``kfold``; None: a quarter of them.
    wire_dtype : str
        Type in which predictions travel: ``float16``, ``float32``, ``int8`` or ``label``.
    probability_floor : float
        Shared probabilities are raised to this, in (0, 0.1]: it bounds what one peer can do.
    **flower
        See :class:`RoundStrategy`.
    """

    exchanges_predictions = True

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        schedule: str | Schedule = "static",
        per_round: int | None = None,
        wire_dtype: str = "float16",
        probability_floor: float = FLOOR,
        **flower: Any,
    ) -> None:
        super().__init__(num_classes, **flower)
        at_least("num_samples", num_samples, 1)
        one_of("wire_dtype", wire_dtype, WIRE_DTYPES)
        if not callable(schedule):
            one_of("schedule", schedule, SCHEDULES)
        if not 0 < probability_floor <= 0.1:
            raise ValueError(f"probability_floor: {probability_floor} is not in (0, 0.1]")
        if per_round is not None and not 1 <= per_round <= num_samples:
            raise ValueError(f"per_round: {per_round} is not between 1 and num_samples={num_samples}")
        self.num_samples = num_samples
        self.schedule = schedule
        self.per_round = per_round or max(num_samples // 4, 1)
        self.wire_dtype = wire_dtype
        self.floor = probability_floor

    def indices(self, round: int) -> IndexArray:
        """Public samples of a round, sorted."""
        if callable(self.schedule):
            return self.schedule(round)
        if self.schedule == "static":
            return np.arange(self.num_samples, dtype=np.int32)
        if self.schedule == "sample":
            rng = np.random.default_rng([self.seed, round])
            chosen = rng.choice(self.num_samples, self.per_round, replace=False)
        else:
            folds = -(-self.num_samples // self.per_round)
            shuffled = np.random.default_rng(self.seed).permutation(self.num_samples)
            chosen = np.array_split(shuffled, folds)[(round - 1) % folds]
        return np.sort(chosen).astype(np.int32)

    def consensus_of_all(self) -> FloatArray | None:
        """Log-probabilities [n, C] of the last round's consensus of all clients; None before round 1."""
        return None

    def arrays(self) -> ArrayRecord | None:
        """The last round's ``indices`` and ``consensus`` (probabilities), for ``evaluate_fn``."""
        weights = super().arrays()
        consensus = self.consensus_of_all()
        if weights is not None or consensus is None:
            return weights
        return ArrayRecord({"indices": Array(self.predicted), "consensus": Array(np.exp(consensus))})

    @property
    def predicted(self) -> IndexArray:
        """Public samples that the last round's predictions are of."""
        return NO_SAMPLES
