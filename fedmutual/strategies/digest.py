"""Strategies that teach every client one consensus, its own prediction included: FedMD, DS-FL and CFD."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedmutual.learning.consensus import as_target
from fedmutual.strategies.base import Arrays, Figures
from fedmutual.strategies.predictions import PredictionStrategy
from fedmutual.wire.codec import FloatArray
from fedmutual.wire.orders import Order
from fedmutual.wire.records import NO_SAMPLES, IndexArray
from fedmutual.wire.reports import Report


class Digest(PredictionStrategy):
    """Gather predictions, return one consensus of all.

    Parameters
    ----------
    num_samples, num_classes : int
        N public samples, C classes.
    **options
        ``schedule``, ``per_round``, ``wire_dtype``, ``probability_floor``, see
        :class:`fedmutual.strategies.predictions.PredictionStrategy`, and Flower's, see
        :class:`fedmutual.strategies.base.RoundStrategy`.
    """

    def __init__(self, num_samples: int, num_classes: int, **options: Any) -> None:
        super().__init__(num_samples, num_classes, **options)
        self._consensus: FloatArray | None = None
        self._predicted: IndexArray = NO_SAMPLES

    @abstractmethod
    def consensus(self, predictions: FloatArray) -> FloatArray:
        """Log-probabilities [n, C] that everyone is taught, from those of all clients [K, n, C]."""

    def order(self, client: str | None, base: Order) -> Order:
        """This round's public samples, and the consensus of the round before."""
        return taught_to_all(base, self._predicted, self._consensus)

    def take(self, round: int, reports: Mapping[str, Report]) -> Figures:
        """Form the consensus."""
        self._predicted = self.indices(round)
        self._consensus = self.consensus(np.stack([r.predictions for r in reports.values()]))
        return {}

    def consensus_of_all(self) -> FloatArray | None:
        """The consensus of the last round."""
        return self._consensus

    @property
    def predicted(self) -> IndexArray:
        """Public samples that the consensus is of."""
        return self._predicted

    def state(self) -> tuple[dict[str, Any], Arrays]:
        """The consensus, and what it is of."""
        arrays = {} if self._consensus is None else {"consensus": self._consensus}
        return {}, {**arrays, "predicted": self._predicted}

    def restore_state(self, meta: Mapping[str, Any], arrays: Arrays) -> None:
        """Continue from what :meth:`state` returned."""
        self._consensus, self._predicted = arrays.get("consensus"), arrays["predicted"]


def taught_to_all(base: Order, predicted: IndexArray, log_probabilities: FloatArray | None) -> Order:
    """An order with one target for everyone."""
    if log_probabilities is None:
        return base
    target = as_target(log_probabilities)
    return replace(
        base,
        target_indices=predicted,
        log_targets=target.log_probabilities,
        target_entropies=target.entropies,
        kl_weight=1.0,
    )
