"""FedMD (arXiv:1910.03581): digest the consensus of mean scores, then revisit the private images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmutual.learning.aggregation import mean_of_scores
from fedmutual.strategies.digest import DigestSettings
from fedmutual.wire.codec import FloatArray


@dataclass(kw_only=True)
class FedMDSettings(DigestSettings):
    """Settings of ``strategy=fedmd``. The paper digests with the mean absolute error; here with the KL."""

    revisits_last: ClassVar[bool] = True

    def consensus(self, predictions: FloatArray) -> FloatArray:
        """Mean scores, one's own included."""
        return mean_of_scores(predictions)
