"""DS-FL (arXiv:2008.06180): distillation from a consensus whose entropy is reduced."""

from __future__ import annotations

from typing import Any

from fedmutual.learning.aggregation import entropy_reduction
from fedmutual.strategies.digest import Digest
from fedmutual.wire.codec import FloatArray


class DSFL(Digest):
    """Entropy reduction aggregation.

    Parameters
    ----------
    num_samples, num_classes : int
    era_temperature : float
        T of the entropy reduction; the paper: 0.1.
    **options
        See :class:`fedmutual.strategies.digest.Digest`.
    """

    def __init__(
        self, num_samples: int, num_classes: int, *, era_temperature: float = 0.1, **options: Any
    ) -> None:
        super().__init__(num_samples, num_classes, **options)
        if not era_temperature > 0:
            raise ValueError(f"era_temperature: {era_temperature} is not above 0")
        self.era_temperature = era_temperature

    def consensus(self, predictions: FloatArray) -> FloatArray:
        """Softmax of the mean distribution divided by T."""
        return entropy_reduction(predictions, self.era_temperature)
