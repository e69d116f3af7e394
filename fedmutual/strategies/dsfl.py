"""DS-FL (arXiv:2008.06180): distillation from a consensus whose entropy is reduced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmutual.learning.aggregation import entropy_reduction
from fedmutual.settings import setting
from fedmutual.strategies.digest import DigestSettings
from fedmutual.wire.codec import FloatArray


@dataclass(kw_only=True)
class DSFLSettings(DigestSettings):
    """Settings of ``strategy=dsfl``."""

    era_temperature: float = setting("T of the entropy reduction; the paper: 0.1", above=0)

    revisits_last: ClassVar[bool] = False

    def consensus(self, predictions: FloatArray) -> FloatArray:
        """Entropy reduction aggregation."""
        return entropy_reduction(predictions, self.era_temperature)
