"""Compressed federated distillation, after CFD (arXiv:2012.00632): clients send labels, not distributions.

The paper quantises the server's soft labels as well, and distils through a model at the server; here every
client learns from the share of the votes.
"""

from __future__ import annotations

from typing import Any

from fedmutual.learning.aggregation import mean_of_probabilities
from fedmutual.strategies.digest import Digest
from fedmutual.wire.codec import FloatArray


class CFD(Digest):
    """Share of the votes; ``wire_dtype="label"`` unless another one is given."""

    def __init__(
        self, num_samples: int, num_classes: int, *, wire_dtype: str = "label", **options: Any
    ) -> None:
        super().__init__(num_samples, num_classes, wire_dtype=wire_dtype, **options)

    def consensus(self, predictions: FloatArray) -> FloatArray:
        """Mean of the distributions that the labels stand for."""
        return mean_of_probabilities(predictions)
