"""Compressed federated distillation, after CFD (arXiv:2012.00632): clients send labels, not distributions.

The paper quantises the server's soft labels as well, and distils through a model at the server; here every
client learns from the share of the votes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmutual.learning.aggregation import mean_of_probabilities
from fedmutual.strategies.digest import DigestSettings
from fedmutual.wire.codec import FloatArray


@dataclass(kw_only=True)
class CFDSettings(DigestSettings):
    """Settings of ``strategy=cfd``: ``wire_dtype=label`` by default."""

    revisits_last: ClassVar[bool] = False

    def consensus(self, predictions: FloatArray) -> FloatArray:
        """Share of the votes."""
        return mean_of_probabilities(predictions)
